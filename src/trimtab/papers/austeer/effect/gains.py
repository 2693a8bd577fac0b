"""What rankings gain when their first units are steered as strongly as a budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Part
from trimtab.figures import Difference, corrected, more_is_better
from trimtab.papers.austeer.effect.rankings import USUAL, Costs, Fitted
from trimtab.papers.austeer.effect.within import Within, dials_within
from trimtab.reports import Run
from trimtab.steering import Steering
from trimtab.sweeps import FINE, TaskRows, Values, choose, difference_of
from trimtab.terminal import progress

PARTS: tuple[Part, ...] = ("validation", "test")


@dataclass(frozen=True)
class Setting:
    """A steering at the largest dial within a budget: its values on both parts, and what it was
    predicted to gain and to cost there; `draw` is the number of a random choice."""

    within: Within
    values: Mapping[Part, Values] = field(repr=False)
    predicted: Mapping[str, float] | None = None
    draw: int | None = None

    def as_json(self) -> dict[str, Any]:
        within = self.within
        found = {"dial": within.dial, "measured_kl": within.kl, "reached": within.reached}
        drawn = {} if self.draw is None else {"draw": self.draw}
        return {**found, "predicted": self.predicted, **drawn}


@dataclass(frozen=True)
class Cell:
    """A ranking with so many units, or a method with its settings, within a budget; several draws
    are one, row by row their mean."""

    name: str
    params: dict[str, Any]
    budget: float
    draws: Sequence[Setting]
    unsteered: Mapping[Part, Values] = field(repr=False)

    def values(self, part: Part, metric: str = FINE) -> Tensor:
        """Of each row."""
        return torch.stack([one.values[part][metric] for one in self.draws]).mean(0)

    def change(self, metric: str) -> Difference:
        """Of a metric on the test rows, against the unsteered model."""
        before, more = self.unsteered["test"][metric], more_is_better(metric)
        return difference_of(before, self.values("test", metric), more=more)

    @cached_property
    def gain(self) -> Difference:
        """Of log-odds on the test rows."""
        return self.change(FINE)

    @cached_property
    def validation(self) -> float:
        """The mean gain of log-odds on the validation rows."""
        return float((self.values("validation") - self.unsteered["validation"][FINE]).nanmean())

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest mean gain of a draw, on the test rows."""
        before = self.unsteered["test"][FINE]
        each = [float((one.values["test"][FINE] - before).nanmean()) for one in self.draws]
        return min(each), max(each)

    def as_json(self) -> dict[str, Any]:
        draws = [one.as_json() for one in self.draws]
        several = {"draws": draws, "spread": list(self.spread)}
        return {
            "name": self.name,
            "params": self.params,
            "kl": self.budget,
            "validation": self.validation,
            "test": self.gain.as_json(),
            **(draws[0] if len(draws) == 1 else several),
        }


@dataclass(frozen=True)
class Chosen:
    """The cell of a ranking or method that gains most on the validation rows within a budget, and
    on the test rows its difference from what was chosen of `USUAL`."""

    cell: Cell
    against_usual: Difference | None = None

    def as_json(self, rate: str | None) -> dict[str, Any]:
        """With the change of the `rate` by which rows are right or wrong, if there is one."""
        cell = self.cell
        found = {
            "name": cell.name,
            "kl": cell.budget,
            "params": cell.params,
            "validation": cell.validation,
            "test": cell.gain.as_json(),
            "against_signed_momentum": self.against_usual and self.against_usual.as_json(),
        }
        return found if rate is None else {**found, rate: cell.change(rate).as_json()}


