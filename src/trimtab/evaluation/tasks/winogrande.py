"""WinoGrande: which of two words fills the blank of a sentence (AUSteer, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.contrasts import Pair
from trimtab.evaluation.tasks.choice import read_choice, same_choice
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _prompt(row: Row) -> str:
    sentence, option1, option2 = (row[key].strip() for key in ("sentence", "option1", "option2"))
    return (
        f"Please fill in the blanks. Write A or B as the answer.\n\nSentence: {sentence}\n"
        f"A. {option1}\nB. {option2}\nAnswer:"
    )


def _first(row: Row) -> bool:
    """Whether the first option is right; the answer is 1 or 2, a number or its text."""
    return str(row["answer"]) == "1"


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), _prompt(row), "A" if _first(row) else "B")


def _pairs(rows: Sequence[Row], protocol: Protocol, seed: int) -> list[Pair]:
    return [Pair(_prompt(row), *(("A", "B") if _first(row) else ("B", "A"))) for row in rows]


TASK = Task(
    name="winogrande",
    about="which of two words fills the blank; accuracy",
    test=Source(
        "winogrande/dev.jsonl",
        hub="allenai/winogrande",
        hub_config="winogrande_xl",
        hub_split="validation",
    ),
    train=Source(
        "winogrande/train_m.jsonl",
        hub="allenai/winogrande",
        hub_config="winogrande_m",
        hub_split="train",
    ),
    columns={
        "sentence": str,
        "option1": str,
        "option2": str,
        "answer": frozenset({1, 2, "1", "2"}),  # "" where it is kept secret
    },
    example=_example,
    generation=Generation(1),
    pairs=_pairs,
    read=read_choice,
    options=("A", "B"),
    right=same_choice,
    # Twin sentences have the same options; only some copies of the data say which twins are.
    group=lambda row: frozenset((row["option1"], row["option2"])),
    behaviour="choose the answer that makes sense",
    opposite="choose the answer that makes no sense",
)
