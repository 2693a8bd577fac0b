"""p of paired differences, and its correction for how many there are, against scipy and
statsmodels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from trimtab.figures.significance import holm, paired_p


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (3, 0), (7, 12), (20, 20), (13, 2)])
def test_flips_get_mcnemars_exact_p(gained: int, lost: int) -> None:
    differences = [1.0] * gained + [-1.0] * lost + [0.0] * 30
    expected = mcnemar([[15, gained], [lost, 15]], exact=True).pvalue
    assert paired_p(differences) == pytest.approx(expected)


def test_no_flip_is_no_evidence() -> None:
    assert paired_p([0.0] * 10) == paired_p([]) == 1.0


def test_other_differences_get_wilcoxons_test() -> None:
    values = [0.7, -0.2, 1.3, 0.4, 0.9, -0.1, 0.55]
    # By hand: the ranks of the negative ones are 1 and 2, and 2^7 ways to give signs.
    ranks = np.argsort(np.argsort(np.abs(values))) + 1
    lower = sum(rank for rank, value in zip(ranks, values, strict=True) if value < 0)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign < 0)
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    expected = 2 * sum(one <= lower for one in sums) / len(sums)
    assert paired_p(values) == pytest.approx(expected)


def test_a_shift_of_all_values_is_seen() -> None:
    assert paired_p(list(np.random.default_rng(0).normal(1.0, 0.5, 40))) < 0.001


@pytest.mark.parametrize(
    "p", [[0.01, 0.04, 0.03, 0.005], [0.2], [0.5, 0.9, 0.04], [0.01, 0.01, 0.01], []]
)
def test_holm(p: list[float]) -> None:
    expected = multipletests(p, method="holm")[1].tolist() if p else []
    assert holm(p) == pytest.approx(expected)
