"""Coherence: measures of a text against values counted by hand, perplexity against a plain loop."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import by_hand, language_model, operator, plain_logits, refused_in_one_line, steer
from tiny import TINY, tiny_tokenizer
from trimtab.evaluation.metrics.coherence import (
    coherence,
    compression_ratio,
    language_consistency,
    perplexities,
    repetition,
)
from trimtab.steering import POSITIONS, Positions

# -- language ------------------------------------------------------------------------------------

LANGUAGE = {
    "": 1.0,
    " \n\t\u00a0\u3000": 1.0,  # nothing but spaces
    "Bread and poems, 12 % of them!": 1.0,
    "été, Ærø, Łódź, ﬁne": 1.0,  # accents and ligatures are Latin
    "a b 中文": 2 / 4,  # spaces do not count
    "中文": 0.0,
    "да": 0.0,
    "It’s": 3 / 4,  # a typographic quote is foreign
    "“x”": 1 / 3,
    "ok🍞": 2 / 3,
    "a—b…": 2 / 4,
    "e\u0301t": 2 / 3,  # an accent that is a character of its own is COMBINING
    "Ａb": 1 / 2,  # FULLWIDTH LATIN begins otherwise
    "\x00a": 1.0,  # ASCII without a name
    "\ue000a": 1 / 2,  # no name, no ASCII
}


@pytest.mark.parametrize("text", LANGUAGE)
def test_language_consistency(text: str) -> None:
    assert language_consistency(text) == pytest.approx(LANGUAGE[text], abs=1e-12)


# -- compression ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["bread", "the bread " * 50, "中文" * 30, "It’s “fine” 🍞", "\n", "a" * 10_000]
)
def test_compression_ratio_is_bytes_over_bytes(text: str) -> None:
    packed = zlib.compress(text.encode("utf-8"), level=9)
    assert compression_ratio(text) == len(packed) / len(text.encode("utf-8"))


def test_compression_ratio_by_hand() -> None:
    assert compression_ratio("") == 1.0
    # One byte in a fixed block: 2 of header, 3 of content, 4 of checksum.
    assert compression_ratio("a") == 9.0
    assert compression_ratio("é") == 10 / 2  # two bytes of text, one more packed
    assert compression_ratio("a poem " * 200) < 0.05  # loops compress well


# -- repetition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("  \n ", 0.0),
        ("a b c", 0.0),  # fewer than four words
        ("a b c d", 0.0),
        ("a a a a a", 1 / 2),  # two 4-grams, one of them new
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("a b\nc  d\ta b c d", 1 / 5),  # any space parts words
        ("a b c d a b c d a b c d", 5 / 9),  # nine 4-grams, four of them different
        ("a b c d A b c d", 0.0),  # case counts
        ("a b c d. a b c d", 0.0),  # and so does a full stop
        (" ".join("x" * 103), 99 / 100),
    ],
)
def test_repetition_of_four_words(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share, abs=1e-12)


def test_repetition_of_other_lengths() -> None:
    assert repetition("a b a b a", 2) == 2 / 4  # ab ba ab ba
    assert repetition("a b a b a", 1) == 3 / 5
    assert repetition("a b a b a", 5) == 0.0
    assert repetition("a b a b a", 6) == 0.0


# -- perplexity: the oracle ----------------------------------------------------------------------

LONG = "She looked at the map and asked where they were going, and he said that he did not know. "
PROMPTS = [
    "Today I feel",
    "What is the best way to learn a language? Read, write, listen and speak every day",
    "Yes",
    # Shared beginnings, long enough that they are run once.
    LONG + "The wind",
    LONG + "The wind",
    LONG + "The day",
    LONG,
]
WRITTEN = [" happy.", " and think about it for a long time", "", " was good", " was long, too"]
WRITTEN += [" was", " They would rule together; there was nothing more to say."]


def ids(text: str, special: bool = False) -> list[int]:
    found: list[int] = tiny_tokenizer()(text, add_special_tokens=special).input_ids
    return found


COMPLETIONS = [ids(text) for text in WRITTEN]


@contextmanager
def hooked(block: Any, change: Any, positions: Positions, prompt: int) -> Iterator[None]:
    """A change of a block's output on some tokens of one unpadded text, by a plain hook."""

    def hook(module: Any, args: Any, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        steered = {
            "all": place >= 0,
            "prompt": place < prompt,
            "generated": place >= prompt,
            "last": place >= prompt - 1,
        }[positions]
        return torch.where(steered[None, :, None], change(x), x)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def perplexity(model: Any, prompt: Sequence[int], new: Sequence[int]) -> float | None:
    """One text alone, without cache or padding: exp of the mean -ln p of its new tokens."""
    if not new:
        return None
    log_p = plain_logits(model, [*prompt, *new]).double().log_softmax(-1)
    each = [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(new)]
    return math.exp(-sum(each) / len(each))


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def by_loop(
    lm: tt.LanguageModel, change: Any = None, positions: Positions = "all"
) -> list[float | None]:
    found = []
    for text, new in zip(PROMPTS, COMPLETIONS, strict=True):
        prompt = ids(text, special=True)
        if change is None:
            found.append(perplexity(lm.model, prompt, new))
        else:
            with hooked(blocks(lm.model)[1], change, positions, len(prompt)):
                found.append(perplexity(lm.model, prompt, new))
    return found


def same(found: Sequence[float | None], expected: Sequence[float | None]) -> None:
    assert [value is None for value in found] == [value is None for value in expected]
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            assert one == pytest.approx(other, rel=1e-4)


# -- perplexity on tiny models -------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_unsteered_perplexity_is_that_of_each_text_alone(name: str) -> None:
    lm = language_model(name)
    expected = by_loop(lm)
    assert expected[2] is None  # nothing was written
    same(perplexities(lm, PROMPTS, COMPLETIONS), expected)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_self_perplexity_is_that_of_each_steered_text_alone(
    name: str, positions: Positions
) -> None:
    lm = language_model(name)
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions=positions, alpha=2.0)
    expected = by_loop(lm, by_hand(op, 2.0), positions)
    plain = by_loop(lm)
    assert expected[1] != pytest.approx(plain[1], rel=1e-3)  # it does something
    same(perplexities(lm, PROMPTS, COMPLETIONS, steering), expected)
    same(perplexities(lm, PROMPTS, COMPLETIONS), plain)  # and is gone


