"""Which pairs of answers are kept: by plain rules, by scores of a service, and by log-odds that are
compared with a loop over a plain transformers model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from generated_texts import lm, own_surroundings, roomy
from services import Reply, Request, serving
from trimtab.evaluation import ChatEndpoint
from trimtab.writing import filtering
from trimtab.writing.filtering import (
    COHERENCE_QUESTION,
    TRAIT_QUESTION,
    Answers,
    Filtered,
    _shuffled,
    filtered,
    yes_odds,
)
from trimtab.writing.work import Work

__all__ = ["lm", "own_surroundings"]  # fixtures, which pytest finds by their names here

WISH = "formal {wish}"


def rows(*sides: tuple[str, str]) -> list[Answers]:
    return [Answers(f"Why {i}?", "train", i, *both) for i, both in enumerate(sides)]


def judged(some: list[Answers], judge: Any, special: tuple[str, ...] = ("<|end|>",)) -> Filtered:
    work = Work(None, {}, overwrite=False)
    return filtered(some, judge, WISH, work, answerer=judge, special=special, max_new_tokens=10)


def scoring(by: Callable[[str, str], str]) -> Callable[[Request], Reply]:
    """A service that gives the score that `by` says of a kind of request and an answer."""

    def reply(request: Request) -> Reply:
        system, user = (message["content"] for message in request.content["messages"])
        kind = "trait" if "by a trait: formal {wish}." in system else "coherence"
        text = user.split("<answer>\n")[1].removesuffix("\n</answer>")
        return Reply({"choices": [{"message": {"content": by(kind, text)}}]})

    return reply


def test_plain_rules_come_before_any_judge() -> None:
    loop = "the sea is wide and " * 6
    some = rows(
        *(("  ...", "fine"), ("x" * 161, "fine"), ("stop <|end|>", "fine"), (loop, "fine")),
        *(("half \ud800", "fine"), ("The Sea", "the  sea")),
        ("good", "bad"),
    )
    some.append(some[-1])
    scores = {("trait", "bad"): "0"}
    with serving(scoring(lambda *about: scores.get(about, "90"))) as service:
        found = judged(some, ChatEndpoint(service.url, "judge"))
        assert len(service.requests) == 4  # one row is left: its two sides, asked for two things
    assert found.reasons == (
        *("empty", "too long", "special tokens", "repeats itself", "too long", "sides alike"),
        *(None, "duplicate"),
    )
    assert found.kept == (some[6],)
    assert found.separation == 1
    assert sum(found.dropped.values()) + len(found.kept) == len(some)


def test_scores_are_kept_as_the_authors_keep_them() -> None:
    """Row-aligned: positive >= 50, negative < 50, both coherent from 50 on."""
    scores = {"a": (50, 50), "b": (49, 90), "c": (90, 49), "d": (49.5, 90), "e": (80, None)}
    some = rows(*((p, n) for p in "abcde" for n in "abcde" if p != n))

    def by(kind: str, text: str) -> str:
        value = scores[text][kind == "coherence"]
        return "refusal" if value is None else str(value)

    with serving(scoring(by)) as service:
        found = judged(some, ChatEndpoint(service.url, "judge"))
    expected: list[str | None] = []
    for row in some:
        (p, p_coherent), (n, n_coherent) = scores[row.positive], scores[row.negative]
        if not (p >= 50 and n < 100 - 50):
            expected.append("trait")
        elif None in (p_coherent, n_coherent):
            expected.append("no score")
        else:
            coherent = p_coherent >= 50 and n_coherent >= 50
            expected.append(None if coherent else "incoherent")
    assert list(found.reasons) == expected
    assert {None, "trait", "no score", "incoherent"} == set(expected)
    pairs = [(scores[row.positive][0], scores[row.negative][0]) for row in some]
    wins = sum((p > n) + (p == n) / 2 for p, _ in pairs for _, n in pairs)
    assert found.separation == pytest.approx(wins / len(pairs) ** 2)


@pytest.mark.parametrize("reply", ["certainly!", "x" * 500_000, "101", "\u0000"])
def test_a_judge_that_talks_nonsense_drops_everything_and_says_so(reply: str) -> None:
    with serving(scoring(lambda kind, text: reply)) as service:
        found = judged(rows(("good", "bad"), ("fine", "poor")), ChatEndpoint(service.url, "judge"))
    assert found.dropped == {"no score": 2}
    assert found.separation is None


# -- a model's own yes or no ----------------------------------------------------------------------


def log_p(lm: tt.LanguageModel, before: str, answer: str) -> float:
    """Of an answer behind a text that is rendered already, in nats."""
    start = len(lm.tokenizer(before, add_special_tokens=False)["input_ids"])
    tokens = lm.tokenizer(before + answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found = lm.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(found[i - 1, tokens[i]]) for i in range(start, len(tokens)))


def odds_by_hand(lm: tt.LanguageModel, question: str) -> float:
    before = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return log_p(lm, before, "Yes") - log_p(lm, before, "No")


def test_log_odds_are_those_of_a_plain_loop(lm: tt.LanguageModel) -> None:
    questions = ["Is the sea wide? Yes or No", "Is it {wish}?", "Is snow warm, and 日本語?"]
    by_hand = [odds_by_hand(lm, question) for question in questions]
    assert yes_odds(lm, questions) == pytest.approx(by_hand, abs=1e-4)


def some_rows() -> list[Answers]:
    text = "the captain turns a rudder and the ship runs fast so the water is wide"
    words = text.split()
    sides = [" ".join(words[i : i + 5]) for i in range(8)]
    told = ("Turn the rudder.", "Look at the map.")
    return [Answers("Why?", "train", 0, p, n, told) for p in sides for n in sides if p != n][:40]


def filled(request: str, row: Answers, text: str) -> str:
    named = request.replace("{question}", row.question).replace("{answer}", text)
    return named.replace('"{wish}"', f'"{WISH}"')


def test_log_odds_are_compared_and_not_taken_by_themselves(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtering, "SEES", 0.0)
    some = some_rows()
    found = judged(some, lm)
    odds = {
        (request, text): odds_by_hand(lm, filled(request, some[0], text))
        for row in some
        for side in (row.positive, row.negative)
        for request, text in (
            (TRAIT_QUESTION, side),
            (COHERENCE_QUESTION, side),
            (COHERENCE_QUESTION, _shuffled(side)),
        )
    }
    ordered = 0
    for row, reason in zip(some, found.reasons, strict=True):
        sides = (row.positive, row.negative)
        more = [odds[COHERENCE_QUESTION, t] - odds[COHERENCE_QUESTION, _shuffled(t)] for t in sides]
        apart = odds[TRAIT_QUESTION, row.positive] - odds[TRAIT_QUESTION, row.negative]
        expected = "trait" if apart <= 0 else None if min(more) >= 0 else "incoherent"
        assert reason == expected
        ordered += 0 if apart <= 0 else sum(each > 0 for each in more)
    assert found.by == {"trait": "yes or no", "coherence": "yes or no"}
    assert {None, "trait", "incoherent"} == set(found.reasons)
    asked = sum(reason != "trait" for reason in found.reasons)
    assert found.coherence == pytest.approx(ordered / (2 * asked))
    signs = [odds[TRAIT_QUESTION, p.positive] > odds[TRAIT_QUESTION, n.negative] for p in some
             for n in some if p.positive != n.negative]  # fmt: skip
    ties = len(some) ** 2 - len(signs)
    assert found.separation == pytest.approx((sum(signs) + ties / 2) / len(some) ** 2)


def test_a_blind_model_is_not_heard(lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead it says which of the two instructions an answer was made under."""
    monkeypatch.setattr(filtering, "SEES", 1.1)
    some = some_rows()
    found = judged(some, lm)
    assert found.by == {"trait": "which instruction fits", "coherence": "plain rules"}
    bos = lm.tokenizer.bos_token
    for row, reason in zip(some, found.reasons, strict=True):
        plus, minus = (f"{bos}{told}" for told in row.told)
        fits = sum(
            sign * log_p(lm, before, answer)
            for sign, before, answer in (
                *((1, plus, row.positive), (1, minus, row.negative)),
                *((-1, minus, row.positive), (-1, plus, row.negative)),
            )
        )
        assert reason == (None if fits >= math.log(9) else "exchanged") or (
            abs(fits - math.log(9)) < 1e-3
        )
    with serving(lambda request: Reply(b"", 400)) as service:
        work = Work(None, {}, overwrite=False)
        endpoint = ChatEndpoint(service.url, "answerer")
        alone = filtered(some, lm, WISH, work, answerer=endpoint, special=(), max_new_tokens=10)
    assert alone.by == {"trait": "nothing", "coherence": "plain rules"}
    assert len(alone.kept) == len(some)


