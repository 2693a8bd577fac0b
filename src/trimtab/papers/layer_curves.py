"""A vector at one block after another, at several strengths: what it does and what it changes.

"Persona Vectors: Monitoring and Controlling Character Traits in Language Models" (arXiv
2507.21509) chooses the block that steers a trait most, and shows trait and coherence over the
coefficient. Here the trait is by how many nats the answers that show it are ahead on held-out
pairs, and coherence KL per generated token on neutral prompts, and cost on plain text. A judge, if
there is one, scores besides what the model writes, as the paper's does: trait and coherence from 0
to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from trimtab.contrasts import Contrast, last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import Chat, Continuations, TokenKL, neutral
from trimtab.figures import Difference, Estimate, mean_interval
from trimtab.methods import METHODS
from trimtab.model import LanguageModel, answer_of
from trimtab.options import SPLIT
from trimtab.papers.effects import fitted
from trimtab.papers.result import StudyResult, Value, contrast_of, value_of
from trimtab.reports import (
    Picture,
    Table,
    cell,
    curve,
    difference_cell,
    number_cell,
    one_line_each,
    panels,
    styled,
)
from trimtab.steering import Steering
from trimtab.sweeps import FINE, TaskRows
from trimtab.terminal import progress
from trimtab.writing import trait_and_coherence

#: A block, and the strength.
Place = tuple[int, float]


def layer_curves(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    layers: Sequence[int],
    strengths: Sequence[float],
    method: Mapping[str, Any] | None = None,
    pairs: int | None = None,
    limit: int | None = None,
    new_tokens: int = 32,
    judge: Chat | None = None,
    data: str | None = None,
) -> StudyResult:
    """The gain in log-odds on held-out pairs, KL per generated token and cost on plain text of a
    method's vector at each block and strength, with n and 95 % intervals.

    `method` is as a recipe writes one, {method, fixed} (default: caa). The vectors are fitted on
    the first `pairs` train pairs in one pass; `limit` is of held-out pairs, and of the neutral
    prompts that KL is over. The block is chosen on validation pairs,
    at the strength that is nearest to 1; figures are those of test pairs. KL is over `new_tokens`,
    and a `judge` scores answers of so many to the test pairs' prompts.
    """
    source = contrast_of(contrast, data).with_parts(SPLIT)
    judged = None if judge is None else _Judged(language_model, source, limit, new_tokens, judge)
    bench = TaskRows(language_model, source, limit=limit, test_limit=limit)
    asked = method or {"method": "caa"}
    name = asked["method"]
    field = "layer" if "layer" in METHODS[name].__dataclass_fields__ else "layers"  # type: ignore[attr-defined]
    blocks = list(dict.fromkeys(layers))
    methods = [
        {"name": str(one), "method": name, "fixed": {**asked.get("fixed", {}), field: one}}
        for one in blocks
    ]
    train = source.train if pairs is None else source.train.take(pairs)
    made = fitted(language_model, methods, train)
    prompts = neutral(language_model, bench.asks_chats)[:limit]
    continued = Continuations(language_model, prompts, new_tokens)
    gains: dict[Place, Difference] = {}
    kl: dict[Place, TokenKL] = {}
    cost: dict[Place, float] = {}
    chosen_by: dict[int, float] = {}
    usual = min(strengths, key=lambda one: abs(one - 1))
    with progress("turning vectors", len(blocks) * len(strengths)) as advance:
        for block in blocks:
            for strength in strengths:
                turned, place = made[str(block)].at(strength), (block, strength)
                gains[place] = bench.change(bench.values(turned, "test"), FINE, "test")
                kl[place] = continued.kl(turned)
                cost[place] = bench.plain.cost(turned)
                if judged is not None:
                    judged.score(place, turned)
                if strength == usual:
                    chosen_by[block] = bench.change(bench.values(turned), FINE).difference
                advance(1)
    best = max(chosen_by, key=lambda one: chosen_by[one])
    document = {
        "method": name,
        "chosen_layer": best,
        "places": [
            {
                "layer": block,
                "strength": strength,
                "gain": gains[block, strength].as_json(),
                "kl": kl[block, strength].as_json(),
                "cost": cost[block, strength],
            }
            for block, strength in gains
        ],
    }
    values = {"chosen layer": Value(best)}
    for (block, strength), gain in gains.items():
        place_name = _named((block, strength))
        values[place_name] = Value(gain.difference, gain.ci95, gain.n)
        values[f"{place_name}, KL"] = Value(kl[block, strength].mean, kl[block, strength].ci95)
    tables, pictures = [_table(gains, kl, cost, best)], [_picture(gains, kl)]
    notes = list(bench.notes())
    if judged is not None:
        document["judged"] = judged.as_json()
        values |= judged.values()
        tables.append(judged.table())
        pictures.append(judged.picture())
        notes += judged.notes()
    return StudyResult(document, values, tables, pictures, notes)


#: What a judge scores, from 0 to 100.
_SCORES = ("trait", "coherence")


class _Judged:
    """What a judge says of answers to the prompts of test pairs, unsteered (None) and at each
    place."""

    def __init__(
        self,
        language_model: LanguageModel,
        source: Contrast,
        limit: int | None,
        new_tokens: int,
        judge: Chat,
    ) -> None:
        if not source.behaviour:
            raise TrimtabError(
                f"{source.name} does not say in words what the trait is, so that no judge can "
                "score it: leave --judge out, or take a contrast of trimtab contrast persona"
            )
        self._lm, self._judge, self._trait = language_model, judge, source.behaviour
        prompts = [pair.prompt for pair in source.part("test").pairs[:limit]]
        self._prompts = list(dict.fromkeys(prompts))
        self._most = new_tokens
        self._found: dict[Place | None, dict[str, list[float | None]]] = {}
        self.score(None, None)

    def score(self, place: Place | None, steering: Steering | None) -> None:
        """Answer every prompt, and have the answers scored."""
        written = self._lm.generate(
            self._prompts, steering=steering, chat=False, max_new_tokens=self._most
        )
        asked = [
            (last_message(prompt), answer_of(self._lm, answer).text)
            for prompt, answer in zip(self._prompts, written, strict=True)
        ]
        scores = trait_and_coherence(self._judge, self._trait, asked)
        columns = zip(*scores, strict=True)
        self._found[place] = dict(zip(_SCORES, map(list, columns), strict=True))

    def _means(self, place: Place | None) -> dict[str, Estimate | None]:
        """The mean of each score, with its interval; None where there is none."""
        found: dict[str, Estimate | None] = {}
        for name, scores in self._found[place].items():
            given = [one for one in scores if one is not None]
            found[name] = mean_interval(torch.tensor(given)) if given else None
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "judge": self._judge.name,
            "trait": self._trait,
            "places": [
                {
                    "layer": None if place is None else place[0],
                    "strength": None if place is None else place[1],
                    **{name: one and asdict(one) for name, one in self._means(place).items()},
                }
                for place in self._found
            ],
        }

    def values(self) -> dict[str, Value]:
        return {
            f"{_named(place)}, {name} score": value_of(one, share=False)
            for place in self._found
            for name, one in self._means(place).items()
            if one is not None
        }

    def table(self) -> Table:
        rows = []
        for place in self._found:
            means = self._means(place)
            cells = ["" if one is None else cell(one) for one in means.values()]
            rows.append([_named(place), *cells, len(self._prompts)])
        note = "Scores from 0 to 100 of answers to the prompts of test pairs, with 95 % intervals."
        return Table(f"As {self._judge.name} scores", ["", *_SCORES, "n"], rows, note)

    @styled
    def picture(self) -> Picture:
        figure, panel = panels((9.5, 3.6), 1, 2)
        lines: dict[str, dict[str, dict[float, Estimate]]] = {name: {} for name in _SCORES}
        for place in self._found:
            for name, one in self._means(place).items():
                if place is not None and one is not None:
                    lines[name].setdefault(f"layer {place[0]}", {})[place[1]] = one
        for axes, name in zip(panel, _SCORES, strict=True):
            base = self._means(None)[name]
            curve(axes, one_line_each(lines[name]), base, xlabel="strength", ylabel=name)
        handles, labels = panel[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        return Picture(
            "Scores over the strength",
            "curve",
            figure,
            "trait and coherence from 0 to 100 as a judge scores them over the strength, one line "
            "for each layer, with 95 % intervals",
        )

    def notes(self) -> list[str]:
        scores = [one for of in self._found.values() for each in of.values() for one in each]
        none = sum(one is None for one in scores)
        left_out = f"; {none} of {len(scores)} scores were not given, and are left out"
        said = f"{self._judge.name} scores answers by {self._trait!r}, in trimtab's wording"
        return [said + (left_out if none else "")]


def _named(place: Place | None) -> str:
    return "unsteered" if place is None else f"layer {place[0]}, strength {place[1]:g}"


def _table(
    gains: Mapping[Place, Difference],
    kl: Mapping[Place, TokenKL],
    cost: Mapping[Place, float],
    best: int,
) -> Table:
    rows = [
        [
            f"{block} (chosen on validation)" if block == best else block,
            f"{strength:g}",
            difference_cell(gain, FINE),
            gain.n,
            f"{kl[block, strength].mean:.3g} [{kl[block, strength].ci95[0]:.3g}, "
            f"{kl[block, strength].ci95[1]:.3g}]",
            number_cell(cost[block, strength], "+.3f"),
        ]
        for (block, strength), gain in gains.items()
    ]
    heads = ["layer", "strength", "gain in log-odds, nats", "n", "KL per generated token, nats"]
    return Table(
        "A vector at each layer and strength",
        [*heads, "cost on plain text, nats per token"],
        rows,
        "Against the unsteered model on test pairs, with 95 % intervals; KL over neutral prompts.",
    )


@styled
def _picture(gains: Mapping[Place, Difference], kl: Mapping[Place, TokenKL]) -> Picture:
    figure, (left, right) = panels((9.5, 3.6), 1, 2)
    blocks = list(dict.fromkeys(block for block, _ in gains))
    for axes, of, label in (
        (left, {p: Estimate(g.difference, *g.ci95, g.n) for p, g in gains.items()}, "gain, nats"),
        (right, {p: Estimate(k.mean, *k.ci95, k.tokens) for p, k in kl.items()}, "KL per token"),
    ):
        by_block = {
            f"layer {block}": {at: one for (layer, at), one in of.items() if layer == block}
            for block in blocks
        }
        curve(axes, one_line_each(by_block), xlabel="strength", ylabel=label)
        axes.axhline(0, color="black", linewidth=0.8)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return Picture(
        "Trait and change over the strength",
        "curves",
        figure,
        "gain in log-odds and KL per generated token over the strength, one line for each layer, "
        "with 95 % intervals",
    )
