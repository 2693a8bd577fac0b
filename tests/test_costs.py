"""What turning the dial costs, and where it ends, against plain passes of the same models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor

import trimtab as tt
from helpers import (
    PROMPTS,
    add,
    by_hand,
    language_model,
    operator,
    plain_logits,
    refused_in_one_line,
    steer,
    token_ids,
)
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.steering.operators import Add
from trimtab.strength import cost_curve, limit
from trimtab.strength.costs import cut_into_blocks

TEXT = (
    "The ship left the harbour in the morning, and the captain stood at the wheel. She looked at "
    "the map and asked where they were going. He said that he did not know, but that the wind was "
    "good and the day was long. When the rain came, the children ran into the house."
)
DIALS = [-2.0, -0.5, 0.0, 0.5, 2.0]


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@contextmanager
def changed(model: Any, *places: tuple[int, Any], first: int = 0) -> Iterator[None]:
    """Blocks' outputs changed by hand, from token `first` on."""

    def hook(change: Any) -> Any:
        return lambda m, args, out: torch.cat((out[:, :first], change(out[:, first:])), 1)

    handles = [blocks_of(model)[i].register_forward_hook(hook(change)) for i, change in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_nll(model: Any, ids: Sequence[int]) -> float:
    """Mean over a block's tokens but the first."""
    log_p = plain_logits(model, list(ids)).double().log_softmax(-1)
    return -float(np.mean([float(log_p[i, token]) for i, token in enumerate(ids[1:])]))


def by_vector(lm: tt.LanguageModel, seed: int = 0, size: float = 0.5, layer: int = 1) -> Any:
    return steer(lm, (f"layers.{layer}.resid", add(lm.anatomy.hidden_size, seed, size)))


# -- cross-entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_cost_is_plain_cross_entropy_of_blocks(name: str) -> None:
    lm = language_model(name)
    steering = by_vector(lm)
    found = cost_curve(lm, steering, [TEXT, "The answer is yes."], DIALS, block=20)
    # One stream with an end-of-text token after each text, cut, and BOS before each block.
    tokenizer = tiny_tokenizer()
    stream: list[int] = []
    for text in (TEXT, "The answer is yes."):
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    blocks = [[tokenizer.bos_token_id, *stream[i : i + 20]] for i in range(0, len(stream), 20)]
    assert len(blocks[-1]) < 21  # the last one is shorter
    base = [plain_nll(lm.model, block) for block in blocks]
    weights = [len(block) - 1 for block in blocks]
    assert found.tokens == sum(weights) == len(stream)
    assert found.base == pytest.approx(np.average(base, weights=weights), rel=1e-5)
    for place, dial in enumerate(DIALS):
        with changed(lm.model, (1, by_hand(steering.interventions[0].operator, dial))):
            steered = [plain_nll(lm.model, block) for block in blocks]
        delta = np.array(steered) - np.array(base)
        assert found.per_block[place].tolist() == pytest.approx(delta, abs=1e-5)
        assert float(found.delta[place]) == pytest.approx(
            np.average(delta, weights=weights), abs=1e-5
        )
    assert float(found.delta[2]) == 0
    assert found.per_block[2].abs().max() == 0
    assert abs(float(found.delta[0])) > 0.01


def test_the_same_whatever_runs_together() -> None:
    lm = language_model("llama")
    steering = by_vector(lm)
    one = cost_curve(lm, steering, [TEXT], [1.0], block=16)
    many = cost_curve(lm, steering, [TEXT], [-3.0, 1.0, 5.0], block=16)
    torch.testing.assert_close(one.per_block[0], many.per_block[1], atol=1e-9, rtol=0)
    type(lm).batch_tokens, kept = property(lambda self: 20), type(lm).batch_tokens
    try:
        alone = cost_curve(lm, steering, [TEXT], [1.0], block=16)
    finally:
        type(lm).batch_tokens = kept
    torch.testing.assert_close(one.per_block, alone.per_block, atol=1e-5, rtol=0)


def test_dials_are_sorted_and_there_once() -> None:
    lm = language_model("llama")
    found = cost_curve(lm, by_vector(lm), [TEXT], [2, -1, 2, 0], block=50)
    assert found.dials.tolist() == [-1.0, 0.0, 2.0]
    assert found.dials.dtype == found.delta.dtype == torch.float64


@pytest.mark.parametrize("kind", ["Rotate", "Scale", "Turn"])
def test_cost_of_other_dials(kind: str) -> None:
    lm = language_model("llama")
    op = operator(kind, lm.anatomy.hidden_size, 2)
    found = cost_curve(lm, steer(lm, ("layers.1.resid", op)), [TEXT], [0.0, 40.0], block=300 // 3)
    (block,) = cut_into_blocks(lm, [TEXT], 100, None)[:1]
    for place, dial in enumerate((0.0, 40.0)):
        with changed(lm.model, (1, by_hand(op, dial))):
            delta = plain_nll(lm.model, block)
        delta -= plain_nll(lm.model, block)
        assert float(found.per_block[place, 0]) == pytest.approx(delta, abs=2e-5)
    assert (float(found.delta[0]) == 0) is (kind != "Turn")


@pytest.mark.parametrize("positions", ["last", "prompt"])
def test_positions_in_a_text_that_is_read(positions: Any) -> None:
    """`last` are the tokens that a next one is read from, here all of them; `prompt` too."""
    lm = language_model("llama")
    op = add(lm.anatomy.hidden_size, 1, 0.5)
    all_of_them = steer(lm, ("layers.1.resid", op))
    some = steer(lm, ("layers.1.resid", op), positions=positions)
    expected = cost_curve(lm, all_of_them, [TEXT], DIALS, block=30)
    found = cost_curve(lm, some, [TEXT], DIALS, block=30)
    torch.testing.assert_close(found.per_block, expected.per_block, atol=1e-5, rtol=0)
    assert found.plateaus == pytest.approx(expected.plateaus)


# -- blocks ---------------------------------------------------------------------------------------


def test_blocks_of_a_tokenizer_without_bos() -> None:
    lm = language_model("llama")
    tokenizer: Any = deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    bare = tt.wrap(lm.model, tokenizer, "bare")
    ids = tokenizer("Today I feel happy.", add_special_tokens=False).input_ids
    expected = [[*ids, tokenizer.eos_token_id][i : i + 4] for i in range(0, len(ids) + 1, 4)]
    # A block of a single token has nothing to score.
    expected = [block for block in expected if len(block) > 1]
    assert cut_into_blocks(bare, ["Today I feel happy."], 4, None) == expected
    with_bos = cut_into_blocks(lm, ["Today I feel happy."], 4, None)
    assert all(block[0] == tokenizer.bos_token_id for block in with_bos)
    assert all(tokenizer.bos_token_id not in block[1:] for block in with_bos)
    # A model without an end-of-text token has its texts joined as they are.
    tokenizer.eos_token = None
    assert cut_into_blocks(bare, ["Today I feel", " happy."], 50, None) == [
        tokenizer("Today I feel", add_special_tokens=False).input_ids
        + tokenizer(" happy.", add_special_tokens=False).input_ids
    ]


def test_the_first_tokens_only() -> None:
    lm = language_model("llama")
    whole = cut_into_blocks(lm, [TEXT, TEXT], 10, None)
    few = cut_into_blocks(lm, [TEXT, TEXT], 10, 25)
    assert few[:2] == whole[:2]
    assert few[2] == whole[2][:6]
    assert len(few) == 3
    found = cost_curve(lm, by_vector(lm), [TEXT], [1.0], block=10, limit_tokens=25)
    assert found.tokens == 25
    assert found.block_tokens.tolist() == [10, 10, 5]


def test_bad_input_of_costs() -> None:
    lm = language_model("llama")
    steering = by_vector(lm)
    for options, says in (
        ({"dials": []}, "finite numbers"),
        ({"dials": [float("nan")]}, "finite numbers"),
        ({"texts": []}, "too few tokens"),
        ({"texts": [""], "block": 1}, "2 tokens or more"),
        ({"block": 256}, "fits the model"),
        ({"limit_tokens": 0}, "2 tokens or more, not 0"),
        ({"limit_tokens": -5}, "2 tokens or more, not -5"),
    ):
        given: Any = {"texts": [TEXT], "dials": [1.0]} | options
        refused_in_one_line(lambda given=given: cost_curve(lm, steering, **given), says)
    half = language_model("llama", dtype=torch.float16)
    refused_in_one_line(
        lambda: cost_curve(half, by_vector(half), [TEXT], [1e30]), "overflow at some dials"
    )
    late = steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size)), positions="generated")
    refused_in_one_line(lambda: cost_curve(lm, late, [TEXT], [1.0]), "generated tokens only")


