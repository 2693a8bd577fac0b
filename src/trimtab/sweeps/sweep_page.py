"""A sweep as a page: what was chosen, all trials, the metric over the hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from trimtab.figures import metric_of
from trimtab.reports import (
    DOWN,
    NEUTRAL,
    STYLE,
    UP,
    Picture,
    SharedRun,
    Table,
    cell,
    interval,
    model_line,
    page,
    save_figure,
)
from trimtab.sweeps.result import Sweep, Trial
from trimtab.sweeps.space import Range, setting, shown

#: Trials in the page's table; the records have all.
_MOST_ROWS = 400
_MARKERS = {"complete": "o", "pruned": "x"}


def sweep_page(found: Sweep, run: SharedRun, environment: dict[str, Any]) -> str:
    """The page of a sweep; its pictures are also saved beside it."""
    blocks: list[Table | Picture] = [_chosen(found)]
    pictures = sweep_pictures(found)
    blocks += pictures
    blocks.append(_trials(found))
    if run.path is not None:
        directory = run.path / "pictures"
        directory.mkdir(exist_ok=True)
        for picture in pictures:
            save_figure(picture.figure, directory, picture.name)
    return page(
        f"Sweep of {found.method} on {found.task}",
        f"{found.model['name']}; {model_line(run.config['model'])}; {found.seconds:g} seconds",
        blocks,
        run.config,
        environment,
        notes=found.notes,
        flips=found.flips,
    )


def sweep_pictures(found: Sweep) -> list[Picture]:
    """The metric over the one or two hyperparameters that were searched, and trial by trial."""
    with matplotlib.rc_context(STYLE):
        valued = [t for t in found.trials if t.value is not None and t.state == "complete"]
        if not valued:
            return []
        names = list(found.space)
        drawn = any(isinstance(values, Range) for values in found.space.values())
        if len(names) == 2 and not drawn:
            pictures = [heatmap(found, valued, names)]
        elif len(names) == 1:
            pictures = [_line(found, valued, names[0])]
        else:
            pictures = [_panels(found, valued, names)] if names else []
        return [*pictures, _history(found)]


def heatmap(found: Sweep, trials: Sequence[Trial], names: Sequence[str]) -> Picture:
    """Two hyperparameters against each other; the chosen setting is framed."""
    down, across = ([_of(t, name) for t in trials] for name in names)
    rows, columns = _ordered(down), _ordered(across)
    grid = np.full((len(rows), len(columns)), np.nan)
    for trial, y, x in zip(trials, down, across, strict=True):
        grid[rows.index(y), columns.index(x)] = trial.value
    size = (max(5.0, 1.6 + 0.55 * len(columns)), max(3.0, 1.4 + 0.36 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    base = found.unsteered["validation"].value or 0.0
    reach = float(np.nanmax(np.abs(grid - base))) or 1e-9
    # Purple is above unsteered and orange below: colour-blind readers tell them apart.
    drawn = axes.imshow(
        grid, cmap="PuOr", vmin=base - reach, vmax=base + reach, aspect="auto", origin="lower"
    )
    for y in range(len(rows)):
        for x in range(len(columns)):
            if not np.isnan(grid[y, x]) and grid.size <= 400:
                strong = abs(grid[y, x] - base) > 0.6 * reach
                axes.text(
                    x,
                    y,
                    f"{grid[y, x]:.3g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if strong else "black",
                )
    if found.best is not None:
        x = columns.index(_of(found.best, names[1]))
        y = rows.index(_of(found.best, names[0]))
        frame: Any = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
        axes.add_patch(frame)
    axes.set_xticks(range(len(columns)), [shown(v) for v in columns])
    axes.set_yticks(range(len(rows)), [shown(v) for v in rows])
    axes.set(xlabel=names[1], ylabel=names[0])
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05)
    bar.set_label(f"{_quantity(found)} on {_n(found)} validation rows")
    bar.ax.axhline(base, color="black", linewidth=1)
    title = f"{found.method} on {found.task}: {names[0]} × {names[1]}"
    axes.set_title(title)
    return Picture(
        title,
        "heatmap",
        figure,
        f"{found.metric} for each {names[0]} and {names[1]}; the middle of the colours is the "
        f"unsteered model, {base:.4g}",
        "The middle of the colours is the unsteered model; the chosen setting is framed.",
    )


def _line(found: Sweep, trials: Sequence[Trial], name: str) -> Picture:
    """One hyperparameter: the metric with its intervals."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    ordered = _ordered([_of(t, name) for t in trials])
    place = _places(axes, ordered, found.space[name])
    rows = sorted(trials, key=lambda t: place[_of(t, name)])
    x = [place[_of(t, name)] for t in rows]
    y = np.array([t.value for t in rows], dtype=float)
    ends = np.array([t.ci95 or (t.value, t.value) for t in rows], dtype=float)
    axes.errorbar(
        x,
        y,
        yerr=[y - ends[:, 0], ends[:, 1] - y],
        color=UP,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.2,
        label="steered, 95 % intervals",
    )
    _unsteered_line(axes, found)
    if found.best is not None:
        best = float(found.best.value or 0)
        axes.plot(place[_of(found.best, name)], best, "D", color=DOWN, label="chosen", zorder=3)
    axes.set(xlabel=name, ylabel=f"{_quantity(found)}, {_n(found)} validation rows")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    title = f"{found.method} on {found.task}: {name}"
    axes.set_title(title)
    return Picture(title, "line", figure, f"{found.metric} over {name}, with 95 % intervals")


