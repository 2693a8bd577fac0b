"""What the tests of evaluations share: rows in files, tiny models that answer, and sums by hand.

Tiny models speak only a few tokens (the rows of their LM head for all others are zero), so that
they answer A or B, or numbers, often enough for figures to mean something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import add, language_model, steer
from trimtab.model.language_model import LanguageModel
from trimtab.reports import Evaluation

WEATHER = ["in the morning", "when the rain came", "with a king", "and the wind was good"]
CHOICES = [
    ("They sat by the fire.", "The wind was good."),
    ("She asked.", "He was old."),
    ("The rudder turns.", "The day was long, and they said that they did not know."),
]


# -- rows and models ------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def copa_rows(start: int = 0) -> list[dict[str, Any]]:
    """24 questions."""
    return [
        {
            "id": start + i,
            "premise": f"The ship left the harbour {weather}.",
            "question": question,
            "choice1": first,
            "choice2": second,
            "label": i % 2,
        }
        for i, (weather, question, (first, second)) in enumerate(
            (weather, question, choice)
            for weather in WEATHER
            for question in ("cause", "effect")
            for choice in CHOICES
        )
    ]


def svamp_rows(count: int = 7) -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{i}",
            "body": "He had a map." if i % 2 else "She had ten maps and gave two to a king.",
            "question": f"How many are {i} and {i}?",
            "answer": 2 * i,
        }
        for i in range(count)
    ]


def rtp_rows(count: int = 7) -> list[dict[str, Any]]:
    return [
        {
            "filename": f"f{i}",
            "prompt": f"{' so'.join(WEATHER[: 1 + i % 4])} {i}",
            "challenging": True,
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data sets with the layout of the real ones."""
    folder = tmp_path / "data"
    write(folder / "copa" / "test.jsonl", copa_rows())
    train = copa_rows() + copa_rows(1000)
    for row in train:  # each question twice, and no two with the same choices
        row["choice1"] += f" {row['id'] % 1000}"
    write(folder / "copa" / "balanced_train.jsonl", train)
    write(folder / "svamp" / "test.jsonl", svamp_rows())
    write(folder / "rtp" / "challenging.jsonl", rtp_rows())
    write(folder / "bpo" / "test.jsonl", [{"id": i, "prompt": f"Write {i}"} for i in range(5)])
    labels = ["safe", "unsafe", "safe", "safe", "unsafe"]
    write(
        folder / "xstest" / "xstest_v2.jsonl",
        [{"id": i, "prompt": f"What is {i}?", "label": label} for i, label in enumerate(labels)],
    )
    (folder / "text.txt").write_text(LONG)
    return folder


#: 768 tokens of the tiny tokenizer, whose models read 256.
LONG = "\n".join(
    f"The ship left the harbour {weather} {i}, and the captain stood at the wheel. Zebra {i * 7}."
    for i in range(4)
    for weather in WEATHER
)


def speaking(*texts: str, name: str = "llama", **options: Any) -> LanguageModel:
    """A tiny model that writes only these tokens, and padding."""
    lm = language_model(name, **options)
    spoken = torch.zeros(len(lm.tokenizer), 1)
    for text in texts:
        spoken[lm.tokenizer(text, add_special_tokens=False).input_ids] = 1
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(spoken)
    return lm


@pytest.fixture
def chooser() -> LanguageModel:
    """Answers A or B, or nothing."""
    return speaking("A", "B")


@pytest.fixture
def talker() -> LanguageModel:
    return speaking(*"0123456789 ")


def strong(lm: LanguageModel, seed: int = 3, size: float = 3.0) -> tt.Steering:
    """A steering that changes many answers."""
    width = lm.anatomy.width("layers.1.resid")
    return steer(lm, ("layers.1.resid", add(width, seed, size)))


@dataclass
class Scorer:
    """Calls a text toxic if it has a 7."""

    name: str = "sevens"
    asked: list[str] = field(default_factory=list)

    def scores(self, texts: Sequence[str]) -> list[float]:
        self.asked += texts
        return [0.75 if "7" in text else 0.125 for text in texts]


def block_edited(lm: LanguageModel, ids: list[int], edit: Any = None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one text."""
    blocks = lm.model.model.layers
    handle = blocks[1].register_forward_hook(lambda m, a, out: edit(out) if edit else out)
    try:
        with torch.no_grad():
            logits: torch.Tensor = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits


def added(steering: tt.Steering) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a steering of one Add does, by hand."""
    operator: Any = steering.interventions[0].operator
    return lambda x: x + steering.setting * operator.vector


def wilson(ones: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    p = ones / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def content(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without their seconds, and the checksum over them, as JSON has them."""
    unlike = ("seconds", "checksum")
    without = [{k: v for k, v in record.items() if k not in unlike} for record in records]
    found: list[dict[str, Any]] = json.loads(json.dumps(without))
    return found


def same(one: Evaluation, other: Evaluation) -> None:
    """Everything but the seconds."""
    assert one.results == other.results
    assert one.comparisons == other.comparisons
    assert one.notes == other.notes
    assert content(one.records) == content(other.records)


def of(evaluation: Evaluation, **wanted: Any) -> list[dict[str, Any]]:
    """The records with these values."""
    return [r for r in evaluation.records if all(r[k] == v for k, v in wanted.items())]
