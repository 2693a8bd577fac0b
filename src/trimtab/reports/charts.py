"""Pictures. Colours are safe for colour-blind readers, axes are labelled, intervals are drawn.

Four charts take rows of figures: a forest (names, each with its figures), curves (figures over a
number), a heatmap, and a circle (figures over an angle).
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trimtab.figures import Difference, Estimate, metric_of
from trimtab.files import write_whole

# Okabe and Ito's palette.
UP, DOWN, NEUTRAL, GREEN = "#0072B2", "#D55E00", "#666666", "#009E73"

#: Several lines of one picture: the palette without yellow, which is faint on white, black, and
#: grey, which is what stands beside.
COLOURS = (UP, DOWN, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#8C564B")
MARKERS = "os^vDPX*"

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
}
#: A decorator: what the function draws is in our style.
styled = matplotlib.rc_context(STYLE)


def rendered(figure: Figure, kind: str, name: str = "") -> bytes:
    """A figure as png or svg; the same figure gives the same bytes."""
    drawn = io.BytesIO()
    options: dict[str, Any] = {"dpi": 150} if kind == "png" else {"metadata": {"Date": None}}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(drawn, format=kind, **options)
    return drawn.getvalue()


def save_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """The figure as NAME.png and NAME.svg."""
    return [
        write_whole(directory / f"{name}.{kind}", rendered(figure, kind, name), overwrite=True)
        for kind in ("png", "svg")
    ]


def panels(
    size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure of so many inches and its panels, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def axes_for(ax: Any, size: tuple[float, float]) -> Any:
    """The axes to draw on: those that were given, or those of a new figure of so many inches,
    which a notebook shows."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # looks for a screen, which pages need not

    return plt.subplots(figsize=size, layout="constrained")[1]


@dataclass(frozen=True)
class Line:
    """Figures of one colour: over the numbers `at` in a curve, one a row in a forest; `faint` draws
    intervals paler than points."""

    label: str
    at: Sequence[float]
    figures: Sequence[Estimate]
    colour: str = UP
    marker: str = "o"
    dash: Any = "-"
    faint: bool = False


def look_of(place: int) -> tuple[str, str]:
    """The colour and the mark of one of several lines; of 56 no two look alike, since there is one
    mark more than colours."""
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def one_line_each(figures: Mapping[str, Mapping[float, Estimate]]) -> list[Line]:
    """Figures by name and place, each name with a colour and a mark of its own."""
    lines = []
    for i, (name, own) in enumerate(figures.items()):
        lines.append(Line(name, list(own), list(own.values()), *look_of(i)))
    return lines


def in_percent(axis: Any, metric: str) -> None:
    """An axis, or the bar beside a heatmap, of which shares are read in %."""
    if metric_of(metric).is_share:
        formatter = matplotlib.ticker.PercentFormatter(1.0, decimals=0, symbol=" %")
        axis.set_major_formatter(formatter)


# -- curve ----------------------------------------------------------------------------------------


def curve(axes: Any, lines: Sequence[Line], base: Estimate | None = None, **labels: Any) -> None:
    """Each line with its intervals as bars, and the unsteered model as a band; `labels` are what
    axes take (xlabel, ylabel, title, xscale)."""
    for line in lines:
        _with_bars(axes, line, line.at, [each.value for each in line.figures], "yerr")
    if base is not None:
        axes.axhline(base.value, color="black", linestyle="--", linewidth=1, label="unsteered")
        axes.axhspan(base.low, base.high, color=NEUTRAL, alpha=0.15, linewidth=0)
    axes.set(**labels)


def banded(
    axes: Any, x: Any, low: Any, high: Any, colour: str, *, middle: Any = None, **style: Any
) -> None:
    """A line with a band around it, which needs no points."""
    if middle is not None:
        axes.plot(x, middle, color=colour, **style)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _with_bars(axes: Any, line: Line, x: Any, y: Any, bars: str, **style: Any) -> None:
    if not line.figures:
        return
    middle = np.array([each.value for each in line.figures])
    ends = np.array([(each.low, each.high) for each in line.figures]).reshape(-1, 2)
    reach = np.clip([middle - ends[:, 0], ends[:, 1] - middle], 0, None)
    style = {"marker": line.marker, "linestyle": line.dash, "label": line.label, **style}
    if line.faint:
        style["ecolor"] = (line.colour, 0.35)
    axes.errorbar(
        x, y, color=line.colour, markersize=4, capsize=2, linewidth=1.2, **{bars: reach}, **style
    )


# -- forest ---------------------------------------------------------------------------------------


