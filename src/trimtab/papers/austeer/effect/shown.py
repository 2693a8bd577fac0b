"""Rankings of units for people: tables, pictures and what to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.figures import Difference, Estimate, with_unit
from trimtab.papers.austeer.effect.gains import Cell, Chosen
from trimtab.papers.austeer.effect.rankings import RANDOM, RANKINGS, USUAL
from trimtab.reports import (
    COLOURS,
    MARKERS,
    NEUTRAL,
    Line,
    Picture,
    Table,
    banded,
    cell,
    curve,
    difference_cell,
    heatmap,
    interval,
    number_cell,
    number_text,
    panels,
    styled,
)
from trimtab.sweeps import FINE, setting

#: How rankings look in every picture.
_LOOKS = {RANDOM: (NEUTRAL, "o")} | dict(
    zip(
        ("effect z", "momentum", "effect per nat", "mean difference", USUAL, "effect size"),
        zip(COLOURS, MARKERS, strict=False),
        strict=False,
    )
)
#: Dashes of the lines of methods that steer with whole directions.
_DASHES = {"caa": "--", "iti": ":", "sadi": "-."}


def chosen_table(chosen: Sequence[Chosen], rate: str | None, rows: int) -> Table:
    """What each ranking and method gains with the setting that was chosen on validation rows."""
    lines = []
    for one in chosen:
        own, against = one.cell, one.against_usual
        lines.append(
            [
                f"{own.budget:g}",
                own.name,
                setting(own.params),
                number_text(own.validation, "+"),
                difference_cell(own.gain),
                "" if rate is None else difference_cell(own.change(rate), rate),
                difference_cell(against),
                number_cell(None if against is None else against.corrected_p, ".2g"),
            ]
        )
    heads = ["budget, nats", "ranking", "chosen", "gain, validation", f"gain on test, n = {rows}"]
    heads += [rate or "", f"against {USUAL}", "p, Holm"]
    note = (
        "Gains are nats of log-odds a row; of random choices the mean over draws. p is against "
        f"{USUAL}, corrected for the number of comparisons within a budget."
    )
    return Table(
        "Chosen on validation, reported on test", heads, lines, note
    ).without_empty_columns()


def gain_tables(
    cells: Sequence[Cell], ks: Sequence[int], budgets: Sequence[float], rows: int
) -> list[Table]:
    """For each budget the gain on test rows of each ranking over the number of units."""
    tables = []
    for budget in budgets:
        lines = []
        for name in RANKINGS:
            own = _over_k(cells, name, budget)
            lines.append([name, *(difference_cell(own[k].gain) for k in ks)])
        note = (
            f"Nats of log-odds a row, n = {rows} test rows, at the largest dial within the budget."
        )
        heads = ["ranking", *(f"k = {k:,}" for k in ks)]
        tables.append(Table(f"Gain within {budget:g} nats", heads, lines, note))
    return tables


def alone_table(found: Mapping[str, Any], rows: int) -> Table:
    lines = [
        [
            one["name"],
            one["units"],
            number_text(one["predicted"], "+"),
            _with_interval(one["real"]),
            f"{one['raise']['value']:.0%} {interval(tuple(one['raise']['ci95']), 'accuracy')}",
        ]
        for one in found["rankings"]
    ]
    heads = ["ranking", "units", "predicted", f"real, n = {rows} validation rows", "that gain"]
    note = (
        f"Means over the first units of each ranking, scaled one by one by a factor "
        f"{1 + found['gamma']:g} or {1 - found['gamma']:g}, whichever way the ranking scales them."
    )
    return Table("Units scaled one by one", heads, lines, note)


def _with_interval(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return cell(Estimate(found["value"], low, high, found["n"]))


def overlap_table(found: Mapping[str, Any]) -> Table:
    names = found["names"]
    lines = [
        [name, *(f"{value:.2f}" for value in row)]
        for name, row in zip(names, found["jaccard"], strict=True)
    ]
    note = f"Jaccard's index; two random choices have {found['chance']:.2g}."
    return Table(f"Units in common among the first {found['k']:,}", ["", *names], lines, note)


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures should know."""
    pairs, prompts = found["contrast"]["pairs"], found["prompts"]
    notes = [
        f"rankings were made from {pairs} train pairs; dials keep to a budget on {prompts} "
        "validation prompts: half of them cost less there",
        "random units are scaled as signed momentum scales them; each draw has a dial of its own",
    ]
    short = sorted(
        {
            f"{one['name']} ({setting(one['params'])})"
            for one in found["settings"]
            for own in one.get("draws", [one])
            if not own["reached"] and one["kl"] == min(found["kl"])
        }
    )
    if short:
        notes.append(
            f"even the end of the dial costs less than {min(found['kl']):g} nats: "
            f"{', '.join(short)}"
        )
    return notes


def _over_k(cells: Sequence[Cell], name: str, budget: float) -> dict[int, Cell]:
    return {one.params["k"]: one for one in cells if (one.name, one.budget) == (name, budget)}


# -- pictures -------------------------------------------------------------------------------------


