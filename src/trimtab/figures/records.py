"""Figures that are computed from records: rates and means with intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.figures.intervals import Estimate, mean_interval, rate_interval, weighted_interval
from trimtab.figures.metrics import metric_of, more_is_better
from trimtab.figures.significance import Difference, paired_difference

Record = dict[str, Any]

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


def in_order(records: Sequence[Record]) -> list[Record]:
    """Tasks, protocols and steerings as they came first, examples by their index."""
    rank: dict[tuple[Any, ...], int] = {}
    for record in records:
        rank.setdefault(_key(record), len(rank))
    return sorted(records, key=lambda record: (rank[_key(record)], record["index"]))


def _key(record: Record) -> tuple[str, str, str | None]:
    return (record["task"], record["protocol"], record["steering"])


def _metrics(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(metric for record in records for metric in record["values"]))


def results_of(records: Sequence[Record]) -> list[Result]:
    """Every figure of records that are in order."""
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


def are_rates(metric: str, values: Sequence[float]) -> bool:
    """Whether these are shares of examples for which something holds."""
    return metric_of(metric).kind == "rate" and all(value in (0, 1) for value in values)


def estimate_of(metric: str, values: Sequence[float], weights: Tensor | None = None) -> Estimate:
    """The mean of a metric: Wilson's interval for a rate, bootstrap for any other mean."""
    given = torch.tensor(values, dtype=torch.float64)
    if weights is not None:
        return weighted_interval(given, weights)
    return rate_interval(given) if are_rates(metric, values) else mean_interval(given)


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


def flips_of(records: Sequence[Record], metric: str | None = None) -> list[tuple[Record, Record]]:
    """(unsteered, steered) records of each example whose rating changed.

    `metric` is by default the first that a task has and that rates examples.
    """
    found = []
    for before, after in paired(records):
        names = [metric] if metric else [m for m in after["values"] if metric_of(m).kind == "rate"]
        name = next(iter(names), "")
        old, new = before["values"].get(name), after["values"].get(name)
        if None not in (old, new) and old != new and are_rates(name, (old, new)):
            found.append((before, after))
    return found


def comparisons_of(
    records: Sequence[Record], *, tested: bool = False, more: Mapping[str, bool] | None = None
) -> list[Difference]:
    """Steered minus unsteered, wherever both answered the same example.

    `tested` tests values that are not right or wrong too. `more` says of some metrics whether more
    is better, where that is not as it is by default.
    """
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
            rates = are_rates(metric, [value for old, new, _ in both for value in (old, new)])
            better = (more or {}).get(metric, more_is_better(metric))
            difference = paired_difference(
                changes, flips=rates, weights=weights, tested=tested, more=better
            )
            found.append(
                replace(difference, task=task, protocol=protocol, metric=metric, steering=steering)
            )
    return found


def over_settings(results: Sequence[Result]) -> list[str]:
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
