"""What an evaluation found: its figures, and how people see them: as tables, in a sentence, drawn,
as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from trimtab.errors import TrimtabError
from trimtab.figures import (
    Difference,
    Estimate,
    Record,
    Result,
    comparisons_of,
    flips_of,
    in_order,
    more_is_better,
    over_settings,
    results_of,
    with_unit,
    words_for,
)
from trimtab.reports.page import Picture, model_line, run_page
from trimtab.reports.presented import Presented
from trimtab.reports.run import Run
from trimtab.reports.tables import (
    Table,
    cell,
    change_words,
    difference_cell,
    tested_cell,
    value_text,
    wrong_way_cell,
)

#: Tasks that the sentence on top names one by one.
_NAMED = 4
#: Steerings of which all are shown where texts are.
_FEW = 3


class Measured(Protocol):
    """Something that was measured beside the tasks, with tables of its own."""

    def tables(self) -> list[Table]: ...

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, repr=False)
class Evaluation(Presented):
    """The figures of an evaluation, and the records that they were computed from; `drift` is
    whether effects last, where that was measured."""

    results: tuple[Result, ...]
    comparisons: tuple[Difference, ...]
    records: tuple[Record, ...]
    seconds: float
    model: dict[str, Any]
    notes: tuple[str, ...] = ()
    drift: Measured | None = None

    def value(
        self, task: str, metric: str = "accuracy", steering: str | None = None, **more: Any
    ) -> Result:
        """One result by its task, metric and steering (None: unsteered)."""
        wanted = {"task": task, "metric": metric, "steering": steering, **more}
        for result in self.results:
            if all(getattr(result, key) == value for key, value in wanted.items()):
                return result
        raise TrimtabError(f"there is no result with {wanted}")

    def flips(self, metric: str | None = None) -> list[tuple[Record, Record]]:
        """(unsteered, steered) records of each example whose rating changed.

        `metric` is by default the first that a task has and that rates examples.
        """
        return flips_of(self.records, metric)

    def samples(self, prompts: int = 3) -> list[dict[str, Any]]:
        """What is written for the first prompts of each task of coherence, unsteered beside
        steered; of many steerings the one in the middle and the last."""
        written = [r for r in self.records if r["task"].startswith("coherence:")]
        steered = list(dict.fromkeys(r["steering"] for r in written if r["steering"] is not None))
        if len(steered) > _FEW:
            steered = [steered[(len(steered) - 1) // 2], steered[-1]]
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for record in written:
            place = record["task"], record["index"]
            if record["index"] < prompts and record["steering"] in (None, *steered):
                about = {"task": record["task"], "prompt": record["prompt"], "outputs": []}
                output = {"steering": record["steering"], "text": record["output"]}
                found.setdefault(place, about)["outputs"].append(output)
        return list(found.values())

    def by_task(self) -> list[tuple[str, list[tuple[Result, Difference | None]]]]:
        """For people: a title for each task and protocol, and its results with their comparisons.

        Of each metric the unsteered figure comes first.
        """
        compared = {(c.task, c.protocol, c.metric, c.steering): c for c in self.comparisons}
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.task, result.protocol), []).append(result)
        tables = []
        for (task, protocol), results in groups.items():
            title = f"{task}, {protocol}'s protocol" if protocol else task
            rank = {metric: i for i, metric in enumerate(dict.fromkeys(r.metric for r in results))}
            rows = [
                (r, compared.get((task, protocol, r.metric, str(r.steering))))
                for r in sorted(results, key=lambda r: rank[r.metric])
            ]
            tables.append((title, rows))
        return tables

    def tables(self) -> list[Table]:
        """A table for each task and protocol, and whether effects last where that was measured."""
        heads = ["metric", "steering", "value", "n", "unclear", "difference", "flipped"]
        heads.append("moved the wrong way")
        tables = []
        for title, results in self.by_task():
            rows = [
                [
                    with_unit(r.metric),
                    short_name(r.steering),
                    cell(r, r.metric) or "none is clear",
                    r.n,
                    r.unclear or "",
                    difference_cell(difference),
                    tested_cell(difference),
                    wrong_way_cell(difference),
                ]
                for r, difference in results
            ]
            # Columns that this task has nothing for are left out.
            tables.append(Table(title, heads, rows).without_empty_columns(first=4))
        return tables if self.drift is None else [*tables, *self.drift.tables()]

    @property
    def summary(self) -> str:
        """One sentence: the first metric of each task, steered beside unsteered."""
        first = {(r.task, r.protocol): r for r in reversed(self.results)}
        compared = [c for c in self.comparisons if first[c.task, c.protocol].metric == c.metric]
        if not compared:
            return _alone(list(reversed(first.values())))
        steerings = list(dict.fromkeys(c.steering for c in compared))
        if len(compared) == 1:
            return self._compared(compared[0], f"With {short_name(compared[0].steering)}")
        if len(steerings) == 1:
            said = [
                f"{words_for(c.metric)} on {c.task} {change_words(c)}" for c in compared[:_NAMED]
            ]
            more = f"; {len(compared) - _NAMED} more below" if len(compared) > _NAMED else ""
            return f"With {short_name(steerings[0])}: {'; '.join(said)}{more}."
        place = (compared[0].task, compared[0].protocol)
        own = [c for c in compared if (c.task, c.protocol) == place]
        sign = 1 if more_is_better(own[0].metric) else -1
        best = max(own, key=lambda c: sign * c.difference)
        who = f"Of {len(steerings)} steerings {short_name(best.steering)} does best: with it"
        return self._compared(best, who)

    def _compared(self, found: Difference, who: str) -> str:
        """A sentence about one comparison."""
        after, before = (
            self.value(found.task, found.metric, steering, protocol=found.protocol).value
            for steering in (found.steering, None)
        )
        figures = ""
        if after is not None and before is not None:
            new, old = (value_text(value, found.metric) for value in (after, before))
            figures = f"is {new}, unsteered {old}: "
        return (
            f"{who} {words_for(found.metric)} on {found.task} {figures}{change_words(found)}, "
            f"n = {found.n}."
        )

    def plot(self, ax: Any = None) -> Any:
        """Each task's first metric under each steering, with its interval: on matplotlib axes,
        which are returned."""
        from trimtab.reports.charts import axes_for, forest, one_line_each

        tasks = self.by_task()
        axes = axes_for(ax, (6.5, 1.2 + 0.5 * len(tasks)))
        figures: dict[str, dict[float, Estimate]] = {}
        for place, (_, results) in enumerate(tasks):
            for r, _ in results:
                if r.metric == results[0][0].metric and r.estimate is not None:
                    figures.setdefault(short_name(r.steering), {})[place] = r.estimate
        names = [f"{title}: {with_unit(results[0][0].metric)}" for title, results in tasks]
        lines = one_line_each(figures)
        forest(axes, names, lines, apart=min(0.28, 0.8 / max(1, len(lines))))
        axes.set_xlabel("95 % intervals")
        axes.legend(frameon=False, fontsize=8)
        return axes

    def as_json(self) -> dict[str, Any]:
        """What `trimtab evaluate --json` prints."""
        samples = self.samples()
        return {
            "results": [asdict(result) for result in self.results],
            "comparisons": [difference.as_json() for difference in self.comparisons],
            "seconds": self.seconds,
            "model": self.model,
            "notes": list(self.notes),
            **({"samples": samples} if samples else {}),
            **({} if self.drift is None else {"drift": self.drift.as_json()}),
        }


def short_name(steering: str | None) -> str:
    """A steering's name for people: files without their directories."""
    if steering is None:
        return "unsteered"
    return " + ".join(part.rpartition("/")[2] for part in steering.split(" + "))


