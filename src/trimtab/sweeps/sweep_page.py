"""A sweep as a page: what was chosen, all trials, the metric over the hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from trimtab.figures import with_unit, words_for
from trimtab.reports import (
    DOWN,
    NEUTRAL,
    UP,
    Line,
    Picture,
    Run,
    axes_for,
    curve,
    heatmap,
    in_percent,
    model_line,
    panels,
    run_page,
    styled,
    value_text,
)
from trimtab.sweeps.result import Sweep, Trial
from trimtab.sweeps.space import Range, shown


def sweep_page(found: Sweep, run: Run, environment: dict[str, Any]) -> str:
    """The page of a sweep; its tables and pictures are also saved beside it."""
    chosen, *others = found.tables()
    return run_page(
        run,
        environment,
        f"Sweep of {found.method} on {found.task}",
        f"{found.model['name']}; {model_line(run.config['model'])}; {found.seconds:g} seconds",
        [chosen, *sweep_pictures(found), *others],
        summary=found.summary,
        notes=found.notes,
        flips=found.flips,
    )


def sweep_pictures(found: Sweep) -> list[Picture]:
    """The metric over the one or two hyperparameters that were searched, and trial by trial."""
    valued, names = _valued(found), list(found.space)
    if not valued:
        return []
    if found.max_kl is not None:
        return [_trade_offs(found), _panels(found, valued, names), _history(found)]
    if _is_grid(found):
        pictures = [_heatmap(found, valued, names)]
    elif len(names) == 1:
        pictures = [_line(found, valued, names[0])]
    else:
        pictures = [_panels(found, valued, names)] if names else []
    return [*pictures, _history(found)]


def plot_sweep(found: Sweep, ax: Any) -> Any:
    """The first of the pictures that has one pair of axes."""
    valued, names = _valued(found), list(found.space)
    axes = axes_for(ax, _size_of_grid(found) if _is_grid(found) else (6.5, 3.8))
    if valued and found.max_kl is not None:
        _draw_trade_offs(axes, found)
        axes.legend(frameon=False, fontsize=8)
    elif valued and _is_grid(found):
        _draw_heatmap(axes, found, valued, names)
    elif valued and len(names) == 1:
        _draw_line(axes, found, valued, names[0])
        axes.legend(frameon=False, fontsize=8)
    else:
        _draw_history(axes, found)
        axes.legend(frameon=False, fontsize=8)
    return axes


def _valued(found: Sweep) -> list[Trial]:
    return [t for t in found.trials if t.value is not None and t.state == "complete"]


def _is_grid(found: Sweep) -> bool:
    """Whether two hyperparameters were tried against each other."""
    drawn = any(isinstance(values, Range) for values in found.space.values())
    return len(found.space) == 2 and not drawn


def _size_of_grid(found: Sweep) -> tuple[float, float]:
    rows, columns = (len({str(_of(t, name)) for t in _valued(found)}) for name in found.space)
    return max(5.0, 1.6 + 0.55 * columns), max(3.0, 1.4 + 0.36 * rows)


@styled
def _trade_offs(found: Sweep) -> Picture:
    """What each trial does against what it changes, the front joined."""
    figure, (axes,) = panels((6.5, 4.2))
    _draw_trade_offs(axes, found)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    alt = (
        f"{words_for(found.metric)} of each trial over its KL on neutral texts; the Pareto front "
        "is a line, the chosen trial a diamond"
    )
    return Picture(axes.get_title(), "front", figure, alt)


def _draw_trade_offs(axes: Any, found: Sweep) -> None:
    trials = [t for t in _valued(found) if t.kl is not None]
    axes.plot(*_points_of(trials), "o", color=NEUTRAL, markersize=4, label="trials")
    line = {"drawstyle": "steps-post", "marker": "o", "markersize": 5, "linewidth": 1.2}
    axes.plot(*_points_of(found.front), color=UP, label="Pareto front", **line)
    marked = ((found.best, "D", DOWN, "chosen"), (found.unsearched, "*", "black", "unsearched"))
    for trial, marker, colour, label in marked:
        if trial is not None and trial.kl is not None and trial.value is not None:
            axes.plot(
                *_points_of([trial]), marker, color=colour, markersize=9, label=label, zorder=3
            )
    assert found.max_kl is not None
    axes.axvline(found.max_kl, color=NEUTRAL, linestyle=":", linewidth=1, label="limit of KL")
    _unsteered_line(axes, found)
    axes.set_xscale("symlog", linthresh=max(found.max_kl, 1e-3))
    axes.set(
        xlabel="KL(unsteered || steered) on neutral texts, nats per token",
        ylabel=f"{with_unit(found.metric)}, {_n(found)} validation rows",
        title=f"{found.method} on {found.task}: trade-offs",
    )
    in_percent(axes.yaxis, found.metric)


def _points_of(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [float(t.kl or 0) for t in trials], [float(t.value or 0) for t in trials]


@styled
def _heatmap(found: Sweep, trials: Sequence[Trial], names: Sequence[str]) -> Picture:
    """Two hyperparameters against each other; the chosen setting is framed."""
    figure, (axes,) = panels(_size_of_grid(found))
    _draw_heatmap(axes, found, trials, names)
    base = found.unsteered["validation"].value or 0.0
    return Picture(
        axes.get_title(),
        "heatmap",
        figure,
        f"{words_for(found.metric)} for each {names[0]} and {names[1]}; the middle of the colours "
        f"is the unsteered model, {value_text(base, found.metric)}",
        "The middle of the colours is the unsteered model; the chosen setting is framed.",
    )


def _draw_heatmap(axes: Any, found: Sweep, trials: Sequence[Trial], names: Sequence[str]) -> None:
    down, across = ([_of(t, name) for t in trials] for name in names)
    rows, columns = _ordered(down), _ordered(across)
    grid = np.full((len(rows), len(columns)), np.nan)
    for trial, y, x in zip(trials, down, across, strict=True):
        grid[rows.index(y), columns.index(x)] = trial.value
    base = found.unsteered["validation"].value or 0.0
    reach = float(np.nanmax(np.abs(grid - base))) or 1e-9
    words = {
        (y, x): (value_text(grid[y, x], found.metric), abs(grid[y, x] - base) > 0.6 * reach)
        for y, x in np.argwhere(~np.isnan(grid)).tolist()
        if grid.size <= 400
    }
    label = f"{with_unit(found.metric)} on {_n(found)} validation rows"
    # Purple is above unsteered and orange below: colour-blind readers tell them apart.
    colours: dict[str, Any] = {"cmap": "PuOr", "vmin": base - reach, "vmax": base + reach}
    bar = heatmap(axes.figure, axes, grid, label, words=words, fraction=0.05, **colours)
    in_percent(bar.ax.yaxis, found.metric)
    bar.ax.axhline(base, color="black", linewidth=1)
    if found.best is not None:
        x, y = columns.index(_of(found.best, names[1])), rows.index(_of(found.best, names[0]))
        frame: Any = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
        axes.add_patch(frame)
    axes.set_xticks(range(len(columns)), [shown(v) for v in columns])
    axes.set_yticks(range(len(rows)), [shown(v) for v in rows])
    title = f"{found.method} on {found.task}: {names[0]} × {names[1]}"
    axes.set(xlabel=names[1], ylabel=names[0], title=title)


@styled
def _line(found: Sweep, trials: Sequence[Trial], name: str) -> Picture:
    """One hyperparameter: the metric with its intervals."""
    figure, (axes,) = panels((6.5, 3.8))
    _draw_line(axes, found, trials, name)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    alt = f"{words_for(found.metric)} over {name}, with 95 % intervals"
    return Picture(axes.get_title(), "line", figure, alt)


def _draw_line(axes: Any, found: Sweep, trials: Sequence[Trial], name: str) -> None:
    place = _places(axes, [_of(t, name) for t in trials], found.space[name])
    ordered = sorted(trials, key=lambda t: place[_of(t, name)])
    lines = [
        _points("steered, 95 % intervals", ordered, lambda t: place[_of(t, name)], UP, dash="-")
    ]
    title = f"{found.method} on {found.task}: {name}"
    label = f"{with_unit(found.metric)}, {_n(found)} validation rows"
    curve(axes, lines, xlabel=name, ylabel=label, title=title)
    in_percent(axes.yaxis, found.metric)
    _unsteered_line(axes, found)
    if found.best is not None:
        best = float(found.best.value or 0)
        axes.plot(place[_of(found.best, name)], best, "D", color=DOWN, label="chosen", zorder=3)


@styled
def _panels(found: Sweep, trials: Sequence[Trial], names: Sequence[str]) -> Picture:
    """Several hyperparameters, or drawn ones: the trials over each of them."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (max(6.5, 3.2 * columns), 0.5 + 2.7 * rows)
    figure, every = panels(size, rows, columns, sharey=True)
    chosen = [t for t in trials if found.best is not None and t.number == found.best.number]
    others = [t for t in trials if t not in chosen]
    for axes, name in zip(every, names, strict=False):
        place = _places(axes, [_of(t, name) for t in trials], found.space[name])

        def at(trial: Trial, name: str = name, place: Mapping[Any, float] = place) -> float:
            return place[_of(trial, name)]

        lines = [_points("", others, at, UP), _points("", chosen, at, DOWN, "D")]
        curve(axes, lines, xlabel=name)
        _unsteered_line(axes, found)
    for axes in every[len(names) :]:
        axes.remove()
    for axes in every[::columns]:
        axes.set_ylabel(f"{with_unit(found.metric)}, {_n(found)} rows")
        in_percent(axes.yaxis, found.metric)
    title = f"{found.method} on {found.task}: {', '.join(names)}"
    figure.suptitle(title, fontsize=10)
    note = (
        "Validation rows, 95 % intervals; the chosen setting is a diamond, the dashed line is the "
        "unsteered model."
    )
    alt = f"{words_for(found.metric)} of each trial over {', '.join(names)}, with 95 % intervals"
    return Picture(title, "panels", figure, alt, note)


