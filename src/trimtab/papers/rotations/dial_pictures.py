"""Pictures of a dial that goes round: every metric in polar coordinates, and masks of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trimtab.figures import VIOLATION, metric_of
from trimtab.reports import COLOURS, DOWN, NEUTRAL, STYLE, UP, Picture

#: A figure with its 95 % interval, if it has one.
Valued = tuple[float | None, tuple[float, float] | None]

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MARKERS = "os^D"


def dial_picture(
    methods: Mapping[str, Mapping[float, Mapping[str, Valued]]],
    unsteered: Mapping[str, Any],
    angles: Mapping[str, float | None],
    metric: str,
    rows: str,
    chosen: bool = True,
) -> Picture:
    """One circle for each metric, one line for each method.

    `methods` has by name and by angle in degrees each metric's value with its interval;
    `unsteered` results of the unsteered model; `angles` the angle of each method that is best, by
    `metric`, on the rows that are drawn.
    """
    names = list(
        dict.fromkeys(
            name for dial in methods.values() for figures in dial.values() for name in figures
        )
    )
    names.sort(key=lambda name: (name != metric, name == "answered"))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        size = (0.6 + 3.7 * columns, 0.8 + 3.7 * lines)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(
            lines, columns, squeeze=False, subplot_kw={"projection": "polar"}
        ).ravel()
        for axes, name in zip(panels, names, strict=False):
            base = unsteered[name].value if name in unsteered else None
            base = 0.0 if name == "plain_text_cost" else base
            dials = {
                method: {
                    theta: figures[name]
                    for theta, figures in dial.items()
                    if name in figures and figures[name][0] is not None
                }
                for method, dial in methods.items()
            }
            _circle(axes, name, dials, base, angles if name == metric else {})
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    best = "chosen" if chosen else "best on these rows"
    return Picture(
        "The dial",
        "dial",
        figure,
        f"{', '.join(names)} at each angle, {rows}, with 95 % intervals; the black circle is the "
        "unsteered model",
        f"{rows}. Angles in degrees, bands are 95 % intervals, the black circle is the unsteered "
        f"model, the filled marker the angle that is {best}. SS turns by the angle, SAS and AAS "
        f"lay activations at it. Dotted: self-perplexity {VIOLATION:g}, above which an angle is a "
        "violation.",
    )


def _circle(
    axes: Any,
    name: str,
    dials: Mapping[str, Mapping[float, Valued]],
    base: float | None,
    angles: Mapping[str, float | None],
) -> None:
    low, high, wide = _reach(name, dials, base)
    if wide:
        axes.set_rscale("log")
    axes.set_ylim(low, high)
    around = np.linspace(0, 2 * math.pi, 181)
    if base is not None:
        axes.plot(around, np.full(181, base), color="black", linewidth=1.3, label="unsteered")
    if name == "self_perplexity" and low < VIOLATION < high:
        axes.plot(around, np.full(181, VIOLATION), color="black", linewidth=1, linestyle=":")
    for i, (method, dial) in enumerate(dials.items()):
        if not dial:
            continue
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
        thetas = [*dial, 360.0] if 0.0 in dial else [*dial]
        found = [dial[theta % 360.0] for theta in thetas]
        # Between two angles the radius goes evenly from one to the other, not along a chord, so
        # that equal values lie on a circle.
        dense = np.linspace(thetas[0], thetas[-1], 361)
        values = np.interp(dense, thetas, [float(value or 0) for value, _ in found])
        dash = _DASHES[i % len(_DASHES)]
        axes.plot(np.deg2rad(dense), values, color=colour, linestyle=dash, lw=1.3, label=method)
        axes.plot(
            np.deg2rad(list(dial)),
            [value for value, _ in dial.values()],
            marker,
            color=colour,
            markersize=3,
        )
        if all(interval is not None for _, interval in found):
            ends = np.clip([interval for _, interval in found], low, high)
            sides = [np.interp(dense, thetas, ends[:, side]) for side in (0, 1)]
            axes.fill_between(np.deg2rad(dense), *sides, color=colour, alpha=0.15, linewidth=0)
        best = angles.get(method)
        if best is not None and best in dial:
            axes.plot(
                math.radians(best), dial[best][0], marker, color=colour, markersize=9, mec="black"
            )
    axes.set_xticks(np.deg2rad(range(0, 360, 30)), [f"{angle}°" for angle in range(0, 360, 30)])
    axes.tick_params(axis="x", labelsize=7, pad=0)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_rlabel_position(15)
    if not wide:
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color="#cccccc", linewidth=0.5)
    axes.spines["polar"].set_color("#cccccc")
    axes.set_title(labelled(name), pad=12)


def _reach(
    name: str, dials: Mapping[str, Mapping[float, Valued]], base: float | None
) -> tuple[float, float, bool]:
    """From the centre to the rim, and whether by orders of magnitude."""
    values = [] if base is None else [base]
    for dial in dials.values():
        for value, interval in dial.values():
            assert value is not None
            values += [value, *(interval or ())]
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


def labelled(name: str) -> str:
    """A metric with its unit."""
    unit = metric_of(name).unit
    return f"{name} ({unit})" if unit else name


#: A mask's name, its blocks, its angle, and its figures.
Mask = tuple[str, Sequence[int], float | None, Mapping[str, Valued]]


def mask_picture(
    masks: Sequence[Mask],
    unsteered: Mapping[str, float | None],
    layers: int,
    metric: str,
    task: str,
) -> Picture:
    """Which blocks each mask steers, and what it gives on the test rows."""
    names = list(dict.fromkeys(name for *_, figures in masks for name in figures))
    names = [
        name
        for name in sorted(names, key=lambda name: name != metric)
        if name != "answered"
        and any(figures.get(name, (None,))[0] is not None for *_, figures in masks)
    ]
    with matplotlib.rc_context(STYLE):
        size = (2.0 + min(4.0, 1.4 + 0.1 * layers) + 2.1 * len(names), 1.2 + 0.34 * len(masks))
        figure = Figure(figsize=size, layout="constrained")
        ratios = [min(2.0, 0.7 + 0.05 * layers), *([1.0] * len(names))]
        panels = figure.subplots(
            1, 1 + len(names), squeeze=False, sharey=True, width_ratios=ratios
        )[0]
        _blocks(panels[0], masks, layers)
        for axes, name in zip(panels[1:], names, strict=True):
            base = 0.0 if name == "plain_text_cost" else unsteered.get(name)
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
    for y, (name, blocks, _, _) in enumerate(masks):
        colour = DOWN if "formula" in name else UP
        axes.barh(
            [y] * len(blocks), [0.86] * len(blocks), left=[b - 0.43 for b in blocks], height=0.6,
            color=colour,
        )  # fmt: skip
    labels = [name if theta is None else f"{name}, θ = {theta:g}°" for name, _, theta, _ in masks]
    axes.set_yticks(range(len(masks)), labels)
    axes.set(xlim=(-0.7, layers - 0.3), ylim=(len(masks) - 0.4, -0.6), xlabel="block")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.set_title("what is steered", fontsize=9)


def _dots(axes: Any, masks: Sequence[Mask], name: str, base: float | None) -> None:
    every = [] if base is None else [base]
    for y, (mask, _, _, figures) in enumerate(masks):
        value, interval = figures.get(name, (None, None))
        if value is None:
            continue
        colour = DOWN if "formula" in mask else UP
        axes.plot(value, y, "o", color=colour, markersize=5)
        every.append(value)
        if interval is not None:
            axes.plot(interval, [y, y], color=colour, linewidth=1.4)
            every += interval
    if base is not None:
        axes.axvline(base, color=NEUTRAL, linestyle="--", linewidth=1)
    if metric_of(name).unbounded and min(every) > 0 and max(every) / min(every) > 20:
        axes.set_xscale("log")
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_title(name, fontsize=9)
    axes.set_xlabel(metric_of(name).unit, fontsize=8)
