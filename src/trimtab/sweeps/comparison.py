"""What a comparison found: a row for each method, and the differences between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trimtab.figures import Difference, Evaluation, Result
from trimtab.sweeps.metering import Overhead, Used
from trimtab.sweeps.result import Sweep


@dataclass(frozen=True)
class Compared:
    """One method's row.

    `against` compares it with the unsteered model. `changed` is how many activations it changes at
    a token; `cost` what it adds to the cross-entropy of plain text, in nats per token, `perplexity`
    that of the steered model there; `fit` and `sweep` what they took, `overhead` generation beside
    the unsteered model. `why` says why there is nothing, where there is not.
    """

    name: str
    sweep: Sweep | None
    test: Result | None = None
    against: Difference | None = None
    dial: float | None = None
    changed: int | None = None
    cost: float | None = None
    perplexity: float | None = None
    overhead: Overhead | None = None
    swept: Used | None = None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison: of methods as they were chosen, and at an equal budget of KL."""

    task: str
    metric: str
    unsteered: dict[str, Result]
    perplexity: float
    rows: tuple[Compared, ...]
    at_budget: tuple[Compared, ...]
    kl: float | None
    between: dict[tuple[str, str], Difference]
    fit: Used
    capability: Evaluation | None
    model: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What `trimtab compare --json` prints."""
        return {
            "task": self.task,
            "metric": self.metric,
            "unsteered": {
                part: {"value": r.value, "n": r.n, "ci95": r.ci95}
                for part, r in self.unsteered.items()
            }
            | {"perplexity": self.perplexity},
            "methods": [_row_json(row) for row in self.rows],
            "at_budget": {"kl": self.kl, "methods": [_row_json(row) for row in self.at_budget]},
            "between": [
                {"first": first, "second": second, **_difference_json(found)}
                for (first, second), found in self.between.items()
            ],
            "fit": asdict(self.fit),
            "capability": None if self.capability is None else self.capability.as_json(),
            "model": self.model,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def _difference_json(found: Difference) -> dict[str, Any]:
    return {
        "value": found.difference,
        "ci95": found.ci95,
        "p": found.p,
        "corrected_p": found.corrected_p,
        "n": found.n,
    }


def _row_json(row: Compared) -> dict[str, Any]:
    found = row.sweep
    best = None if found is None else found.best
    return {
        "name": row.name,
        "params": None if best is None else best.params,
        "validation": None if best is None else best.value,
        "trials": 0 if found is None else len(found.trials),
        "test": None if row.test is None else row.test.value,
        "n": 0 if row.test is None else row.test.n,
        "ci95": None if row.test is None else row.test.ci95,
        "against_unsteered": row.against and _difference_json(row.against),
        "dial": row.dial,
        "changed": row.changed,
        "cost": row.cost,
        "perplexity": row.perplexity,
        "overhead": None if row.overhead is None else asdict(row.overhead),
        "swept": None if row.swept is None else asdict(row.swept),
        "why": row.why,
    }
