"""BoolQ: is the answer to a question about a passage yes or no (AUSteer, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.contrasts import Pair
from trimtab.evaluation.tasks.choice import read_choice, same_choice
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _prompt(row: Row) -> str:
    return (
        "Is the answer to the question encapsulated in the passage? Please confirm with 'yes' or "
        f"'no'.\n\nPassage: {row['passage'].strip()}\n\nQuestion: {row['question'].strip()}\n\n"
        "Answer:"
    )


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), "yes" if row["answer"] else "no")


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    sides = {True: ("Yes", "No"), False: ("No", "Yes")}
    return [Pair(_prompt(row), *sides[row["answer"]]) for row in rows]


TASK = Task(
    name="boolq",
    about="yes or no questions about a passage; accuracy",
    test=Source("boolq/dev.jsonl", hub="google/boolq", hub_split="validation"),
    train=Source(
        "boolq/train.jsonl", "boolq/train_small.jsonl", hub="google/boolq", hub_split="train"
    ),
    columns={"question": str, "passage": str, "answer": bool},
    example=_example,
    generation=Generation(1),
    pairs=_pairs,
    read=read_choice,
    options=("yes", "no"),
    right=same_choice,
    group=lambda row: row["passage"],
    behaviour="answer correctly",
    opposite="answer wrongly",
)
