"""The theory of steering strength on trained models; the axes of what is computed; and mistakes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trimtab.errors import TrimtabError
from trimtab.strength.theory import pictures as ufm_pictures
from trimtab.strength.theory.ufm import (
    UFM,
    ConceptData,
    SteeredUFM,
    perfect,
    sides,
    specification,
    train,
)
from ufm_cases import GRID, Case, oracle_p, oracle_steered

# Training.


def test_training_on_the_papers_data_reaches_its_entropy() -> None:
    found = train(specification())
    assert found.entropy == specification().entropy
    assert found.loss == pytest.approx(1.3318, abs=5e-5)
    assert 0 <= found.loss - found.entropy + 1e-12 < 1e-8
    assert (found.model.W.shape, found.model.H.shape) == ((9, 3), (3, 12))


@pytest.mark.parametrize("seed", range(3))
def test_a_trained_model_obeys_the_theory(seed: int) -> None:
    case = Case(3, 3, 0.05, bool(seed % 2), seed)
    exact = case.steered()
    found = train(exact.data, width=5, seed=seed)
    loss = exact.data.weights @ -(
        oracle_p(exact.data) * np.log(oracle_steered(replace(exact, model=found.model), 0))
    ).sum(1)
    assert found.loss == pytest.approx(loss, abs=1e-12)
    assert found.loss == pytest.approx(exact.data.entropy, abs=1e-7)
    trained = replace(exact, model=found.model)
    assert trained.log_odds == pytest.approx(exact.closed_log_odds, abs=0.01)
    assert trained.delta_p(GRID) == pytest.approx(exact.delta_p(GRID), abs=0.01)
    assert trained.peaks() == pytest.approx(exact.peaks(), abs=0.05)
    assert trained.limit(1) == pytest.approx(exact.limit(1), abs=0.01)
    for concept in range(3):
        increase = trained.concept_increase(concept, GRID)
        assert trained.concept_tanh(concept, GRID) == pytest.approx(increase, abs=1e-9)
    assert trained.curvature()[0] == pytest.approx(exact.curvature()[0], rel=0.01)
    assert abs(trained.cross_entropy_slope(0)[0]) < 1e-3


def test_the_ties_of_an_imperfect_model_are_as_rough_as_the_model() -> None:
    data = specification()
    exact = perfect(data)
    off = 1e-4 * np.random.default_rng(0).normal(size=exact.W.shape)
    rough = SteeredUFM(data, UFM(exact.W + off, exact.H), 0, (0, 1), (4, 5))
    assert rough.highest.sum() == rough.lowest.sum() == 1
    tolerant = replace(rough, tie=0.01)
    assert tolerant.highest.tolist() == [True] * 3 + [False] * 6
    assert tolerant.lowest.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert np.all(np.isfinite(tolerant.peaks()[:, 6:]))


def test_a_model_too_narrow_for_the_data_says_so() -> None:
    found = train(specification(), width=1, iterations=300)
    assert found.loss > found.entropy + 0.05
    assert found.model.W.shape == (9, 1)
    early = train(specification(), iterations=2)
    assert early.iterations <= 2
    assert early.loss > found.entropy + 0.01


def test_training_is_reproducible() -> None:
    one, again, other = (train(specification(), seed=seed).model.W for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-3)


# Shapes.


def test_alphas_contexts_and_tokens_are_the_axes() -> None:
    steered = Case(3, 2, 0.05, False, 1).steered()
    assert steered.probabilities(2).shape == (1, 12, 6)
    assert steered.probabilities([1, 2]).shape == (2, 12, 6)
    for function in (steered.logits, steered.probabilities, steered.delta_p):
        every, one = function([1, 2, 3]), function([1, 2, 3], 7)
        assert one.shape == (3, 6)
        assert one == pytest.approx(every[:, 7], abs=1e-12)
    assert steered.delta_p(GRID).sum(-1) == pytest.approx(np.zeros((len(GRID), 12)), abs=1e-12)
    assert steered.expectation([1, 2]).shape == (2, 12)
    assert steered.concept_increase(0, [1, 2]).shape == (2, 12)
    assert steered.curvature([1, 2, 3]).shape == (3,)
    assert steered.vector.shape == (12,)


# Errors.

FLAT = ConceptData(np.full(4, 0.4), np.full(4, 0.1), 2, (0, 0, 1, 1))
GOOD = SteeredUFM(FLAT, perfect(FLAT), 0, (0,), (2,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: specification(9, 2), "9 tokens cannot be split into 2"),
        (lambda: specification(9, 1), "at least 2 concepts"),
        (lambda: specification(9, 3, 0.0), "epsilon is 0: with 3 concepts"),
        (lambda: specification(9, 3, 0.7), "between 0 and 0.666667"),
        (lambda: specification(9, 3, math.nan), "epsilon is nan"),
        (lambda: specification(contexts_each=0), "contexts_each is 0"),
        (lambda: specification(gamma=[0.5, 0.5]), "gamma has 2 numbers: give one a token, 9"),
        (lambda: specification(omega=[0.1] * 9), "omega: give positive numbers that sum to 1"),
        (lambda: specification(4, 2, gamma=[1, 0, 1, 0]), "gamma: give positive numbers"),
        (lambda: specification(4, 2, gamma=[[1, 0], [1, 0]]), "gamma: give one row"),
        (
            lambda: specification(4, 2, 0.4, gamma=[0.9, 0.1, 0.5, 0.5]),
            "token 1 has a = 0.06 and b = 0.2: assumption 1",
        ),
        (lambda: replace(FLAT, a=[0.4] * 3), "a has 3 tokens, b 4"),
        (lambda: replace(FLAT, concepts=3), "4 tokens cannot be split into 3"),
        (lambda: replace(FLAT, a=[0.5] * 4), "concept 0 sum to 1.2"),
        (lambda: replace(FLAT, a=[0.4, 0.4, 0.4, math.nan]), "a: give one row of finite numbers"),
        (lambda: replace(FLAT, b=[0.1, 0.1, 0.1, 0.4]), "token 3 has a = 0.4 and b = 0.4"),
        (lambda: replace(FLAT, b=[0.1, 0.1, 0.2, 0.0]), "token 3 has a = 0.4 and b = 0:"),
        (lambda: replace(FLAT, contexts=()), "no contexts"),
        (lambda: replace(FLAT, contexts=(0, 2), weights=None), "concept 2 does not exist"),
        (lambda: replace(FLAT, weights=[0.5, 0.5]), "2 weights and 4 contexts"),
        (lambda: replace(FLAT, weights=[0.5] * 4), "weights: give one positive number"),
        (lambda: replace(FLAT, weights=[1.5, -0.5, 0.5, -0.5]), "weights: give one positive"),
        (lambda: sides(FLAT, 0, 3), "q is 3: the target has 2 contexts"),
        (lambda: sides(FLAT, 0, 0), "q is 0"),
        (lambda: sides(FLAT, 0, 1, opposite=0), "opposite is 0, the target itself"),
        (lambda: sides(FLAT, 2, 1), "concept 2 does not exist: choose one of 0 to 1"),
        (lambda: sides(FLAT, 0, 1, opposite=5), "concept 5 does not exist"),
        (lambda: UFM(np.ones((4, 2)), np.ones((3, 4))), r"W is \(4, 2\) and H is \(3, 4\)"),
        (lambda: train(FLAT, 0), "width is 0"),
        (lambda: train(FLAT, iterations=0), "iterations 0"),
        (lambda: replace(GOOD, model=perfect(specification())), "12 contexts and 9 tokens"),
        (lambda: replace(GOOD, target=2), "concept 2 does not exist"),
        (lambda: replace(GOOD, positive=()), "P has 0 contexts and N 1"),
        (lambda: replace(GOOD, positive=(0, 1)), "P has 2 contexts and N 1"),
        (lambda: replace(GOOD, positive=(2,)), "context 2 in P is of concept 1: P takes"),
        (lambda: replace(GOOD, negative=(1,)), "context 1 in N is of concept 0: N takes"),
        (lambda: replace(GOOD, negative=(4,)), "context 4 does not exist: choose one of 0 to 3"),
        (
            lambda: replace(GOOD, positive=(0, 0), negative=(2, 3)),
            "context 0 is in P twice",
        ),
        (lambda: GOOD.probabilities(math.inf), "alphas: give one finite number"),
        (lambda: GOOD.probabilities([[1, 2]]), "alphas: give one finite number, or a list"),
        (lambda: GOOD.probabilities(1e308), "alphas: 1e.308 is more than the logits can hold"),
        (lambda: GOOD.delta_p(1, -1), "context -1 does not exist"),
        (lambda: GOOD.limit(0), "sign is 0"),
        (lambda: GOOD.concept_increase(2, 1), "concept 2 does not exist"),
        (lambda: ufm_pictures.figure("figure-9"), "no figure 'figure-9': choose one of figure-3"),
    ],
)
def test_mistakes_get_one_line(call: Any, message: str) -> None:
    with pytest.raises(TrimtabError) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert re.search(message, str(raised.value))
