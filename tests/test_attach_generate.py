"""Attaching: prompt and generated tokens, with and without a cache, against loops by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import trimtab as tt
from helpers import (
    IDS,
    OPERATORS,
    PROMPTS,
    Change,
    by_hand,
    greedy_by_hand,
    language_model,
    left_padded,
    plain_logits,
    raw_greedy,
    relative,
    steer,
    steer_at,
    token_ids,
    turned,
)
from reference import reference
from tiny import TINY
from trimtab.steering import POSITIONS, Positions
from trimtab.steering.operators import Scale

# -- prompt and generated tokens --------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", TINY)
def test_generate_equals_a_loop_by_hand_with_and_without_cache(
    name: str, positions: Positions
) -> None:
    """Raw generate inside the block; left-padded rows of different lengths, each its own dial."""
    lm = language_model(name)
    steering = steer_at(lm, "resid", positions=positions, seed=2)
    change = steering.interventions[0].operator
    dials, new = [4.0, -4.0], 8
    with lm.steered([steering.at(dial) for dial in dials]):
        cached = raw_greedy(lm, PROMPTS[:2], new)
        uncached = raw_greedy(lm, PROMPTS[:2], new, use_cache=False)
    for row, dial in enumerate(dials):
        prompt = token_ids(PROMPTS[row])
        expected = greedy_by_hand(lm.model, prompt, new, by_hand(change, dial), positions)
        assert cached[row] == expected
        assert uncached[row] == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_equals_a_loop_by_hand_at_every_position(
    op: str, positions: Positions
) -> None:
    """Rows of different lengths: each with its own dial, and one that is not steered at all."""
    lm = language_model("gemma3" if op in ("Turn", "Absolute") else "gpt2")
    steering = steer_at(lm, "resid", op, positions=positions, seed=2)
    made, new = steering.interventions[0].operator, 6
    steering = turned(steering, op, 2.0 if op in ("Ablate", "Add") else 1.0)
    rows = [steering, None, replace(steering, value=-steering.setting)]
    with lm.steered(rows):
        cached = raw_greedy(lm, PROMPTS, new)
        uncached = raw_greedy(lm, PROMPTS, new, use_cache=False)
    for row, given in enumerate(rows):
        change = (lambda x: x) if given is None else by_hand(made, given.setting)
        expected = greedy_by_hand(lm.model, token_ids(PROMPTS[row]), new, change, positions)
        assert cached[row] == expected
        assert uncached[row] == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("op", OPERATORS)
def test_a_step_of_decoding_is_steered_as_the_whole_text_is(op: str, positions: Positions) -> None:
    """By logits, which show what a greedy text may hide; cached, one token at a time."""
    lm = language_model("llama")
    # With this seed the generated tokens are not all on the side that Adaptive leaves.
    steering = turned(steer_at(lm, "ffn_norm_in", op, positions=positions, seed=1), op)
    made = by_hand(steering.interventions[0].operator, steering.setting)
    end = len(IDS) - 3
    first = {"all": 0, "prompt": 0, "generated": end, "last": end - 1}[positions]
    stop = end if positions == "prompt" else len(IDS)

    def edit(x: Tensor) -> Tensor:
        return torch.cat((x[:first], made(x[first:stop]), x[stop:]))

    _, expected = reference("llama", lm.model, IDS, {"layers.1.ffn_norm_in": edit})
    with torch.no_grad(), lm.steered([steering, None]):
        cache, seen = None, []
        for new in (IDS[:end], *([token] for token in IDS[end:])):
            output = lm.model(torch.tensor([new, new]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            seen.append(output.logits)
    both = torch.cat(seen, dim=1)
    assert relative(both[0], expected) < 1e-5
    assert relative(both[1], plain_logits(lm.model, IDS)) < 1e-5
    assert relative(both[0], both[1]) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_differ_from_each_other(name: str) -> None:
    """Else the test above could not tell them apart."""
    lm = language_model(name)
    written = []
    for positions in POSITIONS:
        steering = steer_at(lm, "resid", positions=positions, seed=2).at(4)
        written.append(lm.generate(PROMPTS, max_new_tokens=20, chat=False, steering=steering))
    texts = [tuple(one.tokens for one in completions) for completions in written]
    assert len(set(texts)) == 4


def test_a_scale_at_heads_equals_a_loop_by_hand() -> None:
    """The plainest case written out: no helper of this file, no operator of trimtab's."""
    lm = language_model("llama")
    units, factors = torch.tensor([3, 17, 40]), torch.tensor([4.0, -2.0, 0.0])
    op = Scale(units, factors - 1, 64)
    with lm.steered(steer(lm, ("layers.1.heads", op))):
        steered = lm.model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., units] *= factors
        return (x,)

    handle = lm.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
    ids = list(IDS)
    for _ in range(12):
        ids.append(int(plain_logits(lm.model, ids)[-1].argmax()))
    handle.remove()
    assert steered[0].tolist() == ids
    assert lm.model.generate(torch.tensor([IDS]), max_new_tokens=12).tolist() != steered.tolist()


