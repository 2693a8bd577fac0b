"""What single units do, in tables, pictures and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.contrasts import Part
from trimtab.figures import Difference, with_unit, words_for
from trimtab.papers.austeer.ranking import Unit
from trimtab.papers.settings import Figures, change_cell, plain
from trimtab.reports import (
    DOWN,
    NEUTRAL,
    UP,
    Line,
    Picture,
    Table,
    cell,
    columns,
    difference_cell,
    forest,
    panels,
    styled,
    tested_cell,
)
from trimtab.sweeps import TaskRows

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


@dataclass(frozen=True)
class Condition:
    """Several units steered at once, on both parts."""

    name: str
    parts: Mapping[Part, Figures]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, **{part: plain(each) for part, each in self.parts.items()}}


def notes_of(found: dict[str, Any]) -> list[str]:
    deciding, finest, counts = found["metric"], found["fine_metric"], found["counts"]
    tried = len(found["units"])
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


def counts_table(counts: dict[str, dict[str, int]], rows: TaskRows) -> Table:
    return Table(
        "Units by what they do alone",
        ["metric", *COLOURS],
        [[words_for(metric), *numbers.values()] for metric, numbers in counts.items()],
        f"n = {rows.rows('validation')} validation rows; p < {LEVEL:g} after Holm's correction.",
    )


def conditions_table(conditions: Sequence[Condition], rows: TaskRows) -> Table:
    lines = [
        [
            one.name,
            with_unit(metric),
            *(cell(one.parts[part][metric].mean, metric) for part in PARTS),
            change_cell(one.parts["test"][metric].change, metric),
        ]
        for metric in conditions[0].parts["test"]
        for one in conditions
    ]
    heads = ["units", "metric", *(f"{part}, n = {rows.rows(part)}" for part in PARTS)]
    note = "Chosen on the validation rows. p is for one comparison, on the test rows."
    return Table("Several units at once", [*heads, "change on test"], lines, note)


def units_table(alone: Sequence[Alone], order: Sequence[int]) -> Table:
    """The units that gain and lose most."""
    shown = list(order) if len(order) <= 24 else [*order[:12], *order[-12:]]
    lines = []
    for one in (alone[i] for i in shown):
        cells = []
        for metric, change in one.changes.items():
            flips = "" if change.gained is None else tested_cell(change)
            cells += [difference_cell(change, metric), flips]
        unit = one.unit
        lines.append([unit.layer, unit.unit, one.chosen, unit.rank, f"{unit.score:.3f}", *cells])
    heads = ["layer", "unit", "chosen", "rank", "s"]
    for metric in alone[0].changes:
        heads += [f"change in {with_unit(metric)}", f"{words_for(metric)}: flips"]
    title = "Units alone" if len(shown) == len(order) else "The units that gain and lose most"
    return Table(title, heads, lines, "p for one unit, not corrected.").without_empty_columns()


@styled
def alone_picture(
    title: str, alone: Sequence[Alone], verdicts: dict[str, list[str]], rows: TaskRows
) -> Picture:
    """The change of each metric with each unit, coloured by what it does."""
    metrics = list(alone[0].changes)
    figure, every = panels((9.5, 2.6 * len(metrics) + 0.5), len(metrics), sharex=True)
    edges = [i for i in range(1, len(alone)) if alone[i].chosen != alone[i - 1].chosen]
    for axes, metric in zip(every, metrics, strict=True):
        for name, colour in COLOURS.items():
            places = [i for i, verdict in enumerate(verdicts[metric]) if verdict == name]
            changes = [alone[i].changes[metric] for i in places]
            columns(axes, places, changes, colour, f"{name} ({len(places)})")
        axes.set(ylabel=f"change in\n{with_unit(metric)}")
        axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.12))
        for edge in edges:
            axes.axvline(edge - 0.5, color="black", linewidth=0.8, linestyle=":")
    if edges:
        every[0].set_title(
            f"left of the dotted line: the {edges[0]} highest scores; right: "
            f"{len(alone) - edges[0]} at random",
            fontsize=8,
        )
    shown = range(0, len(alone), max(1, len(alone) // 24))
    names = [alone[i].unit.name if edges else str(alone[i].unit.unit) for i in shown]
    every[-1].set_xticks(shown, names, rotation=60 if edges else 0)
    every[-1].set_xlabel("layer.unit, steered alone" if edges else "unit, steered alone")
    figure.suptitle(title)
    return Picture(
        title,
        "units",
        figure,
        f"the change of {' and '.join(metrics)} with each of {len(alone)} units steered alone",
        f"Bars are changes against the unsteered model on {rows.rows('validation')} validation "
        "rows, with 95 % intervals; coloured where they differ from 0 after correction for their "
        "number.",
    )


@styled
def conditions_picture(conditions: Sequence[Condition], rows: TaskRows) -> Picture:
    """Combinations on the rows that they were chosen on, and on others."""
    metrics = list(conditions[0].parts["test"])
    names = [one.name for one in conditions]
    size = (4.6 * len(metrics), 1.4 + 0.45 * len(names))
    figure, every = panels(size, 1, len(metrics), sharey=True)
    for axes, metric in zip(every, metrics, strict=True):
        lines = [
            Line(
                f"{part}, n = {rows.rows(part)}",
                range(len(names)),
                [one.parts[part][metric].mean for one in conditions],
                colour,
            )
            for part, colour in zip(PARTS, (NEUTRAL, UP), strict=True)
        ]
        forest(axes, names, lines, xlabel=with_unit(metric))
        for line in lines:
            unsteered = line.figures[0].value
            axes.axvline(unsteered, color=line.colour, linestyle="--", linewidth=0.8)
    every[-1].legend(frameon=False, fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    title = f"Units together on {rows.task}"
    figure.suptitle(title, x=0.02, ha="left")
    return Picture(
        title,
        "combinations",
        figure,
        "several units steered at once, on validation and on test rows",
        "Dashed: unsteered. The units were chosen on the validation rows.",
    )
