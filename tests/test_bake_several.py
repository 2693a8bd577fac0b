"""Baking several steerings: together, in their order, twice, at a dial of zero."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from baking import REFUSED, check_same
from helpers import (
    LINEAR,
    OPERATORS,
    PROMPTS,
    SITES,
    TELLING,
    add,
    basis,
    by_hand,
    language_model,
    operator,
    plain_logits,
    relative,
    scale,
    site_kinds,
    steer,
    steer_at,
    token_ids,
    turned,
)
from reference import reference
from tiny import TINY
from trimtab.steering.operators import Rotate

# -- several steerings ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_different_operators_together_are_the_formulas_attached_and_baked(name: str) -> None:
    """In both orders at one site, which count, among others at other sites, which do not."""
    lm, ids = language_model(name), token_ids(PROMPTS[0])
    results = []
    for kind in ("heads", "ffn_out", "embed"):
        site = lm.anatomy.sites(kind, (1,))[0]
        chain = {op: operator(op, lm.anatomy.width(site), 3 + i) for i, op in enumerate(LINEAR)}
        bakes = [op for op in chain if (name, kind, op) not in REFUSED]
        other = lm.anatomy.sites("ffn_norm", (2,))[0]
        apart = {other: Rotate(basis(lm.anatomy.hidden_size, 1))}
        far = steer(lm, *apart.items()).at(40)
        for order in (bakes, bakes[::-1]):

            def one_after_another(x: Tensor, order: list[str] = order, ops: Any = chain) -> Tensor:
                for op in order:
                    x = by_hand(ops[op], TELLING[op])(x)
                return x

            edits = {site: one_after_another, other: by_hand(apart[other], 40.0)}
            _, expected = reference(name, lm.model, ids, edits)
            given = [far, *(turned(steer(lm, (site, chain[op])), op) for op in order)]
            with lm.steered(*given):
                assert relative(plain_logits(lm.model, ids), expected) < 5e-5, kind
            assert relative(plain_logits(tt.bake(lm, *given).model, ids), expected) < 5e-5, kind
            results.append(expected)
        assert relative(results[-1], results[-2]) > 1e-3, kind


def test_a_sum_bakes_as_its_parts_in_order() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "heads", "Rotate").at(50), steer_at(lm, "heads", "Scale", seed=1).at(2)
    c = steer_at(lm, "ffn_out", "Ablate").at(1)
    baked = tt.bake(lm, a, b, c)
    for given in ((a + b + c,), (a + b, c), (a, b + c), (a + (b + c),)):
        again = tt.bake(lm, *given)
        assert again.identity.digest == baked.identity.digest
        assert again.name == baked.name
    assert tt.bake(lm, b + a + c).identity.digest != baked.identity.digest
    attached = lm.logits(PROMPTS, steering=a + b + c)
    assert relative(baked.logits(PROMPTS), attached) < 1e-5
    with pytest.raises(tt.TrimtabError, match="cannot bake test: Turn"):
        tt.bake(lm, a + steer_at(lm, "heads", "Turn"))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_ffn_out_and_resid_of_one_layer_in_either_order(name: str) -> None:
    """Both fold into the same weights, but the vector is not scaled, whichever was given first."""
    lm = language_model(name)
    units, vector = steer_at(lm, "ffn_out", "Scale").at(2), steer_at(lm, "resid", "Add").at(2)
    for steerings in ((units, vector), (vector, units)):
        check_same(lm, tt.bake(lm, *steerings), *steerings)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, kind in SITES
        if name in ("llama", "gpt2")
        if not any((name, kind, op) in REFUSED for op in ("Scale", "Add"))
    ],
)
def test_the_order_at_one_site_counts(name: str, kind: str) -> None:
    lm = language_model(name)
    a, b = steer_at(lm, kind, "Scale", seed=1), steer_at(lm, kind, "Add", seed=2).at(3)
    c = steer_at(lm, kind, "Scale", seed=3)
    a_then_b = lm.logits(PROMPTS, steering=[(a, b)] * 3)
    assert relative(lm.logits(PROMPTS, steering=[(b, a)] * 3), a_then_b) > 1e-3
    for order in ((a, b), (b, a), (a, b, c), (c, b, a), (b, b, a)):
        check_same(lm, tt.bake(lm, *order), *order, new=4)


def test_interventions_of_one_steering_at_one_site_keep_their_order() -> None:
    lm = language_model("llama")
    site, first, second = "layers.1.heads", scale(64, 1), add(64, 2, size=2.0)
    for pair in ((first, second), (second, first)):
        steering = steer(lm, *((site, op) for op in pair))
        check_same(lm, tt.bake(lm, steering), steering, new=4)


@pytest.mark.parametrize("name", TINY)
def test_all_that_bakes_together(name: str) -> None:
    lm = language_model(name)
    steerings = [
        steer_at(lm, kind, op, seed=number).at(0.5)
        for number, (kind, op) in enumerate(itertools.product(site_kinds(lm), ("Scale", "Add")))
        if (name, kind, op) not in REFUSED
    ]
    check_same(lm, tt.bake(lm, *reversed(steerings)), *reversed(steerings))


@dataclass(eq=False)
class Shuffle:
    """A linear operator that mixes units, as rotations will: it turns their order round, adds."""

    width: int
    shift: Tensor = field(init=False)
    linear, identity = True, None

    def __post_init__(self) -> None:
        self.size = self.width
        self.shift = torch.randn(self.width, generator=torch.Generator().manual_seed(4)).double()

    def bind(self, dial: Any, device: Any) -> Any:
        return lambda x: (x.flip(-1) + self.shift).to(x.dtype)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x.flip(-1)

    adjoint = linear_part

    def offset(self, dial: float) -> Tensor:
        return self.shift


@pytest.mark.parametrize("kind", ["embed", "attn_norm", "heads", "attn_out", "ffn_in", "ffn_out"])
def test_operators_that_mix_units_keep_their_order_too(kind: str) -> None:
    lm = language_model("gpt2")
    mixing = steer(lm, (f"layers.1.{kind}".replace("layers.1.embed", "embed"), Shuffle(48)))
    if kind == "ffn_in":
        mixing = steer(lm, ("layers.1.ffn_in", Shuffle(96)))
    one, other = steer_at(lm, kind, "Scale"), steer_at(lm, kind, "Add")
    for order in ((mixing, one, other), (other, mixing, one)):
        check_same(lm, tt.bake(lm, *order), *order, new=4)


def test_mixing_units_at_gpt2s_last_norm_is_refused_where_the_order_would_be_lost() -> None:
    lm = language_model("gpt2")
    mixing = Shuffle(48)
    with pytest.raises(tt.TrimtabError, match="has no bias at lm_head"):
        tt.bake(lm, steer(lm, ("final_norm", mixing)))
    mixing.shift.zero_()
    steering = steer(lm, ("final_norm", mixing))
    check_same(lm, tt.bake(lm, steering), steering, new=4)
    with pytest.raises(tt.TrimtabError, match="their order would be lost"):
        tt.bake(lm, steering, steer_at(lm, "final_norm", "Add"))


def test_baking_twice_is_baking_both() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "ffn_out", "Scale"), steer_at(lm, "resid", "Add")
    once = tt.bake(lm, a)
    again = tt.bake(once, steer(once, ("layers.1.resid", b.interventions[0].operator)))
    check_same(lm, again, a, b)


def test_a_dial_of_zero_and_no_steering_bake_to_the_same_weights() -> None:
    lm = language_model("qwen2")
    idle = [op for op in OPERATORS if op not in ("Turn", "Adaptive")]
    zero = [steer_at(lm, kind, op).at(0) for kind in site_kinds(lm) for op in idle]
    for steerings in ([], zero):
        baked = tt.bake(lm, *steerings)
        assert baked.model is not lm.model
        assert torch.equal(baked.logits(PROMPTS), lm.logits(PROMPTS))
        assert baked.identity.digest == lm.identity.digest
