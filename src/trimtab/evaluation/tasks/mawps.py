"""MAWPS: word problems, answered step by step with the result after "####" (AUSteer, appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from trimtab.contrasts import Pair
from trimtab.evaluation.tasks.answers import nearest, nearest_as_published
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.numbers import cut_after, read_number, write_number
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _prompt(row: Row) -> str:
    return (
        "Answer the grade school math word problem below, using step-by-step problem-solving "
        f'process. Print the final answer after "####".\nquestion: {row["question"]}\nanswer: \n'
    )


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), float(row["answer"]))


def _gold(row: Row) -> str:
    """As the authors' data has it: `2 + 4 = 6 #### 6`."""
    equation = _bare(row["equation"].strip())
    answer = write_number(row["answer"])
    return f"{equation} = {answer} #### {answer}"


def _bare(equation: str) -> str:
    """Without parentheses around the whole."""
    inner = equation[1:-1]
    depths = list(accumulate((c == "(") - (c == ")") for c in inner))
    enclosed = equation.startswith("(") and equation.endswith(")") and min(depths, default=0) >= 0
    return inner.strip() if enclosed else equation


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    right = [_gold(row) for row in rows]
    if protocol == "paper":
        wrong = nearest_as_published(right, "     ")
    else:
        wrong = nearest(right, right)
    return [Pair(_prompt(r), a, b) for r, a, b in zip(rows, right, wrong, strict=True)]


def _read(output: str, protocol: Protocol) -> float | None:
    return read_number(cut_after(output, "####"), protocol)


def _new_tokens(architecture: str) -> int:
    """As published: 150 for Qwen, 250 for the others."""
    return 150 if "qwen" in architecture else 250


def _of_hub(row: Row) -> Row:
    """The hub has the worked answer as text, its result after "####"."""
    worked, _, result = str(row["answer"]).rpartition("####")
    return {
        "question": row["question"],
        "equation": worked.rpartition("=")[0].strip(),
        "answer": float(result.replace(",", "")),
    }


TASK = Task(
    name="mawps",
    about="word problems, worked step by step; accuracy",
    test=Source("mawps/test.jsonl", hub="garrethlee/MAWPS", hub_split="test", rename=_of_hub),
    train=Source("mawps/train.jsonl", hub="garrethlee/MAWPS", hub_split="train", rename=_of_hub),
    columns={"question": str, "equation": str, "answer": (int, float)},
    example=_example,
    # What follows one word after the trigger is not read.
    generation=Generation(_new_tokens, stop=r"####\S*\s+\S+\s"),
    pairs=_pairs,
    read=_read,
    differences="a number keeps its thousands separators (the authors read 1,234 as 234, and "
    "as 1 after ####); the wrong side of a pair is the nearest answer that differs (theirs is "
    "spaces where the nearest row has the same answer)",
    behaviour="solve the problem correctly",
    opposite="solve the problem wrongly",
)
