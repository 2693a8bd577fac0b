"""COPA: which of two sentences is the cause or the effect of another (AUSteer, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.contrasts import Pair
from trimtab.tasks.choice import read_choice, same_choice
from trimtab.tasks.task import Example, Generation, Protocol, Row, Source, Task


def _prompt(row: Row) -> str:
    premise, choice1, choice2 = (row[key].strip() for key in ("premise", "choice1", "choice2"))
    return (
        f"Question:\n{premise} Based on the previous passage, choose the most reasonable "
        f"{row['question']}.\nA:{choice1}\nB:{choice2}\n\nAnswer:\n"
    )


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), "AB"[row["label"]])


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    return [Pair(_prompt(row), "AB"[row["label"]], "BA"[row["label"]]) for row in rows]


TASK = Task(
    name="copa",
    about="cause or effect, one of two sentences; accuracy",
    test=Source("copa/test.jsonl", hub="pkavumba/balanced-copa", hub_split="test"),
    train=Source("copa/balanced_train.jsonl", hub="pkavumba/balanced-copa", hub_split="train"),
    columns={"premise": str, "question": str, "choice1": str, "choice2": str, "label": int},
    example=_example,
    generation=Generation(1),
    pairs=_pairs,
    read=read_choice,
    options=("A", "B"),
    right=same_choice,
    # Balanced COPA has each question twice, with the choices of the first: their numbers differ
    # by a thousand.
    group=lambda row: row["id"] % 1000 if isinstance(row["id"], int) else row["id"],
)
