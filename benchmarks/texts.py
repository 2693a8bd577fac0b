"""Pairs from the research sets, with the prompts of AUSteer's released code."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import trimtab as tt


def copa(data: Path, count: int) -> tt.Contrast:
    """COPA: the better choice's letter against the other's."""
    pairs = []
    for row in _rows(data / "copa" / "balanced_train.jsonl", count):
        prompt = (
            f"Question:\n{row['premise']} Based on the previous passage, choose the most "
            f"reasonable {row['question']}.\nA:{row['choice1']}\nB:{row['choice2']}\n\nAnswer:\n"
        )
        right, wrong = ("A", "B") if row["label"] == 0 else ("B", "A")
        pairs.append((prompt, right, wrong))
    return tt.Contrast.from_pairs(pairs, "copa")


def boolq(data: Path, count: int) -> tt.Contrast:
    """BoolQ: the right one of Yes and No against the other."""
    pairs = []
    for row in _rows(data / "boolq" / "train_small.jsonl", count):
        prompt = (
            "Is the answer to the question encapsulated in the passage? Please confirm with "
            f"'yes' or 'no'.\n\nPassage: {row['passage']}\n\nQuestion: {row['question']}\n\nAnswer:"
        )
        right, wrong = ("Yes", "No") if row["answer"] else ("No", "Yes")
        pairs.append((prompt, right, wrong))
    return tt.Contrast.from_pairs(pairs, "boolq")


def _rows(path: Path, count: int) -> list[dict[str, Any]]:
    if not path.is_file():
        raise tt.TrimtabError(f"there is no {path}: name the directory of the data sets by --data")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]
