"""Which number in an output is the answer, as the papers' authors read it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.evaluation.tasks import PROTOCOLS, TASKS
from trimtab.evaluation.tasks.task import Protocol

# -- numbers -----------------------------------------------------------------------------------

#: What a model wrote, what the authors read in it, and what trimtab does (if not the same).
SVAMP_OUTPUTS: list[tuple[str, float | None] | tuple[str, float | None, float | None]] = [
    ("8", 8),
    (" 8.", 8),
    (" 8.0\n", 8),
    ("3.75 dollars", 3.75),
    ("-3", -3),
    ("+4 degrees", 4),
    ("1,234", 234, 1234),
    ("12,345,678.5", 678.5, 12345678.5),
    ("$1,200", 200, 1200),
    ("-1,200.50", 200.5, -1200.5),
    ("between 1,000 and 2,000 km", 0, 2000),
    ("1,23", 23),  # no thousands
    ("1,2345", 2345),
    ("1234,567", 567),
    ("0,123", 123, 123),
    ("3, 4 and 5", 5),
    ("1 234", 234),
    ("15%", 15),
    ("£ 20", 20),
    ("20 €", 20),
    ("12kg", 12),
    ("3/4", 4),
    ("2 1/2", 2),
    ("8 - 3 = 5 apples", 5),
    ("8-3", -3),
    (".5", 5),
    ("5.", 5),
    ("There are 12 boys and 7 girls", 7),
    ("five", None),
    ("", None),
    (" \n", None),
    ("Answer", None),
    ("Answer: ", None),
    ("Answer: 5 apples, not 6", 5),
    ("Answer:7 or 8", 7),
    ("12\nAnswer: 13", 13),
    ("12\nAnswer: the total is 13", 12),
    ("Answer: $1,234.50 in total, or 3", 234.5, 1234.5),
    ("The answer is 9. Answers vary from 1 to 3", 9),  # a capital begins the trigger
    ("The answer is 4 of 5", 5),
    ("6\n\nQuestion: Tom has 3 pens and 5 cups.\nAnswer: 8 cups", 8),
    ("#### 42 and then 43", 42),
    ("9" * 400, None),  # what repeats itself is no number
]
MAWPS_OUTPUTS: list[tuple[str, float | None] | tuple[str, float | None, float | None]] = [
    ("2 + 4 = 6 #### 6", 6),
    ("2 + 4 = 6\n#### 6\n\nquestion: A boy had 9 pens", 6),
    ("#### 6 apples and 9 pears", 6),
    ("####6 7", 6),
    ("####\n\n-2.5", -2.5),
    ("#### 1,234", 1, 1234),
    ("#### -1,000,000.25 loaves", -1, -1000000.25),
    ("so 1,000 + 234 = 1,234", 234, 1234),
    ("#### 0.75", 0.75),
    ("#### 3/4", 3),
    ("#### 12%", 12),
    ("##### 5", 5),
    ("####6####7", 6),
    ("#### 5 #### 6", 5),
    ("3 * 6 = 18 dollars #### $18", 18),
    ("#### **8**", 8),
    ("I get 3 and 4. #### none", 4),
    ("7 is it #### so 5", 7),  # what follows one word after the trigger is not read
    ("#### = 5", None),
    ("####", None),
    ("no number here", None),
    ("5 + 6 = 11", 11),
    ("Answer: 4 of 5", 5),
    ("### 5 then 7", 7),
]
OUTPUTS = [("svamp", *row) for row in SVAMP_OUTPUTS] + [("mawps", *row) for row in MAWPS_OUTPUTS]


def read(name: str, output: str, protocol: Protocol) -> float | str | None:
    reader = TASKS[name].read
    assert reader is not None
    return reader(output, protocol)


@pytest.mark.parametrize("row", OUTPUTS, ids=lambda row: f"{row[0]}-{row[1][:30]!r}")
def test_which_number_is_the_answer(row: tuple[Any, ...]) -> None:
    name, output, paper = row[:3]
    assert read(name, output, "paper") == paper
    assert read(name, output, "trimtab") == row[-1]


def test_numbers_are_right_where_they_are_equal() -> None:
    right = TASKS["svamp"].right
    assert right(8.0, 8)
    assert not right(8.0000001, 8.0)
    assert not right(None, 0.0)


#: What outputs are made of, to find two triggers, odd spaces and numbers next to each other.
_PIECES = ["####", "#", "Answer", "Answers:", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2028"]
_PIECES += ["\x1c", "\u200b", "1", ",", "234", ".5", "-", "$", "loaf", "%", "é", "Question:"]


def same_when_stopped(name: str, output: str) -> bool:
    """Whether generation stops; the answer must be the same wherever it does.

    A token may end at any character, and bring some more than what completes the match.
    """
    stop = TASKS[name].generation.stop
    assert stop is not None
    stops = [end for end in range(len(output) + 1) if re.search(stop, output[:end])]
    for protocol in PROTOCOLS:
        whole = read(name, output, protocol)
        assert all(read(name, output[:end], protocol) == whole for end in stops)
    return bool(stops)


@pytest.mark.parametrize("name", ["svamp", "mawps"])
def test_stopping_never_changes_what_is_read(name: str) -> None:
    trigger = {"svamp": "Answer:", "mawps": "####"}[name]
    texts = [row[1] for row in OUTPUTS if len(row[1]) < 100]
    texts += [
        f"{text}{more}" for text in texts for more in (" then 77", "\n\nand 3", f" {trigger}")
    ]
    texts += [f"{before} {trigger} 5 {after}" for before in texts[:20] for after in texts[:20]]
    assert sum(same_when_stopped(name, text) for text in texts) > 300


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["svamp", "mawps"]), st.lists(st.sampled_from(_PIECES), max_size=25))
def test_stopping_never_changes_what_is_read_in_any_text(name: str, pieces: list[str]) -> None:
    same_when_stopped(name, "".join(pieces))
