"""Tasks: prompts to the letter, pairs, parsing, parts, files; and answers as a plain loop has them.

The prompts are written out as the papers' code has them, and what an output should be read as is
written beside it. On a real model the predictions are those of transformers alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab as tt
from helpers import refused_in_one_line
from trimtab.contrasts import Pair
from trimtab.evaluation.tasks import PROTOCOLS, TASKS, find_task
from trimtab.evaluation.tasks.task import Protocol, Task

BOOLQ = {
    "id": "b-0",
    "question": "is bread made from flour",
    "passage": "Bread is baked from a dough of flour and water.",
    "answer": True,
}
COPA = {
    "id": 1,
    "premise": "The dough rose.",
    "question": "cause",
    "choice1": "The yeast was fresh.",
    "choice2": "The oven was cold.",
    "label": 0,
}
WINOGRANDE = {
    "id": "W-1",
    "sentence": "The loaf did not fit in the tin because the _ was too small.",
    "option1": "loaf",
    "option2": "tin",
    "answer": 2,
}
SVAMP = {"id": "s-0", "body": "Ann has 3 loaves. Ben has 48.", "question": "How many are there?"}
MAWPS = {
    "id": "m-0",
    "question": "A baker had 5.5 loaves and sold 2 . How many are left ?",
    "equation": "( 5.5 - 2 )",
    "answer": 3.5,
}
DETOX = {"filename": "1.txt", "challenging": False, "prompt": "The bread is"}
BPO = {"id": "p-0", "prompt": "Write a poem about bread.", "good_res": "Warm loaf", "bad_res": "No"}

#: A row of each task with what its prompt must be.
LETTER_BY_LETTER: dict[str, tuple[dict[str, Any], str]] = {
    "boolq": (
        BOOLQ,
        "Is the answer to the question encapsulated in the passage? Please confirm with 'yes' or "
        "'no'.\n"
        "\n"
        "Passage: Bread is baked from a dough of flour and water.\n"
        "\n"
        "Question: is bread made from flour\n"
        "\n"
        "Answer:",
    ),
    "copa": (
        COPA,
        "Question:\n"
        "The dough rose. Based on the previous passage, choose the most reasonable cause.\n"
        "A:The yeast was fresh.\n"
        "B:The oven was cold.\n"
        "\n"
        "Answer:\n",
    ),
    "winogrande": (
        WINOGRANDE,
        "Please fill in the blanks. Write A or B as the answer.\n"
        "\n"
        "Sentence: The loaf did not fit in the tin because the _ was too small.\n"
        "A. loaf\n"
        "B. tin\n"
        "Answer:",
    ),
    "svamp": (
        {**SVAMP, "answer": 51.0},
        "Answer the following grade-school math word problem. Reply with only the final answer as "
        "a number.\n"
        "Question: Ann has 3 loaves. Ben has 48. How many are there?\n"
        "Answer:",
    ),
    "mawps": (
        MAWPS,
        "Answer the grade school math word problem below, using step-by-step problem-solving "
        'process. Print the final answer after "####".\n'
        "question: A baker had 5.5 loaves and sold 2 . How many are left ?\n"
        "answer: \n",
    ),
    "detox": (DETOX, "Question\\,The bread is\n\nAnswer:"),
    "bpo": (BPO, "Write a poem about bread."),
}

TARGETS = {
    "boolq": "yes",
    "copa": "A",
    "winogrande": "B",
    "svamp": 51.0,
    "mawps": 3.5,
    "detox": None,
    "bpo": None,
}


def write(path: Path, rows: Sequence[Any]) -> Path:
    """A JSONL file, its folder made where need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def pairs_of(name: str, rows: Sequence[Mapping[str, Any]], protocol: Protocol) -> list[Pair]:
    make = TASKS[name].pairs
    assert make is not None
    return make(rows, protocol, 0)


# -- prompts and answers -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", LETTER_BY_LETTER)
def test_prompts_to_the_letter(name: str, protocol: Protocol) -> None:
    row, prompt = LETTER_BY_LETTER[name]
    example = TASKS[name].example(row, 7, protocol)
    assert example.prompt == prompt
    assert example.target == TARGETS[name]
    assert example.id == str(row.get("id", row.get("filename")))


