"""Pictures of a dial that goes round: every metric in polar coordinates, and masks of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

from trimtab.figures import VIOLATION, Estimate, Result, metric_of, words_for
from trimtab.reports import DOWN, NEUTRAL, UP, Picture, circle, panels, styled


@dataclass(frozen=True)
class Mask:
    """A mask's blocks, its angle, and its figures on the test rows."""

    name: str
    blocks: Sequence[int]
    theta: float | None
    figures: Mapping[str, Estimate]

    @property
    def colour(self) -> str:
        return DOWN if "formula" in self.name else UP


@styled
def dial_picture(
    dials: Mapping[str, Mapping[float, Mapping[str, Estimate]]],
    unsteered: Mapping[str, Result],
    angles: Mapping[str, float | None],
    metric: str,
    rows: str,
    chosen: bool = True,
) -> Picture:
    """One circle for each metric, one line for each method.

    `dials` has by name and by angle in degrees the figure of each metric; `unsteered` results of
    the unsteered model; `angles` the angle of each method that is best, by `metric`, on the rows
    that are drawn.
    """
    every = [figures for dial in dials.values() for figures in dial.values()]
    names = list(dict.fromkeys(name for figures in every for name in figures))
    names.sort(key=lambda name: (name != metric, name == "answered"))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (0.6 + 3.7 * columns, 0.8 + 3.7 * lines)
    figure, panes = panels(size, lines, columns, subplot_kw={"projection": "polar"})
    for axes, name in zip(panes, names, strict=False):
        own = {
            method: {theta: figures[name] for theta, figures in dial.items() if name in figures}
            for method, dial in dials.items()
        }
        base = 0.0 if name == "plain_text_cost" else None
        if name in unsteered:
            base = unsteered[name].value
        low, high, by_orders = _reach(name, own, base)
        limit = VIOLATION if name == "self_perplexity" else None
        best = angles if name == metric else {}
        circle(axes, own, base, (low, high), best=best, limit=limit, by_orders=by_orders)
        unit = metric_of(name).unit
        axes.set_title(f"{words_for(name)} ({unit})" if unit else words_for(name), pad=12)
    for axes in panes[len(names) :]:
        axes.set_axis_off()
    handles, labels = panes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    which = "chosen" if chosen else "best on these rows"
    return Picture(
        "The dial",
        "dial",
        figure,
        f"{', '.join(names)} at each angle, {rows}, with 95 % intervals; the black circle is the "
        "unsteered model",
        f"{rows}. Angles in degrees, bands are 95 % intervals, the black circle is the unsteered "
        f"model, the filled marker the angle that is {which}. SS turns by the angle, SAS and AAS "
        f"lay activations at it. Dotted: self-perplexity {VIOLATION:g}, above which an angle is a "
        "violation.",
    )


def _reach(
    name: str, dials: Mapping[str, Mapping[float, Estimate]], base: float | None
) -> tuple[float, float, bool]:
    """From the centre to the rim, and whether by orders of magnitude."""
    values = [] if base is None else [base]
    for dial in dials.values():
        for each in dial.values():
            values += [each.value, each.low, each.high]
    low, high = min(values, default=0.0), max(values, default=1.0)
    metric = metric_of(name)
    if metric.range == (0.0, 1.0):
        return -0.06, 1.06, False  # room for what lies on the rim or in the centre
    if metric.unbounded and low > 0 and high / low > 20:
        return low / 1.5, high * 1.5, True
    room = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    if 0 <= low < 0.6 * high:
        return -room, high + room, False
    return low - 2 * room, high + room, False


@styled
def mask_picture(
    masks: Sequence[Mask],
    unsteered: Mapping[str, Result],
    layers: int,
    metric: str,
    task: str,
) -> Picture:
    """Which blocks each mask steers, and what it gives on the test rows."""
    names = list(dict.fromkeys(name for mask in masks for name in mask.figures))
    names = [name for name in sorted(names, key=lambda name: name != metric) if name != "answered"]
    size = (2.0 + min(4.0, 1.4 + 0.1 * layers) + 2.1 * len(names), 1.2 + 0.34 * len(masks))
    ratios = [min(2.0, 0.7 + 0.05 * layers), *([1.0] * len(names))]
    figure, panes = panels(size, 1, 1 + len(names), sharey=True, width_ratios=ratios)
    _blocks(panes[0], masks, layers)
    for axes, name in zip(panes[1:], names, strict=True):
        base = 0.0 if name == "plain_text_cost" else None
        if name in unsteered:
            base = unsteered[name].value
        _dots(axes, masks, name, base)
    return Picture(
        "Layer masks",
        "masks",
        figure,
        f"blocks that each mask steers, and {', '.join(names)} on {task} with 95 % intervals",
        f"Test rows of {task}, each mask at its own θ. Lines: 95 % intervals; dashed: the "
        "unsteered model.",
    )


def _blocks(axes: Any, masks: Sequence[Mask], layers: int) -> None:
    for y, mask in enumerate(masks):
        lefts, ones = [block - 0.43 for block in mask.blocks], [y] * len(mask.blocks)
        axes.barh(ones, [0.86] * len(lefts), left=lefts, height=0.6, color=mask.colour)
    labels = [m.name if m.theta is None else f"{m.name}, θ = {m.theta:g}°" for m in masks]
    axes.set_yticks(range(len(masks)), labels)
    axes.set(xlim=(-0.7, layers - 0.3), ylim=(len(masks) - 0.4, -0.6), xlabel="block")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.set_title("what is steered", fontsize=9)


def _dots(axes: Any, masks: Sequence[Mask], name: str, base: float | None) -> None:
    ends = [] if base is None else [base]
    for y, mask in enumerate(masks):
        if name in mask.figures:
            each = mask.figures[name]
            axes.plot(each.value, y, "o", color=mask.colour, markersize=5)
            axes.plot(each.ci95, [y, y], color=mask.colour, linewidth=1.4)
            ends += each.ci95
    if base is not None:
        axes.axvline(base, color=NEUTRAL, linestyle="--", linewidth=1)
    if metric_of(name).unbounded and min(ends) > 0 and max(ends) / min(ends) > 20:
        axes.set_xscale("log")
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_title(words_for(name), fontsize=9)
    axes.set_xlabel(metric_of(name).unit, fontsize=8)