def _panels(found: Sweep, trials: Sequence[Trial], names: Sequence[str]) -> Picture:
    """Several hyperparameters, or drawn ones: the trials over each of them."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(6.5, 3.2 * columns), 0.5 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for axes, name in zip(grid.flat, names, strict=False):
        values = [_of(t, name) for t in trials]
        place = _places(axes, values, found.space[name])
        for t, value in zip(trials, values, strict=True):
            chosen = found.best is not None and t.number == found.best.number
            _point(axes, place[value], t, DOWN if chosen else UP, "D" if chosen else "o")
        _unsteered_line(axes, found)
        axes.set_xlabel(name)
    for row in grid:
        row[0].set_ylabel(f"{_quantity(found)}, {_n(found)} rows")
    title = f"{found.method} on {found.task}: {', '.join(names)}"
    figure.suptitle(title, fontsize=10)
    note = (
        "Validation rows, 95 % intervals; the chosen setting is a diamond, the dashed line is the "
        "unsteered model."
    )
    alt = f"{found.metric} of each trial over {', '.join(names)}, with 95 % intervals"
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
        axes.xaxis.set_major_formatter(FuncFormatter(_plainly))
        short = ordered[-1] / ordered[0] < 10  # there may be no power of ten to label
        axes.xaxis.set_minor_formatter(FuncFormatter(_plainly) if short else NullFormatter())
    elif all(isinstance(v, int) for v in ordered):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return {v: float(v) for v in ordered}


def _plainly(value: float, _: Any) -> str:
    """A number on an axis, without powers of ten."""
    return f"{value:g}"


def _point(axes: Any, x: float, trial: Trial, colour: str, marker: str = "o") -> None:
    """The value of a trial with its interval."""
    value = float(trial.value or 0)
    low, high = trial.ci95 or (value, value)
    axes.errorbar(
        x,
        value,
        yerr=[[value - low], [high - value]],
        color=colour,
        ecolor=(colour, 0.35),
        marker=marker,
        markersize=4,
        linewidth=1,
        zorder=3 if colour == DOWN else 2,
    )


def _history(found: Sweep) -> Picture:
    """Trial by trial: validation, and test where it was run."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for t in found.trials:
        if t.value is not None:
            _point(axes, t.number, t, UP if t.state == "complete" else NEUTRAL, _MARKERS[t.state])
    tested = [t for t in found.trials if t.test is not None]
    axes.plot(
        [t.number for t in tested],
        [float(t.test or 0) for t in tested],
        "+",
        color=DOWN,
        markersize=6,
    )
    states = [t.state for t in found.trials if t.value is not None]
    names = [("validation", UP, "complete"), ("validation, stopped early", NEUTRAL, "pruned")]
    marks: list[Any] = [
        Line2D([], [], color=colour, marker=_MARKERS[state], markersize=4, label=label)
        for label, colour, state in names
        if state in states
    ]
    if tested:
        marks.append(Line2D([], [], color=DOWN, marker="+", linestyle="", label="test"))
    marks.append(_unsteered_line(axes, found))
    marks.append(_unsteered_line(axes, found, "test", DOWN))
    axes.set(xlabel="trial", ylabel=_quantity(found))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(
        handles=[mark for mark in marks if mark is not None],
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=3,
    )
    axes.set_title("Trial by trial")
    alt = f"{found.metric} of each trial on validation rows, with 95 % intervals, and on test rows"
    return Picture("Trial by trial", "trials", figure, alt)