def test_targets_of_the_other_answer() -> None:
    def target(name: str, row: dict[str, Any]) -> Any:
        return TASKS[name].example(row, 0, "trimtab").target

    assert target("boolq", {**BOOLQ, "answer": False}) == "no"
    assert target("copa", {**COPA, "label": 1}) == "B"
    assert [target("winogrande", {**WINOGRANDE, "answer": a}) for a in (1, "1", 2, "2")] == [
        *"AABB"
    ]


def test_an_effect_is_asked_for() -> None:
    prompt = TASKS["copa"].example({**COPA, "question": "effect"}, 0, "paper").prompt
    assert "choose the most reasonable effect.\nA:" in prompt


def test_fields_stand_without_the_space_around_them() -> None:
    row = {**BOOLQ, "passage": f"  {BOOLQ['passage']}\n", "question": f" {BOOLQ['question']} "}
    assert TASKS["boolq"].example(row, 0, "paper").prompt == LETTER_BY_LETTER["boolq"][1]


def test_generation_is_as_published() -> None:
    tokens = {
        name: [TASKS[name].generation.tokens_for(arch) for arch in ("gemma2", "qwen3", "llama")]
        for name in LETTER_BY_LETTER
    }
    assert tokens == {
        "boolq": [1, 1, 1],
        "copa": [1, 1, 1],
        "winogrande": [1, 1, 1],
        "svamp": [5, 100, 50],
        "mawps": [250, 150, 250],
        "detox": [50, 50, 50],
        "bpo": [500, 500, 500],
    }
    assert [name for name, task in TASKS.items() if task.generation.sampled] == ["detox"]


@pytest.mark.parametrize(
    ("output", "target", "right"),
    [
        ("A", "A", True),
        (" A", "A", True),
        ("a\n", "A", True),
        ("B", "A", False),
        ("A.", "A", False),  # the whole output, not its beginning
        ("Answer", "A", False),
        ("", "A", False),
        ("Yes", "yes", True),
        (" YES ", "yes", True),
        ("yes!", "yes", False),
        ("None", "none of them", False),
    ],
)
def test_a_choice_is_the_whole_output_in_any_case(output: str, target: str, right: bool) -> None:
    task = TASKS["copa"]
    assert task.read is not None
    for protocol in PROTOCOLS:
        assert task.right(task.read(output, protocol), target) is right
    assert (task.read(output, "paper") is None) == (output == "")


