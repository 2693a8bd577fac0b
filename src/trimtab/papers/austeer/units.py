"""What single units do: each steered alone, then the good ones together and with harmful ones among
them (AUSteer, Figures 2 and 6 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from trimtab import options
from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError
from trimtab.evaluation import Asked
from trimtab.figures import Difference, corrected
from trimtab.model import LanguageModel
from trimtab.options import flat, option
from trimtab.papers.austeer.ranking import Ranking, Unit, rankings, scaling
from trimtab.papers.austeer.units_shown import (
    COLOURS,
    LEVEL,
    PARTS,
    Alone,
    Condition,
    alone_picture,
    conditions_picture,
    conditions_table,
    counts_table,
    notes_of,
    units_table,
)
from trimtab.papers.result import StudyResult, Value, timed, value_of
from trimtab.papers.settings import Figures, figures_of, means, plain_means, rows_of
from trimtab.steering import Steering
from trimtab.sweeps import TaskRows, Values, contrast_for
from trimtab.terminal import progress

Gamma = Literal["austeer", "same"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the units are."""

    heading = "Units"

    site: str = option("A kind of site: ffn_out, heads, ffn_in, resid ...", "ffn_out")
    layer: int | None = option("A block, from 0.", None)
    head: int | None = option("An attention head of the block, from 0.", None)
    locate: Literal["momentum", "effect"] = option(
        "How units are ranked: momentum (the paper's) or effect.", "momentum"
    )


@dataclass(frozen=True, kw_only=True)
class Combined:
    """How many units are steered together."""

    heading = "Units"

    positives: int = option("Beneficial units that are combined.", 4)
    negatives: int = option("Harmful units that are combined.", 2)


@flat
@timed
def units(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(test_limit=100),
    seed: int = 0,
    place: Place = Place(),
    count: int = 64,
    alpha: float = 10.0,
    gamma: Gamma = "austeer",
    combined: Combined = Combined(),
) -> StudyResult:
    """Steer units one at a time, each against the unsteered model on the same validation rows.

    With `layer` (and for heads perhaps `head`) `count` units at even distances in that block or
    head are steered, as in the paper; without, half are the units of the highest scores and half
    are drawn at random by `seed`. A unit is scaled by 1 + alpha gamma, with AUSteer's gamma (where
    units are ranked by effect, the effect's sign) or, as `same`, 1 for all. It is beneficial or
    harmful where McNemar's test says so of the flips (of the nats, Wilcoxon's, where the task has
    no right and wrong), corrected for the number of units (Holm). The `positives` that gain most
    are then steered together, and together with the `negatives` that lose most; because they were
    chosen on the validation rows, what counts of them is the test rows (`test_limit` of them; None:
    all).
    """
    site, layer, head = place.site, place.layer, place.head
    positives, negatives = combined.positives, combined.negatives
    if head is not None and (site != "heads" or layer is None):
        raise TrimtabError("a head is one of a layer's heads: name site heads and a layer")
    if count < 2 or positives < 1 or negatives < 1:
        raise TrimtabError("heterogeneity takes 2 units or more, and 1 of each to combine")
    texts = contrast_for(task, contrast, asked)
    rows = rows_of(language_model, task, asked, seed)
    ranking = rankings(language_model, texts, [site], place.locate)[site]
    chosen, block = _chosen(language_model, ranking, layer, head, count, seed)

    def steering(of: Sequence[Unit]) -> Steering:
        gains = [1.0] * len(of) if gamma == "same" else None
        return scaling(language_model, texts, site, of, alpha, gains)

    alone, values = _each_alone(rows, chosen, steering)
    deciding = rows.rate or rows.first
    # Nats tell units apart that flip no row; they choose what is combined.
    finest = rows.fine or deciding
    judged = {
        metric: corrected([one.changes[metric] for one in alone]) for metric in alone[0].changes
    }
    verdicts = {metric: [_verdict(change) for change in each] for metric, each in judged.items()}
    agreement = _agreement(
        rows.values(None)[finest], [each[finest] for each in values], rows.targets(), seed
    )
    order = sorted(
        range(len(alone)), key=lambda i: (-alone[i].changes[finest].difference, alone[i].unit.rank)
    )
    good, bad = _combined(alone, order, finest, positives, negatives)
    groups: dict[str, list[Unit]] = {
        f"{len(good)} positive": good,
        f"{len(good)} positive and {len(bad)} harmful": [*good, *bad],
        f"{len(bad)} harmful": bad,
        f"AUSteer's {positives} highest": ranking.top(positives),
    }
    if block:
        groups[f"all {len(block)} of the {'head' if head is not None else 'block'}"] = block
    conditions = _conditions(rows, {name: steering(of) for name, of in groups.items() if of})
    entries = [
        {
            **one.unit.as_json(),
            "chosen": one.chosen,
            "verdict": verdicts[deciding][i],
            "changes": {
                metric: {**each[i].as_json(), "verdict": verdicts[metric][i]}
                for metric, each in judged.items()
            },
        }
        for i, one in enumerate(alone)
    ]
    counts = {
        metric: {name: each.count(name) for name in COLOURS} for metric, each in verdicts.items()
    }
    document = {
        "task": rows.task,
        "site": site,
        "layer": layer,
        "head": head,
        "locate": place.locate,
        "alpha": alpha,
        "gamma": gamma,
        "metric": deciding,
        "fine_metric": finest,
        "rows": rows.rows("validation"),
        "unsteered": {part: plain_means(means(rows.values(None, part))) for part in PARTS},
        "units": entries,
        "counts": counts,
        "split_half_correlation": agreement,
        "combinations": [one.as_json() for one in conditions],
        "positive": [unit.name for unit in good],
        "harmful": [unit.name for unit in bad],
    }
    where = (
        "" if layer is None else f" of layer {layer}" + ("" if head is None else f", head {head}")
    )
    title = f"Single units of {site}{where} on {rows.task}"
    shown = {one.name: value_of(one.parts["test"][deciding].mean) for one in conditions}
    return StudyResult(
        document,
        shown | {name: Value(number) for name, number in counts[deciding].items()},
        [counts_table(counts, rows), conditions_table(conditions, rows), units_table(alone, order)],
        [alone_picture(title, alone, verdicts, rows), conditions_picture(conditions, rows)],
        [*rows.notes(), *notes_of(document)],
        "units",
        title,
    )


