"""COPA: which of two sentences is the cause or the effect of another (AUSteer, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.contrasts import Pair
from trimtab.evaluation.tasks.choice import read_choice, same_choice
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


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
    columns={
        "premise": str,
        "question": frozenset({"cause", "effect"}),
        "choice1": str,
        "choice2": str,
        "label": frozenset({0, 1}),
    },
    example=_example,
    generation=Generation(1),
    pairs=_pairs,
    read=read_choice,
    options=("A", "B"),
    right=same_choice,
    # Balanced COPA has the choices of each question a second time, after a mirrored premise.
    group=lambda row: frozenset((row["choice1"], row["choice2"])),
    behaviour="choose the more reasonable answer",
    opposite="choose the less reasonable answer",
)
