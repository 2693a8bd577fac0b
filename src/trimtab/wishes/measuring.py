"""What steerings, and words before prompts, gain and cost: each is measured once for a directory.

The gain is by how many nats the positive side of a pair gets ahead of the negative one, against the
unsteered model on the same pair. The cost is how much harder plain text is to predict, in nats per
token: the same as in `compare` and for budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.contrasts import Part
from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached
from trimtab.figures import Estimate
from trimtab.sweeps import FINE, TaskRows, cost_interval
from trimtab.wishes.work import Work

#: What is measured, made where its figure is not known yet.
Made = Callable[[], Attached]


class Measures:
    """Measures on the rows of a bench; what is asked for by a `name` is known by it afterwards."""

    def __init__(self, bench: TaskRows, work: Work) -> None:
        self.bench, self._work = bench, work

    def gains(
        self, attached: Made, name: str, part: Part = "validation", start: int = 0, stop: int = 0
    ) -> Tensor:
        """Of the rows of a part from one to another (0: the last), [rows] in nats."""
        stop = stop or self.bench.rows(part)
        base = self.unsteered(part)  # first, so that it is the same whatever is steered
        return self._odds(attached, name, part, start, stop) - base[start:stop]

    def unsteered(self, part: Part) -> Tensor:
        """By how many nats the positive side is ahead in the model as it is, [rows]."""
        return self._odds(lambda: None, "unsteered", part, 0, self.bench.rows(part))

    def _odds(self, attached: Made, name: str, part: Part, start: int, stop: int) -> Tensor:
        def measure() -> list[float]:
            records = self.bench.records(attached(), part, start, stop)
            return [_finite(record["values"][FINE]) for record in records]

        found = self._work.recall(f"log-odds of {name}, {part} {start}-{stop}", measure)
        return torch.tensor(found, dtype=torch.float64)

    def cost(self, attached: Made, name: str, texts: int | None = None) -> float:
        """What plain text costs, in nats per token, on all of it or the first `texts`; infinite
        where numbers overflow."""
        found = self._costs(attached, name, texts)
        return (
            math.inf if found is None else float(found.sum() / self.bench.plain.tokens(texts).sum())
        )

    def cost_interval(self, attached: Made, name: str) -> Estimate:
        """With its 95 % interval."""
        found = self._costs(attached, name, None)
        if found is None:
            raise _overflow()
        return cost_interval(found, self.bench.plain.tokens())

    def _costs(self, attached: Made, name: str, texts: int | None) -> Tensor | None:
        """Of each plain text, [texts] in nats; None where numbers overflow."""

        def measure() -> list[float] | None:
            found = self.bench.plain.costs(attached(), texts)
            return found.tolist() if bool(found.isfinite().all()) else None

        found = self._work.recall(f"cost of {name} on {texts or 'all'} texts", measure)
        return None if found is None else torch.tensor(found, dtype=torch.float64)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _overflow()
    return value


def _overflow() -> TrimtabError:
    return TrimtabError("the model's numbers overflow: try --dtype float32")