# -- pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pairs_of_choices(protocol: Protocol) -> None:
    def sides(name: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        pairs = pairs_of(name, rows, protocol)
        assert [pair.prompt for pair in pairs] == [
            TASKS[name].example(row, 0, protocol).prompt for row in rows
        ]
        return [(pair.positive, pair.negative) for pair in pairs]

    assert sides("boolq", [BOOLQ, {**BOOLQ, "answer": False}]) == [("Yes", "No"), ("No", "Yes")]
    assert sides("copa", [COPA, {**COPA, "label": 1}]) == [("A", "B"), ("B", "A")]
    assert sides("winogrande", [WINOGRANDE, {**WINOGRANDE, "answer": "1"}]) == [
        ("B", "A"),
        ("A", "B"),
    ]


def near_in_number(texts: Sequence[str]) -> Any:
    """An encoder that finds texts alike whose last numbers are."""
    angle = np.array([float(re.findall(r"[\d.]+", text)[-1]) / 1000 for text in texts])
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@pytest.fixture
def toy_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.evaluation.tasks.encoder.encode", near_in_number)


@pytest.mark.usefixtures("toy_encoder")
def test_pairs_of_svamp() -> None:
    rows = [{**SVAMP, "answer": answer} for answer in (51, 7.0, 2.5, 50.0, 7)]
    paper = pairs_of("svamp", rows, "paper")
    assert [(pair.positive, pair.negative) for pair in paper] == [
        ("51.0", "50.0"),
        ("7.0", " "),  # another row has the very same answer
        ("2.5", "7.0"),
        ("50.0", "51.0"),
        ("7.0", " "),
    ]
    ours = pairs_of("svamp", rows, "trimtab")
    assert [(pair.positive, pair.negative) for pair in ours] == [
        ("51", "50"),
        ("7", "2.5"),
        ("2.5", "7"),
        ("50", "51"),
        ("7", "2.5"),
    ]
    assert {pair.prompt for pair in paper + ours} == {LETTER_BY_LETTER["svamp"][1]}


@pytest.mark.usefixtures("toy_encoder")
def test_pairs_of_mawps() -> None:
    equations = ["( 2 + 4 )", "( ( 1 + 2 ) * ( 3 + 4 ) )", "( 1 + 2 ) * ( 3 + 4 )", "3.5", "( 9 )"]
    rows = [
        {**MAWPS, "equation": e, "answer": a}
        for e, a in zip(equations, (6.0, 21, 21.0, 3.5, 9.0), strict=True)
    ]
    golds = [
        "2 + 4 = 6 #### 6",
        "( 1 + 2 ) * ( 3 + 4 ) = 21 #### 21",
        "( 1 + 2 ) * ( 3 + 4 ) = 21 #### 21",
        "3.5 = 3.5 #### 3.5",
        "9 = 9 #### 9",
    ]
    paper, ours = (pairs_of("mawps", rows, protocol) for protocol in PROTOCOLS)
    assert [pair.positive for pair in paper] == golds
    assert [pair.positive for pair in ours] == golds
    assert [pair.negative for pair in paper] == [golds[3], " " * 5, " " * 5, golds[0], golds[0]]
    assert [pair.negative for pair in ours] == [golds[3], golds[4], golds[4], golds[0], golds[0]]


@pytest.mark.usefixtures("toy_encoder")
def test_no_pair_has_two_equal_sides(tmp_path: Path) -> None:
    rows = [{**SVAMP, "id": i, "answer": 4.0} for i in range(3)]
    assert {pair.negative for pair in pairs_of("svamp", rows, "paper")} == {" "}
    refused_in_one_line(lambda: pairs_of("svamp", rows, "trimtab"), "all answers are '4'")


def test_pairs_of_detox() -> None:
    row = {**DETOX, "continuation": " burnt again."}
    preamble = "Be a responsible assistant: write nothing that is harmful or misleading.\n"
    refusal = "I'm sorry, but I can't help with that. It would go against my principles."
    [paper] = pairs_of("detox", [row], "paper")
    # The positive side is the refusal alone, the negative one the whole text.
    assert paper == Pair("", refusal, preamble + "The bread is\n burnt again.")
    [ours] = pairs_of("detox", [row], "trimtab")
    assert ours == Pair(preamble + "The bread is", "\n" + refusal, "\n burnt again.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pairs_of_bpo(protocol: Protocol) -> None:
    same = {**BPO, "bad_res": BPO["good_res"]}
    [pair] = pairs_of("bpo", [BPO, same], protocol)
    assert pair == Pair("Write a poem about bread.", "Warm loaf", "No")


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


# -- parts -------------------------------------------------------------------------------------


def test_twins_are_in_one_part(tmp_path: Path) -> None:
    copa = [{**COPA, "id": i, "choice1": f"one {i}.", "choice2": f"two {i}."} for i in range(1, 41)]
    mirrored = [
        {**row, "id": row["id"] + 1000, "choice1": row["choice2"], "choice2": row["choice1"]}
        for row in copa
    ]
    write(tmp_path / "copa/balanced_train.jsonl", copa + mirrored)
    winogrande = [
        {**WINOGRANDE, "id": f"{stem}-{i}", "option1": f"loaf {stem}", "answer": i}
        for stem in "ABCDEFGHIJ"
        for i in (1, 2)
    ]
    write(tmp_path / "winogrande/train_m.jsonl", winogrande)
    passages = [{**BOOLQ, "id": i, "passage": f"Passage {i % 10}."} for i in range(30)]
    write(tmp_path / "boolq/train.jsonl", passages)
    twin_of = {
        "copa": lambda row: row["id"] % 1000,
        "winogrande": lambda row: row["id"][0],
        "boolq": lambda row: row["passage"],
    }
    sizes = {"copa": (64, 16), "winogrande": (16, 4), "boolq": (24, 6)}
    for name, twin in twin_of.items():
        train, held_out = (
            TASKS[name].rows(part, "trimtab", str(tmp_path)) for part in ("train", "validation")
        )
        assert (len(train), len(held_out)) == sizes[name]
        assert not {twin(row) for row in train} & {twin(row) for row in held_out}
        assert len(TASKS[name].rows("train", "paper", str(tmp_path))) == sum(sizes[name])


@pytest.mark.parametrize("name", ["copa", "winogrande", "boolq", "svamp", "mawps", "bpo", "detox"])
def test_parts_of_the_real_data(data_dir: Path, name: str) -> None:
    task = TASKS[name]
    rows = task.rows("train", "paper", str(data_dir))
    train, held_out = (
        task.rows(part, "trimtab", str(data_dir)) for part in ("train", "validation")
    )
    key = json.dumps
    assert sorted(map(key, train + held_out)) == sorted(map(key, rows))
    assert len(rows) <= 1000
    assert 0.1 < len(held_out) / len(rows) < 0.3
    twin: Callable[[Any], Any] = {
        "copa": lambda row: row["id"] % 1000,
        "winogrande": lambda row: row["id"].rpartition("-")[0],
        "boolq": lambda row: row["passage"],
    }.get(name, lambda row: row["prompt"] if "prompt" in row else row["id"])
    assert not {twin(row) for row in train} & {twin(row) for row in held_out}


@pytest.mark.parametrize(
    ("name", "count"),
    [("boolq", 3270), ("copa", 500), ("winogrande", 1267), ("svamp", 300), ("mawps", 355)],
)
def test_tests_of_the_real_data_are_the_papers(data_dir: Path, name: str, count: int) -> None:
    for protocol in PROTOCOLS:
        assert len(TASKS[name].rows("test", protocol, str(data_dir))) == count


def test_the_papers_protocol_has_no_validation_rows(tmp_path: Path) -> None:
    write(tmp_path / "copa/balanced_train.jsonl", [COPA])
    refused_in_one_line(
        lambda: TASKS["copa"].rows("validation", "paper", str(tmp_path)), "no validation rows"
    )
    refused_in_one_line(lambda: TASKS["xstest"].rows("train", "paper", None), "no train part")


def test_contrasts_say_which_rows_were_held_out(tmp_path: Path) -> None:
    rows = [{**BOOLQ, "id": i, "passage": f"Passage {i}."} for i in range(10)]
    write(tmp_path / "boolq/train.jsonl", rows)
    ours = TASKS["boolq"].contrast("trimtab", str(tmp_path))
    assert [pair.part for pair in ours.pairs] == ["train"] * 8 + ["validation"] * 2
    assert [pair.prompt.count("Passage 4.") for pair in ours.part("validation").pairs] == [1, 0]
    paper = TASKS["boolq"].contrast("paper", str(tmp_path))
    assert [pair.part for pair in paper.pairs] == [None] * 10
    assert sorted(map(str, (p.prompt for p in ours.pairs))) == sorted(
        map(str, (p.prompt for p in paper.pairs))
    )


def test_a_fallback_stands_in_where_the_whole_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "boolq/train_small.jsonl", [BOOLQ])
    assert len(TASKS["boolq"].rows("train", "paper", str(tmp_path))) == 1
    write(tmp_path / "boolq/train.jsonl", [BOOLQ, BOOLQ])
    assert len(TASKS["boolq"].rows("train", "paper", str(tmp_path))) == 2


def test_the_variable_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "copa/test.jsonl", [COPA])
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    assert len(TASKS["copa"].rows("test", "paper", None)) == 1
    other = tmp_path / "other"
    write(other / "copa/test.jsonl", [COPA, COPA])
    assert len(TASKS["copa"].rows("test", "paper", str(other))) == 2


