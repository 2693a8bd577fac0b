"""Intervals of rates and weighted means, against other libraries and a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from trimtab.figures import intervals
from trimtab.figures.intervals import Estimate, mean_interval, rate_interval, weighted_interval


def ones(count: int, n: int) -> torch.Tensor:
    return torch.tensor([1.0] * count + [0.0] * (n - count), dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (37, 50), (1, 3), (830, 1000)]
)
def test_a_rate_has_wilson_s_interval(count: int, n: int) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    low, high = proportion.proportion_confint(count, n, method="wilson")
    found = rate_interval(ones(count, n)[torch.randperm(n)])
    assert (found.value, found.n) == (count / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_wilson_s_formula() -> None:
    # Centre (p + z²/2n) / (1 + z²/n), half width z √(p(1-p)/n + z²/4n²) / (1 + z²/n).
    p, n, z = 0.7, 10, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    found = rate_interval(ones(7, 10))
    assert found.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert found.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)


def test_a_rate_is_exact_in_any_dtype() -> None:
    # bfloat16 cannot hold the sum.
    assert rate_interval(ones(999, 1999).bfloat16()).value == 999 / 1999


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values that hang together with their weights, so that resampling them apart would show."""
    rng = np.random.default_rng(seed)
    weights = rng.gamma(1.0, size=n) + 0.01
    return rng.normal(size=n) + 2 * weights, weights


def test_a_weighted_mean_is_numpy_s() -> None:
    values, weights = sample(57)
    found = weighted_interval(torch.tensor(values), torch.tensor(weights))
    assert found.value == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert found.n == 57


def test_a_weighted_interval_is_that_of_a_plain_bootstrap() -> None:
    values, weights = sample(80)
    rng = np.random.default_rng(9)
    means = []
    for _ in range(20_000):
        drawn = rng.integers(0, 80, 80)
        means.append(np.average(values[drawn], weights=weights[drawn]))
    low, high = np.percentile(means, (2.5, 97.5))
    found = weighted_interval(torch.tensor(values), torch.tensor(weights))
    # Chance moves an end by about 2 % of the width.
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_only_the_ratio_of_weights_counts() -> None:
    values, weights = (torch.tensor(x) for x in sample(40))
    one, other = weighted_interval(values, weights), weighted_interval(values, 1000 * weights)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


def test_equal_weights_are_no_weights() -> None:
    values = torch.tensor(sample(60)[0])
    found = weighted_interval(values, torch.full((60,), 3.0))
    plain = mean_interval(values)
    assert found.value == pytest.approx(plain.value)
    assert found.low == pytest.approx(plain.low, abs=0.1 * (plain.high - plain.low))
    assert found.high == pytest.approx(plain.high, abs=0.1 * (plain.high - plain.low))


def test_a_weighted_interval_repeats_and_its_seed_matters() -> None:
    values, weights = (torch.tensor(x) for x in sample(30))
    found = weighted_interval(values, weights)
    assert weighted_interval(values, weights) == found
    assert weighted_interval(values, weights, seed=1) != found


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0, 1.0]])
def test_values_that_are_all_the_same_have_no_width(values: list[float]) -> None:
    found = weighted_interval(torch.tensor(values), torch.rand(len(values)) + 0.1)
    mean = pytest.approx(values[0])
    assert found == Estimate(mean, mean, mean, len(values))  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 150, 3001])
def test_a_mean_s_interval_does_not_depend_on_how_many_are_resampled_at_once(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = sample(n)[0]
    whole = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    for at_once in (10_000_000, 700_000):
        monkeypatch.setattr(intervals, "_AT_ONCE", at_once)
        found = mean_interval(torch.tensor(values))
        assert found == Estimate(values.mean(), whole.low, whole.high, n)


def test_a_weighted_interval_does_not_depend_on_how_many_are_resampled_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, weights = (torch.tensor(x) for x in sample(500))
    found = weighted_interval(values, weights)
    monkeypatch.setattr(intervals, "_AT_ONCE", 100_000)
    assert weighted_interval(values, weights) == found
