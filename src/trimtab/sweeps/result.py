"""What a sweep found: its trials, the best of them, and the figures beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trimtab.figures import Difference, Record, Result
from trimtab.steering import Steering
from trimtab.sweeps.space import Params


@dataclass(frozen=True)
class Trial:
    """One setting.

    `state` is complete, pruned (stopped early), failed (`why`) or dear (above the limit of cost).
    `value` is the metric's mean over `n` validation rows, `test` that over `test_n` test rows where
    they were run; `cost` is in nats per token of plain text, where it was measured.
    """

    number: int
    params: Params
    state: str
    value: float | None = None
    n: int = 0
    ci95: tuple[float, float] | None = None
    test: float | None = None
    test_n: int = 0
    test_ci95: tuple[float, float] | None = None
    cost: float | None = None
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    `best` is the complete trial of the best value on the validation rows, the first of those that
    are equal; `oracle` that of the best value on the test rows. `unsteered` has the figures of the
    unsteered model on both parts; `difference` compares the best with it on the test rows, and
    `chosen_p` is McNemar's p on the validation rows times the number of trials.
    """

    method: str
    task: str
    metric: str
    maximise: bool
    space: dict[str, Any]
    trials: tuple[Trial, ...]
    best: Trial | None
    oracle: Trial | None
    unsteered: dict[str, Result]
    difference: Difference | None
    chosen_p: float | None
    steering: Steering | None
    flips: tuple[tuple[Record, Record], ...]
    model: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    #: Records of the best trial on the test rows.
    tested: tuple[Record, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What `trimtab sweep --json` prints."""
        best, oracle = self.best, self.oracle
        return {
            "method": self.method,
            "task": self.task,
            "metric": self.metric,
            "best": best
            and {
                "params": best.params,
                "validation": best.value,
                "test": best.test,
                "n": best.test_n,
                "ci95": best.test_ci95,
                "validation_n": best.n,
                "validation_ci95": best.ci95,
                "chosen_p": self.chosen_p,
                "trial": best.number,
            },
            "oracle": oracle and {"params": oracle.params, "test": oracle.test},
            "unsteered": {
                part: {"value": r.value, "n": r.n, "ci95": r.ci95}
                for part, r in self.unsteered.items()
            },
            "difference": None if self.difference is None else self.difference.as_json(),
            "trials": [asdict(trial) for trial in self.trials],
            "model": self.model,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
