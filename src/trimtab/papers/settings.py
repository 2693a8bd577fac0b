"""Settings of a method on the rows of a task: tried, compared with no steering, chosen, shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trimtab import options
from trimtab.contrasts import Part
from trimtab.evaluation import Asked
from trimtab.figures import Difference, Estimate, corrected, more_is_better, with_unit
from trimtab.model import LanguageModel
from trimtab.reports import Line, Table, cell, change_text, tested_cell
from trimtab.steering import Steering
from trimtab.sweeps import FINE, Measured, TaskRows, Values, choose, mean_of, shown
from trimtab.terminal import progress


@dataclass(frozen=True)
class Figure:
    """A metric under a steering, and how it differs from the unsteered model's."""

    mean: Estimate
    change: Difference | None = None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.mean), "change": self.change and self.change.as_json()}


#: By metric.
Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Tried:
    """One steering that was tried: its parameters, and its figures on the validation rows."""

    params: dict[str, Any]
    steering: Steering
    values: Values = field(repr=False)
    figures: Figures

    def as_json(self) -> dict[str, Any]:
        return {**self.params, "figures": plain(self.figures)}


def rows_of(
    language_model: LanguageModel, task: Asked, asked: options.Rows = options.Rows(), seed: int = 0
) -> TaskRows:
    """The rows of a task that an analysis measures on."""
    measured = Measured(answering=options.Answering(seed=seed))
    return TaskRows(language_model, task, asked, measured)


def means(values: Values) -> dict[str, Figure]:
    """Of each metric the mean with its interval."""
    return {metric: Figure(mean_of(metric, each)) for metric, each in values.items()}


def figures_of(rows: TaskRows, values: Values, part: Part = "validation") -> dict[str, Figure]:
    """Of each metric the mean, and the change against the unsteered model."""
    return {
        metric: replace(figure, change=rows.change(values, metric, part))
        for metric, figure in means(values).items()
    }


def plain(figures: Figures) -> dict[str, Any]:
    """For JSON."""
    return {metric: figure.as_json() for metric, figure in figures.items()}


def plain_means(figures: Figures) -> dict[str, Any]:
    """For JSON, without changes."""
    return {metric: asdict(figure.mean) for metric, figure in figures.items()}


def measured(rows: TaskRows, settings: Sequence[tuple[dict[str, Any], Steering]]) -> list[Tried]:
    """Each steering on the validation rows."""
    tried = []
    with progress("trying settings", len(settings)) as advance:
        for params, steering in settings:
            values = rows.values(steering)
            tried.append(Tried(params, steering, values, means(values)))
            advance(1)
    return tried


def compared(rows: TaskRows, tried: Sequence[Tried]) -> list[Tried]:
    """With changes against the unsteered model, whose p are corrected for their number."""
    changes = {
        metric: corrected([rows.change(each.values, metric) for each in tried])
        for metric in tried[0].figures
    }
    return [
        replace(
            each,
            figures={m: Figure(f.mean, changes[m][i]) for m, f in each.figures.items()},
        )
        for i, each in enumerate(tried)
    ]


def best_of(rows: TaskRows, tried: Sequence[Tried]) -> Tried:
    """What is best by the task's first metric on the validation rows."""
    metric = rows.first
    best = choose(tried, lambda each: each.figures[metric].mean.value, more_is_better(metric))
    assert best is not None
    return best


# -- for people -----------------------------------------------------------------------------------


def settings_table(title: str, tried: Sequence[Tried], base: Figures, count: int) -> Table:
    names = list(tried[0].params)
    rows: list[list[Any]] = [["unsteered", *[""] * (len(names) - 1)]]
    rows[0] += [text for metric, figure in base.items() for text in (cell(figure.mean, metric), "")]
    for each in tried:
        row = [_counted(value) for value in each.params.values()]
        for metric, figure in each.figures.items():
            row += [cell(figure.mean, metric), change_cell(figure.change, metric)]
        rows.append(row)
    heads = names + [head for metric in base for head in (with_unit(metric), "change")]
    note = f"n = {count} validation rows; p corrected for {len(tried)} comparisons."
    return Table(title, heads, rows, note)


def change_cell(found: Difference | None, metric: str) -> str:
    """The flips of a change, or its mean, with its p."""
    if found is None:
        return ""
    mean = f"{change_text(found.difference, metric)} " if found.gained is None else ""
    return mean + tested_cell(found)


def _counted(value: Any) -> str:
    """Whole numbers with commas, to be read rather than typed."""
    return f"{value:,}" if isinstance(value, int) else shown(value)


def drawn_metrics(rows: TaskRows, figures: Figures) -> list[str]:
    """The metrics that a picture has room for."""
    return [metric for metric in figures if metric in (rows.first, "accuracy", FINE)]


def line_of(
    label: str,
    tried: Sequence[Tried],
    metric: str,
    colour: str,
    at: Callable[[int, dict[str, Any]], float],
) -> Line:
    """A metric of several settings, each `at` its place (by its number and parameters)."""
    places = [at(i, each.params) for i, each in enumerate(tried)]
    return Line(label, places, [each.figures[metric].mean for each in tried], colour)
