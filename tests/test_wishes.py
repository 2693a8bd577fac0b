"""What is written for a trait: the grammar of wishes, instructions, questions, replies."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from helpers import refused_in_one_line
from trimtab.writing.instructions import TEMPLATES, Instructions, by_templates, new_pairs, top_up
from trimtab.writing.questions import built_in, dealt, is_question, new_questions
from trimtab.writing.replies import listed, listed_questions, score
from trimtab.writing.wishes import read_wish

ONE = "in one short sentence"
SAY = "in all that you say"


@pytest.mark.parametrize(
    ("wish", "ask", "ask_not", "who"),
    [
        # something to do, in any of its forms
        (f"answers {ONE}", f"answer {ONE}", "answer in several long paragraphs",
         f"an assistant who answers {ONE}"),
        (f" Answer  {ONE}. ", f"answer {ONE}", "answer in several long paragraphs",
         f"an assistant who answers {ONE}"),
        ("speaks formally", "speak formally", "speak casually", "an assistant who speaks formally"),
        ("never apologises", "never apologise", "always apologise",
         "an assistant who never apologises"),
        ("does not use lists", "do not use lists", "use lists",
         "an assistant who does not use lists"),
        ("do not hedge", "do not hedge", "hedge", "an assistant who does not hedge"),
        ("talks like a pirate", "talk like a pirate", "do not talk like a pirate",
         "an assistant who talks like a pirate"),
        ("answers without hedging", "answer without hedging", "answer with hedging",
         "an assistant who answers without hedging"),
        ("answering in rhyme", "keep answering in rhyme", "keep answering in plain prose",
         "an assistant known for answering in rhyme"),
        # something to be
        ("formal", f"be formal {SAY}", f"be casual {SAY}", "a formal assistant"),
        ("is honest", f"be honest {SAY}", f"be dishonest {SAY}", "an honest assistant"),
        ("calm and patient", f"be calm and patient {SAY}", f"be agitated and impatient {SAY}",
         "a calm and patient assistant"),
        ("grandfatherly", f"be grandfatherly {SAY}",
         "do not be grandfatherly in anything that you say", "a grandfatherly assistant"),
        # something to show, somebody to be, and what no rule knows
        ("joy", f"show joy {SAY}", f"show gloom {SAY}", "an assistant full of joy"),
        ("nationalism", f"show nationalism {SAY}", f"show no nationalism {SAY}",
         "an assistant full of nationalism"),
        ("a pirate", "answer as a pirate would", "answer as an ordinary assistant would",
         "a pirate"),
        ("antwortet förmlich 🙂", "let this show in every answer: antwortet förmlich 🙂",
         "let none of this show in any answer: antwortet förmlich 🙂",
         "an assistant known for this: antwortet förmlich 🙂"),
    ],
)  # fmt: skip
def test_a_wish_in_the_forms_that_instructions_need(
    wish: str, ask: str, ask_not: str, who: str
) -> None:
    found = read_wish(wish)
    assert (found.ask, found.ask_not, found.who) == (ask, ask_not, who)


def test_an_opposite_of_ones_own_is_read_as_a_wish() -> None:
    assert read_wish("talks like a pirate").guessed
    found = read_wish("talks like a pirate", "talks like a judge")
    assert (found.ask_not, found.guessed) == ("talk like a judge", False)


@pytest.mark.parametrize(
    ("wish", "says"),
    [(" . ", "the wish is empty"), ("\ud800x", "not UTF-8"), ("x" * 400, "has 400 characters")],
)
def test_what_is_no_wish(wish: str, says: str) -> None:
    refused_in_one_line(lambda: read_wish(wish), says)


def test_templates_differ_and_hold_the_wish() -> None:
    wish = read_wish("speaks formally")
    pairs = by_templates(wish, len(TEMPLATES))
    assert pairs[0] == Instructions("Speak formally.", "Speak casually.", "templates")
    assert len({text for pair in pairs for text in (pair.positive, pair.negative)}) == 16
    for pair in pairs:
        assert "speak formally" in pair.positive.lower()
        assert pair.negative == pair.positive.replace("formally", "casually")
    refused_in_one_line(lambda: by_templates(wish, 9), "8 templates for the 9 pairs")
    own = [Instructions("Be formal now.", "Be casual now.", "writer")]
    assert [pair.source for pair in top_up(own, wish, 3)] == ["writer", "templates", "templates"]


def test_pairs_of_a_writer_are_checked() -> None:
    good = {"positive": " Speak as\n a duke. ", "negative": "Speak as a sailor."}
    junk = [
        *(None, 3, "Speak as a duke.", [], {"positive": "Only one side here."}),
        {"positive": "Speak as a duke.", "negative": 7},
        {"positive": "short", "negative": "Speak as a sailor."},
        {"positive": "Speak " * 200, "negative": "Speak as a sailor."},
        {"positive": "Speak as a queen.", "negative": "speak as  a queen."},
        {"positive": "Speak as a lord.", "negative": "speak as a Duke."},  # known from the first
    ]
    assert new_pairs([good, *junk], []) == [
        Instructions("Speak as a duke.", "Speak as a sailor.", "writer")
    ]


# -- questions ------------------------------------------------------------------------------------


def test_the_built_in_questions() -> None:
    questions = built_in()
    assert Counter(one.part for one in questions) == {"train": 40, "validation": 20, "test": 20}
    texts = [one.text for one in questions]
    assert new_questions(texts, []) == texts  # all are questions, and none is like another
    assert all(one.source == "built in" for one in questions)


def test_questions_are_dealt_out_to_fixed_parts() -> None:
    for count in (1, 7, 40, 80):
        sizes = Counter(one.part for one in dealt([], count))
        assert sum(sizes.values()) == count
        assert sizes["train"] == (count + 1) // 2
        assert 0 <= sizes["validation"] - sizes["test"] <= 1
    own = [f"What is the colour of thing number {word}?" for word in ("one", "two", "three")]
    some = dealt(own, 8)
    by_text = {one.text: one for one in some}
    assert [by_text[text].part for text in own] == ["train", "validation", "train"]
    known = {one.text: one.part for one in built_in()}
    assert all(one.part == known[one.text] for one in some if one.source == "built in")
    assert Counter(one.part for one in some) == {"train": 4, "validation": 2, "test": 2}
    refused_in_one_line(lambda: dealt([], 81), "80 questions for the 81")


def test_what_is_no_new_question() -> None:
    texts = [
        *("Why is  the sky blue?", "why is the sky BLUE?", "Why is the sky so blue today?"),
        *("Tell me a story.", "Why?", f"Why {'so ' * 200}?", "なぜ空は青いのですか\uff1f"),
    ]
    assert new_questions(texts, []) == [
        *("Why is the sky blue?", "Why is the sky so blue today?"),
        "なぜ空は青いのですか\uff1f",
    ]
    assert new_questions(texts[:1], ["Why is the sky blue?"]) == []
    assert not is_question("Why is it so. ")


# -- replies --------------------------------------------------------------------------------------


def test_lists_in_replies() -> None:
    content = {"questions": ["Why?", 3, "How so?"]}
    for reply in (
        json.dumps(content),
        f"Sure! Here {{they}} are:\n```json\n{json.dumps(content, indent=2)}\n```\nAnything else?",
    ):
        assert listed(reply, "questions") == content["questions"]
        assert listed_questions(reply) == ["Why?", "How so?"]
    lines = '1. Why is it so?\n - "Who is there?",\nNo question.\n* *\n' + "\n" * 50_000
    assert listed_questions(lines) == ["Why is it so?", "Who is there?"]


@pytest.mark.parametrize(
    "reply",
    ["", "{", "{" * 200_000, '{"a":' * 100_000, "[" * 200_000, '{"questions": 4}', "null", "?" * 9],
)
def test_junk_in_replies_lists_nothing(reply: str) -> None:
    assert listed(reply, "questions") == []
    assert listed_questions(reply) == []


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        *((" 85", 85.0), ("85/100", 85.0), ("0", 0.0), ("100.", 100.0), ("72.5 or so", 72.5)),
        *(("101", None), ("1000", None), ("-5", None), ("refusal", None), ("", None)),
        *(("Score: 80", None), ("8" * 100_000, None)),
    ],
)
def test_scores_in_replies(reply: str, value: float | None) -> None:
    assert score(reply) == value