@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_perplexity_does_not_depend_on_the_batch(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")
    op = operator("Rotate", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions="generated", alpha=70.0)
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", batch_tokens)
    found = perplexities(lm, PROMPTS, COMPLETIONS, steering)
    alone = [
        perplexities(lm, [prompt], [new], steering)[0]
        for prompt, new in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    same(found, alone)
    order = [5, 2, 0, 6, 3, 1, 4]
    turned = perplexities(
        lm, [PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], steering
    )
    same(turned, [found[i] for i in order])


def test_the_prompt_of_a_chat_is_not_scored() -> None:
    lm = language_model("llama")
    prompt = (("user", "What is the capital of France?"),)
    new = ids("The capital of France is Paris.")
    # The template has BOS already.
    text = "<s><|user|>\nWhat is the capital of France?</s>\n<|assistant|>\n"
    same(perplexities(lm, [prompt], [new]), [perplexity(lm.model, ids(text), new)])


def test_one_token_texts_can_be_scored_with_a_steering_of_generated_tokens() -> None:
    # Their only token is read from the prompt, which such a steering leaves as it is.
    lm = language_model("llama")
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions="generated")
    new = [[7], [9]]
    plain = perplexities(lm, PROMPTS[:2], new)
    same(perplexities(lm, PROMPTS[:2], new, steering), plain)
    same(
        plain,
        [perplexity(lm.model, ids(p, True), n) for p, n in zip(PROMPTS[:2], new, strict=True)],
    )


@pytest.mark.parametrize("positions", POSITIONS)
def test_empty_texts_have_no_perplexity(positions: Positions) -> None:
    lm = language_model("llama")
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions=positions)
    for attached in (None, steering):
        assert perplexities(lm, ["Yes", "No"], [[], ()], attached) == [None, None]
        assert perplexities(lm, [], [], attached) == []


