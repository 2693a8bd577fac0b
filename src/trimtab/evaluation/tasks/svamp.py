"""SVAMP: elementary word problems, answered by a number alone (AUSteer, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.contrasts import Pair
from trimtab.evaluation.tasks.answers import nearest, nearest_as_published
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.numbers import cut_after, read_number, write_number
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _prompt(row: Row) -> str:
    return (
        "Answer the following grade-school math word problem. Reply with only the final answer as "
        f"a number.\nQuestion: {row['body']} {row['question']}\nAnswer:"
    )


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), float(row["answer"]))


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    if protocol == "paper":
        right = [str(float(row["answer"])) for row in rows]
        wrong = nearest_as_published(right, " ")
    else:
        right = [write_number(row["answer"]) for row in rows]
        wrong = nearest(right, right)
    return [Pair(_prompt(r), a, b) for r, a, b in zip(rows, right, wrong, strict=True)]


def _read(output: str, protocol: Protocol) -> float | None:
    return read_number(cut_after(output, "Answer"), protocol)


def _new_tokens(architecture: str) -> int:
    """As published: 5 for Gemma, 100 for Qwen, 50 for Llama; others as Llama."""
    return 5 if architecture.startswith("gemma") else 100 if "qwen" in architecture else 50


def _of_hub(row: Row) -> Row:
    return {
        "body": row["Body"],
        "question": row["Question"],
        "answer": float(row["Answer"]),
    }


TASK = Task(
    name="svamp",
    about="elementary word problems, a number as the answer; accuracy",
    test=Source(
        "svamp/test.jsonl",
        hub="ChilleD/SVAMP",
        hub_split="test",
        rename=_of_hub,
    ),
    train=Source(
        "svamp/train.jsonl",
        hub="ChilleD/SVAMP",
        hub_split="train",
        rename=_of_hub,
    ),
    columns={"body": str, "question": str, "answer": (int, float)},
    example=_example,
    # What follows one word after the trigger is not read.
    generation=Generation(_new_tokens, stop=r"Answer\S*\s+\S+\s"),
    pairs=_pairs,
    read=_read,
    differences="a number keeps its thousands separators (the authors read 1,234 as 234); the "
    "wrong side of a pair is the nearest answer that differs (theirs is a space where the nearest "
    "row has the same answer), and numbers are written 51, not 51.0",
    behaviour="solve the problem correctly",
    opposite="solve the problem wrongly",
)
