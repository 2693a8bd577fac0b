"""How often completions show a concept: the judges, the protocol, the intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import PROMPTS, add, language_model, refused_in_one_line, steer
from services import Reply, Request, serving
from trimtab.evaluation.endpoint import ChatEndpoint
from trimtab.model import Completion
from trimtab.steering.operators import Add
from trimtab.strength import ChatConceptJudge, LexiconJudge, concept_curve, lexicon
from trimtab.writing.concepts import CONCEPTS

# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text", "shows"),
    [
        (("joy",), "What a joy!", True),
        (("joy",), "JOY", True),
        (("joy",), "joyful", False),  # a word ends where it ends
        (("joy",), "killjoy", False),
        (("joy*",), "joyful", True),
        (("joy*",), "joy", True),
        (("joy*",), "killjoy", False),  # and begins where it begins
        (("shut up",), "Oh, Shut up.", True),
        (("shut up",), "shut\nup", True),
        (("shut up",), "shut it up", False),
        (("shut up",), "shut upper", False),
        (("dear", "sir*"), "Hello, sirs", True),
        (("C++",), "I write C++ and C", True),
        (("C++",), "I write C+", False),
        (("a.b",), "axb", False),  # a word, not a pattern
        ((":)",), "well :)", True),
        (("été",), "L'ÉTÉ", True),
        (("joy",), "", False),
    ],
)
def test_a_judge_by_words(words: tuple[str, ...], text: str, shows: bool) -> None:
    assert LexiconJudge(words).labels([text, ""]) == [shows, False]


def test_a_lexicon_needs_words() -> None:
    for words in ((), ("",), ("joy", " "), ("*",)):
        refused_in_one_line(lambda words=words: LexiconJudge(words), "a lexicon needs words")
    for word in ("*joy", "j*y", "joy**"):
        refused_in_one_line(lambda word=word: LexiconJudge((word,)), "star stands at a word's end")
    assert LexiconJudge(("a", "b")).name == "lexicon of 2 words"


@pytest.mark.parametrize(
    ("concept", "shows", "not_so"),
    [
        ("apathetic", "I am indifferent to it.", "I care a lot."),
        ("depression", "Everything is hopeless.", "The day is fine."),
        ("evil", "A wicked plan!", "A good plan."),
        ("humorous", "That made me laugh.", "The report is due."),
        ("impolite", "How rude you are.", "Thank you so much."),
        ("joy", "Happiness fills me.", "The wall is grey."),
        ("lying", "I lied to you.", "I believe you."),
        ("optimistic", "I am hopeful.", "The wall is grey."),
    ],
)
def test_each_concept_of_the_paper_has_words(concept: str, shows: str, not_so: str) -> None:
    assert concept in CONCEPTS
    assert lexicon(concept).labels([shows, not_so]) == [True, False]


def test_there_are_eight_and_no_ninth() -> None:
    assert len(CONCEPTS) == 8
    for concept in CONCEPTS:
        assert len(lexicon(concept).words) > 5
    refused_in_one_line(lambda: lexicon("formal"), "no lexicon for 'formal'.*words of your own")


# -- a chat model as judge ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("1", True), ("0", False), (" 1.", True), ("**0**", False), ("1\n", True), ("(1)", True),
        ("10", None), ("yes", None), ("", None), ("Answer: 1", None), ("2", None),
        ("0 or 1", False),
    ],
)  # fmt: skip
def test_answers_of_a_chat_judge(tmp_path: Path, answer: str, label: bool | None) -> None:
    def script(request: Request) -> Reply:
        return Reply({"choices": [{"message": {"role": "assistant", "content": answer}}]})

    with serving(script) as service:
        chat = ChatEndpoint(f"{service.url}/v1", "judge", "", max_tokens=4, cache=tmp_path)
        judge = ChatConceptJudge(chat, "joy")
        assert judge.labels(["It is a fine day"]) == [label]
        (request,) = service.requests
    system, user = request.content["messages"]
    assert system == {
        "role": "system",
        "content": "You are a classifier. Answer strictly with 1 or 0.",
    }
    assert "It is a fine day" in user["content"]
    assert '"joy"' in user["content"]
    assert request.content["max_tokens"] == 4
    assert request.content["temperature"] == 0
    assert judge.name == f"judge at {service.url}/v1 on joy"


# -- the protocol ---------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A judge that remembers what it was shown, and says what it is told to."""

    answers: Any  # of the text's place
    seen: list[str] = field(default_factory=list)
    name: str = "scripted"

    def labels(self, texts: Sequence[str]) -> list[bool | None]:
        self.seen = list(texts)
        return [self.answers(i) for i in range(len(texts))]


