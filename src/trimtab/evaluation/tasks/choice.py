"""How the tasks whose answer is one word are read: the whole output, in any case."""

from __future__ import annotations

from trimtab.evaluation.tasks.task import Protocol


def read_choice(output: str, protocol: Protocol) -> str | None:
    """The output without the space around it; None where nothing was written."""
    return output.strip() or None


def same_choice(prediction: str | float | None, target: str | float | None) -> bool:
    """Whether the whole output is the answer, whatever its case."""
    return str(prediction).lower() == str(target).lower()
