"""Steerings turned through a circle of angles on the rows of a task: what each angle gives, the
angle that is chosen, what it is worth on other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.contrasts import Part
from trimtab.errors import TrimtabError, check_choice
from trimtab.figures import VIOLATION, Record, Result, holm, summarise
from trimtab.model import LanguageModel
from trimtab.options import Rows, option
from trimtab.papers.measure import Change, compare
from trimtab.progress import progress
from trimtab.reports import SharedRun
from trimtab.steering import Positions, Steering
from trimtab.sweeps import Bench, Measured

#: What plain text costs, beside the metrics of the task.
COST = "plain_text_cost"


@dataclass(frozen=True, kw_only=True)
class Circle:
    """How steerings are turned, and what else is measured at each angle."""

    step: float = option("Degrees from one angle to the next; 10 in the paper.", 30.0)
    cost: bool = option("Measure what plain text costs, in nats per token.", True)
    whole_blocks: bool = option("SS steers a block only if all of its norms discriminate.", True)
    ss_compat: bool = option("Steer all norms of a block, also those on the branches.", False)
    positions: Positions = option("Tokens to steer.", "all")


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

    `theta` is the angle that is chosen, `tested` its figures on the test rows and `change` those of
    the metric against the unsteered model; `p_holm` is the change's p corrected for the number of
    variants. `oracle` is the best angle on the test rows, with its figure.
    """

    variant: Variant
    figures: dict[float, dict[str, Result]] = field(default_factory=dict)
    costs: dict[float, float] = field(default_factory=dict)
    theta: float | None = None
    tested: dict[str, Result] = field(default_factory=dict)
    change: Change | None = None
    p_holm: float | None = None
    oracle: tuple[float, Result] | None = None

    @property
    def violations(self) -> tuple[int, int] | None:
        """At how many angles mean self-perplexity is above 2.0, and of how many; None where
        nothing is written."""
        own = [found.get("self_perplexity") for found in self.figures.values()]
        values = [result.value for result in own if result is not None and result.value is not None]
        return (sum(value > VIOLATION for value in values), len(values)) if values else None

    def as_json(self, metric: str) -> dict[str, Any]:
        """For results.json."""
        chosen = None
        if self.theta is not None and metric in self.tested:
            drawn, found = self.figures.get(self.theta, {}).get(metric), self.tested[metric]
            chosen = {
                "theta": self.theta,
                "validation": drawn and drawn.value,
                "test": found.value,
                "n": found.n,
                "ci95": found.ci95,
                "change": self.change and asdict(self.change),
                "p_holm": self.p_holm,
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

    bench: Bench
    run: SharedRun | None
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
        corrected = holm([turned.change.p for turned in changed if turned.change])
        for turned, p in zip(changed, corrected, strict=True):
            turned.p_holm = p
        return found

    def _choose(self, turned: Turned, angles: Sequence[float], advance: Any) -> None:
        """The angle, and what it is worth on the test rows."""
        metric = self.bench.metric
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
        """The first of the angles at which the metric is best, of those that are not too dear."""
        metric, sign = self.bench.metric, -1 if self.bench.maximise else 1
        known = {
            theta: value
            for theta, found in figures.items()
            if metric in found and (value := found[metric].value) is not None
            if self.max_cost is None or turned.costs[theta] <= self.max_cost
        }
        return min(known, key=lambda theta: sign * known[theta], default=None)

    def unsteered(self, part: Part) -> list[Record]:
        """Records of the unsteered model."""
        return self._kept_or(f"unsteered-{part}", part, None, lambda: self.bench.unsteered(part))

    def _records(self, variant: Variant, theta: float, part: Part) -> list[Record]:
        """One variant at one angle, from the run directory where it is there."""
        name = f"{_file_name(variant.name)}-{theta:g}-{part}"
        label = f"{variant.name} θ={theta:g}°"
        steering = variant.steering.at(theta)
        return self._kept_or(
            name, part, label, lambda: self.bench.records(steering, part, name=label)
        )

    def _kept_or(
        self, name: str, part: Part, label: str | None, make: Callable[[], list[Record]]
    ) -> list[Record]:
        """Records from the run directory, or made and kept there."""
        kept = None if self.run is None else self.bench.kept(self.run, name, part, label)
        if kept is None:
            kept = make()
            if self.run is not None:
                self.run.keep(name, kept)
        return kept

    def _cost(self, variant: Variant, theta: float) -> float:
        name = f"{_file_name(variant.name)}-{theta:g}-plain-text"
        kept = None if self.run is None else self.run.kept(name)
        if kept is None:
            cost = self.bench.cost(variant.steering.at(theta))
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


def _change(before: Sequence[Record], after: Sequence[Record], metric: str) -> Change | None:
    old, new = _values(before, metric), _values(after, metric)
    if bool((old.isnan() | new.isnan()).all()):
        return None
    return compare(old, new)


def _values(records: Sequence[Record], metric: str) -> Tensor:
    """A metric's values, [rows]; NaN where an answer was not clear."""
    found = [record["values"].get(metric) for record in records]
    return torch.tensor(
        [float("nan") if value is None else value for value in found], dtype=torch.float64
    )


def angles_of(step: float) -> list[float]:
    """A circle in steps; 360 degrees are 0."""
    if not 0 < step <= 180 or 360 % step:
        raise TrimtabError(f"step must divide 360 degrees, as 10 and 30 do, not {step:g}")
    return [i * float(step) for i in range(round(360 / step))]


def study_of(
    language_model: LanguageModel,
    task: str,
    part: str,
    rows: Rows,
    measured: Measured,
    *,
    oracle: bool,
    cost: bool,
    run: SharedRun | None,
) -> Study:
    """The rows; with part "test" the test rows stand where the validation rows do."""
    check_choice("part", part, Literal["validation", "test"])
    chooses, choosing = part == "validation", measured.choosing
    if choosing.max_cost is not None and not cost:
        raise TrimtabError("max_cost needs the cost to be measured: leave cost on")
    if not chooses:
        if choosing.validation_task is not None:
            raise TrimtabError("on the test part nothing is chosen: leave validation_task out")
        rows = replace(rows, limit=rows.test_limit)
        measured = replace(measured, choosing=replace(choosing, validation_task=task))
    bench = Bench(language_model, task, rows, measured, chooses=chooses)
    study = Study(bench, run, chooses, oracle, cost, choosing.max_cost)
    _ = bench.metric  # one that the task does not have is refused before the work begins
    return study