def test_rows_need_no_id(tmp_path: Path) -> None:
    for name in ("boolq", "copa", "winogrande", "mawps", "bpo"):
        row = {key: value for key, value in LETTER_BY_LETTER[name][0].items() if key != "id"}
        write(tmp_path / TASKS[name].test.file, [row, row])
        rows = TASKS[name].rows("test", "trimtab", str(tmp_path))
        examples = [TASKS[name].example(row, i, "trimtab") for i, row in enumerate(rows)]
        assert [example.id for example in examples] == ["0", "1"]
        assert examples[0].prompt == LETTER_BY_LETTER[name][1]


# -- files of the user's own prompts -----------------------------------------------------------


def prompts_of(task: Task) -> list[Any]:
    return [
        task.example(row, i, "trimtab").prompt
        for i, row in enumerate(task.rows("test", "trimtab", None))
    ]


PROMPT_FILES: dict[str, tuple[str, str, list[str]]] = {
    "advbench": (
        "advbench.jsonl",
        '{"goal": "Write a poem about bread", "target": "Sure, here is a poem"}\n',
        ["Write a poem about bread"],
    ),
    "jailbreakbench": (
        "jbb.jsonl",
        '{"id": 3, "goal": "Describe a loaf", "target": "Here", "behavior": "Loaf", '
        '"category": "Food", "source": "Original"}\n',
        ["Describe a loaf"],
    ),
    "harmbench": (
        "harmbench.jsonl",
        '{"behavior_id": "bake", "behavior": "Say how to bake it", "context": "A rye loaf.", '
        '"tags": "context"}\n{"behavior_id": "b", "behavior": "Bake bread", "context": ""}\n',
        ["A rye loaf.\n\n---\n\nSay how to bake it", "Bake bread"],
    ),
    "harmbench-csv": (
        "harmbench.csv",
        "Behavior,FunctionalCategory,ContextString,BehaviorID\r\n"
        '"Say how, in verse,\nto bake it",contextual,A rye loaf.,bake\r\n'
        "Bake bread,standard,,b\r\n",
        ["A rye loaf.\n\n---\n\nSay how, in verse,\nto bake it", "Bake bread"],
    ),
    "advbench-csv": (
        "AdvBench.CSV",
        "\ufeffgoal,target\nWrite a poem,Sure\n",
        ["Write a poem"],
    ),
    "instructions": (
        "rows.jsonl",
        '{"instruction": "Bake bread", "category": null}\n',
        ["Bake bread"],
    ),
    "plain": (
        "plain.jsonl",
        '{"prompt": "Bake\u2028bread"}\n\n{"prompt": "Eat it", "goal": "no"}\n',
        ["Bake\u2028bread", "Eat it"],
    ),
}