def _places(axes: Any, values: Sequence[Any], searched: Any) -> dict[Any, float]:
    """Where on the axis each value stands: numbers to scale, others one after the other."""
    ordered = _ordered(values)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in ordered):
        axes.set_xticks(range(len(ordered)), [shown(v) for v in ordered])
        return {v: float(i) for i, v in enumerate(ordered)}
    wide = ordered[0] > 0 and ordered[-1] / ordered[0] > 20
    if searched.log if isinstance(searched, Range) else wide:
        axes.set_xscale("log")
        # A number without powers of ten; over a short range there may be none to label.
        plainly = FuncFormatter(lambda value, _: f"{value:g}")
        short = ordered[-1] / ordered[0] < 10
        axes.xaxis.set_major_formatter(plainly)
        axes.xaxis.set_minor_formatter(plainly if short else NullFormatter())
    elif all(isinstance(v, int) for v in ordered):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return {v: float(v) for v in ordered}


@styled
def _history(found: Sweep) -> Picture:
    """Trial by trial: validation, and test where it was run."""
    figure, (axes,) = panels((6.5, 3.6))
    _draw_history(axes, found)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    what = words_for(found.metric)
    alt = f"{what} of each trial on validation rows, with 95 % intervals, and on test rows"
    return Picture("Trial by trial", "trials", figure, alt)


