"""Evaluates a model on tasks, unsteered and steered, and compares the two on the same examples.

Every example leaves a record; all figures are computed from the records, so that a run which was
interrupted and continued gives the table of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.answering import Entry, Measure, Settings, answer
from trimtab.contrasts import Part
from trimtab.errors import TrimtabError
from trimtab.metrics.intervals import Estimate, mean_interval, rate_interval
from trimtab.model import LanguageModel
from trimtab.runs import Run
from trimtab.steering import Steering, Steerings
from trimtab.tasks import Protocol, Task, check_protocol, find_task
from trimtab.tasks.data import file_digest, source_file

#: What is evaluated: one steering (or several that act together), some alternatives, or
#: alternatives by name.
Alternatives = (
    Steering
    | Steerings
    | None
    | Sequence[Steering | Steerings]
    | Mapping[str, Steering | Steerings]
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One figure: `value` over `n` examples with its 95 % interval.

    `steering` is None for the unsteered model. `unclear` examples got no value and are not in n.
    """

    task: str
    protocol: str
    metric: str
    value: float
    n: int
    ci95: tuple[float, float] | None
    steering: str | None
    unclear: int = 0


@dataclass(frozen=True)
class Comparison:
    """Steered minus unsteered on the same examples, with a paired bootstrap interval (95 %).

    For what is right or wrong, `gained` and `lost` count the examples that flipped each way.
    """

    task: str
    protocol: str
    metric: str
    difference: float
    ci95: tuple[float, float]
    n: int
    steering: str
    gained: int | None = None
    lost: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation, and the records that they were computed from."""

    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    records: tuple[Record, ...]
    seconds: float
    model: dict[str, Any]
    notes: tuple[str, ...] = ()

    def value(
        self, task: str, metric: str = "accuracy", steering: str | None = None, **more: Any
    ) -> Result:
        """One result by its task, metric and steering (None: unsteered)."""
        wanted = {"task": task, "metric": metric, "steering": steering, **more}
        for result in self.results:
            if all(getattr(result, key) == value for key, value in wanted.items()):
                return result
        raise TrimtabError(f"there is no result with {wanted}")

    def flips(self, metric: str = "accuracy") -> list[tuple[Record, Record]]:
        """(unsteered, steered) records of each example whose rating changed."""
        found = []
        for before, after in _paired(self.records):
            old, new = before["values"].get(metric), after["values"].get(metric)
            if old is not None and new is not None and old != new:
                found.append((before, after))
        return found

    def as_json(self) -> dict[str, Any]:
        """What `trimtab evaluate --json` prints."""
        return {
            "results": [asdict(result) for result in self.results],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "seconds": self.seconds,
            "model": self.model,
            "notes": list(self.notes),
        }


def evaluate(
    language_model: LanguageModel,
    tasks: str | Sequence[str],
    *,
    steering: Alternatives = None,
    unsteered: bool = True,
    data: str | Path | None = None,
    protocol: Protocol | Sequence[Protocol] = "trimtab",
    part: Part = "test",
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Evaluation:
    """Evaluate a model on tasks, unsteered (unless `unsteered` is false) and steered.

    `steering` is one steering or `a + b`; a list or a mapping by name holds alternatives, each
    evaluated by itself. `data` names the directory of data sets (default: TRIMTAB_DATA, else the
    hub). `limit` takes the first examples of each task. `output` names a run directory, in which a
    run that was interrupted goes on. Tasks: see `trimtab.tasks`.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    protocols: list[Protocol] = [protocol] if isinstance(protocol, str) else list(protocol)
    for one in protocols:
        check_protocol(one)
    if not names:
        raise TrimtabError("there is no task")
    if limit is not None and limit < 1:
        raise TrimtabError(f"the limit must be 1 or more, not {limit}")
    subjects = _subjects(steering, unsteered)
    settings = Settings(seed, batch_size, max_new_tokens, force)
    place = None if data is None else str(data)
    planned = [
        _Planned(find_task(name), protocols, part, limit, place) for name in dict.fromkeys(names)
    ]
    config = {
        "tasks": [one.describe() for one in planned],
        "protocols": protocols,
        "part": part,
        "limit": limit,
        "settings": {k: v for k, v in asdict(settings).items() if k != "force"},
        "model": {**vars(language_model.identity), "dtype": str(language_model.dtype)},
        "steerings": {str(name): _described(one) for name, one in subjects.items()},
    }
    with Run(output, config, overwrite) as run:
        for name, one in subjects.items():
            for plan in planned:
                done = {
                    (record["protocol"], record["index"])
                    for record in run.records
                    if (record["task"], record["steering"]) == (plan.task.name, name)
                }
                for records in plan.run(language_model, one, done, settings):
                    run.append([{"steering": name, **record} for record in records])
        evaluation = summarise(run.records, dict(vars(language_model.identity)))
        run.finish(evaluation.as_json())
    return evaluation


