"""Pictures. Colours are safe for colour-blind readers, axes are labelled, intervals are drawn."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from trimtab.figures import Estimate
from trimtab.files import write_whole
from trimtab.steering import Steering, chosen

# Okabe and Ito's palette.
UP, DOWN, NEUTRAL = "#0072B2", "#D55E00", "#666666"


#: Several lines of one picture: the palette without yellow, which is faint on white, and black.
COLOURS = (UP, DOWN, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", NEUTRAL)

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
}


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


def plot_units(axes: Any, steering: Steering, layers: int, width: int) -> None:
    """Where a unit method's units are: layer against unit, larger for a larger score."""
    units = chosen(steering)["units"]
    for up, colour, label in ((True, UP, "scaled up"), (False, DOWN, "scaled down")):
        these = [unit for unit in units if (unit["gamma"] >= 0) is up]
        axes.scatter(
            [unit["layer"] for unit in these],
            [unit["unit"] for unit in these],
            s=[12 + 160 * (unit["score"] - 0.5) for unit in these],
            c=colour,
            marker="^" if up else "v",
            alpha=0.8,
            linewidths=0,
            label=f"{label} ({len(these)})",
        )
    kind = steering.hyperparameters["site"]
    axes.set(
        xlim=(-0.7, layers - 0.3),
        ylim=(-0.02 * width, 1.14 * width),  # room for the legend
        xlabel="layer",
        ylabel=f"unit of {kind} (0 to {width - 1})",
        title=f"The {len(units)} of {layers * width:,} units that are steered",
    )
    axes.legend(loc="upper center", ncols=2, frameon=False)


def plot_effects(
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


def picture(
    path: Path,
    steering: Steering,
    layers: int,
    width: int,
    effects: Mapping[str, Estimate],
    costs: Mapping[str, Estimate],
    n: int,
) -> Path:
    """Where the units are, what each steering gains and what it costs, in one PNG file."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(12, 5), layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        plot_units(halves[0].subplots(), steering, layers, width)
        upper, lower = halves[1].subplots(2, 1)
        clear = [name for name, gain in effects.items() if gain.low > 0 or gain.high < 0]
        plot_effects(upper, effects, "gain in log-odds of the positive side, nats per pair", clear)
        upper.set_title(f"What it does: {n} held-out pairs, 95 % intervals")
        plot_effects(lower, costs, "change in cross-entropy on plain text, nats per token")
        lower.set_title("What it costs")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
    return write_whole(path, drawn.getvalue(), overwrite=True)