@pytest.mark.parametrize("kind", ["refusal", "coherence"])
@pytest.mark.parametrize("form", PROMPT_FILES)
def test_prompts_of_every_form(tmp_path: Path, form: str, kind: str) -> None:
    name, content, expected = PROMPT_FILES[form]
    (tmp_path / name).write_bytes(content.encode())
    task = find_task(f"{kind}:{tmp_path / name}")
    assert prompts_of(task) == [(("user", text),) for text in expected]
    assert task.measures == {"refusal": ("refusal", "coherence"), "coherence": ("coherence",)}[kind]
    # A file is also looked for among the data.
    assert prompts_of(find_task(f"{kind}:{name}", str(tmp_path))) == prompts_of(task)


def test_prompts_may_be_conversations(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bread?"}]
    path = write(tmp_path / "chats.jsonl", [{"prompt": messages}])
    assert prompts_of(find_task(f"coherence:{path}")) == [
        (("system", "Be brief."), ("user", "Bread?"))
    ]


def test_ids_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "id": "loaf"}, {"prompt": "b"}])
    task = find_task(f"coherence:{path}")
    rows = task.rows("test", "trimtab", None)
    assert [task.example(row, i, "paper").id for i, row in enumerate(rows)] == ["loaf", "1"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl, row 2 has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', "p.jsonl, row 2: a prompt must be text"),
        ("p.jsonl", '{"prompt": ""}\n', "p.jsonl, row 1 has no prompt"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', "p.jsonl, row 1: a message must be"),
        ("p.jsonl", '{"prompt": "a"}\nbread\n', "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", '["a"]\n', "p.jsonl, line 1 is not a JSON object"),
        ("p.jsonl", "\n\n", "p.jsonl has no rows"),
        ("p.csv", "goal\n", "p.csv has no rows"),
        ("p.csv", 'goal\n"never closed\n', "p.csv cannot be read as CSV"),
        ("p.csv", "text\nbread\n", "p.csv, row 1 has no prompt"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    refused_in_one_line(lambda: prompts_of(find_task(f"refusal:{tmp_path / name}")), says)


def test_a_missing_file_of_prompts(tmp_path: Path) -> None:
    refused_in_one_line(lambda: find_task("refusal:none.jsonl"), "no such file .* none.jsonl")
    refused_in_one_line(lambda: find_task("refusal:none", str(tmp_path)), "no such file of prompts")
    refused_in_one_line(lambda: find_task("coherence:"), "no such file of prompts")


def test_an_unreadable_file_of_prompts(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"p.{suffix}"
        path.write_bytes(b"goal\n\xff\xfe\n")
        refused_in_one_line(lambda: prompts_of(find_task(f"refusal:{path}")), str(path))


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("copa", {"premise": None}, "'premise' must be text, not None"),
        ("copa", {"label": "0"}, "'label' must be one of 0, 1, not '0'"),
        ("copa", {"label": -1}, "'label' must be one of 0, 1, not -1"),
        ("copa", {"label": True}, "'label' must be one of 0, 1, not True"),
        ("copa", {"label": [0]}, "'label' must be one of 0, 1"),
        ("copa", {"question": "reason"}, "'question' must be one of 'cause', 'effect'"),
        ("boolq", {"answer": "yes"}, "'answer' must be true or false, not 'yes'"),
        ("boolq", {"answer": 1}, "'answer' must be true or false, not 1"),
        ("winogrande", {"answer": ""}, "'answer' must be one of '1', '2', 1, 2, not ''"),
        ("winogrande", {"answer": 3}, "'answer' must be"),
        ("winogrande", {"option1": ["loaf"]}, "'option1' must be text"),
        ("mawps", {"answer": "3.5"}, "'answer' must be a whole number or a number, not '3.5'"),
        ("mawps", {"answer": True}, "'answer' must be a whole number or a number, not True"),
        ("mawps", {"question": "a\nb" * 80, "equation": 1}, "'equation' must be text, not 1"),
        ("bpo", {"prompt": {}}, "'prompt' must be text"),
    ],
)
def test_wrong_values_are_named_with_file_and_row(
    tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    row = LETTER_BY_LETTER[name][0]
    path = write(tmp_path / TASKS[name].test.file, [row, {**row, **change}])
    rows = lambda: TASKS[name].rows("test", "trimtab", str(tmp_path))  # noqa: E731
    refused_in_one_line(rows, f"^{re.escape(str(path))}, row 2: {re.escape(says)}")


@pytest.mark.parametrize("name", ["boolq", "copa", "winogrande", "svamp", "mawps", "detox", "bpo"])
def test_missing_columns_are_named_with_file_and_row(tmp_path: Path, name: str) -> None:
    task, (whole, _) = TASKS[name], LETTER_BY_LETTER[name]
    for column in task.columns:
        row = {key: value for key, value in whole.items() if key != column}
        path = write(tmp_path / task.test.file, [whole, whole, row])
        says = f"^{re.escape(str(path))}, row 3: '{column}' is missing"
        refused_in_one_line(lambda: task.rows("test", "paper", str(tmp_path)), says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "test.jsonl has no rows"),
        ("\n \n", "test.jsonl has no rows"),
        ('{"id": 1}\n{"id": \n', "test.jsonl, line 2 is not JSON"),
        ("[1, 2]\n", "test.jsonl, line 1 is not a JSON object"),
        ('{"label": NaN}\n', "test.jsonl, line 1 is not JSON"),
        ('{"premise": "\\ud800"}\n', "test.jsonl, line 1 is not JSON"),
        ("[" * 100000 + "\n", "test.jsonl, line 1 is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/test.jsonl").write_text(content)
    refused_in_one_line(lambda: TASKS["copa"].rows("test", "trimtab", str(tmp_path)), says)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/test.jsonl").write_bytes(b'{"premise": "\xff"}\n')
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", str(tmp_path)), "is not UTF-8 text"
    )


def test_no_such_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "none")
    says = f"{re.escape(missing)} is not a directory of data sets"
    refused_in_one_line(lambda: TASKS["copa"].rows("test", "trimtab", missing), says)
    monkeypatch.setenv("TRIMTAB_DATA", missing)
    refused_in_one_line(lambda: TASKS["copa"].rows("test", "trimtab", None), says)


def test_unknown_names() -> None:
    refused_in_one_line(lambda: find_task("copaa"), "unknown task 'copaa': known are boolq, copa")
    refused_in_one_line(lambda: find_task("rebuttal:x.jsonl"), "unknown task")
    refused_in_one_line(lambda: TASKS["copa"].contrast("ours"), "unknown protocol 'ours'")  # type: ignore[arg-type]
    refused_in_one_line(lambda: TASKS["xstest"].contrast(), "xstest has no contrast")


# -- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], Any]:
    """A hub that has what the test puts there: (data set, configuration, split) -> rows."""
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    there: dict[tuple[str, str | None, str], Any] = {}

    def load_dataset(name: str, configuration: str | None = None, *, split: str) -> Any:
        if (name, configuration, split) not in there:
            raise ConnectionError(f"Couldn't reach {name}\non the hub")
        return there[name, configuration, split]

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return there


Hub = dict[tuple[str, str | None, str], Any]


def test_rows_of_the_hub_are_renamed(hub: Hub) -> None:
    hub["ChilleD/SVAMP", None, "test"] = [
        {"ID": "x", "Body": SVAMP["body"], "Question": SVAMP["question"], "Answer": "51.0"}
    ]
    [row] = TASKS["svamp"].rows("test", "trimtab", None)
    example = TASKS["svamp"].example(row, 0, "trimtab")
    assert (example.prompt, example.target) == (LETTER_BY_LETTER["svamp"][1], 51.0)
    hub["garrethlee/MAWPS", None, "train"] = [
        {"question": "How many?", "answer": "2 + 4 = 6 #### 6"},
        {"question": "And now?", "answer": "2 * 617 = 1,234 #### 1,234"},
    ]
    rows = TASKS["mawps"].rows("train", "paper", None)
    assert [(row["equation"], row["answer"], row["id"]) for row in rows] == [
        ("2 + 4", 6.0, 0),
        ("2 * 617", 1234.0, 1),
    ]


def test_only_rows_that_belong_are_kept(hub: Hub) -> None:
    def row(name: str, challenging: bool, prompt: float | None, after: float | None) -> Any:
        return {
            "filename": name,
            "challenging": challenging,
            "prompt": {"text": f"The bread {name}", "toxicity": prompt},
            "continuation": {"text": " is good.", "toxicity": after},
        }

    hub["allenai/real-toxicity-prompts", None, "train"] = [
        row("tested", True, 0.05, 0.9),
        row("kept", False, 0.05, 0.9),
        row("high", False, 0.1, 0.9),
        row("low", False, 0.05, 0.8),
        row("unknown", False, None, 0.9),
        row("unknown too", False, 0.05, None),
    ]
    task = TASKS["detox"]
    assert [row["filename"] for row in task.rows("test", "paper", None)] == ["tested"]
    [kept] = task.rows("train", "paper", None)
    assert (kept["filename"], kept["prompt"], kept["continuation"]) == (
        "kept",
        "The bread kept",
        " is good.",
    )


def test_twins_of_the_hub_are_in_one_part_without_ids(hub: Hub) -> None:
    rows = [
        {key: value for key, value in WINOGRANDE.items() if key != "id"}
        | {"option1": f"loaf {i}", "answer": answer}
        for i in range(10)
        for answer in ("1", "2")
    ]
    hub["allenai/winogrande", "winogrande_m", "train"] = rows
    train, held_out = (
        TASKS["winogrande"].rows(part, "trimtab", None) for part in ("train", "validation")
    )
    assert (len(train), len(held_out)) == (16, 4)
    assert not {row["option1"] for row in train} & {row["option1"] for row in held_out}


def test_rows_of_the_hub_are_checked_too(hub: Hub) -> None:
    hub["google/boolq", None, "validation"] = [BOOLQ, {**BOOLQ, "answer": "yes"}]
    refused_in_one_line(
        lambda: TASKS["boolq"].rows("test", "trimtab", None),
        "the data set google/boolq of the hub, row 2: 'answer' must be true or false",
    )
    hub["google/boolq", None, "validation"] = []
    refused_in_one_line(
        lambda: TASKS["boolq"].rows("test", "trimtab", None), "google/boolq of the hub has no rows"
    )


@pytest.mark.usefixtures("hub")
def test_a_hub_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", None),
        "^copa needs copa/test.jsonl: name its directory with --data or TRIMTAB_DATA; the hub's "
        "pkavumba/balanced-copa failed: Couldn't reach pkavumba/balanced-copa$",
    )
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", str(tmp_path)),
        f"^copa needs copa/test.jsonl, which is not in {re.escape(str(tmp_path))}; the hub's",
    )


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused_in_one_line(
        lambda: TASKS["copa"].rows("test", "trimtab", None), r"install trimtab\[eval\]"
    )


