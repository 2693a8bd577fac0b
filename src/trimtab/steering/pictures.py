"""Where a steering acts, drawn: the units or heads that were chosen, or its sites by block; and of
what was chosen by effect, which, why, and with what certainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trimtab.anatomy import parse_site
from trimtab.reports import DOWN, GREEN, NEUTRAL, UP
from trimtab.steering.artifact import Steering
from trimtab.steering.tables import chosen

#: What is known of everything that was chosen by effect.
_ATTRIBUTED = ("effect", "error", "cost", "first")
#: Of so many the numbers are written below, of more only those of their layers.
_NUMBERED = 32
#: How far apart the numbers of layers must stand, as a share of the width.
_APART = 0.03
#: Half of a 95 % interval, in standard errors.
_REACH = 1.96
#: The budget that the gains of layers are drawn for, in nats.
_BUDGET = 0.1


def plot_steering(axes: Any, steering: Steering) -> None:
    """The chosen units or heads by block and place, or with their effects; of a method that chooses
    none, its sites, or the effects among which it chose its layer."""
    found = chosen(steering)
    every = [record for records in found.values() for record in records]
    if every and all(column in every[0] for column in _ATTRIBUTED):
        _plot_effects(axes, steering, *next(iter(found.items())))
        return
    if isinstance(steering.findings.get("effect"), dict):
        _plot_layers(axes, steering)
        return
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


# -- by effect ------------------------------------------------------------------------------------


def _plot_effects(
    axes: Any, steering: Steering, kind: str, records: Sequence[Mapping[str, Any]]
) -> None:
    """Effects with 95 % intervals, layer by layer and in rank order within each; below them what
    each costs, and the first token's share of its effect."""
    one = kind.removesuffix("s")
    ordered = sorted(records, key=lambda record: record.get("layer", 0))  # stable: by rank
    places = range(len(ordered))
    cost, first = _strips(axes, 2)
    for up, colour, marker in ((True, UP, "^"), (False, DOWN, "v")):
        these = [place for place in places if (ordered[place]["effect"] >= 0) is up]
        _effects(
            axes,
            these,
            [ordered[place]["effect"] for place in these],
            [ordered[place]["error"] for place in these],
            {"color": colour, "marker": marker},
        )
    for strip, column in ((cost, "cost"), (first, "first")):
        strip.bar(places, [record[column] for record in ordered], color=NEUTRAL, width=0.7)
    if min(record["cost"] for record in records) > 0:
        cost.set_yscale("log")
    cost.set(ylabel="cost c")
    first.set(ylim=(0, 1), ylabel="first\ntoken")
    first.yaxis.set_major_locator(MaxNLocator(1))
    first.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _name_places(first, (axes, cost, first), ordered, one)
    axes.set(
        ylabel=f"effect, nats per pair\nand unit of {steering.dial.name}",
        title=f"What each of the {len(records)} {kind} does to the log-odds, 95 % intervals",
    )


def _name_places(
    lowest: Any, every: Sequence[Any], ordered: Sequence[Mapping[str, Any]], one: str
) -> None:
    """Below the lowest axes the layers, each with its own share of the width, and where there is
    room the numbers within them."""
    layers = [record.get("layer") for record in ordered]
    starts = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer]
    for start in starts[1:]:
        for axes in every:
            axes.axvline(start - 0.5, color=NEUTRAL, alpha=0.35, linewidth=0.6)
    lowest.set_xlim(-0.7, len(ordered) - 0.3)
    if len(ordered) <= _NUMBERED or layers[0] is None:
        numbers = [
            f"{record[one]}" if layer is None else f"{layer}.{record[one]}"
            for layer, record in zip(layers, ordered, strict=True)
        ]
        shown = numbers if len(ordered) <= _NUMBERED else []
        lowest.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7)
        lowest.set_xlabel(one if layers[0] is None else f"layer.{one}, in rank order of each layer")
        return
    ends = [*starts[1:], len(ordered)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    named: dict[float, Any] = {}  # those that have room beside the one before
    for middle, start in zip(middles, starts, strict=True):
        if not named or middle - max(named) >= _APART * len(ordered):
            named[middle] = layers[start]
    lowest.set_xticks(list(named), list(named.values()), fontsize=7)
    lowest.tick_params(axis="x", length=0)
    lowest.set_xlabel(f"layer; {one}s in rank order of each")


def _plot_layers(axes: Any, steering: Steering) -> None:
    """The effect of adding each layer's vector, with 95 % intervals; below, how certain each is, by
    which one was chosen, and to first order what each gains at equal cost."""
    found = steering.findings
    places = [parse_site(site)[0] for site in found["effect"]]
    effects, errors = list(found["effect"].values()), list(found["error"].values())
    certain, worth = _strips(axes, 2)
    _effects(axes, places, effects, errors, {"color": NEUTRAL, "marker": "o"})
    gains = [
        abs(effect) * (2 * _BUDGET / cost) ** 0.5 if cost else 0.0
        for effect, cost in zip(effects, found["cost"].values(), strict=True)
    ]
    best = list(found["effect"]).index(found["site"])
    colours = [GREEN if place == best else NEUTRAL for place in range(len(places))]
    sure = [abs(e) / max(error, 1e-30) for e, error in zip(effects, errors, strict=True)]
    certain.bar(places, sure, color=colours, width=0.7)
    worth.bar(places, gains, color=colours, width=0.7)
    _effects(
        axes,
        [places[best]],
        [effects[best]],
        [errors[best]],
        {"color": GREEN, "marker": "s", "label": "chosen" + ", turned round" * (effects[best] < 0)},
    )
    axes.legend(frameon=False)
    certain.set(ylabel="standard\nerrors")
    worth.set(ylabel=f"gain at\n{_BUDGET:g} nats", xlabel="layer whose vector is added")
    worth.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        ylabel=f"effect, nats per pair\nand unit of {steering.dial.name}",
        title="What adding each layer's vector does to the log-odds, 95 % intervals",
    )


def _effects(
    axes: Any,
    places: Sequence[Any],
    effects: Sequence[float],
    errors: Sequence[float],
    look: dict[str, Any],
) -> None:
    """Effects with their intervals, around a line at zero."""
    reach = [_REACH * error for error in errors]
    axes.errorbar(
        places, effects, yerr=reach, linestyle="none", markersize=4, capsize=2, linewidth=1, **look
    )
    axes.axhline(0, color="black", linewidth=0.8)


def _strips(axes: Any, count: int) -> list[Any]:
    """So many low axes below the axes, in the room that these had."""
    ratios: dict[str, Any] = {"height_ratios": [4] + [1] * count, "hspace": 0.1}
    spec, figure = axes.get_subplotspec(), axes.figure
    if spec is not None:
        grid = spec.subgridspec(1 + count, 1, **ratios)
    else:
        box = axes.get_position()
        edges = {"left": box.x0, "right": box.x1, "bottom": box.y0, "top": box.y1}
        grid = GridSpec(1 + count, 1, figure, **edges, **ratios)
    axes.set_subplotspec(grid[0])
    strips = [figure.add_subplot(grid[row + 1], sharex=axes) for row in range(count)]
    for upper in (axes, *strips[:-1]):
        upper.tick_params(axis="x", labelbottom=False, length=0)
    return strips
