"""GSM8K: grade school word problems, worked step by step (Cobbe et al., 2021)."""

from __future__ import annotations

from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.numbers import cut_after, read_number
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    prompt = (
        "Solve the problem below step by step, and end with #### and the result as a number.\n"
        f"Problem: {row['question'].strip()}\nSolution:"
    )
    result = str(row["answer"]).rpartition("####")[2].strip().replace(",", "")
    return Example(str(row["id"]), prompt, float(result))


def _read(output: str, protocol: Protocol) -> float | None:
    return read_number(cut_after(output, "####"), protocol)


TASK = Task(
    name="gsm8k",
    about="grade school word problems, worked step by step; accuracy",
    test=Source("gsm8k/test.jsonl", hub="openai/gsm8k", hub_config="main", hub_split="test"),
    train=None,
    columns={"question": str, "answer": str},
    example=_example,
    # What follows one word after the trigger is not read.
    generation=Generation(256, stop=r"####\s*\S+\s"),
    read=_read,
)