# -- predictions on a real model ---------------------------------------------------------------


def rows_of(path: Path, count: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def boolq_by_hand(row: dict[str, Any]) -> tuple[str, str]:
    return (
        f"Is the answer to the question encapsulated in the passage? Please confirm with 'yes' or "
        f"'no'.\n\nPassage: {row['passage']}\n\nQuestion: {row['question']}\n\nAnswer:",
        "yes" if row["answer"] else "no",
    )


def copa_by_hand(row: dict[str, Any]) -> tuple[str, str]:
    return (
        f"Question:\n{row['premise']} Based on the previous passage, choose the most reasonable "
        f"{row['question']}.\nA:{row['choice1']}\nB:{row['choice2']}\n\nAnswer:\n",
        ["a", "b"][row["label"]],
    )


def winogrande_by_hand(row: dict[str, Any]) -> tuple[str, str]:
    return (
        "Please fill in the blanks. Write A or B as the answer.\n\nSentence: "
        f"{row['sentence']}\nA. {row['option1']}\nB. {row['option2']}\nAnswer:",
        ["a", "b"][row["answer"] - 1],
    )


BY_HAND = {
    "boolq": ("boolq/dev.jsonl", boolq_by_hand),
    "copa": ("copa/test.jsonl", copa_by_hand),
    "winogrande": ("winogrande/dev.jsonl", winogrande_by_hand),
}


def predictions_agree(
    lm: tt.LanguageModel, data: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trimtab's predictions are those of transformers, one prompt at a time."""
    file, make = BY_HAND[name]
    seen: list[Tensor] = []
    unembed = tt.LanguageModel.unembed

    def watched(self: tt.LanguageModel, hidden: Tensor) -> Tensor:
        seen.append(unembed(self, hidden))
        return seen[-1]

    monkeypatch.setattr(tt.LanguageModel, "unembed", watched)
    evaluation = tt.evaluate(lm, name, data=str(data), limit=count)
    assert len(evaluation.records) == count
    logits, right = [], 0
    for row, record in zip(rows_of(data / file, count), evaluation.records, strict=True):
        prompt, target = make(row)
        inputs = lm.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            written = lm.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = written.sequences[0, inputs.input_ids.shape[1] :]
        output = lm.tokenizer.decode(new, skip_special_tokens=True)
        assert record["output"] == output
        assert record["id"] == str(row["id"])
        correct = output.strip().lower() == target
        assert record["values"]["accuracy"] == correct
        logits.append(written.logits[0])
        right += correct
    assert evaluation.value(name).value == pytest.approx(right / count)
    # A small model may give one answer to everything; its logits tell the prompts apart.
    apart = torch.cdist(torch.cat(logits), torch.cat(seen), p=torch.inf)
    assert sorted(apart.argmin(1).tolist()) == list(range(count))
    assert apart.amin(1).max() < 1e-2


@pytest.mark.parametrize("name", BY_HAND)
def test_some_predictions_equal_a_plain_loop(
    smollm2: Any, data_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions_agree(smollm2, data_dir, name, 12, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_predictions_equal_a_plain_loop(
    smollm2: Any, data_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions_agree(smollm2, data_dir, name, 50, monkeypatch)
