"""What single units do, in tables, pictures and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trimtab.contrasts import Part
from trimtab.figures import Difference
from trimtab.papers import measure
from trimtab.papers.austeer.ranking import Ranking, Unit
from trimtab.papers.measure import Rows
from trimtab.reports import DOWN, NEUTRAL, STYLE, UP, Picture, Table, interval

#: A change is called one where chance alone makes it with less than this probability.
LEVEL = 0.05
COLOURS = {"beneficial": UP, "neutral": NEUTRAL, "harmful": DOWN}

PARTS: tuple[Part, ...] = ("validation", "test")


@dataclass(frozen=True)
class Alone:
    """One unit steered alone: what became of each metric."""

    unit: Unit
    chosen: str  # block, ranked or random
    changes: dict[str, Difference]


def notes_of(
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


def counts_table(counts: dict[str, dict[str, int]], rows: Rows) -> Table:
    return Table(
        "Units by what they do alone",
        ["metric", *COLOURS],
        [[metric, *found.values()] for metric, found in counts.items()],
        f"n = {rows.count()} validation rows; p < {LEVEL:g} after Holm's correction.",
    )


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.4g} {interval((entry['low'], entry['high']))}"


def _flips(change: dict[str, Any] | None) -> str:
    if change is None:
        return ""
    if change["gained"] is None:
        return f"{change['difference']:+.3g} (p {change['p']:.2g})"
    return f"+{change['gained']} -{change['lost']} (p {change['p']:.2g})"


def conditions_table(conditions: Sequence[dict[str, Any]], rows: Rows) -> Table:
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


def units_table(alone: Sequence[Alone], order: Sequence[int]) -> Table:
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


def alone_picture(
    title: str, alone: Sequence[Alone], verdicts: dict[str, list[str]], rows: Rows
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


def _draw_alone(axes: Any, alone: Sequence[Alone], metric: str, verdicts: Sequence[str]) -> None:
    for name, colour in COLOURS.items():
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


def conditions_picture(conditions: Sequence[dict[str, Any]], rows: Rows, task: str) -> Picture:
    """Combinations on the rows that they were chosen on, and on others."""
    metrics = list(conditions[0]["test"])
    names = [entry["name"] for entry in conditions]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(metrics), 1.4 + 0.45 * len(names)), layout="constrained")
        panels: Any = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for part, colour, shift in zip(PARTS, (NEUTRAL, UP), (-0.14, 0.14), strict=True):
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