@styled
def gain_picture(
    title: str,
    cells: Sequence[Cell],
    chosen: Sequence[Chosen],
    ks: Sequence[int],
    budgets: Sequence[float],
    rows: int,
) -> Picture:
    """Gain over the number of units, a panel for each budget."""
    size = (1.2 + 3.4 * len(budgets), 4.4)
    figure, every = panels(size, 1, len(budgets), sharey=True)
    for axes, budget in zip(every, budgets, strict=True):
        for i, name in enumerate(RANKINGS):
            own = _over_k(cells, name, budget)
            at = [k * 1.06 ** (i - 3) for k in own]  # bars of several lines are kept apart
            colour, marker = _LOOKS[name]
            figures = [_estimate(one.gain) for one in own.values()]
            dash = ":" if name == RANDOM else "-"
            if name == RANDOM:
                low, high = zip(*(one.spread for one in own.values()), strict=True)
                banded(axes, at, low, high, colour)
            curve(axes, [Line(name, at, figures, colour, marker, dash, faint=True)])
        for one in chosen:
            if one.cell.budget == budget and one.cell.name in _DASHES:
                label = (
                    f"{one.cell.name}, {setting(one.cell.params)}"
                    if len(budgets) == 1
                    else one.cell.name
                )
                look = {"color": "black", "linewidth": 1, "linestyle": _DASHES[one.cell.name]}
                axes.axhline(one.cell.gain.difference, label=label, **look)
        axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        axes.set(xlabel="units that are steered", xscale="log", title=f"within {budget:g} nats")
        axes.set_xticks(list(ks), [f"{k:,}" for k in ks])
        axes.minorticks_off()
    every[0].set(ylabel=f"gain of {with_unit(FINE)}")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=5)
    figure.suptitle(title)
    return Picture(
        "Gain over the number of units",
        "gain-by-k",
        figure,
        "how much the first k units of each ranking raise the log-odds, at an equal budget",
        f"Means over {rows} test rows with 95 % intervals, each at the largest dial within the "
        "budget. Black lines: methods that steer with whole directions, with the setting that was "
        "chosen on validation rows. Of random choices the mean over draws; the grey band is from "
        "the least to the largest draw.",
    )


def _estimate(found: Difference) -> Estimate:
    return Estimate(found.difference, *found.ci95, found.n)


@styled
def alone_picture(found: Mapping[str, Any], rows: int) -> Picture:
    """Real over predicted gains of single units."""
    figure, (axes,) = panels((6.2, 4.8))
    for name in [*RANKINGS][::-1]:
        own = [unit for unit in found["units"] if name in unit["rankings"]]
        colour, marker = _LOOKS[name]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": "none"}
        size = 5 + 2.2 * [*RANKINGS].index(name)  # a unit of several rankings shows all of them
        axes.plot(
            [unit["predicted"] for unit in own], [unit["real"] for unit in own],
            linestyle="none", markersize=size * 0.6, label=name, **style,
        )  # fmt: skip
    ends = np.array([[unit["predicted"], unit["real"]] for unit in found["units"]])
    across = np.array([ends[:, 0].min(), ends[:, 0].max()])
    axes.plot(across, across, color="#aaaaaa", linewidth=0.8, linestyle="--", label="as predicted")
    slope = found["slope"]
    said = ""
    if slope is not None:
        line = slope["intercept"] + slope["value"] * across
        text = f"slope {slope['value']:.2f} {interval(tuple(slope['ci95']))}"
        axes.plot(across, line, color="black", linewidth=1, label=text)
        said = f", r = {found['pearson']:.2f}, rank correlation {found['spearman']:.2f}"
    axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set(
        xlabel=f"predicted from train pairs, {with_unit(FINE)}",
        ylabel=f"real, {rows} validation rows, {with_unit(FINE)}",
        title=f"Units scaled one by one{said}",
    )
    handles, labels = axes.get_legend_handles_labels()
    first = len(RANKINGS)  # which were drawn last to first, the largest marks below
    handles = [*handles[:first][::-1], *handles[first:]]
    labels = [*labels[:first][::-1], *labels[first:]]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(handles, labels, frameon=False, fontsize=7, **place)
    return Picture(
        "Units scaled one by one: predicted and real",
        "predicted",
        figure,
        "what scaling single units does to the log-odds, beside what their effects predict",
        f"Each unit is scaled by {1 + found['gamma']:g} and by {1 - found['gamma']:g}; real is "
        "half of the difference. A unit of several rankings has a mark of each.",
    )


@styled
def overlap_picture(found: Mapping[str, Any], site: str, units: int) -> Picture:
    """Which units rankings share."""
    names = found["names"]
    figure, (axes,) = panels((5.4, 4.4))
    grid = np.array(found["jaccard"])
    words = {
        (i, j): (f"{grid[i, j]:.2f}", bool(grid[i, j] > 0.6))
        for i in range(len(names))
        for j in range(len(names))
    }
    options: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "equal"}
    options |= {"origin": "upper"}
    heatmap(figure, axes, grid, "Jaccard's index", words=words, size=9, **options)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    title = f"Shared units of {site}, the first {found['k']:,} of {units:,}"
    axes.set_title(title)
    return Picture(
        title,
        "overlap",
        figure,
        "how many of their first units rankings share",
        f"Units in both over units in either; two random choices have {found['chance']:.2g}.",
    )