@pytest.mark.parametrize("name", TINY)
def test_a_left_padded_batch_equals_each_prompt_alone(name: str) -> None:
    lm = language_model(name)
    rows = [
        steer_at(lm, "heads", "Scale").at(2),
        None,
        (steer_at(lm, "ffn_out", "Scale"), steer_at(lm, "resid", positions="last")),
    ]
    together = lm.logits(PROMPTS, steering=rows)
    texts = lm.generate(PROMPTS, max_new_tokens=8, chat=False, steering=rows)
    for row, (prompt, steering) in enumerate(zip(PROMPTS, rows, strict=True)):
        assert relative(together[row], lm.logits([prompt], steering=[steering])[0]) < 1e-4
        alone = lm.generate([prompt], max_new_tokens=8, chat=False, steering=[steering])
        assert texts[row].tokens == alone[0].tokens


def test_right_padded_rows_end_where_their_last_token_is() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="last")
    inputs = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad(), lm.steered(steering):
        together = lm.model(**inputs, use_cache=False).logits
        for row, prompt in enumerate(PROMPTS):
            ids = token_ids(prompt)
            alone = plain_logits(lm.model, ids)
            assert relative(together[row, : len(ids)], alone) < 1e-5
    plain = plain_logits(lm.model, token_ids(PROMPTS[1]))
    last = len(plain) - 1
    assert torch.allclose(together[1, :last], plain[:-1], atol=1e-5)
    assert relative(together[1, last], plain[-1]) > 0.01


def by_hand_of(steering: tt.Steering) -> Change:
    change: Change = by_hand(steering.interventions[0].operator, steering.setting)
    return change


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_users_own_loop_with_a_cache(positions: Positions) -> None:
    lm = language_model("qwen2")
    steering = steer_at(lm, "resid", positions=positions, seed=2).at(2)
    expected = greedy_by_hand(lm.model, IDS, 10, by_hand_of(steering), positions)
    with torch.no_grad(), lm.steered(steering):
        for _ in range(2):  # the second text begins anew in the same block
            ids, cache = list(IDS), None
            for _ in range(10):
                new = ids if cache is None else ids[-1:]
                output = lm.model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                ids.append(int(output.logits[0, -1].argmax()))
            assert ids[len(IDS) :] == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("options", ["twice", "static", "chunks", "lookup", "embeds"])
def test_other_ways_to_generate(positions: Positions, options: str) -> None:
    """Positions mean the same however generate cuts a text into passes."""
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions=positions, seed=2).at(4)
    expected = greedy_by_hand(lm.model, IDS, 12, by_hand_of(steering), positions)
    settings: dict[str, Any] = {
        "static": {"past_key_values": StaticCache(lm.model.config, max_cache_len=64)},
        "chunks": {"prefill_chunk_size": 5},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "embeds": {"inputs_embeds": lm.model.model.embed_tokens(torch.tensor([IDS]))},
    }.get(options, {})
    inputs = {} if options == "embeds" else {"input_ids": torch.tensor([IDS])}
    with lm.steered(steering):
        if options == "twice":  # a text of another length before it, with and without a cache
            for use_cache in (True, False):
                raw_greedy(lm, PROMPTS[1:2], 3, use_cache=use_cache)
            settings = {"use_cache": False}
        for _ in range(2 if options == "twice" else 1):
            output = lm.model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
            assert output[0, -12:].tolist() == expected


def test_continuing_from_an_unsteered_cache_steers_the_rest() -> None:
    """The user's own cache of a prefix: the block's first pass begins in the middle of a text."""
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="prompt").at(2)
    with torch.no_grad():
        cache = lm.model(torch.tensor([IDS[:5]]), use_cache=True).past_key_values
        with lm.steered(steering):
            rest = lm.model(torch.tensor([IDS[5:]]), past_key_values=cache).logits[0]

    def after_five(x: Tensor) -> Tensor:
        return torch.cat((x[:5], by_hand_of(steering)(x[5:])))

    _, expected = reference("llama", lm.model, IDS, {"layers.1.resid": after_five})
    assert relative(rest, expected[5:]) < 1e-5


def test_inference_mode() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", "Scale", positions="last").at(2)
    expected = greedy_by_hand(lm.model, IDS, 6, by_hand_of(steering), "last")
    with torch.inference_mode(), lm.steered(steering):
        output = lm.model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    assert output[0, len(IDS) :].tolist() == expected


@pytest.mark.parametrize("op", OPERATORS)
def test_gradients_flow_after_a_pass_in_inference_mode(op: str) -> None:
    """What is computed once per block must not be an inference tensor in a later plain pass."""
    lm = language_model("llama")
    steering = steer_at(lm, "resid", op)
    for rows in (steering, [steering, None, steering.at(2)]):
        with lm.steered(rows):
            lm.logits(PROMPTS)
            lm.model(**left_padded(lm, PROMPTS)).logits.sum().backward()
        gradient = lm.model.model.embed_tokens.weight.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()