class _Planned:
    """A task with its examples under each protocol."""

    def __init__(
        self,
        task: Task,
        protocols: Sequence[Protocol],
        part: Part,
        limit: int | None,
        data: str | None,
    ) -> None:
        self.task, self.part, self.data = task, part, data
        self.entries = []
        for protocol in protocols:
            rows = task.rows(part, protocol, data)[:limit]
            examples = [task.example(row, i, protocol) for i, row in enumerate(rows)]
            self.entries.append(Entry(protocol, tuple(examples)))

    def describe(self) -> dict[str, Any]:
        """Name, rows and the digest of the file they come from."""
        source = self.task.test if self.part == "test" else self.task.train
        path = None if source is None else source_file(source, self.data)
        return {
            "name": self.task.name,
            "rows": len(self.entries[0].examples),
            "file": None if path is None else path.name,
            "sha256": None if path is None else file_digest(path),
        }

    def run(
        self,
        language_model: LanguageModel,
        steering: Steering | Steerings | None,
        done: set[tuple[str, int]],
        settings: Settings,
        measure: Measure | None = None,
    ) -> Any:
        return answer(language_model, self.task, self.entries, steering, done, settings, measure)


def _subjects(steering: Alternatives, unsteered: bool) -> dict[str | None, Any]:
    """What is evaluated, by name; None is the unsteered model."""
    subjects: dict[str | None, Any] = {None: None} if unsteered or steering is None else {}
    if steering is None:
        return subjects
    if isinstance(steering, Mapping):
        named = dict(steering)
    else:
        single = isinstance(steering, Steering | Steerings)
        alternatives: Any = [steering] if single else steering
        named = {}
        for one in alternatives:
            if not isinstance(one, Steering | Steerings):
                raise TrimtabError(f"{one!r} is not a steering: load one with Steering.load(FILE)")
            if one.label in named:
                raise TrimtabError(
                    f"two steerings are called {one.label!r}: name them, {{name: steering}}"
                )
            named[one.label] = one
    return subjects | named


def _described(steering: Steering | Steerings | None) -> list[dict[str, Any]]:
    together = (
        ()
        if steering is None
        else Steerings((steering,))
        if isinstance(steering, Steering)
        else steering
    )
    return [{"label": one.label, "dial": one.setting, "sha256": one.digest} for one in together]


# -- figures from records -------------------------------------------------------------------------


def summarise(records: Sequence[Record], model: dict[str, Any]) -> Evaluation:
    """All figures of a run."""
    ordered = _in_order(records)
    return Evaluation(
        tuple(_results(ordered)),
        tuple(_comparisons(ordered)),
        tuple(ordered),
        round(sum(record["seconds"] for record in records), 2),
        model,
    )


def _in_order(records: Sequence[Record]) -> list[Record]:
    """Tasks, protocols and steerings as they came first, examples by their index."""
    rank: dict[tuple[Any, ...], int] = {}
    for record in records:
        rank.setdefault(_key(record), len(rank))
    return sorted(records, key=lambda record: (rank[_key(record)], record["index"]))


def _key(record: Record) -> tuple[Any, ...]:
    return (record["task"], record["protocol"], record["steering"])


def _groups(
    records: Sequence[Record], key: Callable[[Record], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _metrics(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(metric for record in records for metric in record["values"]))


def _results(records: Sequence[Record]) -> list[Result]:
    found = []
    for (task, protocol, steering), group in _groups(records, _key).items():
        for metric in _metrics(group):
            given = [r["values"][metric] for r in group if metric in r["values"]]
            values = [value for value in given if value is not None]
            if not values:
                continue
            estimate = _estimate(values)
            interval = (estimate.low, estimate.high)
            unclear = len(given) - len(values)
            found.append(
                Result(
                    task, protocol, metric, estimate.value, estimate.n, interval, steering, unclear
                )
            )
    return found


def _rates(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _estimate(values: Sequence[float]) -> Estimate:
    """Wilson's interval for a rate, bootstrap for any other mean."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return rate_interval(tensor) if _rates(values) else mean_interval(tensor)


def _paired(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Each steered record with the unsteered record of the same example."""
    unsteered = {
        (r["task"], r["protocol"], r["index"]): r for r in records if r["steering"] is None
    }
    return [
        (unsteered[place], record)
        for record in records
        if record["steering"] is not None
        and (place := (record["task"], record["protocol"], record["index"])) in unsteered
    ]


def _comparisons(records: Sequence[Record]) -> list[Comparison]:
    found = []
    groups: dict[tuple[Any, ...], list[tuple[Record, Record]]] = {}
    for before, after in _paired(records):
        groups.setdefault(_key(after), []).append((before, after))
    for (task, protocol, steering), pairs in groups.items():
        for metric in _metrics([after for _, after in pairs]):
            both = [
                (before["values"].get(metric), after["values"].get(metric))
                for before, after in pairs
            ]
            values = [(b, a) for b, a in both if b is not None and a is not None]
            if not values:
                continue
            differences = [a - b for b, a in values]
            estimate = mean_interval(torch.tensor(differences, dtype=torch.float64))
            rates = _rates([value for pair in values for value in pair])
            found.append(
                Comparison(
                    task,
                    protocol,
                    metric,
                    estimate.value,
                    (estimate.low, estimate.high),
                    estimate.n,
                    steering,
                    sum(d > 0 for d in differences) if rates else None,
                    sum(d < 0 for d in differences) if rates else None,
                )
            )
    return found


def perplexity_of(nats: float) -> float:
    """exp of a cross-entropy, infinity where that is beyond a float."""
    return math.exp(nats) if nats < 700 else math.inf
