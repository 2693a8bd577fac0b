"""How tokens are chosen: as the call asks, whatever generation settings the checkpoint brings; stop
patterns; logits that are not finite."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import trimtab as tt
from helpers import PROMPTS, language_model, one_line, plain_logits, steer_at, token_ids
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.model.decoding import OPTIONS
from trimtab.reading.reader import plan, prompt_reading, run_batches

#: What a generation_config.json may say, each hostile to who wants the argmax or plain samples.
HOSTILE: dict[str, Any] = {
    "repetition_penalty": 1.9,
    "encoder_repetition_penalty": 0.3,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "top_k": 2,
    "top_p": 0.1,
    "temperature": 0.1,
    "do_sample": True,
    "bad_words_ids": [[i] for i in range(6, 380)],
    "suppress_tokens": list(range(6, 380)),
    "begin_suppress_tokens": list(range(6, 380)),
    "sequence_bias": [[[7], 100.0]],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "exponential_decay_length_penalty": [0, 9.0],
    "renormalize_logits": True,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "max_length": 3,
    "min_length": 300,
    "max_new_tokens": 2,
    "min_new_tokens": 200,
    "max_time": 0.0,
    "stop_strings": ["e", "a", " "],
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "cache_implementation": "static",
    "use_cache": False,
    "token_healing": True,
    "watermarking_config": {"bias": 50.0},
    "constraints": [1],
    "force_words_ids": [[[9]]],
    "num_beam_groups": 3,
    "diversity_penalty": 1.0,
    "length_penalty": -5.0,
    "early_stopping": True,
    "remove_invalid_values": True,
    "compile_config": {"mode": "default"},
    "an_entry_of_its_own": 1,
}


def with_settings(name: str, **settings: Any) -> tt.LanguageModel:
    lm = language_model(name)
    for key, value in settings.items():
        setattr(lm.model.generation_config, key, value)
    return lm


def argmax_loop(model: PreTrainedModel, ids: list[int], new: int) -> tuple[int, ...]:
    """Greedy decoding as it is in a textbook."""
    written: list[int] = []
    for _ in range(new):
        written.append(int(plain_logits(model, ids + written)[-1].argmax()))
    return tuple(written)


@pytest.mark.parametrize("field", HOSTILE)
def test_greedy_is_the_argmax_whatever_the_checkpoint_asks(field: str) -> None:
    lm = with_settings("llama", **{field: HOSTILE[field]})
    done = lm.generate(PROMPTS[:2], max_new_tokens=6, chat=False)
    assert [one.tokens for one in done] == [
        argmax_loop(lm.model, token_ids(prompt), 6) for prompt in PROMPTS[:2]
    ]


@pytest.mark.parametrize("name", TINY)
def test_greedy_is_the_argmax_with_every_setting_at_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm = with_settings(name, **HOSTILE)
    before = vars(lm.model.generation_config).copy()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        done = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    assert [one.tokens for one in done] == [
        argmax_loop(lm.model, token_ids(prompt), 6) for prompt in PROMPTS
    ]
    assert vars(lm.model.generation_config) == before  # the user's model is as it was
    assert caplog.messages == []


def test_samples_follow_the_softmax_whatever_the_checkpoint_asks() -> None:
    lm = with_settings("llama", **HOSTILE)
    count = 3000
    done = lm.generate(
        ["The"] * count, max_new_tokens=1, chat=False, temperature=2.0, seed=0, batch_size=count
    )
    drawn = torch.tensor([one.tokens[0] for one in done])
    expected = (plain_logits(lm.model, token_ids("The"))[-1] / 2.0).softmax(-1)
    found = drawn.bincount(minlength=len(expected)) / count
    assert (found - expected).abs().sum() / 2 < 0.15
    assert len(drawn.unique()) > 50


def test_steered_text_is_the_same_with_and_without_settings() -> None:
    plain, hostile = language_model("gemma2"), with_settings("gemma2", **HOSTILE)
    rows = [steer_at(plain, "resid"), None, steer_at(plain, "ffn_out")]
    options: dict[str, Any] = {"steering": rows, "max_new_tokens": 6, "chat": False}
    assert hostile.generate(PROMPTS, **options) == plain.generate(PROMPTS, **options)


def test_special_tokens_stay_the_checkpoints() -> None:
    lm = language_model("llama")
    free = lm.generate(PROMPTS[:1], max_new_tokens=8, chat=False)[0].tokens
    lm.model.generation_config.eos_token_id = [free[3], 5000]
    lm.model.generation_config.repetition_penalty = 5.0
    stopped = lm.generate(PROMPTS[:1], max_new_tokens=8, chat=False)[0].tokens
    assert stopped == free[: free.index(free[3])]
    longer = lm.generate(PROMPTS[:1], max_new_tokens=8, min_new_tokens=6, chat=False)[0].tokens
    assert len(longer) >= 6
    assert free[3] not in longer[:6]


# -- stop patterns ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["(a|a)*$", "([a-z ]|[a-z ])+$"])
def test_a_pattern_that_never_ends_is_given_up(pattern: str) -> None:
    lm = language_model("llama")
    lm.tokenizer = Says("a" * 60 + "!b")
    started = time.monotonic()
    with pytest.raises(tt.TrimtabError, match="takes more than 1 s to search") as caught:
        lm.generate(["x"], max_new_tokens=4, chat=False, stop=pattern)
    assert "repeats inside repeats" in one_line(caught)
    assert time.monotonic() - started < 60  # it would take years


class Says:
    """A tokenizer for which every text of new tokens reads the same."""

    def __init__(self, text: str) -> None:
        self.text, self.real = text, tiny_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return self.real(*texts, **options)

    def decode(self, *tokens: Any, **options: Any) -> str:
        return self.text


# -- logits that are not finite ---------------------------------------------------------------


def broken(name: str, value: float, **options: Any) -> tt.LanguageModel:
    """A model whose logits are `value` somewhere."""
    lm = language_model(name, **options)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[7, 0] = value
    return lm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_dial_that_overflows_is_named(name: str, dtype: torch.dtype, temperature: float) -> None:
    lm = language_model(name, dtype=dtype)
    far = replace(steer_at(lm, "ffn_out"), value=3e38)
    fine = steer_at(lm, "ffn_out")
    short = str(dtype).removeprefix("torch.")
    options: dict[str, Any] = {"max_new_tokens": 4, "chat": False, "temperature": temperature}
    with pytest.raises(tt.TrimtabError, match=f"logits of prompt 2 .* in {short} with") as caught:
        lm.generate(PROMPTS, steering=[fine, [fine, far], None], **options)
    message = one_line(caught)
    assert f"{fine.label} and {far.label}: turn the dial towards 0" in message
    assert ("float32" in message.split(":")[-1]) is (dtype != torch.float32)
    with pytest.raises(tt.TrimtabError, match="logits of prompt 3 .* not finite"):
        lm.logits(PROMPTS, steering=[fine, None, far])
    with pytest.raises(tt.TrimtabError, match="logits of prompt 1 .* not finite"):
        lm.logits(PROMPTS, steering=far, at="all")
    lm.generate(PROMPTS, steering=fine, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said(value: float, temperature: float) -> None:
    lm = broken("llama", value)
    with pytest.raises(tt.TrimtabError, match="without a steering of its own: look at") as caught:
        lm.generate(PROMPTS, max_new_tokens=3, chat=False, temperature=temperature)
    one_line(caught)
    with pytest.raises(tt.TrimtabError, match="without a steering of its own"):
        lm.logits(PROMPTS)
    readings = [prompt_reading(token_ids(prompt)) for prompt in PROMPTS]
    with pytest.raises(tt.TrimtabError, match="without a steering of its own"):
        list(run_batches(lm, readings, plan(readings, 100)))


def test_what_is_only_read_names_the_dial_too() -> None:
    lm = language_model("llama", dtype=torch.float16)
    far = replace(steer_at(lm, "ffn_out"), value=3e38)
    readings = [prompt_reading(token_ids(prompt)) for prompt in PROMPTS]
    with pytest.raises(tt.TrimtabError, match="not finite") as caught:
        list(run_batches(lm, readings, plan(readings, 100), far))
    assert f"with {far.label}: turn the dial" in one_line(caught)


def test_tokens_that_a_model_bars_are_no_fault() -> None:
    lm = language_model("llama")

    def bar(module: Any, arguments: Any, output: Any) -> Any:
        output[..., 200:] = -torch.inf
        return output

    handle = lm.model.lm_head.register_forward_hook(bar)
    done = lm.generate(PROMPTS, max_new_tokens=5, chat=False, temperature=1.0, seed=0)
    assert all(token < 200 for one in done for token in one.tokens)
    assert lm.logits(PROMPTS).isinf().any()
    handle.remove()


def test_what_comes_after_the_end_of_a_text_does_not_matter() -> None:
    """One row ends at once, the others go on; then the logits of the ended row break."""
    lm = language_model("llama")
    free = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    lm.model.generation_config.eos_token_id = free[0].tokens[1]
    ended = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    assert len(ended[0].tokens) == 1
    longest = max(len(token_ids(prompt)) for prompt in PROMPTS)
    order = sorted(range(3), key=lambda i: len(token_ids(PROMPTS[i])))
    calls = []

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        calls.append(output.shape)
        if len(calls) > spoiled_from:
            output[order.index(0)] = torch.nan
        return output

    handle = lm.model.lm_head.register_forward_hook(spoil)
    spoiled_from = 2  # the first token and the one that ends it are sound
    assert lm.generate(PROMPTS, max_new_tokens=6, chat=False) == ended
    calls.clear()
    spoiled_from = 1
    with pytest.raises(tt.TrimtabError, match="logits of prompt 1 are not finite"):
        lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    handle.remove()
    assert longest > 1


def test_the_watch_costs_one_reduction_a_token() -> None:
    """Operations on the vocabulary that a token takes, counted with and without the watch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from trimtab.model.decoding import SoundLogits

    class Count(TorchDispatchMode):
        wide = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if any(isinstance(a, torch.Tensor) and a.numel() >= 300 for a in args):
                Count.wide += name not in ("view", "_unsafe_view", "reshape", "alias")
            return func(*args, **(kwargs or {}))

    watch = SoundLogits(3, sampled=False)
    with Count():
        for _ in range(10):
            watch(torch.zeros(3, 4), torch.rand(3, 300))
    assert Count.wide == 10
    assert watch.counts() == [10, 10, 10]


def test_tiny_models_have_no_settings_of_their_own() -> None:
    """Or the tests above would not show what a setting does."""
    settings = tiny_model("llama").generation_config.to_diff_dict()
    assert not set(settings) & set(OPTIONS)