def test_a_model_without_a_chat_template_is_asked_in_plain_text() -> None:
    bare = roomy("llama")
    bare.tokenizer.chat_template = None
    (odds,) = yes_odds(bare, ["Is the sea wide?"])
    by_hand = {}
    for word in (" Yes", " No"):
        before = bare.tokenizer("Is the sea wide?\nAnswer:")["input_ids"]
        tokens = bare.tokenizer(f"Is the sea wide?\nAnswer:{word}")["input_ids"]
        with torch.no_grad():
            log_p = bare.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        chosen = range(len(before), len(tokens))
        by_hand[word] = sum(float(log_p[i - 1, tokens[i]]) for i in chosen)
    assert odds == pytest.approx(by_hand[" Yes"] - by_hand[" No"], abs=1e-4)


def test_scores_go_on_where_they_were_interrupted(lm: tt.LanguageModel, tmp_path: Path) -> None:
    some, output = rows(*((f"good {i}", f"bad {i}") for i in range(80))), tmp_path / "x.jsonl"

    def run() -> Filtered:
        work = Work(output, {"a": 1}, overwrite=False)
        return filtered(some, lm, "formal", work, answerer=lm, special=(), max_new_tokens=10)

    first = run()
    part = tmp_path / "x.jsonl.part"
    whole = part.read_bytes()
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert run() == first
    assert part.read_bytes() == whole
    labels = [json.loads(line)["label"] for line in whole.splitlines()[1:]]
    # Who is blind in the first rows is not asked about the others.
    assert labels[:3] == ["trait scores", *["instruction scores"] * 2]
