"""Figures of an evaluation, computed from its records: rates and means with intervals, paired
differences, flips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.figures.intervals import Estimate, mean_interval, rate_interval, weighted_interval
from trimtab.figures.metrics import metric_of
from trimtab.figures.significance import Difference, paired_difference

Record = dict[str, Any]

#: Steerings of which all are shown where texts are.
_FEW = 3
#: Mean self-perplexity above which an angle counts as a violation (Selective Steering).
VIOLATION = 2.0


@dataclass(frozen=True)
class Result:
    """One figure: `value` over `n` examples with its 95 % interval.

    `steering` is None for the unsteered model. `unclear` examples got no value and are not in n;
    where all of them are unclear, the value is None.
    """

    task: str
    protocol: str
    metric: str
    value: float | None
    n: int
    ci95: tuple[float, float] | None
    steering: str | None
    unclear: int = 0

    @property
    def estimate(self) -> Estimate | None:
        """The figure, where there is one; without an interval it is as narrow as can be."""
        if self.value is None:
            return None
        return Estimate(self.value, *(self.ci95 or (self.value, self.value)), self.n)


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation, and the records that they were computed from."""

    results: tuple[Result, ...]
    comparisons: tuple[Difference, ...]
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

    def flips(self, metric: str | None = None) -> list[tuple[Record, Record]]:
        """(unsteered, steered) records of each example whose rating changed.

        `metric` is by default the first that a task has and that rates examples.
        """
        found = []
        for before, after in paired(self.records):
            names = (
                [metric] if metric else [m for m in after["values"] if metric_of(m).kind == "rate"]
            )
            name = next(iter(names), "")
            old, new = before["values"].get(name), after["values"].get(name)
            if None not in (old, new) and old != new and _rates(name, (old, new)):
                found.append((before, after))
        return found

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

    def tables(self) -> list[tuple[str, list[tuple[Result, Difference | None]]]]:
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
        }


def summarise(
    records: Sequence[Record], model: dict[str, Any], notes: Sequence[str] = ()
) -> Evaluation:
    """All figures of a run."""
    ordered = _in_order(records)
    results = _results(ordered)
    return Evaluation(
        tuple(results),
        tuple(_comparisons(ordered)),
        tuple(ordered),
        round(sum(record["seconds"] for record in records), 2),
        model,
        (*notes, *_over_settings(results)),
    )


def _in_order(records: Sequence[Record]) -> list[Record]:
    """Tasks, protocols and steerings as they came first, examples by their index."""
    rank: dict[tuple[Any, ...], int] = {}
    for record in records:
        rank.setdefault(_key(record), len(rank))
    return sorted(records, key=lambda record: (rank[_key(record)], record["index"]))


def _key(record: Record) -> tuple[str, str, str | None]:
    return (record["task"], record["protocol"], record["steering"])


def _metrics(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(metric for record in records for metric in record["values"]))


def _results(records: Sequence[Record]) -> list[Result]:
    groups: dict[tuple[str, str, str | None], list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record), []).append(record)
    found = []
    for (task, protocol, steering), group in groups.items():
        for metric in _metrics(group):
            given = [record for record in group if metric in record["values"]]
            clear = [record for record in given if record["values"][metric] is not None]
            if not clear:
                found.append(
                    Result(task, protocol, metric, None, 0, None, steering, unclear=len(given))
                )
                continue
            estimate = estimate_of(
                metric, [record["values"][metric] for record in clear], _weights(clear)
            )
            figure = partial(Result, task, protocol, steering=steering, n=estimate.n)
            interval = (estimate.low, estimate.high)
            unclear = len(given) - len(clear)
            found.append(
                figure(metric=metric, value=estimate.value, ci95=interval, unclear=unclear)
            )
            if metric == "cross_entropy":
                low, value, high = map(_exp, (estimate.low, estimate.value, estimate.high))
                found.append(figure(metric="perplexity", value=value, ci95=(low, high)))
        for record in group:
            found += [
                Result(task, protocol, metric, value, record["n"], None, steering)
                for metric, value in record.get("figures", {}).items()
            ]
    return found


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _weights(records: Sequence[Record]) -> Tensor | None:
    """What each record weighs (tokens, anchors), or None where all weigh the same."""
    if not any("weight" in record for record in records):
        return None
    return torch.tensor([record.get("weight", 1.0) for record in records], dtype=torch.float64)


def _rates(metric: str, values: Sequence[float]) -> bool:
    """Whether these are shares of examples for which something holds."""
    return metric_of(metric).kind == "rate" and all(value in (0, 1) for value in values)


def estimate_of(metric: str, values: Sequence[float], weights: Tensor | None = None) -> Estimate:
    """The mean of a metric: Wilson's interval for a rate, bootstrap for any other mean."""
    given = torch.tensor(values, dtype=torch.float64)
    if weights is not None:
        return weighted_interval(given, weights)
    return rate_interval(given) if _rates(metric, values) else mean_interval(given)


def paired(records: Sequence[Record]) -> list[tuple[Record, Record]]:
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


def _comparisons(records: Sequence[Record]) -> list[Difference]:
    groups: dict[tuple[str, str, str], list[tuple[Record, Record]]] = {}
    for before, after in paired(records):
        key = (after["task"], after["protocol"], after["steering"])
        groups.setdefault(key, []).append((before, after))
    found = []
    for (task, protocol, steering), pairs in groups.items():
        for metric in _metrics([after for _, after in pairs]):
            both = [
                (before["values"][metric], after["values"][metric], after)
                for before, after in pairs
                if before["values"].get(metric) is not None
                and after["values"].get(metric) is not None
            ]
            if not both:
                continue
            changes = torch.tensor([new - old for old, new, _ in both], dtype=torch.float64)
            weights = _weights([after for _, _, after in both])
            rates = _rates(metric, [value for old, new, _ in both for value in (old, new)])
            difference = paired_difference(changes, flips=rates, weights=weights, tested=False)
            found.append(
                replace(difference, task=task, protocol=protocol, metric=metric, steering=steering)
            )
    return found


def _over_settings(results: Sequence[Result]) -> list[str]:
    """What a sweep over several dials says as a whole: violations, and the spread of coherence."""
    notes = []
    groups = dict.fromkeys((r.task, r.protocol) for r in results if r.metric == "self_perplexity")
    for task, protocol in groups:
        steered = [
            r
            for r in results
            if (r.task, r.protocol) == (task, protocol) and r.steering is not None
        ]
        own = [r.value for r in steered if r.metric == "self_perplexity" and r.value is not None]
        if len(own) < 2:
            continue
        violations = sum(value > VIOLATION for value in own)
        spread = []
        for metric in ("language_consistency", "compression_ratio", "repetition_4gram"):
            known = [r.value for r in steered if r.metric == metric and r.value is not None]
            values = torch.tensor(known)
            spread.append(f"{metric} {values.mean():.3f} ± {values.std():.3f}")
        notes.append(
            f"{task}: self-perplexity above {VIOLATION:g} at {violations} of {len(own)} settings; "
            f"over them {', '.join(spread)}"
        )
    return notes
