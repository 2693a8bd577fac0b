"""Contrasts of right against wrong answers: how the wrong one is chosen, and the sentence encoder.

Where the choice is by likeness, a toy encoder puts numbers on a circle, so that the nearest one is
known; the real encoder is compared with a few lines of transformers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from helpers import refused_in_one_line
from trimtab.checkpoints.packs import encoder_directory
from trimtab.contrasts import Contrast, Pair
from trimtab.evaluation.tasks import answers, encoder, load_contrast
from trimtab.evaluation.tasks.answers import (
    from_answers,
    nearest,
    nearest_as_published,
    read_answers,
)

ROWS = [("1 + 1 =", "2"), ("2 + 2 =", "4"), ("4 + 5 =", "9"), ("1 + 3 =", "4"), ("9 * 9 =", "81")]


def on_a_circle(texts: Sequence[str]) -> Any:
    angle = np.array([float(text) / 1000 for text in texts])
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@pytest.fixture
def toy_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "encode", on_a_circle)


def sides(contrast: Contrast) -> list[tuple[str, str]]:
    return [(pair.positive, pair.negative) for pair in contrast.pairs]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- a wrong answer at random ------------------------------------------------------------------


def test_random_answers_are_wrong_ones_of_the_pool() -> None:
    contrast = from_answers(ROWS, seed=3, name="sums")
    assert contrast.name == "sums"
    assert [(pair.prompt, pair.positive) for pair in contrast.pairs] == ROWS
    assert all(wrong != right for right, wrong in sides(contrast))
    assert {wrong for _, wrong in sides(contrast)} <= {"2", "4", "9", "81"}
    # A right answer of its own pool is not needed there.
    other = from_answers(ROWS, pool=["7", "2", "7"])
    assert {wrong for _, wrong in sides(other)} <= {"7", "2"}
    assert sides(other)[0] == ("2", "7")


def test_the_seed_decides() -> None:
    rows = ROWS * 10
    assert from_answers(rows, seed=1) == from_answers(rows, seed=1)
    assert from_answers(rows, seed=1) != from_answers(rows, seed=2)


def test_every_other_answer_is_as_likely_however_often_it_is_right() -> None:
    rows = [("?", "a")] * 3000 + [("?", "b")] * 5 + [("?", "c")] + [("?", "d")]
    found = Counter(wrong for right, wrong in sides(from_answers(rows)) if right == "a")
    assert set(found) == {"b", "c", "d"}
    assert all(900 < count < 1100 for count in found.values())  # 4 standard deviations of 26


def test_conversations_are_prompts_too() -> None:
    chat = (("user", "Two loaves and two?"),)
    contrast = from_answers([(chat, "4"), ("1 + 1", "2")])
    assert contrast.pairs == (Pair(chat, "4", "2"), Pair("1 + 1", "2", "4"))


@pytest.mark.parametrize("wrong", ["random", "similar"])
def test_a_pool_without_a_wrong_answer_is_refused(wrong: Any) -> None:
    def made(rows: list[tuple[Any, str]], **options: Any) -> Any:
        return lambda: from_answers(rows, wrong=wrong, name="sums", **options)

    says = "^sums: the pool has no answer but '4'"
    refused_in_one_line(made([("a", "4")]), says)
    refused_in_one_line(made([("a", "4"), ("b", "4")]), says)
    refused_in_one_line(made([("a", "2"), ("b", "4")], pool=["4"]), says)
    refused_in_one_line(made([("a", "4")], pool=[]), says)
    refused_in_one_line(made([]), "^sums: there are no answers")


def test_an_unknown_choice_is_refused() -> None:
    refused_in_one_line(lambda: from_answers(ROWS, wrong="worst"), "'worst': known are random")  # type: ignore[arg-type]


# -- the most similar one ----------------------------------------------------------------------


@pytest.mark.usefixtures("toy_encoder")
def test_similar_answers_are_the_nearest_that_differ() -> None:
    contrast = from_answers(ROWS, wrong="similar")
    assert sides(contrast) == [("2", "4"), ("4", "2"), ("9", "4"), ("4", "2"), ("81", "9")]
    contrast = from_answers(ROWS, wrong="similar", pool=["80", "4", "4.0", "10"])
    assert sides(contrast) == [("2", "4"), ("4", "4.0"), ("9", "10"), ("4", "4.0"), ("81", "80")]


@pytest.mark.usefixtures("toy_encoder")
def test_nearest_never_gives_the_answer_itself() -> None:
    answers = ["5", "5", "5.5", "5", "90"]
    assert nearest(answers, answers) == ["5.5", "5.5", "5", "5.5", "5.5"]
    assert nearest(["1"], ["300"]) == ["300"]
    refused_in_one_line(lambda: nearest(["5"], ["5", "5"]), "all answers are '5'")


@pytest.mark.usefixtures("toy_encoder")
def test_as_published_the_same_answer_is_spaces() -> None:
    assert nearest_as_published(["5", "7", "90", "5", "5.5"], " ") == [" ", "5.5", "7", " ", "5"]
    assert nearest_as_published(["5", "5"], "     ") == ["     "] * 2
    assert nearest_as_published(["5"], " ") == [" "]  # there is no other row


# -- files -------------------------------------------------------------------------------------


def test_a_file_without_choices(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in ROWS])
    contrast = load_contrast(f"answers:{path}", seed=5)
    assert contrast.name == f"answers:{path}"
    assert contrast.pairs == from_answers(ROWS, seed=5).pairs
    assert contrast == load_contrast(f"answers:{path}", seed=5)
    many = write(tmp_path / "many.jsonl", [{"prompt": p, "answer": a} for p, a in ROWS * 10])
    assert load_contrast(f"answers:{many}", seed=5) != load_contrast(f"answers:{many}", seed=6)


@pytest.mark.usefixtures("toy_encoder")
def test_a_file_by_likeness(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", [{"prompt": p, "answer": a} for p, a in ROWS])
    contrast = load_contrast(f"answers-similar:{path}")
    assert sides(contrast) == [("2", "4"), ("4", "2"), ("9", "4"), ("4", "2"), ("81", "9")]


def test_choices_of_a_row_are_its_own(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What rises?"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "first", "answer": "north"},
        {"prompt": chat, "answer": "bread", "choices": ["stone", "bread", "iron"]},
        {"prompt": "second", "answer": "south"},
        {"prompt": "third", "answer": "warm", "choices": ["cold"], "topic": "ovens"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    seen = set()
    for seed in range(20):
        pairs = read_answers(path, seed=seed).pairs
        assert pairs[0] == Pair("first", "north", "south")
        assert pairs[1].prompt == (("user", "What rises?"),)
        assert pairs[2] == Pair("second", "south", "north")
        assert pairs[3] == Pair("third", "warm", "cold")
        assert pairs == read_answers(path, seed=seed).pairs
        seen.add(pairs[1].negative)
    assert seen == {"stone", "iron"}


def test_all_rows_with_choices(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "answer": "yes", "choices": ["yes", "no"]} for i in range(3)]
    contrast = load_contrast(f"answers:{write(tmp_path / 'rows.jsonl', rows)}")
    assert sides(contrast) == [("yes", "no")] * 3


GOOD = {"prompt": "Is bread warm?", "answer": "yes", "choices": ["yes", "no"]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": 5}, "row 2: a prompt must be text or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "row 2: a message must be"),
        ({"answer": 5}, "row 2: the answer must be text"),
        ({"answer": " "}, "row 2: the answer must be text"),
        ({"choices": "no"}, "row 2: choices must be a list of texts"),
        ({"choices": ["no", 5]}, "row 2: choices must be a list of texts"),
        ({"choices": ["yes"]}, "row 2: there is no wrong choice"),
        ({"choices": []}, "row 2: there is no wrong choice"),
        ({"choices": None}, "the pool has no answer but 'yes'"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, {**GOOD, **change}])
    refused_in_one_line(lambda: read_answers(path), re.escape(says))


def test_bad_files(tmp_path: Path) -> None:
    for key in ("prompt", "answer"):
        row = {k: v for k, v in GOOD.items() if k != key}
        path = write(tmp_path / "rows.jsonl", [GOOD, GOOD, row])
        refused_in_one_line(lambda: read_answers(path), f"rows.jsonl, row 3: '{key}' is missing")
    missing = tmp_path / "none.jsonl"
    refused_in_one_line(
        lambda: load_contrast(f"answers:{missing}"),
        f"cannot read the answers {missing}: No such file or directory$",
    )
    path.write_text('{"prompt": "a"\n')
    refused_in_one_line(lambda: read_answers(path), "rows.jsonl, line 1 is not JSON")
    path.write_text("\n")
    refused_in_one_line(lambda: read_answers(path), "rows.jsonl: the contrast is empty")


# -- contrasts of tasks ------------------------------------------------------------------------


def copa_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "premise": f"The dough rose {i} times.",
            "question": "cause",
            "choice1": f"The yeast was {i} days old.",
            "choice2": "The oven was cold.",
            "label": i % 2,
        }
        for i in range(count)
    ]


def test_a_contrast_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "copa/balanced_train.jsonl", copa_rows(10))
    contrast = load_contrast("task:copa", data=str(tmp_path))
    assert contrast.name == "task:copa"
    assert [pair.part for pair in contrast.pairs] == ["train"] * 8 + ["validation"] * 2
    assert sides(contrast.part("validation")) == [("A", "B"), ("B", "A")]  # rows 4 and 9
    assert len(contrast.train) == 8
    assert contrast.pairs[1].prompt == (
        "Question:\nThe dough rose 1 times. Based on the previous passage, choose the most "
        "reasonable cause.\nA:The yeast was 1 days old.\nB:The oven was cold.\n\nAnswer:\n"
    )
    paper = load_contrast("task:copa", data=str(tmp_path), protocol="paper")
    assert [pair.part for pair in paper.pairs] == ["train"] * 10
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    assert load_contrast("task:copa") == contrast


def test_the_papers_contrast_is_the_first_thousand_rows(tmp_path: Path) -> None:
    write(tmp_path / "copa/balanced_train.jsonl", copa_rows(1005))
    paper = load_contrast("task:copa", data=str(tmp_path), protocol="paper")
    assert len(paper) == 1000
    assert "rose 999 times" in str(paper.pairs[-1].prompt)
    assert len(load_contrast("task:copa", data=str(tmp_path))) == 1000


def test_a_contrast_of_the_real_data(data_dir: Path) -> None:
    contrast = load_contrast("task:copa", data=str(data_dir))
    assert len(contrast) == 1000
    assert Counter(pair.part for pair in contrast.pairs) == {"train": 800, "validation": 200}
    assert Counter(sides(contrast)).keys() == {("A", "B"), ("B", "A")}


def test_bad_names(tmp_path: Path) -> None:
    data = str(tmp_path)
    refused_in_one_line(lambda: load_contrast("task:bread", data=data), "unknown task 'bread'")
    refused_in_one_line(
        lambda: load_contrast("task:copa", data=data, protocol="ours"), "unknown protocol 'ours'"
    )
    path = write(tmp_path / "p.jsonl", [{"prompt": "Bread?"}])
    refused_in_one_line(lambda: load_contrast(f"task:coherence:{path}"), "has no contrast")


# -- the sentence encoder ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    """transformers' model and tokenizer of the encoder; skips where it cannot be had."""
    from transformers import AutoModel, AutoTokenizer

    try:
        place = encoder_directory(quiet=True)
    except tt.TrimtabError as error:
        pytest.skip(f"the sentence encoder cannot be had here: {error}")
    return AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)


TEXTS = ["51", "2 + 4 = 6 #### 6", "A loaf of bread", "7", "bread " * 400, "51", "The loaf rose."]


def test_vectors_are_means_over_tokens(minilm: Any) -> None:
    model, tokenizer = minilm
    found = encoder.encode(TEXTS)
    assert found.shape == (len(TEXTS), 384)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text).input_ids
        if len(ids) > 256:  # as its own configuration has it: 254 pieces between the marks
            ids = [*ids[:255], ids[-1]]
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=2e-6)


@pytest.mark.usefixtures("minilm")
def test_likeness_is_of_meaning() -> None:
    pool = ["The ship left the harbour.", "She baked some bread.", "51.0"]
    assert nearest(["A loaf is in the oven.", "52.0"], pool) == [pool[1], pool[2]]


class _Words:
    """A model and a tokenizer in one, which notes what it is given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def tokenizer(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        self.batches.append(list(texts))
        ids = torch.tensor([[float(len(text))] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones(len(texts), 1)}

    def model(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        states = torch.stack([input_ids, torch.ones_like(input_ids)], dim=-1)
        return type("Output", (), {"last_hidden_state": states})


def test_each_text_is_encoded_once_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding depends on a text's neighbours: the same texts must have the same in every run."""
    words = _Words()
    monkeypatch.setattr(encoder, "_load", lambda: (words.model, words.tokenizer))
    texts = [chr(ord("a") + i % 26) * (1 + i % 3) for i in range(300)]
    found = encoder.encode(texts)
    given = [text for batch in words.batches for text in batch]
    assert given == sorted(set(texts), key=lambda text: (len(text), text))
    for text, vector in zip(texts, found, strict=True):
        expected = np.array([len(text), 1]) / np.hypot(len(text), 1)
        np.testing.assert_allclose(vector, expected, rtol=1e-6)


def test_an_encoder_that_cannot_be_had_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def nowhere(*args: Any, **options: Any) -> Any:
        raise OSError("no network\nat all")

    def no_wheel() -> Path:
        raise tt.TrimtabError("the wheel cannot be downloaded")

    monkeypatch.setattr(encoder, "encoder_directory", no_wheel)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", nowhere)
    refused_in_one_line(
        encoder._load.__wrapped__,
        r"all-MiniLM-L6-v2 cannot be had, .*\(the wheel cannot be downloaded\) nor from the hub",
    )
