"""What single units do: each steered alone, then the good ones together and with harmful ones among
them (AUSteer, Figures 2 and 6 to 8)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from trimtab.analysis import measure
from trimtab.analysis.measure import Change, Rows, Values, compare
from trimtab.analysis.ranking import Ranking, Unit, rankings, scaling
from trimtab.analysis.result import Analysis
from trimtab.bench import contrast_for
from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError
from trimtab.metrics.significance import holm
from trimtab.model import LanguageModel
from trimtab.plots import DOWN, NEUTRAL, STYLE, UP
from trimtab.progress import progress
from trimtab.report import Picture, Table, interval
from trimtab.steering import Steering

#: A change is called one where chance alone makes it with less than this probability.
_LEVEL = 0.05
_COLOURS = {"beneficial": UP, "neutral": NEUTRAL, "harmful": DOWN}

_PARTS: tuple[Part, ...] = ("validation", "test")

Gamma = Literal["austeer", "same"]


@dataclass(frozen=True)
class _Alone:
    """One unit steered alone: what became of each metric."""

    unit: Unit
    chosen: str  # block, ranked or random
    changes: dict[str, Change]


def units(
    language_model: LanguageModel,
    task: str,
    *,
    contrast: Contrast | str | None = None,
    data: str | None = None,
    limit: int | None = 100,
    test_limit: int | None = 100,
    seed: int = 0,
    site: str = "ffn_out",
    layer: int | None = None,
    head: int | None = None,
    count: int = 64,
    alpha: float = 10.0,
    gamma: Gamma = "austeer",
    positives: int = 4,
    negatives: int = 2,
) -> Analysis:
    """Steer units one at a time, each against the unsteered model on the same validation rows.

    With `layer` (and for heads perhaps `head`) `count` units at even distances in that block or
    head are steered, as in the paper; without, half are the units of the highest scores and half
    are drawn at random by `seed`. A unit is scaled by 1 + alpha gamma, with AUSteer's gamma or, as
    `same`, 1 for all. It is beneficial or harmful where McNemar's test says so of the flips (of the
    nats, Wilcoxon's, where the task has no right and wrong), corrected for the number of units
    (Holm). The `positives` that gain most are then steered together, and together with the
    `negatives` that lose most; because they were chosen on the validation rows, what counts of them
    is the test rows (`test_limit` of them; None: all).
    """
    started = time.perf_counter()
    if head is not None and (site != "heads" or layer is None):
        raise TrimtabError("a head is one of a layer's heads: name site heads and a layer")
    if count < 2 or positives < 1 or negatives < 1:
        raise TrimtabError("heterogeneity takes 2 units or more, and 1 of each to combine")
    texts = contrast_for(task, contrast, data)
    rows = Rows(
        language_model,
        task,
        data=data,
        limit=limit,
        test_limit=test_limit,
        seed=seed,
    )
    ranking = rankings(language_model, texts, [site])[site]
    asked, block = _asked(language_model, ranking, layer, head, count, seed)

    def steering(of: Sequence[Unit]) -> Steering:
        gains = [1.0] * len(of) if gamma == "same" else None
        return scaling(language_model, texts, site, of, alpha, gains)

    alone, values = _each_alone(rows, asked, steering)
    deciding = rows.rate or rows.metric
    corrected = {
        metric: holm([one.changes[metric].p for one in alone]) for metric in alone[0].changes
    }
    verdicts = {
        metric: [_verdict(one.changes[metric], p) for one, p in zip(alone, ps, strict=True)]
        for metric, ps in corrected.items()
    }
    # Nats tell units apart that flip no row; they choose what is combined.
    finest = rows.fine or deciding
    agreement = _agreement(
        rows.unsteered()[finest], [each[finest] for each in values], rows.targets(), seed
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
            **vars(one.unit),
            "chosen": one.chosen,
            "verdict": verdicts[deciding][i],
            "changes": {
                metric: {
                    **measure.plain(change),
                    "p_corrected": corrected[metric][i],
                    "verdict": verdicts[metric][i],
                }
                for metric, change in one.changes.items()
            },
        }
        for i, one in enumerate(alone)
    ]
    counts = {
        metric: {name: found.count(name) for name in _COLOURS} for metric, found in verdicts.items()
    }
    found = {
        "task": task,
        "site": site,
        "layer": layer,
        "head": head,
        "alpha": alpha,
        "gamma": gamma,
        "metric": deciding,
        "fine_metric": finest,
        "rows": rows.count(),
        "unsteered": {
            part: {
                metric: measure.plain(measure.figure(metric, each))
                for metric, each in rows.unsteered(part).items()
            }
            for part in ("validation", "test")
        },
        "units": entries,
        "counts": counts,
        "split_half_correlation": agreement,
        "combinations": conditions,
        "positive": [unit.name for unit in good],
        "harmful": [unit.name for unit in bad],
    }
    where = (
        "" if layer is None else f" of layer {layer}" + ("" if head is None else f", head {head}")
    )
    title = f"Single units of {site}{where} on {task}"
    return Analysis(
        "units",
        title,
        found,
        [
            _counts_table(counts, rows),
            _conditions_table(conditions, rows),
            _units_table(alone, order),
        ],
        [_alone_picture(title, alone, verdicts, rows), _conditions_picture(conditions, rows, task)],
        [*rows.notes(), *_notes(found, counts, ranking, len(alone))],
        round(time.perf_counter() - started, 2),
    )


def _asked(
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
    rows: Rows, asked: Sequence[tuple[Unit, str]], steering: Any
) -> tuple[list[_Alone], list[Values]]:
    """Every unit steered alone; from the lowest layer up, so that what is kept of the lower blocks
    for one serves the next."""
    found: dict[int, tuple[_Alone, Values]] = {}
    metrics = dict.fromkeys(m for m in (rows.rate, rows.metric, rows.fine) if m)
    with progress("steering single units", len(asked)) as advance:
        for i in sorted(range(len(asked)), key=lambda i: asked[i][0].layer):
            unit, why = asked[i]
            values = rows.values(steering([unit]))
            changes = {metric: rows.change(values, metric) for metric in metrics}
            found[i] = _Alone(unit, why, changes), values
            advance(1)
    ordered = [found[i] for i in range(len(asked))]
    return [one for one, _ in ordered], [values for _, values in ordered]


def _verdict(change: Change, p: float) -> str:
    if p >= _LEVEL or not change.difference:
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
    alone: Sequence[_Alone], order: Sequence[int], metric: str, positives: int, negatives: int
) -> tuple[list[Unit], list[Unit]]:
    """The units that gain most, and those that lose most."""
    gains = [alone[i].changes[metric].difference for i in order]
    good = [alone[i].unit for i, gain in zip(order, gains, strict=True) if gain > 0]
    bad = [alone[i].unit for i, gain in zip(order, gains, strict=True) if gain < 0]
    return good[:positives], bad[-negatives:]


def _conditions(rows: Rows, steerings: dict[str, Steering]) -> list[dict[str, Any]]:
    """Several units at once, on both parts."""
    metrics = list(dict.fromkeys(m for m in (rows.rate, rows.metric, rows.fine) if m))
    found = []
    for name, steering in [("unsteered", None), *steerings.items()]:
        entry: dict[str, Any] = {"name": name}
        for part in _PARTS:
            before = rows.unsteered(part)
            values = before if steering is None else rows.values(steering, part)
            entry[part] = {
                metric: {
                    **measure.plain(measure.figure(metric, values[metric])),
                    "change": None
                    if steering is None
                    else measure.plain(compare(before[metric], values[metric])),
                }
                for metric in metrics
            }
        found.append(entry)
    return found


# -- for people -----------------------------------------------------------------------------------


def _notes(
    found: dict[str, Any], counts: dict[str, dict[str, int]], ranking: Ranking, tried: int
) -> list[str]:
    deciding, finest = found["metric"], found["fine_metric"]
    notes = [
        f"{tried} units were tried on {found['rows']} rows: at 5 % each, {0.05 * tried:.1f} would "
        "look significant by luck alone, so p-values are corrected for their number (Holm)",
        f"by {deciding}: {counts[deciding]['beneficial']} beneficial, "
        f"{counts[deciding]['harmful']} harmful, {counts[deciding]['neutral']} neutral; neutral "
        "means that so many rows do not show a difference, not that there is none",
    ]
    if finest != deciding:
        notes.append(
            f"by {finest}, in nats per row, which sees changes that flip nothing: "
            f"{counts[finest]['beneficial']} beneficial, {counts[finest]['harmful']} harmful"
        )
        if deciding == "accuracy":
            notes.append(
                "a unit that makes one answer likelier whatever is asked flips the rows of that "
                f"answer one way and the others the other way: {finest} averages this out where "
                "the answers are balanced, flips need not"
            )
    agreement = found["split_half_correlation"]
    if agreement is not None:
        notes.append(
            f"units are ordered alike by two halves of the rows with Spearman's rho = "
            f"{agreement:.2f} ({finest}); at 0 their differences would be luck"
        )
    if not found["positive"]:
        notes.append("no unit gained anything, so there is no positive combination")
    notes.append(
        "the combinations were chosen on the validation rows, where they look better than they "
        "are: the test rows count"
    )
    if any(unit["r_pos"] == unit["r_neg"] == 0 for unit in found["units"]):
        notes.append("some units never differ between the sides: AUSteer's gamma is 0 for them")
    return notes


def _counts_table(counts: dict[str, dict[str, int]], rows: Rows) -> Table:
    return Table(
        "Units by what they do alone",
        ["metric", *_COLOURS],
        [[metric, *found.values()] for metric, found in counts.items()],
        f"n = {rows.count()} validation rows; p < {_LEVEL:g} after Holm's correction.",
    )


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.4g} {interval((entry['low'], entry['high']))}"


def _flips(change: dict[str, Any] | None) -> str:
    if change is None:
        return ""
    if change["gained"] is None:
        return f"{change['difference']:+.3g} (p {change['p']:.2g})"
    return f"+{change['gained']} -{change['lost']} (p {change['p']:.2g})"


def _conditions_table(conditions: Sequence[dict[str, Any]], rows: Rows) -> Table:
    metrics = list(conditions[0]["test"])
    lines = [
        [
            entry["name"],
            metric,
            _cell(entry["validation"][metric]),
            _cell(entry["test"][metric]),
            _flips(entry["test"][metric]["change"]),
        ]
        for metric in metrics
        for entry in conditions
    ]
    heads = [
        "units",
        "metric",
        f"validation, n = {rows.count()}",
        f"test, n = {rows.count('test')}",
    ]
    note = "Chosen on the validation rows. p is for one comparison, on the test rows."
    return Table("Several units at once", [*heads, "change on test"], lines, note)


def _units_table(alone: Sequence[_Alone], order: Sequence[int]) -> Table:
    """The units that gain and lose most."""
    shown = list(order) if len(order) <= 24 else [*order[:12], *order[-12:]]
    metrics = list(alone[0].changes)
    lines = []
    for i in shown:
        one = alone[i]
        changes = [one.changes[metric] for metric in metrics]
        cells = []
        for change in changes:
            cells.append(f"{change.difference:+.4g} {interval(change.ci95)}")
            cells.append(_flips(measure.plain(change)) if change.gained is not None else "")
        unit = one.unit
        lines.append([unit.layer, unit.unit, one.chosen, unit.rank, f"{unit.score:.3f}", *cells])
    heads = ["layer", "unit", "chosen", "rank", "s"]
    for metric in metrics:
        heads += [f"change in {metric}", f"{metric}: flips"]
    kept = [i for i in range(len(heads)) if any(line[i] != "" for line in lines)]
    title = "Units alone" if len(shown) == len(order) else "The units that gain and lose most"
    return Table(
        title,
        [heads[i] for i in kept],
        [[line[i] for i in kept] for line in lines],
        "p for one unit, not corrected.",
    )


def _alone_picture(
    title: str, alone: Sequence[_Alone], verdicts: dict[str, list[str]], rows: Rows
) -> Picture:
    """Each unit's figure with the unsteered model's, and the change in nats where there is one."""
    metrics = list(alone[0].changes)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 2.6 * len(metrics) + 0.5), layout="constrained")
        panels: Any = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
        for axes, metric in zip(panels, metrics, strict=True):
            _draw_alone(axes, alone, metric, verdicts[metric])
        edges = [i for i in range(1, len(alone)) if alone[i].chosen != alone[i - 1].chosen]
        for axes in panels:
            for edge in edges:
                axes.axvline(edge - 0.5, color="black", linewidth=0.8, linestyle=":")
        if edges:
            panels[0].set_title(
                f"left of the dotted line: the {edges[0]} highest scores; right: "
                f"{len(alone) - edges[0]} at random",
                fontsize=8,
            )
        step = max(1, len(alone) // 24)
        shown = range(0, len(alone), step)
        names = [alone[i].unit.name if edges else str(alone[i].unit.unit) for i in shown]
        panels[-1].set_xticks(shown, names, rotation=60 if edges else 0)
        panels[-1].set_xlabel("layer.unit, steered alone" if edges else "unit, steered alone")
        figure.suptitle(title)
    return Picture(
        title,
        "units",
        figure,
        f"the change of {' and '.join(metrics)} with each of {len(alone)} units steered alone",
        f"Bars are changes against the unsteered model on {rows.count()} validation rows, with "
        "95 % intervals; coloured where they differ from 0 after correction for their number.",
    )


def _draw_alone(axes: Any, alone: Sequence[_Alone], metric: str, verdicts: Sequence[str]) -> None:
    for name, colour in _COLOURS.items():
        some = [i for i, verdict in enumerate(verdicts) if verdict == name]
        if not some:
            continue
        changes = [alone[i].changes[metric] for i in some]
        heights = np.array([change.difference for change in changes])
        ends = np.array([change.ci95 for change in changes])
        axes.bar(some, heights, color=colour, width=0.7, label=f"{name} ({len(some)})")
        reach = np.clip([heights - ends[:, 0], ends[:, 1] - heights], 0, None)
        axes.errorbar(some, heights, yerr=reach, fmt="none", ecolor="black", elinewidth=0.6)
    axes.axhline(0, color="black", linewidth=0.8)
    unit = ", nats" if metric == measure.FINE else ""
    axes.set(ylabel=f"change in\n{metric}{unit}")
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.12))


def _conditions_picture(conditions: Sequence[dict[str, Any]], rows: Rows, task: str) -> Picture:
    """Combinations on the rows that they were chosen on, and on others."""
    metrics = list(conditions[0]["test"])
    names = [entry["name"] for entry in conditions]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(metrics), 1.4 + 0.45 * len(names)), layout="constrained")
        panels: Any = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for part, colour, shift in zip(_PARTS, (NEUTRAL, UP), (-0.14, 0.14), strict=True):
                each = [entry[part][metric] for entry in conditions]
                middle = np.array([one["value"] for one in each])
                low = np.array([one["low"] for one in each])
                high = np.array([one["high"] for one in each])
                axes.errorbar(
                    middle,
                    np.arange(len(names)) + shift,
                    xerr=np.clip([middle - low, high - middle], 0, None),
                    fmt="o",
                    color=colour,
                    markersize=4,
                    capsize=2,
                    label=f"{part}, n = {rows.count(part)}",
                )
                axes.axvline(middle[0], color=colour, linestyle="--", linewidth=0.8)
            axes.set(xlabel=metric + (", nats" if metric == measure.FINE else ""))
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        panels[-1].legend(
            frameon=False, fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1)
        )
        title = f"Units together on {task}"
        figure.suptitle(title, x=0.02, ha="left")
    return Picture(
        title,
        "combinations",
        figure,
        "several units steered at once, on validation and on test rows",
        "Dashed: unsteered. The units were chosen on the validation rows.",
    )
