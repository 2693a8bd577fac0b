"""A loaded model: generation, sampling, logits, and prompts that cannot be."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import (
    PROMPTS,
    language_model,
    one_line,
    plain_logits,
    relative,
    steer_at,
    token_ids,
    without_bos,
)
from tiny import TINY, tiny_model

CHAT = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


# -- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_generate_is_transformers_greedy_search(name: str) -> None:
    lm = language_model(name)
    completions = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = token_ids(prompt)
        for _ in range(8):
            ids.append(int(plain_logits(lm.model, ids)[-1].argmax()))
        assert list(completion.tokens) == ids[-8:]
        assert completion.prompt == prompt
        text = lm.tokenizer.decode(ids[-8:], skip_special_tokens=True)
        assert completion.text == str(completion) == text


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_keep_the_order_of_the_prompts(batch_size: int) -> None:
    lm = language_model("llama")
    prompts = [*PROMPTS, "The", PROMPTS[1]]
    rows = [steer_at(lm, "resid", seed=1), None, steer_at(lm, "heads"), None, None]
    together = lm.generate(
        prompts, max_new_tokens=6, chat=False, steering=rows, batch_size=batch_size
    )
    logits = lm.logits(prompts, steering=rows, batch_size=batch_size)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = lm.generate([prompt], max_new_tokens=6, chat=False, steering=row)[0]
        assert together[i] == alone
        assert relative(logits[i], lm.logits([prompt], steering=row)[0]) < 1e-5


def test_completions_name_their_steering() -> None:
    lm = language_model("llama")
    a = steer_at(lm, "resid")
    rows = [a.at(2), None, (a, a.at(-1))]
    done = lm.generate(PROMPTS, max_new_tokens=2, chat=False, steering=rows)
    assert [one.steering for one in done] == [
        ("test alpha=2",), (), ("test alpha=1", "test alpha=-1"),
    ]  # fmt: skip


def test_text_goes_through_the_chat_template_by_default_or_raw() -> None:
    lm = language_model("llama")
    chat = lm.generate(PROMPTS, max_new_tokens=6)
    assert chat == lm.generate(PROMPTS, max_new_tokens=6, chat=True)
    messages = lm.generate(CHAT, max_new_tokens=6)
    assert [one.tokens for one in messages] == [one.tokens for one in chat]
    assert messages[0].prompt == (("user", PROMPTS[0]),)
    raw = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    assert [one.tokens for one in raw] != [one.tokens for one in chat]
    # A conversation stays one, whatever `chat` says of text.
    assert lm.generate(CHAT, max_new_tokens=6, chat=False) == messages
    bare = tt.wrap(tiny_model("gpt2"), without_bos())
    assert bare.generate(["Hi"], max_new_tokens=2)[0].prompt == "Hi"


def test_logits_are_of_raw_text_by_default() -> None:
    lm = language_model("llama")
    expected = [plain_logits(lm.model, token_ids(prompt))[-1] for prompt in PROMPTS]
    assert relative(lm.logits(PROMPTS), torch.stack(expected)) < 1e-5
    ids = lm.encode([(("user", PROMPTS[0]),)])[0]
    for prompts in (PROMPTS[:1], CHAT[:1]):
        assert relative(lm.logits(prompts, chat=True)[0], plain_logits(lm.model, ids)[-1]) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_logits_of_all_tokens_are_transformers(name: str) -> None:
    lm = language_model(name)
    every = lm.logits(PROMPTS, at="all")
    last = lm.logits(PROMPTS)
    assert isinstance(every, list)
    for i, prompt in enumerate(PROMPTS):
        expected = plain_logits(lm.model, token_ids(prompt))
        assert every[i].shape == expected.shape  # no row for padding
        assert every[i].dtype is torch.float32
        assert relative(every[i], expected) < 1e-5
        assert relative(last[i], expected[-1]) < 1e-5


def test_the_end_of_a_text_stops_it() -> None:
    lm = language_model("llama")
    free = lm.generate(PROMPTS, max_new_tokens=12, chat=False)
    stop = free[0].tokens[4]
    assert stop not in free[0].tokens[:4]
    for eos in (stop, [stop, 399]):
        lm.model.generation_config.eos_token_id = eos
        stopped = lm.generate(PROMPTS, max_new_tokens=12, chat=False)
        assert stopped[0].tokens == free[0].tokens[:4]
        # Rows that end later are not cut where the first one ended.
        for one, other in zip(stopped[1:], free[1:], strict=True):
            cut = other.tokens.index(stop) if stop in other.tokens else 12
            assert one.tokens == other.tokens[:cut]
        assert any(len(one.tokens) == 12 for one in stopped)


def test_a_tokenizer_without_padding_token_generates_batches() -> None:
    lm = tt.wrap(tiny_model("gpt2"), without_bos())
    assert lm.tokenizer.pad_token_id is None
    lm.model.generation_config.pad_token_id = None
    together = lm.generate(PROMPTS, max_new_tokens=6)
    for prompt, one in zip(PROMPTS, together, strict=True):
        assert lm.generate([prompt], max_new_tokens=6)[0] == one


# -- sampling ---------------------------------------------------------------------------------


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    lm = language_model("llama")
    options: dict[str, Any] = {"max_new_tokens": 12, "chat": False, "temperature": 1.0}
    before = torch.random.get_rng_state()
    first = lm.generate(PROMPTS, seed=7, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    assert lm.generate(PROMPTS, seed=7, **options) == first
    assert lm.generate(PROMPTS, seed=8, **options) != first
    torch.random.set_rng_state(before)


def test_without_a_seed_sampling_follows_the_global_generator() -> None:
    lm = language_model("llama")
    options: dict[str, Any] = {"max_new_tokens": 12, "chat": False, "temperature": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = lm.generate(PROMPTS, **options), lm.generate(PROMPTS, **options)
        torch.manual_seed(1)
        assert lm.generate(PROMPTS, **options) == first
    assert first != second


def test_greedy_uses_no_randomness_and_warns_of_nothing() -> None:
    lm = language_model("llama")
    lm.model.generation_config.do_sample = True  # as many chat models have it
    lm.model.generation_config.temperature = 0.6
    lm.model.generation_config.top_p = 0.9
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == language_model("llama").generate(PROMPTS, max_new_tokens=8, chat=False)


def test_sampling_options_reach_the_distribution() -> None:
    lm = language_model("llama")
    greedy = lm.generate(PROMPTS, max_new_tokens=8, chat=False)
    options: dict[str, Any] = {"max_new_tokens": 8, "chat": False, "seed": 3}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert lm.generate(PROMPTS, temperature=5.0, **narrow, **options) == greedy
    assert lm.generate(PROMPTS, temperature=1e-4, **options) == greedy
    assert lm.generate(PROMPTS, temperature=5.0, **options) != greedy


def test_the_whole_distribution_is_sampled_by_default() -> None:
    """Frequencies of the first token against its probabilities, without the model's own top_k."""
    lm = language_model("llama")
    lm.model.generation_config.top_k = 5
    lm.model.generation_config.top_p = 0.5
    count = 3000
    done = lm.generate(
        ["The"] * count, max_new_tokens=1, chat=False, temperature=2.0, seed=0, batch_size=count
    )
    tokens = torch.tensor([one.tokens[0] for one in done])
    expected = (lm.logits(["The"])[0] / 2.0).softmax(-1)
    found = tokens.bincount(minlength=len(expected)) / count
    # Total variation between a distribution over ~100 likely tokens and 3,000 draws from it.
    assert (found - expected).abs().sum() / 2 < 0.15
    assert len(tokens.unique()) > 50


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"top_p": 1.5}, "top_p above 0"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
        ({"batch_size": 0}, "must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(tt.TrimtabError, match=reason) as caught:
        language_model("llama").generate(PROMPTS, chat=False, **options)
    one_line(caught)


# -- prompts that cannot be -------------------------------------------------------------------


def test_an_empty_prompt_is_refused_or_only_bos() -> None:
    lm = language_model("llama")  # with BOS there is something to go on from
    assert len(lm.generate([""], max_new_tokens=3, chat=False)[0].tokens) == 3
    bos = plain_logits(lm.model, [lm.bos])
    assert relative(lm.logits([""]), bos) < 1e-5
    bare = tt.wrap(tiny_model("gpt2"), without_bos())
    for prompts in ([""], ["Hello", ""]):
        with pytest.raises(tt.TrimtabError, match="the prompt '' is empty"):
            bare.generate(prompts)
        with pytest.raises(tt.TrimtabError, match="the prompt '' is empty"):
            bare.logits(prompts)


def test_no_prompts_and_no_list_are_refused() -> None:
    lm = language_model("llama")
    for run in (lm.generate, lm.logits):
        with pytest.raises(tt.TrimtabError, match="there is no prompt"):
            run([])
        with pytest.raises(tt.TrimtabError, match=r"write \[prompt\]"):
            run("Hello")
        with pytest.raises(tt.TrimtabError, match="prompt 2.*must be text or a list of messages"):
            run(["Hello", 3])
        with pytest.raises(tt.TrimtabError, match="message must be"):
            run([[{"role": "user"}]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_that_are_too_long_are_refused(name: str) -> None:
    lm = language_model(name)
    assert lm.max_length == 256
    long = "ship " * 400
    length = len(token_ids(long))
    with pytest.raises(tt.TrimtabError, match=f"{length} tokens.*256 tokens") as caught:
        lm.generate(["short", long], max_new_tokens=4, chat=False)
    assert "shorten" in one_line(caught)
    with pytest.raises(tt.TrimtabError, match=f"{length} tokens.*256 tokens"):
        lm.logits(["short", long])
    # To the last token, and not one more.
    fits = lm.tokenizer.decode(token_ids(long)[1:248])
    room = 256 - len(token_ids(fits))
    assert 0 < room < 60
    assert len(lm.generate([fits], max_new_tokens=room, chat=False)[0].tokens) == room
    with pytest.raises(tt.TrimtabError, match="exceed the 256 tokens"):
        lm.generate([fits], max_new_tokens=room + 1, chat=False)


def test_the_length_limit_is_the_smaller_one_or_none() -> None:
    lm = language_model("llama")
    tokenizer = without_bos()
    tokenizer.model_max_length = int(1e30)  # how tokenizers say that they have no limit
    assert tt.wrap(lm.model, tokenizer).max_length == 256
    tokenizer.model_max_length = 100
    assert tt.wrap(lm.model, tokenizer).max_length == 100