# -- gain within a budget -------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Measures steerings at the largest dial within each budget, and keeps what it measured."""

    rows: TaskRows
    prompts: Sequence[Sequence[int]]
    budgets: Sequence[float]
    run: Run

    def measured(self, file: str, steering: Steering) -> dict[float, tuple[Within, Any]]:
        """By budget the dial, and the values on both parts."""
        kept = self.run.kept(file)
        if kept is None:
            kept = self._measure(file, steering)
            self.run.keep(file, kept)
        if [row.get("budget") for row in kept] != list(self.budgets):
            self.run.refuse(file, "it is not of these budgets")
        return {
            row["budget"]: (
                Within(row["dial"], row["kl"], row["reached"]),
                {part: _tensors(row[part]) for part in PARTS},
            )
            for row in kept
        }

    def _measure(self, file: str, steering: Steering) -> list[dict[str, Any]]:
        lm = self.rows.language_model
        dials = dials_within(lm, steering, self.prompts, self.budgets)
        values: dict[float, dict[str, Any]] = {}
        found = []
        for budget in self.budgets:
            within = dials[budget]
            if within.dial not in values:
                turned = replace(steering, value=within.dial) if within.dial else None
                values[within.dial] = {
                    part: _plain(self.rows.values(turned, part)) for part in PARTS
                }
            named = {"task": self.rows.task, "id": f"{budget:g}", "steering": file}
            known = {"budget": budget, **vars(within), **values[within.dial]}
            found.append({**named, **known})
        return found


def _plain(values: Values) -> dict[str, list[float | None]]:
    """For JSON, which has no NaN."""
    return {
        metric: [None if math.isnan(value) else value for value in each.tolist()]
        for metric, each in values.items()
    }


def _tensors(values: Mapping[str, Sequence[float | None]]) -> dict[str, Tensor]:
    return {
        metric: torch.tensor([math.nan if v is None else v for v in each], dtype=torch.float64)
        for metric, each in values.items()
    }


def cells_of(
    bench: Bench, found: Fitted, texts: Contrast, ks: Sequence[int], costs: Costs
) -> list[Cell]:
    """Every ranking with each number of units, and every setting of the references, within each
    budget."""
    lm = bench.rows.language_model
    unsteered = {part: bench.rows.values(None, part) for part in PARTS}
    groups: dict[tuple[str, Any, float], list[Setting]] = {}
    params: dict[tuple[str, Any], dict[str, Any]] = {}
    number = len(found.rankings) * len(ks) + len(found.references)
    with progress("steering within budgets", number) as advance:
        for ranking in found.rankings:
            for k in ks:
                steering = ranking.top(lm, texts, k)
                gain = found.effects.gain(ranking.units[:k], ranking.gains[:k])
                kl = costs.kl(steering)
                draw = "" if ranking.draw is None else f"-{ranking.draw}"
                file = f"{ranking.name.replace(' ', '-')}{draw}-k{k}"
                for budget, (within, values) in bench.measured(file, steering).items():
                    predicted = {"gain": within.dial * gain, "kl": within.dial**2 * kl}
                    one = Setting(within, values, predicted, ranking.draw)
                    groups.setdefault((ranking.name, k, budget), []).append(one)
                params[ranking.name, k] = {"k": k}
                advance(1)
        for name, own, steering in found.references:
            place = "-".join(f"{key}{value}" for key, value in own.items())
            for budget, (within, values) in bench.measured(f"{name}-{place}", steering).items():
                groups.setdefault((name, place, budget), []).append(Setting(within, values))
            params[name, place] = own
            advance(1)
    return [
        Cell(name, params[name, place], budget, draws, unsteered)
        for (name, place, budget), draws in groups.items()
    ]


def chosen_of(cells: Sequence[Cell], budgets: Sequence[float]) -> list[Chosen]:
    """Of each ranking and method within each budget what gains most on the validation rows."""
    found = []
    for budget in budgets:
        best: dict[str, Cell] = {}
        for name in dict.fromkeys(cell.name for cell in cells):
            own = [cell for cell in cells if (cell.name, cell.budget) == (name, budget)]
            chosen = choose(own, lambda cell: cell.validation, True)
            assert chosen is not None
            best[name] = chosen
        usual = best[USUAL].values("test")
        others = [name for name in best if name != USUAL]
        differences = [
            difference_of(usual, best[name].values("test"), more=True) for name in others
        ]
        against = dict(zip(others, corrected(differences), strict=True))
        found += [Chosen(cell, against.get(name)) for name, cell in best.items()]
    return found
