"""Attaching: in which order steerings act, and in which precision they are computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import (
    IDS,
    PROMPTS,
    TELLING,
    add,
    block,
    by_hand,
    hand_hooked,
    language_model,
    logits_of,
    operator,
    plain_logits,
    relative,
    scale,
    seen_before_and_after,
    steer,
    steer_at,
    turned,
)
from reference import reference
from tiny import TINY
from trimtab.steering.operators import Ablate, Rotate, Turn

# -- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_different_operators_at_one_site_and_at_others_act_in_their_order(name: str) -> None:
    """At one site as given; elsewhere in the order in which a token comes by."""
    lm = language_model(name)
    chain = ["Rotate", "Absolute", "Ablate", "Add", "Turn", "Scale"]
    ops = {op: operator(op, lm.anatomy.hidden_size, seed) for seed, op in enumerate(chain)}
    later, earlier = operator("Adaptive", lm.anatomy.hidden_size, 9), add(lm.anatomy.hidden_size, 8)
    elsewhere = [
        steer(lm, ("layers.2.ffn_norm", later)).at(90.0),
        steer(lm, ("layers.0.attn_out", earlier)).at(2.0),
    ]
    results = []
    for order in (chain, chain[::-1]):
        at_one = [turned(steer(lm, ("layers.1.resid", ops[op])), op) for op in order]

        def one_after_another(x: Tensor, order: list[str] = order) -> Tensor:
            for op in order:
                x = by_hand(ops[op], TELLING[op])(x)
            return x

        edits = {
            "layers.1.resid": one_after_another,
            "layers.2.ffn_norm": by_hand(later, 90.0),
            "layers.0.attn_out": by_hand(earlier, 2.0),
        }
        _, expected = reference(name, lm.model, IDS, edits)
        with lm.steered(elsewhere[0], *at_one, elsewhere[1]):
            attached = plain_logits(lm.model, IDS)
        assert relative(attached, expected) < 5e-5
        # All on one row beside a row with none of them, and as a sum.
        total = elsewhere[0] + at_one[0]
        for steering in (*at_one[1:], elsewhere[1]):
            total = total + steering
        rows = lm.logits([PROMPTS[0]] * 2, steering=[total, None])
        assert relative(rows[0], expected[-1]) < 5e-5
        assert relative(rows[1], plain_logits(lm.model, IDS)[-1]) < 1e-5
        results.append(attached)
    assert relative(results[0], results[1]) > 1e-3


def test_steerings_at_one_site_act_in_the_order_given() -> None:
    lm = language_model("llama")
    first, second = scale(48, 1), add(48, 2, size=1.0)
    a, b = (steer(lm, ("layers.1.resid", op)) for op in (first, second))
    layer, change, move = block(lm.model, 1), by_hand(first), by_hand(second)
    with lm.steered(a, b):
        a_then_b = logits_of(lm)
    with lm.steered(b, a):
        b_then_a = logits_of(lm)
    with hand_hooked(layer, lambda x: move(change(x))):
        assert relative(a_then_b, logits_of(lm)) < 1e-5
    with hand_hooked(layer, lambda x: change(move(x))):
        assert relative(b_then_a, logits_of(lm)) < 1e-5
    assert relative(a_then_b, b_then_a) > 0.01


def test_interventions_of_one_steering_act_in_their_order() -> None:
    lm = language_model("llama")
    first, second = scale(48, 1), add(48, 2, size=1.0)
    a, b = (steer(lm, ("layers.1.resid", op)) for op in (first, second))
    joint = steer(lm, ("layers.1.resid", first), ("layers.1.resid", second))
    with lm.steered(a, b):
        expected = logits_of(lm)
    with lm.steered(joint):
        assert torch.equal(logits_of(lm), expected)


def test_nested_blocks_act_from_the_outside_in() -> None:
    lm = language_model("gemma3")
    a, b = steer_at(lm, "resid", "Scale"), steer_at(lm, "resid", "Add", seed=1)
    plain = logits_of(lm)
    with lm.steered(a):
        alone = logits_of(lm)
        with lm.steered(b):
            nested = logits_of(lm)
        assert torch.equal(logits_of(lm), alone)
    assert torch.equal(logits_of(lm), plain)
    with lm.steered(a, b):
        assert torch.equal(logits_of(lm), nested)
    with lm.steered(b, a):
        assert relative(logits_of(lm), nested) > 1e-3


def test_nested_blocks_on_experts() -> None:
    lm = language_model("qwen3_moe")
    a, b = steer_at(lm, "ffn_in", "Scale"), steer_at(lm, "ffn_in", "Add", seed=1)
    plain = logits_of(lm)
    with lm.steered(a):
        with lm.steered(b):
            nested = logits_of(lm)
        with lm.steered(a, b):
            pass  # not run: a steering that meets no pass is no error
        alone = logits_of(lm)
    with lm.steered(a, b):
        assert torch.equal(logits_of(lm), nested)
    with lm.steered(a):
        assert torch.equal(logits_of(lm), alone)
    assert torch.equal(logits_of(lm), plain)
    assert relative(nested, alone) > 1e-3


# -- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["Scale", "Add"])
def test_arithmetic_is_float32_and_cast_back(op: str, dtype: torch.dtype) -> None:
    lm = language_model("llama", dtype=dtype)
    made = scale(48) if op == "Scale" else add(48)
    steering = steer(lm, ("layers.1.resid", made))
    seen: list[Tensor] = []
    layer = block(lm.model, 1)
    dials = [3.7, 0.0, -1.3]
    for rows in (steering.at(3.7), [steering.at(dial) for dial in dials]):
        seen.clear()
        with lm.steered(rows), seen_before_and_after(layer, seen):
            logits_of(lm)
        x, y = seen
        assert y.dtype is dtype
        per_row = torch.tensor(dials if isinstance(rows, list) else [3.7] * 3)[:, None, None]
        if op == "Add":
            expected = x.float() + per_row * made.vector
            coarse = x + (per_row * made.vector).to(dtype)
        else:
            factors = torch.ones(3, 1, 48)
            factors[..., made.units] = 1 + per_row * made.gain
            expected = x.float() * factors
            coarse = x * factors.to(dtype)
        assert torch.equal(y, expected.to(dtype))
        assert not torch.equal(y, coarse)  # the test can tell the difference
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", ["Ablate", "Rotate", "Turn", "Adaptive"])
def test_planes_are_computed_in_float32_or_better_and_cast_back(
    op: str, dtype: torch.dtype
) -> None:
    lm = language_model("llama", dtype=dtype)
    plane = torch.zeros(2, 48)  # lengths and angle exact in float32 already
    plane[:, [0, 5, 20, 47]] = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, -0.5, 0.5]])
    made = {"Ablate": Ablate(plane[0]), "Rotate": Rotate(plane), "Turn": Turn(plane)}.get(
        op, Turn(plane, adaptive=True)
    )
    steering = turned(steer(lm, ("layers.1.resid", made)), op)
    seen: list[Tensor] = []
    rough = 1e-12 if dtype == torch.float64 else 1e-6
    layer = block(lm.model, 1)
    for rows in (steering, [steering, None, replace(steering, value=20.0)]):
        seen.clear()
        with lm.steered(rows), seen_before_and_after(layer, seen):
            logits_of(lm)
        x, y = seen
        dials = [row and row.setting for row in rows] if isinstance(rows, list) else []
        for row in range(3):
            dial = dials[row] if dials else steering.setting
            exact = x[row].double() if dial is None else by_hand(made, dial)(x[row].double())
            # One rounding at the end: half a step, and what the sums themselves round.
            half = torch.finfo(dtype).eps * exact.abs() / 2 + rough * exact.norm(dim=-1)[:, None]
            assert ((y[row].double() - exact).abs() <= half).all()


def test_rows_and_dials_in_bfloat16_leave_the_others_alone() -> None:
    lm = language_model("gemma2", dtype=torch.bfloat16)
    plain = logits_of(lm)
    with lm.steered([None, steer_at(lm, "resid", "Add"), None]):
        steered = logits_of(lm)
    assert torch.equal(steered[[0, 2]], plain[[0, 2]])
    assert not torch.equal(steered[1], plain[1])