def made(lm: tt.LanguageModel) -> tt.Steering:
    return steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size, 1, 1.0)))


def wilson(ones: int, n: int) -> tuple[float, float]:
    z, p = 1.959964, ones / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def test_each_completion_has_a_label_of_its_own() -> None:
    lm = language_model("llama")
    judge = Scripted(lambda i: i % 12 < (3, 9, 0)[i // 12])
    found = concept_curve(
        lm, made(lm), PROMPTS, judge, [0.5, -1.0, 2.5], samples=4, max_new_tokens=5, chat=False
    )
    assert found.dials.tolist() == [-1.0, 0.5, 2.5]
    assert len(judge.seen) == 3 * 3 * 4
    assert found.probability.tolist() == [3 / 12, 9 / 12, 0.0]
    assert found.n.tolist() == [12, 12, 12]
    assert found.unclear == 0
    for place, ones in enumerate((3, 9, 0)):
        low, high = wilson(ones, 12)
        assert float(found.low[place]) == pytest.approx(low, abs=1e-6)
        assert float(found.high[place]) == pytest.approx(high, abs=1e-6)
    assert [text["text"] for text in found.texts] == judge.seen
    assert [text["dial"] for text in found.texts[::12]] == [-1.0, 0.5, 2.5]
    assert [text["prompt"] for text in found.texts[:12]] == [p for p in PROMPTS for _ in range(4)]
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["dials"] == [-1.0, 0.5, 2.5]
    assert document["probability"] == [0.25, 0.75, 0.0]
    assert document["ci95"][1] == [float(found.low[1]), float(found.high[1])]
    assert document["judge"] == "scripted"


def test_dials_stay_what_they_were() -> None:
    lm = language_model("llama")
    judge = Scripted(lambda i: i % 3 == 0)
    found = concept_curve(
        lm, made(lm), PROMPTS[:1], judge, [0.1], samples=3, max_new_tokens=2, chat=False
    )
    assert found.as_json()["dials"] == [0.1]  # not 0.10000000149011612
    assert found.as_json()["probability"] == [1 / 3]


def test_one_label_for_all_samples_of_a_prompt() -> None:
    lm = language_model("llama")
    judge = Scripted(lambda i: i % 3 == 0)
    options: Any = {"samples": 4, "chat": False, "seed": 3}
    found = concept_curve(
        lm, made(lm), PROMPTS, judge, [-1.0, 1.0], max_new_tokens=200, any_of=True, **options
    )
    assert len(judge.seen) == 2 * 3
    assert found.n.tolist() == [3, 3]
    assert found.probability.tolist() == [1 / 3, 1 / 3]
    assert found.any_of
    # Four texts of a prompt, no more than 800 characters of each.
    whole = [text["text"] for text in found.texts]
    assert max(len(text) for text in whole) > 800 or all(len(text) <= 800 for text in whole)
    for place, shown in enumerate(judge.seen):
        own = whole[4 * place : 4 * place + 4]
        assert shown == "\n\n".join(text[:800] for text in own)


def test_long_texts_are_cut_for_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")

    def generate(prompts: Sequence[Any], **options: Any) -> list[Any]:
        texts = [f"{i}" * 1000 for i in range(len(prompts))]
        return [Completion(prompts[0], text, (), ()) for text in texts]

    monkeypatch.setattr(lm, "generate", generate)
    judge = Scripted(lambda i: True)
    concept_curve(lm, made(lm), ["Hi"], judge, [1.0], samples=2, any_of=True)
    assert judge.seen == ["0" * 800 + "\n\n" + "1" * 800]
    concept_curve(lm, made(lm), ["Hi"], judge, [1.0], samples=2)
    assert judge.seen == ["0" * 1000, "1" * 1000]


def test_unclear_labels_are_counted_and_left_out() -> None:
    lm = language_model("llama")
    judge = Scripted(lambda i: None if i in (0, 1, 7) else i % 2 == 0)
    found = concept_curve(
        lm, made(lm), PROMPTS[:1], judge, [-1.0, 1.0], samples=6, max_new_tokens=2, chat=False
    )
    # First dial: 2..5 of which 2 and 4 are yes. Second: 6, 8, 9, 10, 11 without 7.
    assert found.n.tolist() == [4, 5]
    assert found.probability.tolist() == [2 / 4, 3 / 5]
    assert found.unclear == 3
    silent = Scripted(lambda i: None if i >= 6 else True)
    refused_in_one_line(
        lambda: concept_curve(
            lm, made(lm), PROMPTS[:1], silent, [-1.0, 1.0], samples=6, max_new_tokens=2, chat=False
        ),
        "scripted gave no label at alpha = 1",
    )


def test_sampling_repeats_by_its_seed_and_is_steered() -> None:
    lm = language_model("llama")
    options: Any = {"samples": 5, "max_new_tokens": 6, "chat": False}

    def texts(seed: int, steering: tt.Steering, dials: list[float]) -> list[str]:
        judge = Scripted(lambda i: True)
        concept_curve(lm, steering, PROMPTS[:2], judge, dials, seed=seed, **options)
        return judge.seen

    steering = made(lm)
    assert texts(1, steering, [0.0, 9.0]) == texts(1, steering, [0.0, 9.0])
    assert texts(1, steering, [0.0, 9.0]) != texts(2, steering, [0.0, 9.0])
    assert len(set(texts(1, steering, [0.0]))) > 5  # samples differ
    # Far out a dial writes what a plain steered generate writes there.
    lots = texts(4, steering, [50.0])
    plain = lm.generate(
        [prompt for prompt in PROMPTS[:2] for _ in range(5)],
        steering=replace(steering, value=50.0),
        max_new_tokens=6, temperature=0.9, top_k=50, top_p=0.95, chat=False, seed=4, batch_size=32,
    )  # fmt: skip
    assert lots == [completion.text for completion in plain]


def test_greedy_texts_of_a_dial_are_plain_generates() -> None:
    lm = language_model("llama")
    options: Any = {"max_new_tokens": 6, "chat": False, "temperature": 0}
    judge = Scripted(lambda i: True)
    concept_curve(lm, made(lm), PROMPTS[:2], judge, [0.0], samples=2, **options)
    plain = [one.text for one in lm.generate(PROMPTS[:2], **options)]
    assert judge.seen == [text for text in plain for _ in range(2)]


def test_the_judge_sees_the_steering_work() -> None:
    """A vector that makes one token almost sure, found by a judge by words."""
    lm = language_model("llama")
    token = lm.tokenizer(" day", add_special_tokens=False).input_ids[0]
    v = lm.model.lm_head.weight[token].detach().clone()
    steering = steer(lm, ("layers.2.resid", Add(v / v.norm())))
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(1.0)
        lm.model.lm_head.weight.mul_(4)
    word = lm.tokenizer.decode([token]).strip()
    found = concept_curve(
        lm, steering, PROMPTS, LexiconJudge((f"{word}*",)), [0.0, 200.0], samples=10,
        max_new_tokens=4, chat=False,
    )  # fmt: skip
    assert found.probability[0] < 0.5
    assert found.probability[1] > 0.8
    assert found.judge == "lexicon of 1 words"


def test_bad_input_of_a_concept_curve() -> None:
    lm = language_model("llama")
    judge = Scripted(lambda i: True)
    for options, says in (
        ({"prompts": []}, "needs prompts, dials and 1 sample"),
        ({"dials": []}, "needs prompts, dials and 1 sample"),
        ({"samples": 0}, "needs prompts, dials and 1 sample"),
        ({"dials": [math.nan]}, "finite numbers"),
        ({"temperature": math.inf}, "temperature"),
        ({"max_new_tokens": 0}, "1 or more"),
    ):
        given: Any = {"prompts": PROMPTS, "judge": judge, "dials": [1.0]} | options
        refused_in_one_line(
            lambda given=given: concept_curve(lm, made(lm), chat=False, **given), says
        )
    foreign = replace(made(lm), model=replace(lm.identity, digest="0" * 64))
    refused_in_one_line(
        lambda: concept_curve(lm, foreign, PROMPTS, judge, [1.0], samples=1, max_new_tokens=1),
        "fit one for this model",
    )
