"""MMLU: questions of 57 subjects with four answers (Hendrycks et al., 2021), asked without
examples."""

from __future__ import annotations

from trimtab.evaluation.tasks.choice import same_choice
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task

_LETTERS = "ABCD"


def _prompt(row: Row) -> str:
    choices = "\n".join(
        f"{letter}. {text}" for letter, text in zip(_LETTERS, row["choices"], strict=True)
    )
    return f"Question: {row['question'].strip()}\n{choices}\nAnswer:"


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), _LETTERS[row["answer"]])


def _read(output: str, protocol: Protocol) -> str | None:
    """The letter that an answer is, or begins with."""
    return output.strip().rstrip(".):")[:1] or None


TASK = Task(
    name="mmlu",
    about="questions of 57 subjects, one of four answers; accuracy",
    test=Source("mmlu/test.jsonl", hub="cais/mmlu", hub_config="all", hub_split="test"),
    train=None,
    columns={"question": str, "choices": list, "answer": frozenset({0, 1, 2, 3})},
    example=_example,
    generation=Generation(1),
    read=_read,
    options=tuple(_LETTERS),
    right=same_choice,
)