# -- intervals and shape --------------------------------------------------------------------------


def test_intervals_are_a_bootstrap_over_blocks() -> None:
    lm = language_model("llama")
    found = cost_curve(lm, by_vector(lm), [TEXT * 3], [-1.0, 0.0, 1.0], block=16)
    draw = np.random.default_rng(7)
    blocks = found.per_block.shape[1]
    picks = draw.integers(0, blocks, (4000, blocks))
    weights = found.block_tokens.numpy()
    for place in (0, 2):
        values = found.per_block[place].numpy()
        means = (values * weights)[picks].sum(1) / weights[picks].sum(1)
        low, high = np.percentile(means, (2.5, 97.5))
        width = high - low
        assert float(found.low[place]) == pytest.approx(low, abs=0.08 * width)
        assert float(found.high[place]) == pytest.approx(high, abs=0.08 * width)
        assert found.low[place] < found.delta[place] < found.high[place]
    assert float(found.low[1]) == float(found.high[1]) == 0
    again = cost_curve(lm, by_vector(lm), [TEXT * 3], [-1.0, 0.0, 1.0], block=16)
    assert torch.equal(again.low, found.low)


def test_json_of_costs() -> None:
    lm = language_model("llama")
    found = cost_curve(lm, by_vector(lm), [TEXT], [-1.0, 0.0, 1.0], block=16)
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["delta_ce"] == found.delta.tolist()
    assert document["ci95"][0] == [float(found.low[0]), float(found.high[0])]
    assert document["blocks"] == found.per_block.shape[1]
    assert document["tokens"] == found.tokens
    assert document["plateaus"] == list(found.plateaus or ())


