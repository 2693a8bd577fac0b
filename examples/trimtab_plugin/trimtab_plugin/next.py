"""Next: what comes after a day, a month or a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.contrasts import Pair
from trimtab.evaluation import Example, Generation, Protocol, Row, Source, Task


def _prompt(row: Row) -> str:
    return f"What comes after {row['item']}?\nAnswer:"


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), row["next"])


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    return [Pair(_prompt(row), f" {row['next']}", f" {row['item']}") for row in rows]


def _read(text: str, protocol: Protocol) -> str | None:
    words = text.split()
    return words[0].strip(".,") if words else None


def _file(name: str) -> Source:
    return Source(str(Path(__file__).with_name(name)))


TASK = Task(
    name="next",
    about="what comes after a day, a month or a number; accuracy",
    test=_file("test.jsonl"),
    train=_file("train.jsonl"),
    columns={"item": str, "next": str},
    example=_example,
    generation=Generation(3),
    pairs=_pairs,
    read=_read,
)
