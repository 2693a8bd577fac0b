"""Intervals for means, by bootstrap over the examples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

#: Resampled values at once: what bounds the bootstrap's memory.
_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over n examples."""

    value: float
    low: float
    high: float
    n: int

    @property
    def ci95(self) -> tuple[float, float]:
        """The ends of the interval."""
        return self.low, self.high

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def rate_interval(values: Tensor) -> Estimate:
    """The share of ones among zeros and ones, with its 95 % interval (Wilson)."""
    n, ones = len(values), int(values.double().sum())
    interval = stats.binomtest(ones, n).proportion_ci(method="wilson")
    return Estimate(ones / n, float(interval.low), float(interval.high), n)


def auroc_interval(scores: Tensor, positive: Tensor) -> Estimate:
    """How often a positive text scores above a negative one (a tie counts half), with its 95 %
    interval (Newcombe 2006, method 5, which like Wilson's has a width where all are right); n is
    the number of texts."""
    m, n = int(positive.sum()), int((~positive).sum())
    ranks = stats.rankdata(scores.double().cpu().numpy())
    value = (float(ranks[positive.cpu().numpy()].sum()) - m * (m + 1) / 2) / (m * n)
    more = (m + n) / 2 - 1

    def off(theta: float) -> float:
        """By how much `theta` is out of reach of what was seen."""
        spread = 1 + more * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (value - theta) ** 2 - 1.96**2 * theta * (1 - theta) * spread / (m * n)

    inside = min(max(value, 1e-9), 1 - 1e-9)
    low = 0.0 if value == 0 else float(optimize.brentq(off, 0.0, inside))
    high = 1.0 if value == 1 else float(optimize.brentq(off, inside, 1.0))
    return Estimate(value, low, high, m + n)


def weighted_interval(values: Tensor, weights: Tensor, seed: int = 0) -> Estimate:
    """Weighted mean and its 95 % bootstrap interval; a value is resampled with its weight."""
    pairs = torch.stack([values, weights]).double().cpu().numpy()
    mean = float(np.average(pairs[0], weights=pairs[1]))
    n = len(values)
    if n < 2 or np.ptp(pairs[0]) == 0:
        return Estimate(mean, mean, mean, n)
    result = stats.bootstrap(
        tuple(pairs),
        lambda v, w, axis: (v * w).sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        batch=max(1, _AT_ONCE // n),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Estimate(mean, float(low), float(high), n)


def mean_interval(values: Tensor, seed: int = 0) -> Estimate:
    """Mean and 95 % bootstrap interval (BCa). Give paired differences for a paired comparison."""
    sample = values.double().cpu().numpy()
    mean = float(sample.mean())
    if len(sample) < 2 or np.ptp(sample) == 0:
        return Estimate(mean, mean, mean, len(sample))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of degenerate data
        result = stats.bootstrap(
            (sample,),
            np.mean,
            batch=max(1, _AT_ONCE // len(sample)),
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    if not (np.isfinite(low) and np.isfinite(high)):
        # Values that differ by a rounding error leave BCa nothing to correct by.
        low, high = np.percentile(result.bootstrap_distribution, (2.5, 97.5))
    return Estimate(mean, float(low), float(high), len(sample))
