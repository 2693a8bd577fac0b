"""What was read of a conversation is used again only where it is what would be read anew: the texts
are those of `generate` on the whole conversation, whatever is turned in between."""

from __future__ import annotations

from typing import Any

import pytest

import trimtab as tt
from helpers import language_model, steer_at
from trimtab.model import Kept

QUESTIONS = ["Today I feel sad", "Why is that", "Read and write", "The ship left", "Go on"]


def talk(lm: tt.LanguageModel, turned: list[Any], **options: Any) -> list[int]:
    """A conversation under one steering after the other; of how many tokens the reading was used
    again. Each answer is that of a call which keeps nothing."""
    kept, messages, reused = Kept(), list[dict[str, str]](), list[int]()
    for question, steering in zip(QUESTIONS, turned, strict=False):
        messages.append({"role": "user", "content": question})
        asked: dict[str, Any] = {"max_new_tokens": 8, "steering": steering, **options}
        (done,) = lm.generate([messages], kept=kept, **asked)
        reused.append(kept.reused)
        (plain,) = lm.generate([messages], **asked)
        assert done.tokens == plain.tokens
        messages.append({"role": "assistant", "content": done.text})
    return reused


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_texts_are_those_of_whole_conversations(name: str) -> None:
    lm = language_model(name)
    a, b = steer_at(lm, "resid", seed=2).at(4), steer_at(lm, "ffn_out", "Scale", seed=3).at(2)
    late = steer_at(lm, "resid", seed=5).at(6).scoped("generated")
    reused = talk(lm, [None, a, a, a + b, None])
    if name != "gemma3":  # whose window has moved on
        first = len(lm.encode([(("user", QUESTIONS[0]),)])[0])
        # Of another steering nothing; of the same one all, and the answer, which is prompt now.
        assert reused[:2] == [0, 0]
        assert reused[2] > first + 8
        assert reused[3:] == [0, 0]
        # What acts on generated tokens leaves prompts as they are: answers are read anew.
        one, two, three, four, five = talk(lm, [late, late.at(-6), None, a, a])
        assert (one, four) == (0, 0)
        assert first - 4 <= two <= first
        assert first + 8 < three < five


def test_windows_of_scopes_and_budgets() -> None:
    lm = language_model("llama")
    begun = steer_at(lm, "resid", seed=2).at(4).scoped("prompt[:6]")
    assert talk(lm, [begun] * 4)[2] > 6
    decayed = steer_at(lm, "resid", seed=2).at(4).scoped("generated ~ 0.5")
    talk(lm, [decayed] * 4)
    user = steer_at(lm, "resid", seed=2).at(4).scoped("user | last")
    talk(lm, [user] * 4)
    rule = tt.within(steer_at(lm, "resid", seed=2), kl=0.3)
    assert talk(lm, [rule] * 2) == [0, 0]  # another dial each time


def test_sampling_and_stops() -> None:
    lm = language_model("llama")
    a = steer_at(lm, "resid", seed=2).at(4)
    assert talk(lm, [a] * 4, temperature=1.2, seed=3)[3] > 0
    assert talk(lm, [None] * 4, stop="[ae]")[3] > 0


def test_an_answer_that_was_left_is_not_used_again() -> None:
    lm = language_model("llama")
    kept = Kept()
    messages = [{"role": "user", "content": QUESTIONS[0]}]

    def leave(place: int, piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.generate([messages], kept=kept, on_text=leave)
    (done,) = lm.generate([messages], kept=kept, max_new_tokens=8)
    assert kept.reused == 0
    assert done.tokens == lm.generate([messages], max_new_tokens=8)[0].tokens
    (again,) = lm.generate([messages], kept=kept, max_new_tokens=8)
    assert kept.reused > 4
    assert again.tokens == done.tokens


def test_another_model_reads_anew() -> None:
    one, other, kept = language_model("llama"), language_model("llama", seed=1), Kept()
    for lm in (one, other, one):
        (done,) = lm.generate(QUESTIONS[:1], kept=kept, max_new_tokens=8)
        assert kept.reused == 0
        assert done.tokens == lm.generate(QUESTIONS[:1], max_new_tokens=8)[0].tokens


def test_what_a_block_steers_is_not_kept() -> None:
    lm, kept = language_model("llama"), Kept()
    with lm.steered(steer_at(lm, "resid", seed=2).at(6)):
        (steered,) = lm.generate(QUESTIONS[:1], kept=kept, max_new_tokens=8)
    (plain,) = lm.generate(QUESTIONS[:1], kept=kept, max_new_tokens=8)
    assert kept.reused == 0
    assert plain.tokens == lm.generate(QUESTIONS[:1], max_new_tokens=8)[0].tokens != steered.tokens


def test_it_is_for_one_prompt() -> None:
    lm = language_model("llama")
    with pytest.raises(tt.TrimtabError, match="one prompt"):
        lm.generate(QUESTIONS[:2], kept=Kept())
    with pytest.raises(tt.TrimtabError, match="one prompt"):
        lm.generate(QUESTIONS[:1], kept=Kept(), num_beams=2)