def _draw_history(axes: Any, found: Sweep) -> None:
    lines = []
    for label, colour, marker, state in (
        ("validation", UP, "o", "complete"),
        ("validation, stopped early", NEUTRAL, "x", "pruned"),
    ):
        trials = [t for t in found.trials if t.value is not None and t.state == state]
        if trials:
            lines.append(_points(label, trials, lambda t: t.number, colour, marker))
    curve(axes, lines, xlabel="trial", ylabel=with_unit(found.metric), title="Trial by trial")
    in_percent(axes.yaxis, found.metric)
    tested = [t for t in found.trials if t.test is not None]
    if tested:
        values = [float(t.test or 0) for t in tested]
        numbers = [t.number for t in tested]
        axes.plot(numbers, values, "+", color=DOWN, markersize=6, label="test")
    _unsteered_line(axes, found)
    _unsteered_line(axes, found, "test", DOWN)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _points(
    label: str, trials: Sequence[Trial], at: Any, colour: str, marker: str = "o", dash: str = "none"
) -> Line:
    """Trials with their intervals; many of them are easier to tell apart with pale ones."""
    figures = [trial.estimate for trial in trials if trial.estimate is not None]
    places = [at(trial) for trial in trials]
    return Line(label, places, figures, colour, marker, dash, faint=dash == "none")


def _unsteered_line(
    axes: Any, found: Sweep, part: str = "validation", colour: str = "black"
) -> None:
    base = found.unsteered[part].value
    if base is not None:
        style = {"linestyle": "--" if part == "validation" else ":", "linewidth": 1}
        axes.axhline(base, color=colour, label=f"unsteered, {part}", **style)


def _n(found: Sweep) -> int:
    return found.unsteered["validation"].n


def _of(trial: Trial, name: str) -> Any:
    value = trial.params[name]
    return tuple(value) if isinstance(value, list) else value


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Values once each; numbers by their size, others as they came."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(v, int | float) for v in distinct):
        return sorted(distinct)
    return distinct