def _chosen(
    language_model: LanguageModel,
    ranking: Ranking,
    layer: int | None,
    head: int | None,
    count: int,
    seed: int,
) -> tuple[list[tuple[Unit, str]], list[Unit]]:
    """The units to steer alone and why they were chosen; and all units of the block, if one was
    named."""
    width = ranking.scores.shape[1]
    if layer is None:
        half = min(count // 2, ranking.size)
        rest = ranking.order[half:]
        generator = torch.Generator().manual_seed(seed)
        drawn = rest[torch.randperm(len(rest), generator=generator)[: count - half]].tolist()
        ranked = [(unit, "ranked") for unit in ranking.top(half)]
        return [*ranked, *((unit, "random") for unit in ranking.units(sorted(drawn)))], []
    # Says which layers there are.
    site = language_model.anatomy.sites(ranking.kind, (layer,))[0]
    row = language_model.anatomy.sites(ranking.kind).index(site)
    start, stop = 0, width
    if head is not None:
        heads = language_model.anatomy.heads
        if not 0 <= head < heads:
            raise TrimtabError(f"head {head} is out of range: there are heads 0 to {heads - 1}")
        start, stop = head * width // heads, (head + 1) * width // heads
    block = ranking.units(range(row * width + start, row * width + stop))
    even = np.linspace(0, len(block) - 1, min(count, len(block))).round().astype(int)
    return [(block[i], "block") for i in even], block


def _each_alone(
    rows: TaskRows, asked: Sequence[tuple[Unit, str]], steering: Any
) -> tuple[list[Alone], list[Values]]:
    """Every unit steered alone; from the lowest layer up, so that what is kept of the lower blocks
    for one serves the next."""
    found: dict[int, tuple[Alone, Values]] = {}
    with progress("steering single units", len(asked)) as advance:
        for i in sorted(range(len(asked)), key=lambda i: asked[i][0].layer):
            unit, why = asked[i]
            values = rows.values(steering([unit]))
            changes = {metric: rows.change(values, metric) for metric in _metrics(rows)}
            found[i] = Alone(unit, why, changes), values
            advance(1)
    ordered = [found[i] for i in range(len(asked))]
    return [one for one, _ in ordered], [values for _, values in ordered]


def _metrics(rows: TaskRows) -> list[str]:
    return list(dict.fromkeys(m for m in (rows.rate, rows.first, rows.fine) if m))


def _verdict(change: Difference) -> str:
    if (change.corrected_p or 0.0) >= LEVEL or not change.difference:
        return "neutral"
    return "beneficial" if change.difference > 0 else "harmful"


def _agreement(
    before: torch.Tensor, after: Sequence[torch.Tensor], targets: Sequence[Any], seed: int
) -> float | None:
    """How alike units are ordered by one half of the rows and by the other (Spearman): whether
    they differ in more than luck. None where nothing varies.

    Each half has its share of every right answer: a unit that makes one letter more probable would
    otherwise gain in the half that has more of it and lose in the other.
    """
    changes = torch.stack([each - before for each in after])  # [units, rows]
    drawn = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).tolist()
    clear = ~changes.isnan().any(0)
    order = sorted((i for i in drawn if clear[i]), key=lambda i: str(targets[i]))
    if len(order) < 4 or len(changes) < 3:
        return None
    halves = [changes[:, order[start::2]].mean(1) for start in (0, 1)]
    if any(float(half.std()) == 0 for half in halves):
        return None
    return float(stats.spearmanr(halves[0].numpy(), halves[1].numpy()).statistic)


def _combined(
    alone: Sequence[Alone], order: Sequence[int], metric: str, positives: int, negatives: int
) -> tuple[list[Unit], list[Unit]]:
    """The units that gain most, and those that lose most."""
    gains = [alone[i].changes[metric].difference for i in order]
    good = [alone[i].unit for i, gain in zip(order, gains, strict=True) if gain > 0]
    bad = [alone[i].unit for i, gain in zip(order, gains, strict=True) if gain < 0]
    return good[:positives], bad[-negatives:]


def _conditions(rows: TaskRows, steerings: dict[str, Steering]) -> list[Condition]:
    """Several units at once, on both parts."""
    conditions = []
    for name, steering in [("unsteered", None), *steerings.items()]:
        parts: dict[Part, Figures] = {}
        for part in PARTS:
            values = rows.values(steering, part)
            values = {metric: values[metric] for metric in _metrics(rows)}
            parts[part] = means(values) if steering is None else figures_of(rows, values, part)
        conditions.append(Condition(name, parts))
    return conditions