def _unsteered_line(
    axes: Any, found: Sweep, part: str = "validation", colour: str = "black"
) -> Any:
    base = found.unsteered[part].value
    if base is None:
        return None
    style = "--" if part == "validation" else ":"
    label = f"unsteered, {part}"
    return axes.axhline(base, color=colour, linestyle=style, linewidth=1, label=label)


def _quantity(found: Sweep) -> str:
    """The metric with its unit, for an axis."""
    metric = metric_of(found.metric)
    shows = metric.unit and metric.kind == "mean"  # that a rate is a share goes without saying
    return f"{found.metric} [{metric.unit}]" if shows else found.metric


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


def _chosen(found: Sweep) -> Table:
    """The chosen setting beside the unsteered model and the oracle."""
    rows: list[list[Any]] = []
    base = found.unsteered
    rows.append(
        [
            "unsteered",
            "",
            cell(base["validation"].value, base["validation"].ci95),
            cell(base["test"].value, base["test"].ci95),
            "",
            "",
        ]
    )
    if found.best is not None:
        best, d = found.best, found.difference
        flips = "" if d is None or d.p is None else f"+{d.gained} -{d.lost} (p {d.p:.2g})"
        rows.append(
            [
                "chosen on validation",
                setting(best.params),
                cell(best.value, best.ci95),
                cell(best.test, best.test_ci95),
                "" if d is None else f"{d.difference:+.4g} {interval(d.ci95)}",
                flips,
            ]
        )
    note = ""
    if found.oracle is not None:
        note = "The oracle was chosen on the rows that it is reported on: no one has it beforehand."
        rows.append(
            [
                "oracle: best on the test rows",
                setting(found.oracle.params),
                cell(found.oracle.value, found.oracle.ci95),
                cell(found.oracle.test, found.oracle.test_ci95),
                "",
                "",
            ]
        )
    return Table(
        f"{found.metric} on {found.task}",
        [
            "",
            "setting",
            f"validation, n = {base['validation'].n}",
            f"test, n = {base['test'].n}",
            "difference on test",
            "flipped",
        ],
        rows,
        note,
    )


def _trials(found: Sweep) -> Table:
    shown_trials = found.trials[:_MOST_ROWS]
    rows = [
        [
            t.number,
            setting(t.params),
            t.state,
            cell(t.value, t.ci95),
            t.n,
            cell(t.test, t.test_ci95),
            "" if t.cost is None else f"{t.cost:.3f}",
            f"{t.seconds:.1f}",
        ]
        for t in shown_trials
    ]
    heads = ["trial", "setting", "state", "validation", "n", "test", "cost, nats/token", "seconds"]
    kept = [i for i in range(len(heads)) if any(row[i] != "" for row in rows)]
    title = "All trials"
    if len(found.trials) > _MOST_ROWS:
        title = f"The first {_MOST_ROWS} of {len(found.trials)} trials"
    return Table(title, [heads[i] for i in kept], [[row[i] for i in kept] for row in rows])