def test_a_text_that_no_model_would_write_is_not_an_overflow() -> None:
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.lm_head.weight[7] = 0
        lm.model.lm_head.weight.mul_(1e4)
    prompt, new = ids("Yes", special=True), [7]
    nll = -float(plain_logits(lm.model, [*prompt, *new]).double().log_softmax(-1)[-2, 7])
    assert nll > 710  # where exp ends
    assert perplexities(lm, ["Yes"], [new]) == [pytest.approx(math.exp(700))]


def test_completions_must_match_their_prompts() -> None:
    lm = language_model("llama")
    refused_in_one_line(
        lambda: perplexities(lm, ["Yes"], [[7], [8]]), "2 completions for 1 prompts"
    )
    refused_in_one_line(
        lambda: perplexities(lm, ["Yes", "No"], [[7]]), "1 completions for 2 prompts"
    )


def test_a_prompt_without_tokens_has_nothing_to_read_the_first_token_from() -> None:
    lm = language_model("llama")
    empty = tiny_tokenizer()
    lm.tokenizer = lambda texts, **options: {
        "input_ids": [empty(text, add_special_tokens=False).input_ids for text in texts]
    }
    lm.tokenizer.bos_token = None
    refused_in_one_line(lambda: perplexities(lm, [""], [[7]]), "the prompt '' is empty")


# -- all of them ---------------------------------------------------------------------------------


def test_all_measures_of_each_text() -> None:
    lm = language_model("llama")
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op))
    rows = coherence(lm, PROMPTS, WRITTEN, COMPLETIONS, steering)
    same([row["perplexity"] for row in rows], by_loop(lm))
    same([row["self_perplexity"] for row in rows], by_loop(lm, by_hand(op)))
    for row, text in zip(rows, WRITTEN, strict=True):
        assert row["language_consistency"] == language_consistency(text)
        assert row["compression_ratio"] == compression_ratio(text)
        assert row["repetition_4gram"] == repetition(text)
        assert len(row) == 5
    plain = coherence(lm, PROMPTS, WRITTEN, COMPLETIONS)
    for row, bare in zip(rows, plain, strict=True):
        assert bare["self_perplexity"] == bare["perplexity"] == row["perplexity"]


def test_another_model_s_steering_is_refused_unless_forced() -> None:
    lm, other = language_model("llama"), language_model("llama", seed=1)
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(other, ("layers.1.resid", op))
    with pytest.raises(tt.TrimtabError):
        coherence(lm, PROMPTS, WRITTEN, COMPLETIONS, steering)
    rows = coherence(lm, PROMPTS, WRITTEN, COMPLETIONS, steering, force=True)
    same([row["self_perplexity"] for row in rows], by_loop(lm, by_hand(op)))


# -- a real model --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_perplexity_of_what_a_steered_model_wrote(smollm2: Any, positions: Positions) -> None:
    model, tokenizer = smollm2.model, smollm2.tokenizer
    op = operator("Add", smollm2.anatomy.hidden_size)
    steering = steer(smollm2, ("layers.12.resid", op), positions=positions, alpha=10.0)
    # One of them empty, and one a single token.
    prompts = [
        "Bread is",
        "She looked at the map and asked where they were going, and",
        "Yes",
        "No",
    ]
    lengths = [3, 6, 0, 1]
    completions = []
    expected: list[list[float | None]] = [[], []]
    for prompt, length in zip(prompts, lengths, strict=True):
        given = tokenizer(prompt).input_ids
        tokens = list(given)
        with hooked(model.model.layers[12], by_hand(op, 10.0), positions, len(given)):
            for _ in range(length):  # no cache: each pass is the whole text
                tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
            own = perplexity(model, given, tokens[len(given) :])
        completions.append(tokens[len(given) :])
        expected[0].append(perplexity(model, given, completions[-1]))
        expected[1].append(own)
    same(perplexities(smollm2, prompts, completions), expected[0])
    same(perplexities(smollm2, prompts, completions, steering), expected[1])
    # Texts that the steered model chose are likelier to it.
    assert expected[1][1] < expected[0][1]  # type: ignore[operator]
