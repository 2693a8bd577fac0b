"""The tasks of the evaluation, by name. One file a task."""

from __future__ import annotations

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.tasks import boolq, bpo, copa, detox, mawps, svamp, winogrande, xstest
from trimtab.tasks.answers import read_answers
from trimtab.tasks.prompts import MEASURES, prompts_task
from trimtab.tasks.task import PROTOCOLS, Example, Protocol, Task, check_protocol

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (boolq, copa, winogrande, svamp, mawps, detox, bpo, xstest)
}

__all__ = [
    "PROTOCOLS",
    "TASKS",
    "Example",
    "Protocol",
    "Task",
    "check_protocol",
    "contrast_of",
    "find_task",
]


def contrast_of(source: str, data: str | None, protocol: str, seed: int) -> Contrast:
    """The contrast of `task:NAME`, `answers:FILE` or `answers-similar:FILE`."""
    kind, _, name = source.partition(":")
    if kind != "task":
        return read_answers(name, wrong="random" if kind == "answers" else "similar", seed=seed)
    check_protocol(protocol)
    return find_task(name, data).contrast(protocol, data, seed)  # type: ignore[arg-type]


def find_task(name: str, data: str | None = None) -> Task:
    """A task by its name; `refusal:FILE` and `coherence:FILE` run over the user's own prompts."""
    kind, colon, file = name.partition(":")
    if colon and kind in MEASURES:
        return prompts_task(kind, file, data)
    if name not in TASKS:
        files = (f"{kind}:FILE" for kind in (*MEASURES, "perplexity"))
        known = ", ".join([*TASKS, *files, "contrast:SOURCE", "lm-eval:NAME"])
        raise TrimtabError(f"unknown task {name!r}: known are {known}")
    return TASKS[name]