@pytest.mark.slow
def test_cost_is_convex_at_zero_on_a_real_model(smollm2: Any) -> None:
    """Its slope need not vanish: the model is not a perfect one."""
    steering = tt.CAA(layer=15, token="last").fit(smollm2, tt.Contrast.builtin("formality").take(6))
    found = cost_curve(smollm2, steering, [TEXT], [-1.0, -0.5, 0.0, 0.5, 1.0], block=64)
    second = np.polyfit(found.dials.numpy(), found.delta.numpy(), 2)[0]
    assert second > 0
    assert float(found.delta[0] + found.delta[-1]) > 0


# -- limits ---------------------------------------------------------------------------------------


def double(name: str, **options: Any) -> tt.LanguageModel:
    lm = tt.wrap(tiny_model(name, dtype=torch.float64, **options), tiny_tokenizer(), name)
    if name == "qwen3_moe":  # the fused experts know no float64
        lm.model.set_experts_implementation("eager")
    return lm


def far(lm: tt.LanguageModel, alpha: float, *vectors: tuple[int, Tensor]) -> Tensor:
    """The next token's log-distribution of the model that is really steered."""
    places = [(layer, by_hand(Add(vector), alpha)) for layer, vector in vectors]
    with changed(lm.model, *places):
        return plain_logits(lm.model, token_ids(PROMPTS[0]))[-1].log_softmax(-1)


@pytest.mark.parametrize("name", TINY)
def test_the_limit_is_where_the_steered_model_goes(name: str) -> None:
    lm = double(name)
    vector = add(lm.anatomy.hidden_size, 4, 1.0).vector
    steering = steer(lm, ("layers.1.resid", Add(vector)))
    for sign in (1, -1):
        foretold = limit(lm, steering, sign)  # type: ignore[arg-type]
        assert float(foretold.exp().sum()) == pytest.approx(1)
        near, away = (
            float((far(lm, sign * alpha, (1, vector)) - foretold).abs().max())
            for alpha in (1e4, 1e6)
        )
        assert near < 0.05
        assert away < 5e-4
        assert away / near == pytest.approx(0.01, rel=0.5)  # O(1 / alpha)
    unsteered = far(lm, 0.0, (1, vector))
    assert float((unsteered - limit(lm, steering)).abs().max()) > 0.1


def test_the_two_ends_of_an_rms_norm_mirror_each_other_and_those_of_a_layer_norm_do_not() -> None:
    for name, mirrored in (("llama", True), ("gemma2", True), ("gpt2", False)):
        lm = double(name)
        vector = add(lm.anatomy.hidden_size, 4).vector
        ends = []
        for sign in (1, -1):
            found = limit(lm, steer(lm, ("layers.1.resid", Add(vector))), sign)  # type: ignore[arg-type]
            ends.append(found - found.mean())
        # Logits of opposite sign; log-softmax takes a constant away from all of them.
        plus, minus = ends
        assert torch.allclose(plus, -minus, atol=1e-6) is mirrored
    norm: Any = lm.model.transformer.ln_f
    assert norm.bias.abs().max() > 0
    v = vector.double()
    hidden = (v - v.mean()) / v.std(unbiased=False) * norm.weight + norm.bias
    expected = (hidden @ lm.model.lm_head.weight.T).log_softmax(-1)
    torch.testing.assert_close(
        limit(lm, steer(lm, ("layers.1.resid", Add(vector)))), expected, atol=1e-6, rtol=1e-6
    )


