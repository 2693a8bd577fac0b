"""A live model that keeps to a budget, and steerings that are calibrated for some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import (
    PROMPTS,
    kl_at,
    language_model,
    refused_in_one_line,
    steer_at,
    token_ids,
    with_range,
)
from tiny import tiny_model, tiny_tokenizer
from trimtab.anatomy.hooks import is_hooked
from trimtab.strength import budget, calibrate, within

#: For tests that leave the model as it is.
shared = cache(language_model)

# -- a model that keeps to a budget while it runs ---------------------------------------------

TOKENS = [token_ids(prompt) for prompt in PROMPTS]


def dials_of(lm: tt.LanguageModel, steering: tt.Steering, prompts: Sequence[str]) -> list[float]:
    found = budget(lm, steering, prompts, 0.1, chat=False, side="positive")
    return [row.dial for row in found.per_prompt]


def alone(lm: tt.LanguageModel, steering: tt.Steering, dial: float, ids: list[int]) -> list[int]:
    """Six greedy tokens at a dial that is known, one text at a time, all of it in each pass."""
    text = list(ids)
    with lm.steered(replace(steering, value=dial)) as sequences, torch.no_grad():
        sequences.given_ends = [len(ids)]
        for _ in range(6):
            text.append(int(lm.model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]


def padded(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Left-padded, as generate wants it."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def raw(lm: tt.LanguageModel, rows: Sequence[list[int]], **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    made: list[list[int]] = lm.model.generate(**padded(rows), **settings)[:, -6:].tolist()
    return made


@pytest.mark.parametrize("positions", ["all", "prompt", "last"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generate_with_a_budget(name: str, positions: Any) -> None:
    lm = shared(name)
    steering = with_range(steer_at(lm, "resid", positions=positions))
    dials = dials_of(lm, steering, PROMPTS)
    expected = [alone(lm, steering, *pair) for pair in zip(dials, TOKENS, strict=True)]
    made = lm.generate(PROMPTS, steering=within(steering, kl=0.1), max_new_tokens=6, chat=False)
    assert [list(one.tokens) for one in made] == expected
    assert made[0].steering == (f"test alpha={dials[0]:g}",)
    with lm.steered(within(steering, kl=0.1)):
        for use_cache in (True, False):
            assert raw(lm, TOKENS, use_cache=use_cache) == expected
        # Other prompts in the same block, fewer of them; and a plain pass.
        assert raw(lm, TOKENS[1:2]) == expected[1:2]
        logits = lm.model(torch.tensor([TOKENS[0]])).logits[0, -1].detach()
        inside = lm.logits(PROMPTS)
    outside = lm.logits(PROMPTS, steering=[replace(steering, value=dial) for dial in dials])
    assert (logits - outside[0]).abs().max() < 1e-4
    assert (inside - outside).abs().max() < 1e-4
    assert (inside - lm.logits(PROMPTS)).abs().amax(-1).min() > 0.05
    assert not is_hooked(lm.model)


def test_a_plain_pass_costs_the_budget() -> None:
    lm = shared("qwen3")
    with torch.no_grad():
        plain = lm.model(**padded(TOKENS)).logits[:, -1].double().log_softmax(-1)
        with lm.steered(within(steer_at(lm, "resid"), kl=0.1)):
            steered = lm.model(**padded(TOKENS)).logits[:, -1].double().log_softmax(-1)
    # Positions that count from the padding on: the dial is that of the text without it.
    kl = (plain.exp() * (plain - steered)).sum(-1)
    assert kl.tolist() == pytest.approx([0.1] * 3, rel=0.02)


@pytest.mark.parametrize("setting", [3.0, -3.0])
def test_the_side_is_the_settings(setting: float) -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid").at(setting)
    side: Any = "negative" if setting < 0 else "positive"
    found = budget(lm, steering, PROMPTS, 0.1, chat=False, side=side)
    made = lm.generate(PROMPTS, steering=within(steering, kl=0.1), max_new_tokens=6, chat=False)
    expected = [
        alone(lm, steering, row.dial, ids)
        for row, ids in zip(found.per_prompt, TOKENS, strict=True)
    ]
    assert [list(one.tokens) for one in made] == expected
    with lm.steered(within(steering, kl=0.1)):
        assert raw(lm, TOKENS) == expected
    assert found.dial * setting > 0


def test_beams_and_several_samples() -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    dials = dials_of(lm, steering, PROMPTS)
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
    ):
        torch.manual_seed(0)
        with lm.steered([steering.at(dial) for dial in dials]):
            expected = raw(lm, TOKENS, **options)
        torch.manual_seed(0)
        with lm.steered(within(steering, kl=0.1)):
            assert raw(lm, TOKENS, **options) == expected
        assert len(expected) == 3 * options["num_return_sequences"]


def test_in_inference_mode_and_on_experts() -> None:
    lm = shared("qwen3_moe")
    steering = with_range(steer_at(lm, "ffn_in", "Scale"))
    dials = dials_of(lm, steering, PROMPTS)
    expected = [alone(lm, steering, *pair) for pair in zip(dials, TOKENS, strict=True)]
    with lm.steered(within(steering, kl=0.1)), torch.inference_mode():
        assert raw(lm, TOKENS) == expected


def test_inside_another_steering() -> None:
    """The budget is from the model that is there: steered already."""
    lm = shared("llama")
    outer, inner = steer_at(lm, "resid", seed=1).at(2), steer_at(lm, "resid", seed=2)
    with lm.steered(outer), torch.no_grad():
        plain = lm.logits(PROMPTS).double().log_softmax(-1)
        with lm.steered(within(inner, kl=0.1)):
            steered = lm.logits(PROMPTS).double().log_softmax(-1)
    kl = (plain.exp() * (plain - steered)).sum(-1)
    assert kl.tolist() == pytest.approx([0.1] * 3, rel=0.02)


def test_one_budget_at_a_time() -> None:
    """A dial cannot be found with a model that looks for one whenever it runs."""
    lm = shared("llama")
    steering = steer_at(lm, "embed")
    with lm.steered(within(steering, kl=0.1)):
        for action in (
            lambda: budget(lm, steering, PROMPTS, 0.1),
            lambda: lm.generate(PROMPTS, steering=within(steering, kl=0.1)),
            lambda: lm.steered(within(steering, kl=0.1)).__enter__(),
        ):
            refused_in_one_line(action, "find this one before that block")
        with lm.steered(steering.at(1)):  # a dial that is known is in nobody's way
            raw(lm, TOKENS)
    budget(lm, steering, PROMPTS, 0.1, chat=False)


def test_prompts_that_do_not_come_whole_are_refused() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    ids = torch.tensor([TOKENS[0]])
    embedded = lm.model.model.embed_tokens(ids).detach()
    cache_of_some = lm.model(ids[:, :4], use_cache=True).past_key_values
    whole = "whole prompts of tokens"
    expected = alone(lm, steering, dials_of(lm, steering, PROMPTS[:1])[0], TOKENS[0])
    with lm.steered(within(steering, kl=0.1)):
        for says, arguments in (
            (whole, {"inputs_embeds": embedded}),
            (whole, {"input_ids": ids, "past_key_values": cache_of_some}),
        ):
            refused_in_one_line(
                lambda arguments=arguments: lm.model.generate(**arguments, max_new_tokens=2), says
            )
        four: Any = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        refused_in_one_line(
            lambda: lm.model(input_ids=ids, attention_mask=four), "which tokens are padding"
        )
        # None of these is in the way of what comes after; a prompt that generate() reads in parts
        # is known whole.
        assert raw(lm, TOKENS[:1]) == [expected]
        output = lm.model.generate(
            ids, prefill_chunk_size=4, max_new_tokens=len(expected), do_sample=False
        )
        assert output[0, ids.shape[1] :].tolist() == expected


def test_nothing_is_left_after_an_exception() -> None:
    lm = language_model("llama")

    def fail(*args: Any) -> None:
        raise RuntimeError("on the way")

    handle = lm.model.model.layers[2].mlp.register_forward_hook(fail)
    with (
        pytest.raises(RuntimeError, match="on the way"),
        lm.steered(within(steer_at(lm, "resid"), kl=0.1)),
    ):
        lm.model(torch.tensor([TOKENS[0]]))
    handle.remove()
    for module in lm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert "generate" not in vars(lm.model)


def test_no_text_ends_before_min_new_tokens() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "llama")
    ids = torch.tensor([TOKENS[0]])
    lm.model.generation_config.eos_token_id = int(lm.model(ids).logits[0, -1].argmax())
    assert lm.generate(PROMPTS[:1], chat=False, max_new_tokens=6)[0].tokens == ()
    made = lm.generate(PROMPTS[:1], chat=False, max_new_tokens=6, min_new_tokens=4)
    assert len(made[0].tokens) >= 4
    for wrong in (-1, 7):
        refused_in_one_line(
            lambda wrong=wrong: lm.generate(PROMPTS, max_new_tokens=6, min_new_tokens=wrong),
            "min_new_tokens must be 0 to 6",
        )


# -- calibration ------------------------------------------------------------------------------


def test_a_calibration_is_the_budgets(tmp_path: Path) -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    nats = [0.3, 0.01, 0.1]
    made = calibrate(lm, steering, PROMPTS, nats, chat=False)
    assert steering.calibration is None
    assert made.calibration is not None
    assert made.calibration.kl == (0.01, 0.1, 0.3)
    assert made.calibration.prompts == 3
    for kl in nats:
        found = budget(lm, steering, PROMPTS, kl, chat=False)
        assert found.other is not None
        for side, of_set in (("positive", found), ("negative", found.other)):
            where: Any = side
            assert made.at(kl=kl, side=where).setting == pytest.approx(of_set.worst5_dial, rel=0.01)
            median = made.at(kl=kl, side=where, median=True)
            assert median.setting == pytest.approx(of_set.dial, rel=0.01)
    # Between two budgets nobody's is exceeded by much, nor the median far from it.
    between = made.at(kl=0.05).setting
    costs = [kl_at(lm, steering, prompt, between) for prompt in PROMPTS]
    assert max(costs) == pytest.approx(0.05, rel=0.1)
    below = made.at(kl=0.002).setting
    assert max(kl_at(lm, steering, p, below) for p in PROMPTS) == pytest.approx(0.002, rel=0.3)

    path = tmp_path / "calibrated.safetensors"
    made.save(path)
    again = tt.Steering.load(path)
    assert again.calibration == made.calibration
    assert tt.Steering.read(f"{path}@kl=0.1").setting == made.at(kl=0.1).setting
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_calibrations_of_other_prompts_differ_in_their_digest() -> None:
    lm = shared("llama")
    steering = steer_at(lm, "resid")
    one, same, other, chats = (
        calibrate(lm, steering, prompts, [0.1], chat=chat).calibration
        for prompts, chat in (
            (PROMPTS, False),
            (PROMPTS, False),
            (PROMPTS[:2], False),
            (PROMPTS, None),
        )
    )
    assert one == same
    assert len({c.digest for c in (one, other, chats) if c is not None}) == 3


def test_what_few_prompts_reach_has_no_median() -> None:
    lm = shared("llama")
    free = steer_at(lm, "resid")
    dials = sorted(dials_of(lm, free, PROMPTS))
    for end, median in (((dials[0] + dials[1]) / 2, None), ((dials[1] + dials[2]) / 2, dials[1])):
        made = calibrate(lm, with_range(free, 0.0, end), PROMPTS, [0.1], chat=False).calibration
        assert made is not None
        assert made.positive == (median if median is None else pytest.approx(median, rel=0.01),)
        assert made.positive_worst5 == (pytest.approx(dials[0], rel=0.01),)
        assert made.negative == made.negative_worst5 == ()
