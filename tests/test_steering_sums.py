"""Sums of steerings: flat, in order, and wherever one steering goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, by_hand, language_model, operator, relative, steer, token_ids
from reference import reference
from steerings import some_steering
from trimtab.contrasts import Pair
from trimtab.reading.likelihood import cross_entropy, log_odds
from trimtab.steering import Steering, Steerings

# -- several steerings ------------------------------------------------------------------------

A, B, C = (some_steering(method=name) for name in "abc")


def test_sums_are_flat_and_in_order() -> None:
    for both, expected in (
        (A + B, (A, B)),
        (B + A, (B, A)),
        (A + A, (A, A)),
        ((A + B) + C, (A, B, C)),
        (A + (B + C), (A, B, C)),
        ((A + B) + (C + A), (A, B, C, A)),
        (A + Steerings(), (A,)),
        (Steerings() + A, (A,)),
    ):
        assert isinstance(both, Steerings)
        assert len(both) == len(expected)
        assert all(one is other for one, other in zip(both, expected, strict=True))
    assert (A + B.at(3)).label == "a alpha=8 + b alpha=3"
    assert A.value is None


@pytest.mark.parametrize("wrong", [3, None, "caa", [A], (A,), {"a": A}], ids=lambda x: type(x))
def test_only_steerings_are_summed(wrong: Any) -> None:
    for one in (A, A + B):
        with pytest.raises(TypeError):
            one + wrong
    with pytest.raises(TypeError):
        wrong + A


_PAIRS = tt.Contrast(
    (Pair("The answer is", " yes", " no"), Pair("Today I feel", " happy", " sad and tired"))
)


def _two(lm: tt.LanguageModel) -> tuple[Steering, Steering]:
    """Two steerings of one site that do not commute, and the first one also a site later."""
    scale, rotate, add = (operator(kind, 48) for kind in ("Scale", "Rotate", "Add"))
    a = steer(lm, ("layers.1.ffn_out", scale), ("layers.2.attn_norm", rotate), alpha=2.0)
    return a, steer(lm, ("layers.1.ffn_out", add))


def test_the_earlier_one_acts_first() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    ids = token_ids(PROMPTS[0])
    found = []
    for both in (a + b, b + a):
        chains: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        for steering in both:
            for i in steering.interventions:
                chains.setdefault(i.site, []).append(by_hand(i.operator, steering.setting))
        edits = {
            site: (lambda x, chain=chain: chain[-1](chain[0](x) if len(chain) > 1 else x))
            for site, chain in chains.items()
        }
        _, expected = reference("llama", lm.model, ids, edits)
        with lm.steered(both):
            logits = lm.model(torch.tensor([ids])).logits[0]
        assert relative(logits, expected) < 1e-5
        found.append(logits)
    assert relative(found[0], found[1]) > 1e-2


_USES: dict[str, Callable[[tt.LanguageModel, Any], Any]] = {
    "logits": lambda lm, given: lm.logits(PROMPTS[:2], steering=given),
    "log_odds": lambda lm, given: log_odds(lm, _PAIRS, given),
    "cross_entropy": lambda lm, given: cross_entropy(lm, PROMPTS[:2], given)[0],
}


@pytest.mark.parametrize("name", _USES)
def test_a_sum_goes_wherever_one_steering_goes(name: str) -> None:
    lm, use = language_model("llama"), _USES[name]
    a, b = _two(lm)
    plain = use(lm, None)
    with lm.steered(a, b):
        expected = use(lm, None)
    for both in (a + b, [a + b, a + b], [[a, b], (a, b)], [Steerings((a,)) + b, [a + b]]):
        assert relative(use(lm, both), expected) < 1e-5
    for other in (b + a, a, b):
        assert relative(use(lm, other), expected) > 1e-3
    # In a list it is one row's, beside others.
    mixed = use(lm, [a + b, None])
    assert relative(mixed[0], expected[0]) < 1e-5
    assert relative(mixed[1], plain[1]) < 1e-5


def test_a_sum_steers_a_block() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    expected = lm.logits(PROMPTS, steering=a + b)
    for arguments in ((a + b,), (a, b), (Steerings((a,)), b), ([a + b] * 3,)):
        with lm.steered(*arguments):
            assert relative(lm.logits(PROMPTS), expected) < 1e-5


def test_a_sum_generates_and_is_named() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    options: dict[str, Any] = {"max_new_tokens": 5, "chat": False}
    with lm.steered(a, b):
        expected = [one.tokens for one in lm.generate(PROMPTS[:2], **options)]
    assert expected != [one.tokens for one in lm.generate(PROMPTS[:2], **options)]
    done = lm.generate(PROMPTS[:2], steering=a + b.at(1), **options)
    assert [one.tokens for one in done] == expected
    assert done[0].steering == ("test alpha=2", "test alpha=1")
    mixed = lm.generate(PROMPTS[:2], steering=[None, a + b], **options)
    assert mixed[1].tokens == expected[1]
    assert [len(one.steering) for one in mixed] == [0, 2]


def test_a_sum_is_baked() -> None:
    lm = language_model("llama")
    a, b = _two(lm)
    for baked, expected in (
        (tt.bake(lm, a + b), a + b),
        (tt.bake(lm, b + a), b + a),
        (tt.bake(lm, b, Steerings((a, b))), b + a + b),
    ):
        logits = lm.logits(PROMPTS, steering=expected)
        assert relative(baked.logits(PROMPTS), logits) < 1e-4
        assert baked.name == f"llama + {expected.label}"


def test_every_one_of_a_sum_has_to_fit() -> None:
    lm, other = language_model("llama"), language_model("llama", seed=1)
    both = _two(lm)[0] + _two(other)[1]
    for use in (lambda: lm.logits(PROMPTS, steering=both), lambda: tt.bake(lm, both)):
        with pytest.raises(tt.TrimtabError, match="force"):
            use()
    lm.logits(PROMPTS, steering=both, force=True)
    tt.bake(lm, both, force=True)


def test_an_empty_sum_does_nothing() -> None:
    lm = language_model("llama")
    assert Steerings().label == ""
    assert torch.equal(lm.logits(PROMPTS, steering=Steerings()), lm.logits(PROMPTS))
