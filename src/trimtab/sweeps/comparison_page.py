"""A comparison as a page: tables, differences with their intervals, gain against cost."""

from __future__ import annotations

from typing import Any

from trimtab.figures import Difference, Estimate, with_unit, words_for
from trimtab.reports import (
    MARKERS,
    NEUTRAL,
    Line,
    Picture,
    Run,
    bars,
    curve,
    in_percent,
    look_of,
    model_line,
    panels,
    run_page,
    styled,
)
from trimtab.sweeps.comparison import Comparison

#: A difference is called one where chance alone makes it with less than this probability.
_LEVEL = 0.05


def comparison_page(found: Comparison, run: Run, environment: dict[str, Any]) -> str:
    """The page of a comparison; its tables and pictures are also saved beside it."""
    worth, *tables = found.tables()
    more = [] if found.capability is None else found.capability.tables()
    return run_page(
        run,
        environment,
        f"{len(found.rows)} methods on {found.task}",
        f"{found.model['name']}; {model_line(run.config['model'])}; {found.seconds:g} seconds",
        [worth, *comparison_pictures(found), *tables, *more],
        summary=found.summary,
        notes=found.notes,
    )


@styled
def comparison_pictures(found: Comparison) -> list[Picture]:
    """Differences with their intervals, and gain against cost."""
    gains = _gains(found)
    if not gains:
        return []
    figure, (axes,) = panels((7, 1.2 + 0.42 * len(gains)))
    draw_differences(axes, found)
    differences = Picture(
        "Against the unsteered model",
        "differences",
        figure,
        f"{_quantity(found)}, with 95 % intervals, for {', '.join(gains)}",
        f"Coloured where the corrected p is below {_LEVEL:g}.",
    )
    return [differences, _plane(found)]


def draw_differences(axes: Any, found: Comparison) -> None:
    """A bar for each method, with its interval."""
    gains = _gains(found)
    clear = [name for name, one in gains.items() if (one.corrected_p or 0.0) < _LEVEL]
    label = _quantity(found)
    if gains:
        label += f" (n = {next(iter(gains.values())).n}, 95 % intervals)"
    bars(axes, {name: _estimate(one) for name, one in gains.items()}, label, clear)
    in_percent(axes.xaxis, found.metric)


def _gains(found: Comparison) -> dict[str, Difference]:
    return {row.name: row.against for row in found.rows if row.against is not None}


def _quantity(found: Comparison) -> str:
    """What the differences are of, for an axis."""
    return f"{with_unit(found.metric)}: steered minus unsteered"


def _estimate(difference: Difference) -> Estimate:
    return Estimate(difference.difference, *difference.ci95, difference.n)


def _plane(found: Comparison) -> Picture:
    """Gain against cost, as chosen and at budgets; prompts stand in all as they are."""
    groups = {"as chosen": found.rows}
    groups |= {f"at {one.kl:g} nats of KL": one.methods for one in found.at_budgets}
    size = (4.6 * len(groups) + 1.6, 3.8)
    figure, every = panels(size, 1, len(groups), sharex=True, sharey=True)
    places = {row.name: i for i, row in enumerate(found.rows)}
    for axes, (title, rows) in zip(every, groups.items(), strict=True):
        lines = [
            Line(
                row.name,
                [row.cost],
                [_estimate(row.against)],
                *look_of(places[row.name]),
                "none",
            )
            for row in rows
            if row.against is not None and row.cost is not None
        ]
        lines += _asked_points(found)
        curve(axes, lines, title=title, xlabel="cost on plain text, nats per token")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
    every[0].set_ylabel(_quantity(found))
    in_percent(every[0].yaxis, found.metric)
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return Picture(
        "Gain and cost",
        "gain-and-cost",
        figure,
        f"gain in {words_for(found.metric)} against cost on plain text for each method"
        + (" and each prompt" if found.prompts is not None else ""),
        "Grey are prompts, which have no dial." if found.prompts is not None else "",
    )


def _asked_points(found: Comparison) -> list[Line]:
    """Prompts that are said without a steering."""
    rows = () if found.prompts is None else found.prompts.rows
    return [
        Line(
            row.name,
            [row.cost],
            [_estimate(row.against)],
            NEUTRAL,
            MARKERS[i % len(MARKERS)],
            "none",
        )
        for i, row in enumerate(row for row in rows if row.asks and row.dial is None)
        if row.against is not None and row.cost is not None
    ]
