"""How well directions find concepts in texts: AxBench's detection, which takes no judge.

"AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders" (Wu et al., arXiv
2501.17148). Of each concept a direction is fitted on texts about it and texts about nothing
special; the score of a held-out text is the largest that one of its tokens has along it. AUROC says
how often a text about the concept scores above another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.figures import Estimate, auroc_interval, mean_interval
from trimtab.model import LanguageModel
from trimtab.monitoring import projections
from trimtab.papers.axbench import NONE, concepts_of, first_tokens, read_set
from trimtab.papers.effects import fitted
from trimtab.papers.result import StudyResult, Value, value_of
from trimtab.reports import Picture, Table, cell, forest, one_line_each, panels, styled
from trimtab.terminal import progress


def detection(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    *,
    texts_of: str,
    concepts: int | None = None,
    train_texts: int | None = None,
    test_texts: int | None = None,
    max_length: int = 256,
    data: str | None = None,
) -> StudyResult:
    """AUROC of each concept with each method's direction, with its 95 % interval.

    `texts_of` names the set: DIR/axbench/NAME_train.jsonl and NAME_eval.jsonl, of AxBench's
    columns. `concepts` takes the first ones, `train_texts` and `test_texts` so many of each side.
    Texts are read up to `max_length` tokens, instruction and answer as plain text.
    """
    train, test = (read_set(texts_of, part, data) for part in ("train", "test"))
    others = [row for row in train if row["concept_id"] == NONE][:train_texts]
    known = concepts_of(train, concepts)
    if not others or not known:
        raise TrimtabError(f"{texts_of} has no texts of a concept, or none of no concept")
    found: dict[str, dict[str, Estimate]] = {}
    with progress("finding concepts", len(known)) as advance:
        for concept in known:
            shown = [row for row in train if row["concept_id"] == concept][:train_texts]
            contrast = Contrast.from_texts(
                [_cut(language_model, row, max_length) for row in shown],
                [_cut(language_model, row, max_length) for row in others],
                f"{texts_of}, concept {concept}",
            )
            held_out = _held_out(test, concept, test_texts)
            found[concept] = _aurocs(language_model, methods, contrast, held_out, max_length)
            advance(1)
    names = list(next(iter(found.values())))
    means = {
        name: mean_interval(torch.tensor([of[name].value for of in found.values()]).double())
        for name in names
    }
    return StudyResult(
        _as_json(texts_of, known, found, means),
        _values(found, means),
        _tables(known, found, means),
        [_picture(known, found)],
    )


def _held_out(
    rows: Sequence[dict[str, Any]], concept: str, most: int | None
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """A concept's held-out texts, hard negatives with the negatives, and which are about it."""
    own = [row for row in rows if row["concept_id"] == concept]
    positive = [row for row in own if row["category"] == "positive"][:most]
    negative = [row for row in own if row["category"] != "positive"][:most]
    if not positive or not negative:
        raise TrimtabError(f"concept {concept} has no held-out texts of both kinds")
    right = torch.tensor([True] * len(positive) + [False] * len(negative))
    return [*positive, *negative], right


def _cut(language_model: LanguageModel, row: Mapping[str, Any], most: int) -> str:
    """Instruction and answer as one text of at most so many tokens."""
    return first_tokens(language_model, f"{row['input']}\n{row['output']}", most)


def _aurocs(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    contrast: Contrast,
    held_out: tuple[list[dict[str, Any]], torch.Tensor],
    most: int,
) -> dict[str, Estimate]:
    """AUROC of each method's direction."""
    rows, right = held_out
    texts = language_model.encode([_cut(language_model, row, most) for row in rows])
    found = {}
    for name, steering in fitted(language_model, methods, contrast).items():
        scores = projections(language_model, steering.condition(), texts)
        # The first token's activation is of another size, whatever the text is about.
        largest = torch.stack([each[1:].max() for each in scores])
        found[name] = auroc_interval(largest, right)
    return found


# -- shown ----------------------------------------------------------------------------------------


def _as_json(
    texts_of: str,
    known: Mapping[str, str],
    found: Mapping[str, Mapping[str, Estimate]],
    means: Mapping[str, Estimate],
) -> dict[str, Any]:
    return {
        "texts_of": texts_of,
        "concepts": [
            {"id": concept, "concept": known[concept], "auroc": _estimates(of)}
            for concept, of in found.items()
        ],
        "mean": _estimates(means),
    }


def _estimates(of: Mapping[str, Estimate]) -> dict[str, Any]:
    return {
        name: {"value": one.value, "ci95": list(one.ci95), "n": one.n} for name, one in of.items()
    }


def _values(
    found: Mapping[str, Mapping[str, Estimate]], means: Mapping[str, Estimate]
) -> dict[str, Value]:
    values = {name: value_of(one, share=False) for name, one in means.items()}
    for concept, of in found.items():
        for name, one in of.items():
            values[f"{name}, concept {concept}"] = value_of(one, share=False)
    return values


def _tables(
    known: Mapping[str, str],
    found: Mapping[str, Mapping[str, Estimate]],
    means: Mapping[str, Estimate],
) -> list[Table]:
    names = list(means)
    rows = [
        [concept, known[concept], of[names[0]].n, *(cell(of[name]) for name in names)]
        for concept, of in found.items()
    ]
    rows.append(["", "mean over concepts", "", *(cell(one) for one in means.values())])
    note = (
        "AUROC of the largest projection of a text's tokens, with 95 % intervals: over texts, and "
        "of the mean over concepts. Hard negatives count as negatives."
    )
    return [Table("Concepts found in texts", ["id", "concept", "n", *names], rows, note)]


@styled
def _picture(known: Mapping[str, str], found: Mapping[str, Mapping[str, Estimate]]) -> Picture:
    figure, (axes,) = panels((7, 1.4 + 0.4 * len(found)))
    names = list(next(iter(found.values())))
    lines = one_line_each(
        {name: {place: of[name] for place, of in enumerate(found.values())} for name in names}
    )
    labels = [f"{concept}: {known[concept][:40]}" for concept in found]
    forest(axes, labels, lines, apart=0.16, xlabel="AUROC, 95 % intervals")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(
        "Concepts found in texts",
        "auroc",
        figure,
        "AUROC of each concept with each method's direction, with 95 % intervals",
    )
