"""Files of contrasts, whoever wrote them; and what is said of files that are none."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import refused_in_one_line
from trimtab.contrasts import Contrast, Pair, Text
from trimtab.evaluation import find_task, load_contrast

ROWS = [
    ("Today; I feel", " happy, and so on", ' "sad"'),
    ("Tea\tor coffee?", " tea", " coffee\nplease"),
]
PAIRS = tuple(Pair(*row) for row in ROWS)
KNOWN = "known are prompt, positive, negative"


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# -- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_of_any_delimiter(tmp_path: Path, delimiter: str, quoting: Any, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("prompt", "positive", "negative"), *ROWS])
    assert load_contrast(str(path)).rows == PAIRS


def test_headers_as_spreadsheets_write_them(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", "Prompt ; Positive; Negative\nSo, yes; a; b\n")
    assert load_contrast(path).rows == (Pair("So, yes", " a", " b"),)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_arrays(tmp_path: Path, suffix: str) -> None:
    rows = [dict(zip(("prompt", "positive", "negative"), row, strict=True)) for row in ROWS]
    for indent in (None, 2):
        path = write(tmp_path / f"pairs{suffix}", "\n " + json.dumps(rows, indent=indent))
        assert load_contrast(path).rows == PAIRS
        assert Contrast.from_jsonl(path).rows == PAIRS
    broken = write(tmp_path / f"broken{suffix}", json.dumps(rows, indent=2)[:-3])
    refused_in_one_line(lambda: load_contrast(broken), "broken.* is not JSON: .*line")
    one = write(tmp_path / f"one{suffix}", json.dumps({"pairs": rows}, indent=2))
    refused_in_one_line(lambda: load_contrast(one), "one.* is one JSON object over several lines")
    mixed = write(tmp_path / f"mixed{suffix}", [rows[0], 3])
    refused_in_one_line(lambda: load_contrast(mixed), "row 2 is not a JSON object")


# -- columns --------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = (("user", "Hi"),)
FULL = {side: [user("Hi"), answer(text)] for side, text in (("chosen", "a"), ("rejected", "b"))}
TALK = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"

#: Rows as other tools have them, and the pair that each is.
OTHERS: dict[str, tuple[dict[str, Any], Pair]] = {
    "DPO": ({"prompt": "p", "chosen": " a", "rejected": " b"}, Pair("p", " a", " b")),
    "DPO with scores": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9.0, "id": 3},
        Pair("p", "a", "b"),
    ),
    "DPO with question": ({"question": "p", "chosen": "a", "rejected": "b"}, Pair("p", "a", "b")),
    "DPO, messages": (
        {"prompt": [user("Hi")], "chosen": [answer("a")], "rejected": [answer("b")]},
        Pair(ASKED, "a", "b"),
    ),
    "DPO, messages that begin with the prompt": (
        FULL,
        Pair(ASKED, "a", "b"),
    ),
    "DPO, the prompt once more as text": (
        {"prompt": "Hi", **FULL},
        Pair(ASKED, "a", "b"),
    ),
    "DPO, text and messages": (
        {"prompt": "Hi", "chosen": [answer("a")], "rejected": [answer("b")], "part": "test"},
        Pair(ASKED, "a", "b", "test"),
    ),
    "conversations as text": (
        {"chosen": f"{TALK} a", "rejected": f"{TALK} b"},
        Pair(TALK, " a", " b"),
    ),
    "repeng": ({"positive": "Happy me", "negative": "Sad me"}, Pair("", "Happy me", "Sad me")),
    "Anthropic": (
        {"question": "Q?", "statement": "S", "label_confidence": 0.9, "behavior": "x"}
        | {"answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"},
        Pair("Q?", " Yes", " No"),
    ),
    "CAA's right and wrong": (
        {"prompt": "Q?", "correct": "(B)", "incorrect": "(A)", "category": "x"},
        Pair("Q?", " (B)", " (A)"),
    ),
    "CAA, which dropped the blank": (
        {"question": "Q?\n\nChoices:\n (A) Yes\n (B) No"}
        | {"answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"},
        Pair("Q?\n\nChoices:\n (A) Yes\n (B) No", " (A)", " (B)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_other_tools(tmp_path: Path, name: str) -> None:
    row, pair = OTHERS[name]
    assert load_contrast(write(tmp_path / "rows.jsonl", row)).rows == (pair,)
    assert load_contrast(write(tmp_path / "rows.json", [row, row])).rows == (pair, pair)
    if name == "repeng":  # of pairs without a prompt none may have one
        rows = [row, {**row, "prompt": "p"}]
        refused_in_one_line(
            lambda: load_contrast(write(tmp_path / "mixed.json", rows)),
            "row 1: 'prompt' is missing",
        )


def test_messages_in_cells_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "dpo.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(("chosen", "rejected"))
        writer.writerow([json.dumps([user("Hi"), answer(side)]) for side in "ab"])
    assert load_contrast(str(path)).rows == (Pair(ASKED, "a", "b"),)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two prompts": (
        {"prompt": "p", "question": "q", "positive": "a", "negative": "b"},
        f"prompt and question both stand for the prompt: keep one; {KNOWN}",
    ),
    "two sides": (
        {"prompt": "p", "positive": "a", "chosen": "c", "negative": "b"},
        f"positive and chosen both stand for the positive: keep one; {KNOWN}",
    ),
    "no column": ({"input": "p", "good": "a"}, f"no column of .* among good, input: {KNOWN}"),
    "one column more": (
        {"prompt": "p", "positive": "a", "negative": "b", "lable": "x"},
        f"unknown field 'lable': take it out, or rename it; {KNOWN}",
    ),
    "one side only": ({"prompt": "p", "chosen": "a"}, "'negative' is missing"),
    "text and messages": (
        {"prompt": "p", "chosen": "a", "rejected": [answer("b")]},
        "chosen is text and rejected is not",
    ),
    "other beginnings": (
        {"chosen": [user("Hi"), answer("a")], "rejected": [user("Ho"), answer("b")]},
        "the same messages but for the assistant's last",
    ),
    "another prompt": (
        {"prompt": "Ho", **FULL},
        "the prompt is not how chosen and rejected begin",
    ),
    "equal answers": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the two sides are equal"),
    "a message that is none": ({"chosen": [1], "rejected": [2]}, "a message must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_columns_that_are_refused(tmp_path: Path, name: str) -> None:
    row, says = BAD[name]
    path = write(tmp_path / "rows.jsonl", row)
    refused_in_one_line(lambda: load_contrast(path), rf"rows.jsonl, row 1.*{says}")


# -- written --------------------------------------------------------------------------------------


def test_to_jsonl_comes_back(tmp_path: Path) -> None:
    talk = (("system", "Be kind.\u2028"), ("user", "Zoë 🙂"))
    pairs = Contrast((Pair("p", "a\n", '"b"', "test"), Pair(talk, "", "b"), Pair("", "a", "b")))
    texts = Contrast((Text("t", "positive", "train"), Text(talk, "negative")))
    for contrast in (pairs, texts):
        path = contrast.to_jsonl(tmp_path / "rows.jsonl", overwrite=True)
        again = Contrast.from_jsonl(path)
        assert (again.rows, again.digest) == (contrast.rows, contrast.digest)
    before = path.read_bytes()
    refused_in_one_line(lambda: pairs.to_jsonl(path), "exists")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]
    refused_in_one_line(lambda: pairs.to_jsonl(tmp_path / "no" / "rows.jsonl"), "cannot write")


# -- what is meant --------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path / "pirate.jsonl", {"prompt": "p", "positive": "a", "negative": "b"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(action: Callable[[], Any], says: str) -> None:
    refused_in_one_line(action, says)


def test_a_name_that_is_no_file_says_what_it_may_mean(here: Path) -> None:
    for source, meant in (
        ("formality", "did you mean builtin:formality"),
        ("formalty", "did you mean builtin:formality"),
        ("copa", "did you mean task:copa"),
        ("contrast:pirate.jsonl", r"did you mean pirate\.jsonl\?"),
        ("pirates.jsonl", r"cannot read the contrast pirates\.jsonl.*did you mean pirate\.jsonl\?"),
        ("pirate.json", r"did you mean pirate\.jsonl\?"),
    ):
        refused(lambda source=source: load_contrast(source), meant)
    write(here / "formality", {"prompt": "p", "positive": "a", "negative": "b"})
    assert len(load_contrast("formality")) == 1  # a file of that name is meant


def test_a_text_is_no_contrast(here: Path) -> None:
    path = write(here / "lines.txt", "one\ntwo\n")
    refused(lambda: load_contrast(path), "lines.txt is plain text.*two sides.*prompt, positive")


def test_a_file_that_is_no_task_says_which_it_may_be(here: Path) -> None:
    refused(lambda: find_task("pirate.jsonl"), r"did you mean contrast:pirate\.jsonl .*refusal:")
    refused(lambda: find_task("asked.txt"), r"did you mean refusal:asked\.txt")
    refused(lambda: find_task("formality"), "did you mean contrast:builtin:formality")
    refused(lambda: find_task("cupa"), r"did you mean copa\? known are")
    refused(lambda: find_task("coherence:pirates.jsonl"), r"did you mean pirate\.jsonl\?")


# -- prompts --------------------------------------------------------------------------------------


def test_prompts_of_any_file(tmp_path: Path) -> None:
    wanted = [(("user", "Write; a story"),), (("user", "Sing"),)]
    files = {
        "lines.txt": "Write; a story\n\nSing\n",
        "rows.json": json.dumps([{"goal": "Write; a story"}, {"prompt": "Sing"}]),
        "rows.csv": 'goal;id\n"Write; a story";1\nSing;2\n',
        "rows.tsv": "instruction\tid\nWrite; a story\t1\nSing\t2\n",
    }
    for name, content in files.items():
        task = find_task(f"refusal:{write(tmp_path / name, content)}")
        rows = task.rows("test", "trimtab", None)
        found = [task.example(row, i, "trimtab").prompt for i, row in enumerate(rows)]
        assert found == wanted, name


def test_the_real_files_of_other_tools(data_dir: Path) -> None:
    for file, count, side in (
        ("caa/generate.jsonl", 4911, r" \([A-H]\)"),
        ("caa/truthfulqa_ab.jsonl", 817, r" \([A-H]\)"),
        ("anthropic_evals/persona_16x250.jsonl", 4000, " (Yes|No)"),
    ):
        contrast = load_contrast(str(data_dir / file))
        assert len(contrast) == count
        for pair in contrast.pairs:
            assert re.match(side, pair.positive), pair
            assert re.match(side, pair.negative), pair
        assert set(contrast.with_parts().sizes) == {"train", "validation", "test"}
