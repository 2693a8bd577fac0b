"""The theory of steering strength: every identity against softmaxes and loops of `ufm_cases`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from trimtab.strength.theory.ufm import UFM, ConceptData, SteeredUFM, perfect, sides, specification
from ufm_cases import GRID, Case, oracle_log_odds, oracle_p, oracle_steered


@st.composite
def cases(draw: st.DrawFn) -> Case:
    concepts = draw(st.integers(2, 4))
    share = draw(st.sampled_from([0.01, 0.075, 0.5, 0.9]))
    return Case(
        concepts,
        draw(st.integers(1, 4)),
        share * (concepts - 1) / concepts,
        draw(st.booleans()),
        draw(st.integers(0, 9999)),
    )


def for_all_cases(test: Any) -> Any:
    return settings(max_examples=25, deadline=None, derandomize=True)(given(cases())(test))


def far(M: np.ndarray) -> float:
    """An α at which e^(αM) leaves nothing but the extremes: the nearest other is e^-40 of them."""
    gaps = np.concatenate([M.max() - M, M - M.min()])
    return float(40 / gaps[gaps > 1e-9].min())


def target_tokens(steered: SteeredUFM) -> np.ndarray:
    size = len(steered.data.a) // steered.data.concepts
    return np.arange(len(steered.data.a)) // size == steered.target


# The data.


def test_the_papers_data_set_has_its_entropy() -> None:
    data = specification()  # V = 9, G = 3, ε = 0.05, uniform
    assert data.a == pytest.approx([0.95 / 3] * 9, abs=1e-15)
    assert data.b == pytest.approx([0.05 / 6] * 9, abs=1e-15)
    assert data.entropy == pytest.approx(
        -0.95 * math.log(0.95 / 3) - 0.05 * math.log(0.05 / 6), abs=1e-12
    )
    assert data.entropy == pytest.approx(1.3318, abs=5e-5)
    assert data.contexts == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)


@for_all_cases
def test_data_sets_are_those_of_definition_2_1(case: Case) -> None:
    data = case.data
    p = oracle_p(data)
    assert np.array_equal(data.probabilities, p)
    assert p.sum(1) == pytest.approx(1, abs=1e-12)
    assert np.all((data.b > 0) & (data.b < data.a) & (data.a < 1))
    # The specification: γ and ω sum to one over each concept.
    gamma, omega = data.a / (1 - case.epsilon), data.b * (case.concepts - 1) / case.epsilon
    for shares in (gamma, omega):
        assert shares.reshape(case.concepts, -1).sum(1) == pytest.approx(1, abs=1e-12)
    entropy = sum(
        -weight * sum(x * math.log(x) for x in row)
        for weight, row in zip(data.weights, p, strict=True)
    )
    assert data.entropy == pytest.approx(entropy, abs=1e-12)


def test_a_given_gamma_and_omega_are_kept() -> None:
    gamma, omega = [0.2, 0.8, 0.5, 0.5], [0.7, 0.3, 0.1, 0.9]
    data = specification(4, 2, 0.1, gamma=gamma, omega=omega)
    assert data.a == pytest.approx([0.18, 0.72, 0.45, 0.45])
    assert data.b == pytest.approx([0.07, 0.03, 0.01, 0.09])
    # Only what is not given is drawn, however near ε is to its bound.
    drawn = specification(4, 2, 0.499, gamma=gamma, seed=3)
    assert drawn.a == pytest.approx(0.501 * np.array(gamma))
    drawn = specification(4, 2, 0.499, omega=omega, seed=3)
    assert drawn.b == pytest.approx(0.499 * np.array(omega))
    assert np.array_equal(specification(seed=5).a, specification(seed=5).a)
    assert not np.array_equal(specification(seed=5).a, specification(seed=6).a)


def test_data_cannot_be_changed_behind_its_checks() -> None:
    a = np.full(4, 0.4)
    data = ConceptData(a, np.full(4, 0.1), 2, (0, 1))
    a[0] = 0.9
    assert data.a[0] == 0.4
    with pytest.raises(ValueError, match="read-only"):
        data.a[0] = 0.9


def test_the_sides_of_a_contrast() -> None:
    data = specification(12, 4, contexts_each=5)
    everything = set()
    for seed in range(20):
        positive, negative = sides(data, 2, 3, seed=seed)
        assert set(positive) <= set(range(10, 15))
        assert not set(negative) & set(range(10, 15))
        assert len(set(positive)) == len(set(negative)) == 3
        everything |= set(negative)
        contrastive = sides(data, 2, 3, opposite=0, seed=seed)[1]
        assert set(contrastive) <= set(range(5))
        assert sides(data, 2, 3, seed=seed) == (positive, negative)
    assert {data.contexts[j] for j in everything} == {0, 1, 3}  # random: any other concept


# Lemmas B.2 to B.5.


@pytest.mark.parametrize("seed", range(4))
def test_b2_steering_adds_the_mean_difference_of_logits(seed: int) -> None:
    # Of any UFM, however badly trained.
    rng = np.random.default_rng(seed)
    data = specification(seed=seed)
    model = UFM(rng.normal(size=(9, 5)), rng.normal(size=(5, 12)))
    P, N = sides(data, 1, 3, seed=seed)
    steered = SteeredUFM(data, model, 1, P, N)
    plain = (model.W @ model.H).T
    for alpha in (-3.0, 0.0, 0.7):
        shift = alpha / 3 * (sum(plain[i] for i in P) - sum(plain[i] for i in N))
        assert steered.logits(alpha)[0] == pytest.approx(plain + shift, abs=1e-12)
        assert steered.probabilities(alpha)[0] == pytest.approx(oracle_steered(steered, alpha))


@for_all_cases
def test_b3_steering_reweights_by_the_log_odds(case: Case) -> None:
    steered = case.steered()
    p, M = oracle_p(steered.data), oracle_log_odds(steered)
    assert perfect(steered.data).logits == pytest.approx(np.log(p), abs=1e-12)
    assert steered.probabilities(0)[0] == pytest.approx(p, abs=1e-12)
    shift = np.random.default_rng(case.seed).normal(size=len(p)) * 10
    shifted = case.steered(shift)
    assert shifted.model.logits == pytest.approx(np.log(p) + shift[:, None], abs=1e-12)
    for alpha in (-4.0, -0.3, 1.0, 5.0):
        reweighted = p * np.exp(alpha * M)
        reweighted /= reweighted.sum(1, keepdims=True)
        assert steered.probabilities(alpha)[0] == pytest.approx(reweighted, abs=1e-11)
        assert shifted.probabilities(alpha)[0] == pytest.approx(reweighted, abs=1e-11)
        assert steered.delta_p(alpha)[0] == pytest.approx(reweighted - p, abs=1e-11)
    assert shifted.log_odds == pytest.approx(M, abs=1e-9)


@for_all_cases
def test_b4_the_sign_of_the_log_odds_tells_target_from_others(case: Case) -> None:
    steered = case.steered()
    data, size = steered.data, case.size
    expected = []
    for z in range(len(data.a)):
        ratio = math.log(data.a[z] / data.b[z])
        q_z = sum(data.contexts[j] == z // size for j in steered.negative)
        expected.append(ratio if z // size == case.target else -q_z / len(steered.negative) * ratio)
    assert steered.log_odds == pytest.approx(expected, abs=1e-10)
    assert steered.log_odds == pytest.approx(oracle_log_odds(steered), abs=1e-10)
    assert steered.closed_log_odds == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(steered.closed_log_odds > 0, target_tokens(steered))


@for_all_cases
def test_b5_derivatives_are_central_differences(case: Case) -> None:
    steered, step = case.steered(), 1e-5
    alphas = np.array([-2.0, -0.4, 0.0, 0.9, 3.0])
    ahead, behind = steered.probabilities(alphas + step), steered.probabilities(alphas - step)
    assert steered.slope(alphas) == pytest.approx((ahead - behind) / (2 * step), abs=1e-8)
    M = oracle_log_odds(steered)
    expectation = np.array([oracle_steered(steered, alpha) @ M for alpha in alphas])
    assert steered.expectation(alphas) == pytest.approx(expectation, abs=1e-10)
    change = (ahead - behind) @ M / (2 * step)  # eq. 10
    assert steered.variance(alphas) == pytest.approx(change, abs=1e-6)


@for_all_cases
def test_the_expected_log_odds_rise_from_the_least_to_the_greatest(case: Case) -> None:
    steered = case.steered()
    assert np.all(np.diff(steered.expectation(np.linspace(-2, 2, 81)), axis=0) > 0)
    M = oracle_log_odds(steered)
    assert steered.expectation(far(M))[0] == pytest.approx(M.max(), abs=1e-6)
    assert steered.expectation(-far(M))[0] == pytest.approx(M.min(), abs=1e-6)


# Theorem 3.3.


@for_all_cases
def test_3_3_every_token_but_the_extremes_has_one_peak(case: Case) -> None:
    steered = case.steered()
    M, peaks = oracle_log_odds(steered), steered.peaks()
    extreme = np.isclose(M, M.max(), atol=1e-9) | np.isclose(M, M.min(), atol=1e-9)
    assert np.array_equal(np.isfinite(peaks), np.tile(~extreme, (len(peaks), 1)))
    for j, z in zip(*np.nonzero(np.isfinite(peaks)), strict=True):
        peak = peaks[j, z]
        if j % 4:
            assert peak == pytest.approx(peaks[j - 1, z], abs=1e-9)  # contexts of one concept
            continue
        assert oracle_steered(steered, peak)[j] @ M == pytest.approx(M[z], abs=1e-8)
        # Rising before, falling after: log σ is concave, so that its slope shows it far out too.
        for offset in (0.01, 0.1, 1, 10):
            before, after = (oracle_steered(steered, peak + step) for step in (-offset, offset))
            assert before[j] @ M < M[z] < after[j] @ M
        near = steered.delta_p(peak + np.linspace(-1, 1, 21), int(j))[:, z]
        assert np.all(np.diff(near[:11]) > -1e-14)
        assert np.all(np.diff(near[10:]) < 1e-14)
        assert near.argmax() == 10 or near[10] == pytest.approx(near.max(), abs=1e-14)


@pytest.mark.parametrize("seed", range(6))
def test_3_3_peaks_are_where_a_search_finds_them(seed: int) -> None:
    steered = Case(3, 3, 0.05, bool(seed % 2), seed).steered()
    peaks = steered.peaks()
    for z in np.nonzero(np.isfinite(peaks[0]))[0]:
        for j in (0, 5, 11):
            found = minimize_scalar(
                lambda alpha: -np.log(oracle_steered(steered, alpha)[j, z]),
                bounds=(peaks[j, z] - 3, peaks[j, z] + 5),
                method="bounded",
                options={"xatol": 1e-9},
            )
            assert peaks[j, z] == pytest.approx(found.x, abs=1e-5)


def test_3_3_a_peak_in_closed_form() -> None:
    # Two target tokens, and two others with equal log-odds -ln(a/b): E_α[M] = M(z) is
    # p_1 e^(α M_1) (M_1 - M_0) = 2 p_off e^(α M_off) (M_0 - M_off), which is linear in α.
    data = specification(4, 2, 0.1, gamma=[0.3, 0.7, 0.5, 0.5], omega=[0.5] * 4)
    steered = SteeredUFM(data, perfect(data), 0, (0, 1), (4, 5))
    m0, m1, off = math.log(0.27 / 0.05), math.log(0.63 / 0.05), -math.log(0.45 / 0.05)
    for j, (p1, p_off) in ((0, (0.63, 0.05)), (4, (0.05, 0.45))):
        alpha = math.log(2 * p_off * (m0 - off) / (p1 * (m1 - m0))) / (m1 - off)
        assert steered.peaks()[j] == pytest.approx([alpha, math.inf, -math.inf, -math.inf])


def test_3_3_peaks_of_nearly_extreme_tokens_are_far_out_and_exact() -> None:
    # Two target tokens whose log-odds differ by δ: the lesser one's peak has the closed
    # form of above, with M_1 - M_0 a millionth of the spread.
    delta = 1e-6
    omega = np.array([0.9, 0.1, 0.5, 0.5])
    gamma = omega * np.array([1, np.exp(delta), 1, 1])
    gamma[:2] /= gamma[:2].sum()
    data = specification(4, 2, 0.1, gamma=gamma, omega=omega)
    steered = SteeredUFM(data, perfect(data), 0, (0,), (4,))
    m0, m1, off = steered.closed_log_odds[[0, 1, 2]]
    p1, p_off = 0.1 * 0.1, 0.9  # from a context outside
    alpha = math.log(p_off * (m0 - off) / (p1 * (m1 - m0))) / (m1 - off)
    assert steered.peaks()[4, 0] == pytest.approx(alpha, rel=1e-6)


@for_all_cases
def test_3_3_others_peak_before_targets_and_the_extremes_never_turn(case: Case) -> None:
    steered = case.steered()
    peaks, target = steered.peaks(), target_tokens(steered)
    assert np.all(peaks[:, ~target].max(1) < peaks[:, target].min(1))
    M = oracle_log_odds(steered)
    assert steered.highest[M.argmax()]
    assert steered.lowest[M.argmin()]
    assert not np.any(steered.highest & ~target)
    assert not np.any(steered.lowest & target)
    steps = np.diff(steered.delta_p(np.linspace(-2, 2, 41)), axis=0)
    assert np.all(steps[..., steered.highest] > 0)
    assert np.all(steps[..., steered.lowest] < 0)
    assert np.all(np.isposinf(peaks[:, steered.highest]))
    assert np.all(np.isneginf(peaks[:, steered.lowest]))


def test_with_uniform_probabilities_all_targets_tie_and_nothing_peaks_there() -> None:
    data = specification()
    steered = SteeredUFM(data, perfect(data), 0, (0, 1, 2), (4, 5, 8))
    assert steered.highest.tolist() == [True] * 3 + [False] * 6
    assert steered.lowest.tolist() == [False] * 3 + [True] * 3 + [False] * 3  # q_z = 2, then 1
    assert np.all(np.isposinf(steered.peaks()[:, :3]))
    assert np.all(np.isfinite(steered.peaks()[:, 6:]))
    assert steered.limit(1)[4, :3] == pytest.approx([1 / 3 - 0.05 / 6] * 3)  # the mass is shared


# Remark 3.4.


@for_all_cases
def test_remark_3_4_outside_the_target_small_epsilon_gives_positive_peaks(case: Case) -> None:
    steered = case.steered()
    epsilon, others = case.epsilon, case.concepts - 1
    # F(ε) of appendix B.3.
    bound = epsilon / others * math.log((1 - epsilon) * others / epsilon)
    least = oracle_log_odds(steered)[target_tokens(steered)].min()
    assert steered.peak_margin() == pytest.approx(least - bound, abs=1e-10)
    if steered.peak_margin() > 0:
        outside = [j for j, concept in enumerate(steered.data.contexts) if concept != case.target]
        assert np.all(steered.peaks()[outside][:, target_tokens(steered)] > 0)
    assert replace(case, epsilon=1e-5).steered().peak_margin() > 0  # F → ∞ as ε → 0


def test_remark_3_4_fails_inside_the_target() -> None:
    # ε is small, the margin large, and still a target token peaks before zero in its own concept.
    steered = Case(3, 3, 0.01, False, 0).steered()
    assert steered.peak_margin() > 1
    inside = steered.data.contexts.index(steered.target)
    peaks = steered.peaks()[inside, target_tokens(steered)]
    assert peaks.min() < 0 < peaks.max()
    z = int(np.nonzero(target_tokens(steered))[0][peaks.argmin()])
    assert steered.delta_p(-1e-3, inside)[0, z] > 0 > steered.delta_p(1e-3, inside)[0, z]


# Proposition B.1.


@for_all_cases
def test_b1_in_the_limit_the_mass_is_on_the_extremes_in_proportion(case: Case) -> None:
    steered = case.steered()
    p, M = oracle_p(steered.data), oracle_log_odds(steered)
    for sign in (1, -1):
        kept = np.isclose(sign * M, (sign * M).max(), atol=1e-9) * p
        expected = kept / kept.sum(1, keepdims=True) - p
        assert steered.limit(sign) == pytest.approx(expected, abs=1e-12)
        assert steered.delta_p(sign * far(M))[0] == pytest.approx(expected, abs=1e-6)


# Theorem 3.6.


@for_all_cases
def test_3_6_the_increase_of_a_concept_is_a_tanh(case: Case) -> None:
    steered = case.steered()
    steps = [oracle_steered(steered, alpha) - oracle_p(steered.data) for alpha in GRID[::20]]
    total = 0.0
    for concept in range(case.concepts):
        members = slice(concept * case.size, (concept + 1) * case.size)
        mean = np.array([step[:, members].mean(1) for step in steps])
        assert steered.concept_increase(concept, GRID[::20]) == pytest.approx(mean, abs=1e-11)
        assert steered.concept_tanh(concept, GRID[::20]) == pytest.approx(mean, abs=1e-11)
        total = total + steered.concept_probability(concept, GRID)
    assert total == pytest.approx(np.ones_like(total))


@pytest.mark.parametrize("seed", range(4))
def test_3_6_nu_is_the_integral_of_the_gap_between_the_means(seed: int) -> None:
    steered = Case(3, 3, 0.2, bool(seed % 2), seed).steered()
    M, concept, j = oracle_log_odds(steered), seed % 3, 3 * seed
    inside = np.arange(9) // 3 == concept

    def gap(alpha: float) -> float:
        p = oracle_steered(steered, alpha)[j]
        means = [np.average(M[part], weights=p[part]) for part in (inside, ~inside)]
        return float(means[0] - means[1])

    for alpha in (-3.0, 0.0, 0.8, 4.0):
        nu = steered.concept_reparametrisation(concept, alpha)[0, j]
        assert nu == pytest.approx(quad(gap, 0, alpha)[0], abs=1e-8)
        assert abs(nu) <= np.ptp(M) * abs(alpha) + 1e-12  # at most linear


@for_all_cases
def test_3_6_the_target_rises_and_concepts_below_all_others_fall(case: Case) -> None:
    steered = case.steered()
    M = oracle_log_odds(steered)
    alphas = np.linspace(-2, 2, 41)
    for concept in range(case.concepts):
        inside = np.arange(len(M)) // case.size == concept
        steps = np.diff(steered.concept_increase(concept, alphas), axis=0)
        if concept == case.target:
            assert np.all(steps > 0)
        elif M[inside].max() <= M[~inside].min():
            assert np.all(steps < 0)


@for_all_cases
def test_3_6_the_limits_of_concepts(case: Case) -> None:
    steered = case.steered()
    p, M = oracle_p(steered.data), oracle_log_odds(steered)
    for concept in range(case.concepts):
        members = slice(concept * case.size, (concept + 1) * case.size)
        for sign in (1, -1):
            end = steered.concept_increase(concept, sign * far(M))[0]
            assert steered.concept_limit(concept, sign) == pytest.approx(end, abs=1e-6)
        own = M[members]
        if own.max() < M.max() - 1e-9 and own.min() > M.min() + 1e-9:
            # All is lost at both ends; nothing returns to its unsteered value.
            lost = -p[:, members].sum(1) / case.size
            for sign in (1, -1):
                assert steered.concept_limit(concept, sign) == pytest.approx(lost, abs=1e-12)


def test_3_6_has_concepts_of_each_kind_to_be_tested_on() -> None:
    """The two conditional tests above see each condition hold."""
    falling = middling = 0
    for seed in range(20):
        steered = Case(3, 3, 0.05, bool(seed % 2), seed).steered()
        M = oracle_log_odds(steered).reshape(3, 3)
        for concept in range(3):
            rest = np.delete(M, concept, 0)
            falling += M[concept].max() <= rest.min()
            middling += rest.min() < M[concept].min() and M[concept].max() < rest.max()
    assert falling >= 5
    assert middling >= 5


# Theorem 3.8.


@for_all_cases
def test_3_8_cross_entropy_is_the_weighted_loss_and_convex(case: Case) -> None:
    steered = case.steered()
    data, p = steered.data, oracle_p(steered.data)

    def loss(alpha: float) -> float:
        logs = np.log(oracle_steered(steered, alpha))
        return -sum(w * float(p[j] @ logs[j]) for j, w in enumerate(data.weights))

    alphas = np.array([-2.0, -0.5, 0.0, 0.3, 2.0])
    expected = np.array([loss(alpha) for alpha in alphas])
    assert steered.cross_entropy(alphas) == pytest.approx(expected, abs=1e-10)
    assert steered.delta_cross_entropy(alphas) == pytest.approx(expected - loss(0), abs=1e-10)
    assert loss(0) == pytest.approx(data.entropy, abs=1e-10)
    curve = steered.delta_cross_entropy(GRID)
    assert np.all(curve >= 0)
    assert np.all(np.diff(curve, 2) >= -1e-12)
    assert np.all(steered.curvature(GRID) >= 0)
    step = 1e-4
    ahead, behind = (steered.delta_cross_entropy(alphas + sign * step) for sign in (1, -1))
    assert steered.cross_entropy_slope(alphas) == pytest.approx(
        (ahead - behind) / (2 * step), abs=1e-6
    )


@for_all_cases
def test_3_8_near_zero_the_cost_is_half_the_variance_times_the_square(case: Case) -> None:
    steered = case.steered()
    M, p = oracle_log_odds(steered), oracle_p(steered.data)
    variance = [np.average((M - row @ M) ** 2, weights=row) for row in p]
    expected = float(np.dot(steered.data.weights, variance))
    assert float(steered.curvature()[0]) == pytest.approx(expected, rel=1e-9)
    assert abs(steered.cross_entropy_slope(0.0)[0]) < 1e-12
    for alpha in (1e-3, -1e-3):
        ratio = steered.delta_cross_entropy(alpha)[0] / (0.5 * expected * alpha**2)
        assert ratio == pytest.approx(1, abs=5e-3)
    both = steered.delta_cross_entropy([1e-3, -1e-3]).mean()  # odd terms cancel
    assert both / (0.5 * expected * 1e-6) == pytest.approx(1, abs=2e-5)


def test_3_8_needs_the_perfect_model() -> None:
    # Of another one, the slope at zero need not vanish; curvature stays a variance.
    rng = np.random.default_rng(0)
    data = specification(seed=0)
    model = UFM(rng.normal(size=(9, 4)), rng.normal(size=(4, 12)))
    steered = SteeredUFM(data, model, 0, (0, 1), (4, 8))
    ahead, behind = steered.delta_cross_entropy([1e-5, -1e-5])
    assert abs(steered.cross_entropy_slope(0)[0]) > 0.1
    assert steered.cross_entropy_slope(0)[0] == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)
    assert np.all(steered.curvature(GRID) > 0)
