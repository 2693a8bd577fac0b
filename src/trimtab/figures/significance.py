"""Paired differences, and whether they are more than chance, also where there are many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from trimtab.figures.intervals import Estimate, mean_interval, rate_interval, weighted_interval

#: What changes by no more has not moved: sums of the same numbers in another order differ as much.
_STILL = 1e-6


@dataclass(frozen=True)
class Difference:
    """What was measured after minus before on the same n examples: the mean, and its 95 % interval
    (paired bootstrap).

    Of what is right or wrong, `gained` and `lost` count the examples that flipped each way, and `p`
    is McNemar's exact test of whether they flip both ways alike: with few flips it is to be
    believed over the interval, which cannot draw a flip that did not occur. Of other values `p` is
    Wilcoxon's signed-rank test, where one was made. `corrected_p` is p corrected for the number of
    differences that this is one of (Holm). An evaluation's differences, steered minus unsteered,
    also say of what they are.
    """

    difference: float
    ci95: tuple[float, float]
    n: int
    p: float | None = None
    gained: int | None = None
    lost: int | None = None
    corrected_p: float | None = None
    task: str = ""
    protocol: str = ""
    metric: str = ""
    steering: str = ""
    #: How many examples moved the wrong way, whatever the mean says.
    wrong: int | None = None

    @property
    def wrong_way(self) -> Estimate | None:
        """The share of examples that moved the wrong way, with its 95 % interval (Wilson)."""
        if self.wrong is None or not self.n:
            return None
        return rate_interval(torch.arange(self.n) < self.wrong)

    @property
    def wrong_way_as_json(self) -> dict[str, Any] | None:
        """The same for results.json."""
        share = self.wrong_way
        return None if share is None else {"value": share.value, "n": share.n, "ci95": share.ci95}

    @property
    def is_clear(self) -> bool:
        """Whether chance alone seldom makes it: p (corrected, where it was) is below 0.05, or
        without a test the interval, of more than one example, is to one side of zero."""
        p = self.p if self.corrected_p is None else self.corrected_p
        if p is not None:
            return p < 0.05
        return self.n > 1 and (self.ci95[0] > 0 or self.ci95[1] < 0)

    def as_json(self) -> dict[str, Any]:
        """For results.json and `--json`."""
        wrong = {"wrong_way": self.wrong_way_as_json}
        if self.task:
            return {key: getattr(self, key) for key in _OF_AN_EVALUATION} | wrong
        found = {key: getattr(self, key) for key in ("difference", "ci95", "n", "p")}
        found |= {"gained": self.gained, "lost": self.lost, **wrong}
        return found if self.corrected_p is None else {**found, "p_corrected": self.corrected_p}


_OF_AN_EVALUATION = (
    *("task", "protocol", "metric", "difference", "ci95", "n"),
    *("steering", "gained", "lost", "p"),
)


def paired_difference(
    changes: Tensor,
    *,
    flips: bool,
    weights: Tensor | None = None,
    tested: bool = True,
    more: bool = True,
) -> Difference:
    """From each example's change, [examples].

    `flips` where examples are right or wrong, so that changes are -1, 0 and 1. `tested` false
    makes no test of what does not flip. `more` says whether more is better, and so which way is
    wrong; what changes by less than a millionth has not moved.
    """
    mean = mean_interval(changes) if weights is None else weighted_interval(changes, weights)
    p = paired_p(changes.tolist()) if flips or tested else None
    counts = (int((changes > 0).sum()), int((changes < 0).sum())) if flips else (None, None)
    wrong = int(((changes if more else -changes) < -_STILL).sum())
    gained, lost = counts
    return Difference(
        mean.value, (mean.low, mean.high), mean.n, p, gained=gained, lost=lost, wrong=wrong
    )


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences.

    McNemar's exact test where they are -1, 0 and 1 (right or wrong), else Wilcoxon's signed-rank
    test.
    """
    values = np.asarray(differences, dtype=float)
    if not values.any():
        return 1.0
    if np.isin(values, (-1, 0, 1)).all():
        gained, lost = int((values > 0).sum()), int((values < 0).sum())
        return float(stats.binomtest(gained, gained + lost).pvalue)
    return float(stats.wilcoxon(values).pvalue)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Differences that were looked at together, each with its p corrected for their number."""
    every = holm([1.0 if each.p is None else each.p for each in differences])
    return [replace(each, corrected_p=p) for each, p in zip(differences, every, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of several p for their number, in their order."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected
