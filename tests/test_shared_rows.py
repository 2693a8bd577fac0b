"""A choice is not reported on the rows that it was made on, by whatever name they go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import language_model, refused_in_one_line
from trimtab.sweeps.rows import TaskRows
from trimtab.sweeps.sweep_method import sweep


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asks(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {i}", "id": i} for i in numbers]


def bench(lm: tt.LanguageModel, task: Any, other: Any, **options: Any) -> TaskRows:
    return TaskRows(
        lm, f"refusal:{task}", validation_task=f"refusal:{other}", max_new_tokens=2, **options
    )


def test_the_same_file_by_any_path_is_refused(lm: tt.LanguageModel, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", asks(range(4)))
    (tmp_path / "deep").mkdir()
    os.symlink(own, tmp_path / "deep" / "link.jsonl")
    copy = write(tmp_path / "copy.jsonl", asks(range(4)))
    overlapping = write(tmp_path / "some.jsonl", asks(range(3, 9)))
    for other in (own, tmp_path / "deep" / ".." / "own.jsonl", tmp_path / "deep/link.jsonl", copy):
        refused_in_one_line(
            lambda other=other: bench(lm, own, other), "4 of the 4 rows of refusal:.* are among"
        )
    refused_in_one_line(lambda: bench(lm, own, overlapping), "1 of the 6 rows of refusal:")
    refused_in_one_line(lambda: bench(lm, overlapping, own, limit=4), "1 of the 4 rows of refusal:")


def test_other_rows_are_taken(lm: tt.LanguageModel, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", asks(range(4)))
    other = write(tmp_path / "other.jsonl", asks(range(4, 6)))
    assert bench(lm, own, other).rows("validation") == 2
    # The rows that are shared are not used.
    overlapping = write(tmp_path / "some.jsonl", asks(range(2, 6)))
    assert bench(lm, own, overlapping, test_limit=2).rows("test") == 2


def test_pairs_are_told_apart_by_their_sides(lm: tt.LanguageModel, tmp_path: Path) -> None:
    def pairs(name: str, sides: list[str]) -> str:
        rows = [{"prompt": "It is", "positive": f" {s}", "negative": " no"} for s in sides]
        marked = [{**row, "part": part} for row in rows for part in ("train", "test")]
        return f"contrast:{write(tmp_path / name, marked)}"

    one, other = pairs("one.jsonl", ["a", "b"]), pairs("other.jsonl", ["c", "d"])
    assert TaskRows(lm, one, validation_task=other).rows("validation") == 2
    refused_in_one_line(
        lambda: TaskRows(lm, one, validation_task=pairs("same.jsonl", ["b", "c"])),
        "1 of the 2 rows of contrast:",
    )


def test_a_sweep_refuses_it_before_it_writes(lm: tt.LanguageModel, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", asks(range(4)))
    texts = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"It {i}", "positive": " is", "negative": " was"} for i in range(4)],
    )
    refused_in_one_line(
        lambda: sweep(
            lm,
            "caa",
            f"refusal:{own}",
            {"layer": (0, 1)},
            contrast=str(texts),
            validation_task=f"refusal:{own}",
            output=tmp_path / "run",
        ),
        "are among those of",
    )
    assert not (tmp_path / "run").exists()
