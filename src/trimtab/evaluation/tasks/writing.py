"""Free answers to neutral questions in several languages, which come with trimtab: does the text
hold together, and is it in the language of its question?"""

from __future__ import annotations

from pathlib import Path

from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task

_FILE = Path(__file__).parents[2] / "data" / "neutral.jsonl"


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    fields = {"language": row["language"]}
    return Example(str(row["id"]), (("user", row["prompt"]),), fields=fields)


TASK = Task(
    name="writing",
    about="neutral questions in five languages; repetition, and whether the language is kept",
    test=Source(str(_FILE)),
    train=None,
    columns={"id": str, "language": str, "prompt": str},
    example=_example,
    generation=Generation(96),
    measures=("coherence", "language"),
    chat=True,
)