def forest(
    axes: Any,
    names: Sequence[str],
    lines: Sequence[Line],
    base: Estimate | None = None,
    apart: float = 0.28,
    **labels: Any,
) -> None:
    """A row for each name, with the figure of each line and its interval; the rows go down."""
    for i, line in enumerate(lines):
        places = np.array(line.at) + apart * (i - (len(lines) - 1) / 2)
        middle = [each.value for each in line.figures]
        _with_bars(axes, line, middle, places, "xerr", linestyle="none")
    if base is not None:
        axes.axvline(base.value, color="black", linestyle="--", label="unsteered")
        axes.axvspan(base.low, base.high, color=NEUTRAL, alpha=0.15, linewidth=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(**labels)


def bars(
    axes: Any, effects: Mapping[str, Estimate], label: str, clear: Collection[str] = ()
) -> None:
    """Means with their 95 % intervals, one bar each; those that are `clear` of chance coloured by
    their sign."""
    names = list(effects)
    for place, name in enumerate(names):
        effect = effects[name]
        colour = NEUTRAL
        if name in clear:
            colour = UP if effect.value > 0 else DOWN
        axes.barh(place, effect.value, color=colour, height=0.55)
        error = [[effect.value - effect.low], [effect.high - effect.value]]
        axes.errorbar(effect.value, place, xerr=error, color="black", capsize=4, linewidth=1.2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=label)


def columns(
    axes: Any, places: Sequence[float], changes: Sequence[Difference], colour: str, label: str
) -> None:
    """Upright bars of changes with their intervals."""
    if not changes:
        return
    heights = np.array([change.difference for change in changes])
    ends = np.array([change.ci95 for change in changes])
    reach = np.clip([heights - ends[:, 0], ends[:, 1] - heights], 0, None)
    axes.bar(places, heights, color=colour, width=0.7, label=label)
    axes.errorbar(places, heights, yerr=reach, fmt="none", ecolor="black", elinewidth=0.6)
    axes.axhline(0, color="black", linewidth=0.8)


# -- heatmap --------------------------------------------------------------------------------------


def heatmap(
    figure: Figure,
    axes: Any,
    grid: Any,
    legend: str,
    *,
    words: Mapping[tuple[int, int], tuple[str, bool]] | None = None,
    size: float = 7,
    fraction: float = 0.046,
    **options: Any,
) -> Any:
    """A grid of numbers as colours, with the bar that explains them, which is returned; `words`
    stand in fields, white where the second is true."""
    drawn = axes.imshow(grid, **{"aspect": "auto", "origin": "lower", **options})
    for (y, x), (text, white) in (words or {}).items():
        colour = "white" if white else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)
    if words:
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, fraction=fraction)
    bar.set_label(legend)
    return bar


# -- circle ---------------------------------------------------------------------------------------

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))


def circle(
    axes: Any,
    dials: Mapping[str, Mapping[float, Estimate]],
    base: float | None,
    reach: tuple[float, float],
    *,
    best: Mapping[str, float | None] | None = None,
    limit: float | None = None,
    by_orders: bool = False,
) -> None:
    """Figures over the angle in degrees on polar axes, a line with its band for each name.

    `reach` is from the centre to the rim, `by_orders` by orders of magnitude. The unsteered
    model's `base` is a circle, `limit` a dotted one; `best` are the angles that are marked.
    """
    if by_orders:
        axes.set_rscale("log")
    axes.set_ylim(*reach)
    around = np.linspace(0, 2 * math.pi, 181)
    if base is not None:
        axes.plot(around, np.full(181, base), color="black", linewidth=1.3, label="unsteered")
    if limit is not None and reach[0] < limit < reach[1]:
        axes.plot(around, np.full(181, limit), color="black", linewidth=1, linestyle=":")
    for i, (name, dial) in enumerate(dials.items()):
        if not dial:
            continue
        colour, marker = look_of(i)
        thetas = [*dial, 360.0] if 0.0 in dial else [*dial]
        figures = [dial[theta % 360.0] for theta in thetas]
        ends = np.array([(each.value, each.low, each.high) for each in figures])
        ends[:, 1:] = np.clip(ends[:, 1:], *reach)
        # Between two angles the radius goes evenly from one to the other, not along a chord, so
        # that equal values lie on a circle.
        dense = np.linspace(thetas[0], thetas[-1], 361)
        middle, low, high = (np.interp(dense, thetas, each) for each in ends.T)
        style = {"color": colour, "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.3}
        axes.plot(np.deg2rad(dense), middle, label=name, **style)
        values = [each.value for each in dial.values()]
        axes.plot(np.deg2rad(list(dial)), values, marker, color=colour, markersize=3)
        axes.fill_between(np.deg2rad(dense), low, high, color=colour, alpha=0.15, linewidth=0)
        angle = (best or {}).get(name)
        if angle is not None and angle in dial:
            place = math.radians(angle), dial[angle].value
            axes.plot(*place, marker, color=colour, markersize=9, mec="black")
    axes.set_xticks(np.deg2rad(range(0, 360, 30)), [f"{angle}°" for angle in range(0, 360, 30)])
    axes.tick_params(axis="x", labelsize=7, pad=0)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_rlabel_position(15)
    if not by_orders:
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color="#cccccc", linewidth=0.5)
    axes.spines["polar"].set_color("#cccccc")
