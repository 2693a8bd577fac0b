"""The pictures of the theory of steering strength, and the numbers behind them; no model."""

from __future__ import annotations

from functools import cache

import numpy as np
from matplotlib.figure import Figure

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.papers.result import StudyResult, Value
from trimtab.reports import DOWN, NEUTRAL, UP, Picture, Table, panels, styled
from trimtab.strength import theory as ufm

_ALTS = {
    "figure-2": "probability of each token after a context of its own concept and of another",
    "figure-3": "change in probability of nine tokens over positive steering strength",
    "figure-4": "change in probability of three concepts over steering strength, with the limits",
    "figure-5": "cross-entropy added over steering strength, with the parabola of Theorem 3.8",
    "figure-b1": "change in probability of nine tokens over negative steering strength",
}

#: Training takes a second, and gives the same every time.
_facts = cache(ufm.facts)


def theory(
    language_model: LanguageModel | None = None, *, picture: str | None = None
) -> StudyResult:
    """One picture of the theory (None: the numbers of training alone); the model has no part."""
    numbers = _facts()
    pictures = []
    if picture is not None:
        if picture not in _ALTS:
            raise TrimtabError(f"there is no picture {picture!r}: known are {', '.join(_ALTS)}")
        drawn = _data_set() if picture == "figure-2" else ufm.figure(picture)
        pictures = [Picture(picture.replace("-", " "), picture, drawn, _ALTS[picture])]
    uniform = numbers["uniform"]
    values = {
        "entropy of the data": Value(f"{uniform['entropy']:.5f}"),
        "loss reached": Value(f"{uniform['trained_loss']:.5f}"),
        "quadratic coefficient, theorem": Value(numbers["curvature"] / 2),
        "quadratic coefficient, fitted": Value(numbers["fitted_curvature"] / 2),
        "tokens that peak": Value(sum(t["course"] == "peaks" for t in numbers["tokens"])),
        "tokens that rise on": Value(sum(t["course"] == "rises" for t in numbers["tokens"])),
    }
    lines = ufm.lines(numbers)
    table = Table("The theory in words", ["what the formulas say"], [[line] for line in lines])
    return StudyResult({"theory": numbers}, values, [table], pictures)


@styled
def _data_set() -> Figure:
    """Figure 2: p(z | c) after a lower-case context and after one of capitals."""
    data = ufm.example().data
    names = ufm.TOKENS
    places = np.arange(len(names))
    figure, (axes,) = panels((6.5, 3.4))
    for concept, colour, marker in ((0, UP, "o"), (1, DOWN, "s")):
        context = data.contexts_of(concept)[0]
        heights = data.probabilities[context]
        own = [i for i in places if i // data.size == concept]
        label = f"after a context of {ufm.CONCEPTS[concept]}"
        shift = 0.12 * (concept - 0.5)
        axes.vlines(places + shift, 0, heights, color=colour, linewidth=1.2)
        axes.plot(places + shift, heights, marker, color=colour, markersize=5, label=label)
        axes.axvspan(own[0] - 0.5, own[-1] + 0.5, color=colour, alpha=0.07, linewidth=0)
    for edge in range(data.size, len(names), data.size):
        axes.axvline(edge - 0.5, color=NEUTRAL, linewidth=0.6, linestyle=":")
    axes.set_xticks(places, names)
    axes.set(xlabel="next token z", ylabel="probability p(z | c)", ylim=(0, None))
    axes.set_title("Figure 2: a token is likelier after a context of its own concept")
    axes.legend(frameon=False)
    return figure