def test_the_limit_by_hand_with_gammas_and_the_soft_cap() -> None:
    lm = double("gemma2")
    vector = add(lm.anatomy.hidden_size, 4).vector
    v = vector.double()
    hidden = v / v.square().mean().sqrt() * (1 + lm.model.model.norm.weight)
    logits = torch.tanh(hidden @ lm.model.lm_head.weight.T / 2.0) * 2.0
    found = limit(lm, steer(lm, ("layers.1.resid", Add(vector))))
    torch.testing.assert_close(found, logits.log_softmax(-1), atol=1e-7, rtol=1e-6)
    assert (hidden @ lm.model.lm_head.weight.T).abs().max() > 2  # the cap bites


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_vectors_of_several_layers_add_up(name: str) -> None:
    lm = double(name)
    width = lm.anatomy.hidden_size
    vectors = [(0, add(width, 1).vector), (2, add(width, 2, 0.5).vector)]
    sites = [(f"layers.{layer}.resid", Add(vector)) for layer, vector in vectors]
    foretold = limit(lm, steer(lm, *sites))
    assert float((far(lm, 1e7, *vectors) - foretold).abs().max()) < 1e-4
    alone = limit(lm, steer(lm, sites[0]))
    assert float((alone - foretold).abs().max()) > 0.1


def test_sites_that_write_the_stream_have_the_same_limit() -> None:
    lm = double("llama")
    op = Add(add(lm.anatomy.hidden_size, 4).vector)
    expected = limit(lm, steer(lm, ("layers.1.resid", op)))
    for site in ("embed", "layers.1.attn_out", "layers.2.ffn_out"):
        torch.testing.assert_close(limit(lm, steer(lm, (site, op))), expected)
    for positions in ("last", "prompt"):
        same = steer(lm, ("layers.1.resid", op), positions=positions)  # type: ignore[arg-type]
        torch.testing.assert_close(limit(lm, same), expected)


def test_what_has_no_limit_is_refused_with_the_reason() -> None:
    lm, gemma, gpt2 = double("llama"), double("gemma2"), double("gpt2")
    width = lm.anatomy.hidden_size
    for where, made, says in (
        (lm, steer(lm, ("layers.1.resid", operator("Scale", width))), "Scale at layers.1.resid"),
        (lm, steer(lm, ("layers.1.resid", operator("Rotate", width))), "Rotate .* no limit"),
        (lm, steer(lm, ("layers.1.heads", add(64))), "layers.1.heads passes weights"),
        (lm, steer(lm, ("layers.1.ffn_norm", add(width))), "passes weights"),
        (gemma, steer(gemma, ("layers.1.ffn_out", add(width))), "passes weights or a norm"),
        (lm, steer(lm, ("layers.1.resid", add(width)), positions="generated"), "generated tokens"),
        (lm, steer(lm, ("layers.1.resid", Add(torch.zeros(width)))), "adds nothing"),
        (gpt2, steer(gpt2, ("layers.1.resid", Add(torch.ones(width)))), "LayerNorm takes away"),
    ):  # fmt: skip
        refused_in_one_line(lambda where=where, made=made: limit(where, made), says)
    ones = limit(lm, steer(lm, ("layers.1.resid", Add(torch.ones(width)))))
    assert torch.isfinite(ones).all()  # an RMSNorm keeps it


def test_the_plateau_that_is_foretold_is_measured() -> None:
    for name in ("gpt2", "gemma2", "llama"):
        lm = double(name)
        steering = steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size, 4, 1.0)))
        found = cost_curve(lm, steering, [TEXT], [-1e6, 0.0, 1e6], block=30)
        assert found.plateaus is not None
        assert float(found.delta[0]) == pytest.approx(found.plateaus[0], abs=1e-3)
        assert float(found.delta[-1]) == pytest.approx(found.plateaus[1], abs=1e-3)
        assert abs(found.plateaus[0] - found.plateaus[1]) > 1e-3
        assert abs(found.plateaus[1]) > 1e-2
    scaled = steer(lm, ("layers.1.resid", operator("Scale", lm.anatomy.hidden_size)))
    none = cost_curve(lm, scaled, [TEXT], [0.0, 1.0], block=30)
    assert none.plateaus is None
    assert "no limit of Proposition 4.1" in none.why
    assert none.as_json()["plateaus"] is None


def test_a_foreign_steering_costs_nothing_but_a_line() -> None:
    lm = language_model("llama")
    foreign = replace(by_vector(lm), model=replace(lm.identity, digest="0" * 64))
    refused_in_one_line(lambda: cost_curve(lm, foreign, [TEXT], [1.0]), "fit one for this model")
    found = cost_curve(lm, foreign, [TEXT], [1.0], force=True, block=30)
    assert torch.isfinite(found.delta).all()
