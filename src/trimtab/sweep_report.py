"""A sweep as a page: what was chosen, all trials, the metric over the hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trimtab.plots import DOWN, NEUTRAL, STYLE, UP, save_figure
from trimtab.report import Picture, Table, interval, model_line, page
from trimtab.runs import SharedRun
from trimtab.spaces import shown
from trimtab.sweep import Sweep, Trial

#: Trials in the page's table; the records have all.
_MOST_ROWS = 400


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
        pictures = []
        names = list(found.space)
        valued = [t for t in found.trials if t.value is not None and t.state == "complete"]
        if len(names) == 2 and valued:
            pictures.append(heatmap(found, valued, names))
        elif len(names) == 1 and valued:
            pictures.append(_line(found, valued, names[0]))
        if valued:
            pictures.append(_history(found))
        return pictures


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
    # Blue is more than unsteered and orange less, in a map that colour-blind readers tell apart.
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
        frame: Any = matplotlib.patches.Rectangle(
            (x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2
        )
        axes.add_patch(frame)
    axes.set_xticks(range(len(columns)), [shown(v) for v in columns])
    axes.set_yticks(range(len(rows)), [shown(v) for v in rows])
    axes.set(xlabel=names[1], ylabel=names[0])
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05)
    bar.set_label(f"{found.metric} on {_n(found)} validation rows")
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
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    ordered = _ordered([_of(t, name) for t in trials])
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in ordered)
    place = {v: (v if numbers else i) for i, v in enumerate(ordered)}
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
        axes.plot(place[_of(found.best, name)], best, "D", color=DOWN, label="chosen")
    if not numbers:
        axes.set_xticks(range(len(ordered)), [shown(v) for v in ordered])
    axes.set(xlabel=name, ylabel=f"{found.metric}, {_n(found)} validation rows")
    axes.legend(frameon=False)
    title = f"{found.method} on {found.task}: {name}"
    axes.set_title(title)
    return Picture(title, "line", figure, f"{found.metric} over {name}, with 95 % intervals")


def _history(found: Sweep) -> Picture:
    """Trial by trial: validation, and test where it was run."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for state, marker, colour in (("complete", "o", UP), ("pruned", "x", NEUTRAL)):
        some = [t for t in found.trials if t.state == state and t.value is not None]
        if some:
            axes.plot(
                [t.number for t in some],
                [float(t.value or 0) for t in some],
                marker,
                color=colour,
                markersize=4,
                label=f"validation, {state}",
            )
    tested = [t for t in found.trials if t.test is not None]
    if tested:
        axes.plot(
            [t.number for t in tested],
            [float(t.test or 0) for t in tested],
            "+",
            color=DOWN,
            markersize=6,
            label="test",
        )
    _unsteered_line(axes, found)
    axes.set(xlabel="trial", ylabel=found.metric)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Trial by trial")
    return Picture("Trial by trial", "trials", figure, f"{found.metric} of each trial")


def _unsteered_line(axes: Any, found: Sweep) -> None:
    base = found.unsteered["validation"].value
    if base is not None:
        axes.axhline(base, color="black", linestyle="--", linewidth=1, label="unsteered")


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
            _cell(base["validation"].value, base["validation"].ci95),
            _cell(base["test"].value, base["test"].ci95),
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
                _params(best),
                _cell(best.value, best.ci95),
                _cell(best.test, best.test_ci95),
                "" if d is None else f"{d.difference:+.4g} {interval(d.ci95)}",
                flips,
            ]
        )
    if found.oracle is not None:
        rows.append(
            [
                "oracle: best on the test rows",
                _params(found.oracle),
                _cell(found.oracle.value, found.oracle.ci95),
                _cell(found.oracle.test, found.oracle.test_ci95),
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
        "The oracle was chosen on the rows that it is reported on: no one has it beforehand.",
    )


def _trials(found: Sweep) -> Table:
    shown_trials = found.trials[:_MOST_ROWS]
    rows = [
        [
            t.number,
            _params(t),
            t.state,
            _cell(t.value, t.ci95),
            t.n,
            _cell(t.test, t.test_ci95),
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


def _params(trial: Trial) -> str:
    return " ".join(f"{name}={shown(value)}" for name, value in trial.params.items())


def _cell(value: float | None, ci95: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value:.4g} {interval(ci95)}"
