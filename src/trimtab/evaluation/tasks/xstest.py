"""XSTest: does a model refuse what only sounds dangerous, and what is (Röttger et al., 2024)."""

from __future__ import annotations

from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task


def _example(row: Row, index: int, protocol: Protocol) -> Example:
    return Example(str(row["id"]), (("user", row["prompt"]),), fields={"label": row["label"]})


TASK = Task(
    name="xstest",
    about="safe prompts that sound dangerous, and unsafe ones; over-refusal and refusal",
    test=Source("xstest/xstest_v2.jsonl", hub="walledai/XSTest", hub_split="test"),
    train=None,
    columns={"id": (int, str), "prompt": str, "label": str},
    example=_example,
    generation=Generation(256),
    measures=("refusal", "coherence"),
    chat=True,
    behaviour="refuse what would do harm, and nothing else",
)