def _alone(results: Sequence[Result]) -> str:
    """A sentence about figures beside which there are none of the unsteered model, or no others."""
    said = [
        f"{words_for(r.metric)} on {r.task} is "
        + (f"{cell(r, r.metric)}, n = {r.n}" if r.value is not None else "clear of no example")
        for r in results[:_NAMED]
    ]
    more = f"; {len(results) - _NAMED} more below" if len(results) > _NAMED else ""
    who = "Without steering" if results and results[0].steering is None else "Steered"
    return f"{who} {'; '.join(said)}{more}." if said else "Nothing was evaluated."


def summarise(
    records: Sequence[Record], model: dict[str, Any], notes: Sequence[str] = ()
) -> Evaluation:
    """All figures of a run."""
    ordered = in_order(records)
    results = results_of(ordered)
    return Evaluation(
        tuple(results),
        tuple(comparisons_of(ordered)),
        tuple(ordered),
        round(sum(record["seconds"] for record in records), 2),
        model,
        (*notes, *over_settings(results)),
    )


def evaluation_page(
    evaluation: Evaluation,
    run: Run,
    environment: dict[str, Any],
    more: Sequence[Table | Picture] = (),
) -> str:
    """The page of an evaluation, with what else is to be seen of it; tables and pictures are also
    saved beside it."""
    model = run.config["model"]
    return run_page(
        run,
        environment,
        f"Evaluation of {model['name']}",
        f"{model_line(model)}; {evaluation.seconds:g} seconds",
        [*evaluation.tables(), *more],
        summary=evaluation.summary,
        notes=evaluation.notes,
        flips=evaluation.flips(),
    )
