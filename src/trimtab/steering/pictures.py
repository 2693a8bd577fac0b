"""Where a steering acts, drawn: the units or heads that were chosen, or its sites by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.anatomy import parse_site
from trimtab.reports import DOWN, UP
from trimtab.steering.artifact import Steering
from trimtab.steering.tables import chosen


def plot_steering(axes: Any, steering: Steering) -> None:
    """The chosen units or heads by block and place; of a method that chooses none, its sites."""
    found = chosen(steering)
    kind = next((name for name in ("units", "heads") if found.get(name)), "")
    if not kind or "layer" not in found[kind][0]:
        _plot_sites(axes, steering)
    elif kind == "units":
        _plot_units(axes, steering, found["units"])
    else:
        _plot_heads(axes, steering, found["heads"])


def _plot_units(axes: Any, steering: Steering, units: Sequence[Mapping[str, Any]]) -> None:
    """Layer against unit, larger for a larger score."""
    layers, width = steering.model.layers, steering.interventions[0].operator.width
    scores = [unit.get("score", 0.0) for unit in units]
    low, reach = min(scores), (max(scores) - min(scores)) or 1.0
    for up, colour, label in ((True, UP, "scaled up"), (False, DOWN, "scaled down")):
        these = [unit for unit in units if (unit["gamma"] >= 0) is up]
        axes.scatter(
            [unit["layer"] for unit in these],
            [unit["unit"] for unit in these],
            s=[20 + 70 * (unit.get("score", 0.0) - low) / reach for unit in these],
            c=colour,
            marker="^" if up else "v",
            alpha=0.8,
            linewidths=0,
            label=f"{label} ({len(these)})",
        )
    kind = parse_site(steering.interventions[0].site)[1]
    axes.set(
        xlim=(-0.7, layers - 0.3),
        ylim=(-0.02 * width, 1.14 * width),  # room for the legend
        xlabel="layer",
        ylabel=f"unit of {kind} (0 to {width - 1})",
        title=f"The {len(units)} of {layers * width:,} units that are steered",
    )
    axes.legend(loc="upper center", ncols=2, frameon=False)


def _plot_heads(axes: Any, steering: Steering, heads: Sequence[Mapping[str, Any]]) -> None:
    axes.scatter([one["layer"] for one in heads], [one["head"] for one in heads], c=UP, marker="s")
    axes.set(
        xlim=(-0.7, steering.model.layers - 0.3),
        xlabel="layer",
        ylabel="head",
        title=f"The {len(heads)} heads that are steered",
    )
    axes.yaxis.get_major_locator().set_params(integer=True)


def _plot_sites(axes: Any, steering: Steering) -> None:
    """A mark for each site; what is outside the blocks stands beside the first and the last."""
    layers = steering.model.layers
    outside = {"embed": -1, "final_norm": layers}
    places: dict[str, list[int]] = {}
    for intervention in steering.interventions:
        layer, kind = parse_site(intervention.site)
        places.setdefault(kind, []).append(outside[kind] if layer is None else layer)
    for row, own in enumerate(places.values()):
        axes.scatter(own, [row] * len(own), c=UP, marker="s")
    axes.set_yticks(range(len(places)), list(places))
    axes.set(
        xlim=(-1.7, layers + 0.7),
        ylim=(len(places) - 0.5, -0.5),
        xlabel=f"layer (0 to {layers - 1})",
        title=f"Where {steering.label} acts",
    )
