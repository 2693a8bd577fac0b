"""The tasks of the evaluation, by name. One file a task."""

from __future__ import annotations

from trimtab.errors import TrimtabError
from trimtab.tasks import boolq, copa, mawps, svamp, winogrande
from trimtab.tasks.task import PROTOCOLS, Example, Protocol, Task, check_protocol

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (boolq, copa, winogrande, svamp, mawps)
}

__all__ = ["PROTOCOLS", "TASKS", "Example", "Protocol", "Task", "check_protocol", "find_task"]


def find_task(name: str) -> Task:
    """A task by its name."""
    if name not in TASKS:
        raise TrimtabError(f"unknown task {name!r}: known are {', '.join(TASKS)}")
    return TASKS[name]
