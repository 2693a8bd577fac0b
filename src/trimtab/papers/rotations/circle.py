"""Steerings turned through a circle of angles on the rows of a task: what each angle gives, the
angle that is chosen, what it is worth on other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trimtab.anatomy import parse_site
from trimtab.contrasts import Part
from trimtab.errors import TrimtabError, check_choice
from trimtab.evaluation import Asked
from trimtab.figures import (
    VIOLATION,
    Difference,
    Estimate,
    Record,
    Result,
    corrected,
    more_is_better,
)
from trimtab.model import LanguageModel
from trimtab.options import MAX_COST, Rows, option
from trimtab.papers.result import Value, value_of
from trimtab.reports import Run, summarise
from trimtab.steering import Positions, Scope, Steering
from trimtab.sweeps import Measured, TaskRows, choose, difference_of, values_of
from trimtab.terminal import progress

#: What plain text costs, beside the metrics of the task.
COST = "plain_text_cost"


@dataclass(frozen=True, kw_only=True)
class Circle:
    """How steerings are turned, and what else is measured at each angle."""

    heading = "Circle"

    step: float = option("Degrees from one angle to the next; 10 in the paper.", 30.0)
    cost: bool = option("Measure what plain text costs, in nats per token.", True)
    whole_blocks: bool = option("SS steers a block only if all of its norms discriminate.", True)
    ss_compat: bool = option("Steer all norms of a block, also those on the branches.", False)
    positions: Positions = option("Tokens to steer, a scope: all, prompt, generated ...", "all")

    def __post_init__(self) -> None:
        Scope.of(self.positions)  # says what is wrong with it


@dataclass(frozen=True)
class Variant:
    """A steering whose dial is an angle, under a name of its own."""

    name: str
    steering: Steering

    @property
    def layers(self) -> list[int]:
        """The blocks that it changes."""
        found = {parse_site(one.site)[0] for one in self.steering.interventions}
        return sorted(layer for layer in found if layer is not None)


@dataclass
class Turned:
    """A variant at each angle: figures of every metric by name, and what plain text costs.

    `theta` is the angle that is chosen, `tested` its figures on the test rows and `change` that of
    the metric against the unsteered model, its p corrected for the number of variants. `oracle` is
    the best angle on the test rows, with its figure.
    """

    variant: Variant
    figures: dict[float, dict[str, Result]] = field(default_factory=dict)
    costs: dict[float, float] = field(default_factory=dict)
    theta: float | None = None
    tested: dict[str, Result] = field(default_factory=dict)
    change: Difference | None = None
    oracle: tuple[float, Result] | None = None

    @property
    def violations(self) -> tuple[int, int] | None:
        """At how many angles mean self-perplexity is above 2.0, and of how many; None where
        nothing is written."""
        own = [found.get("self_perplexity") for found in self.figures.values()]
        values = [result.value for result in own if result is not None and result.value is not None]
        return (sum(value > VIOLATION for value in values), len(values)) if values else None

    def estimates(self, theta: float) -> dict[str, Estimate]:
        """The figures at an angle and what plain text costs there, as far as they are known."""
        known = {name: result.estimate for name, result in self.figures.get(theta, {}).items()}
        if theta in self.costs:
            cost = self.costs[theta]
            known[COST] = Estimate(cost, cost, cost, 1)
        return {name: estimate for name, estimate in known.items() if estimate is not None}

    def as_json(self, metric: str) -> dict[str, Any]:
        """For results.json."""
        chosen = None
        if self.theta is not None and metric in self.tested:
            drawn, test = self.figures.get(self.theta, {}).get(metric), self.tested[metric]
            chosen = {
                "theta": self.theta,
                "validation": drawn and drawn.value,
                "test": test.value,
                "n": test.n,
                "ci95": test.ci95,
                "change": self.change and replace(self.change, corrected_p=None).as_json(),
                "p_holm": self.change and self.change.corrected_p,
                "metrics": plain_figures(self.tested),
                COST: self.costs.get(self.theta),
            }
        return {
            "name": self.variant.name,
            "layers": self.variant.layers,
            "sites": len(self.variant.steering.interventions),
            "dial": [
                {"theta": theta, "metrics": plain_figures(found), COST: self.costs.get(theta)}
                for theta, found in self.figures.items()
            ],
            "violations": self.violations and dict(zip(("n", "of"), self.violations, strict=True)),
            "chosen": chosen,
            "oracle": self.oracle and {"theta": self.oracle[0], "test": self.oracle[1].value},
        }

    def values(self, metric: str) -> dict[str, Value]:
        """To stand beside a paper's: the angle that was chosen or the best one, and the lowest and
        the highest figure over the circle."""
        name, values = self.variant.name, {}
        if self.theta is not None and metric in self.tested:
            values[name] = value_of(self.tested[metric], share=False)
            values[f"{name}, θ"] = Value(self.theta)
        if self.oracle is not None:
            values[f"{name}, oracle"] = Value(self.oracle[1].value)
        points = [
            (figures[metric].value, theta)
            for theta, figures in self.figures.items()
            if metric in figures and figures[metric].value is not None
        ]
        if len(points) > 1:
            (low, first), (high, last) = min(points), max(points)
            circle = f"{low:.3g} at {first:g}° to {high:.3g} at {last:g}°"
            values[f"{name}, over the circle"] = Value(circle)
        return values


def plain_figures(figures: Mapping[str, Result]) -> dict[str, Any]:
    return {
        name: {"value": found.value, "n": found.n, "ci95": found.ci95}
        for name, found in figures.items()
    }


@dataclass(frozen=True)
class Study:
    """The rows that variants are turned on, and the run directory that keeps their records.

    `chooses` false: the rows that the dial is drawn over are the test rows.
    """

    rows: TaskRows
    run: Run | None
    chooses: bool
    oracle: bool
    cost: bool
    max_cost: float | None = None

    def turn(self, variants: Sequence[Variant], angles: Sequence[float]) -> list[Turned]:
        """Each variant through all angles; those that choose are run on the test rows."""
        found = [Turned(variant) for variant in variants]
        parts = 1 + (self.chooses and self.oracle)
        with progress("dial", len(variants) * len(angles) * parts) as advance:
            for turned in found:
                for theta in angles:
                    records = self._records(turned.variant, theta, "validation")
                    turned.figures[theta] = figures_of(records)
                    if self.cost:
                        turned.costs[theta] = self._cost(turned.variant, theta)
                    advance(1)
                self._choose(turned, angles, advance)
        changed = [turned for turned in found if turned.change is not None]
        changes = [turned.change for turned in changed if turned.change is not None]
        for turned, change in zip(changed, corrected(changes), strict=True):
            turned.change = change
        return found

    def _choose(self, turned: Turned, angles: Sequence[float], advance: Any) -> None:
        """The angle, and what it is worth on the test rows."""
        metric = self.rows.metric
        best = self._best(turned, turned.figures)
        if best is None:
            advance(len(angles) if self.chooses and self.oracle else 0)
            return
        if not self.chooses:
            turned.tested = turned.figures[best]
            turned.theta = best
            if len(angles) > 1:
                turned.oracle = best, turned.figures[best][metric]
            records = self._records(turned.variant, best, "validation")
            turned.change = _change(self.unsteered("validation"), records, metric)
            return
        turned.theta = best
        records = self._records(turned.variant, best, "test")
        turned.tested = figures_of(records)
        turned.change = _change(self.unsteered("test"), records, metric)
        if self.oracle:
            on_test = {}
            for theta in angles:
                on_test[theta] = figures_of(self._records(turned.variant, theta, "test"))
                advance(1)
            top = self._best(turned, on_test)
            assert top is not None
            turned.oracle = top, on_test[top][metric]

    def _best(self, turned: Turned, figures: Mapping[float, Mapping[str, Result]]) -> float | None:
        """The first of the angles at which the metric is best, of those within the cost limit."""
        metric = self.rows.metric
        within = (
            theta
            for theta in figures
            if self.max_cost is None or turned.costs[theta] <= self.max_cost
        )
        values = {
            theta: figures[theta][metric].value for theta in within if metric in figures[theta]
        }
        return choose(values, lambda theta: values[theta], self.rows.maximise)

    def unsteered(self, part: Part) -> list[Record]:
        """Records of the unsteered model."""
        return self.rows.recorded(self.run, f"unsteered-{part}", None, part)

    def _records(self, variant: Variant, theta: float, part: Part) -> list[Record]:
        """One variant at one angle, from the run directory where it is there."""
        name = f"{_file_name(variant.name)}-{theta:g}-{part}"
        label = f"{variant.name} θ={theta:g}°"
        return self.rows.recorded(self.run, name, variant.steering.at(theta), part, label)

    def _cost(self, variant: Variant, theta: float) -> float:
        name = f"{_file_name(variant.name)}-{theta:g}-plain-text"
        kept = None if self.run is None else self.run.kept(name)
        if kept is None:
            cost = self.rows.plain.cost(variant.steering.at(theta))
            kept = [{"task": "plain text", "id": "all", "steering": variant.name, COST: cost}]
            if self.run is not None:
                self.run.keep(name, kept)
        found = [record.get(COST) for record in kept]
        if self.run is not None and [type(cost) for cost in found] != [float]:
            self.run.refuse(name, "it is not one record of a cost")
        return float(kept[0][COST])


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def figures_of(records: Sequence[Record]) -> dict[str, Result]:
    """Every metric by its name."""
    return {found.metric: found for found in summarise(records, {}).results}


def _change(before: Sequence[Record], after: Sequence[Record], metric: str) -> Difference | None:
    old, new = values_of(before).get(metric), values_of(after).get(metric)
    if old is None or new is None or bool((old.isnan() | new.isnan()).all()):
        return None
    return difference_of(old, new, more=more_is_better(metric))


def angles_of(step: float) -> list[float]:
    """A circle in steps; 360 degrees are 0."""
    if not 0 < step <= 180 or 360 % step:
        raise TrimtabError(f"step must divide 360 degrees, as 10 and 30 do, not {step:g}")
    return [i * float(step) for i in range(round(360 / step))]


def study_of(
    language_model: LanguageModel,
    task: Asked,
    part: str,
    rows: Rows,
    measured: Measured,
    *,
    oracle: bool,
    cost: bool,
    run: Run | None,
) -> Study:
    """The rows; with part "test" the test rows stand where the validation rows do."""
    check_choice("part", part, Literal["validation", "test"])
    chooses, choosing = part == "validation", measured.choosing
    limit = choosing.max_cost if cost else None
    if not cost and choosing.max_cost not in (None, MAX_COST):
        raise TrimtabError("max_cost needs the cost to be measured: leave cost on")
    if not chooses:
        if choosing.validation_task is not None:
            raise TrimtabError("on the test part nothing is chosen: leave validation_task out")
        rows = replace(rows, limit=rows.test_limit)
        measured = replace(measured, choosing=replace(choosing, validation_task=task))
    found = TaskRows(language_model, task, rows, measured, chooses=chooses)
    study = Study(found, run, chooses, oracle, cost, limit)
    _ = found.metric  # one that the task does not have is refused before the work begins
    return study
