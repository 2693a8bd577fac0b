"""The tasks of the evaluation, by name: trimtab's own, one file each, and installed packages'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks import boolq, bpo, copa, detox, mawps, svamp, winogrande, xstest
from trimtab.evaluation.tasks.answers import read_answers
from trimtab.evaluation.tasks.data import Row, Source
from trimtab.evaluation.tasks.prompts import MEASURES, prompts_task
from trimtab.evaluation.tasks.task import (
    PROTOCOLS,
    Example,
    Generation,
    Protocol,
    Task,
    check_protocol,
)
from trimtab.plugins import Extended

_OWN = (boolq, copa, winogrande, svamp, mawps, detox, bpo, xstest)


def _is_task(added: Any, name: str) -> bool:
    return isinstance(added, Task) and added.name == name


TASKS: Mapping[str, Task] = Extended(
    "task", {module.TASK.name: module.TASK for module in _OWN}, _is_task
)


def load_contrast(
    source: str, *, data: str | None = None, protocol: str = "trimtab", seed: int = 0
) -> Contrast:
    """`builtin:NAME`, a .jsonl or .csv file, `task:NAME` (right against wrong answers of a task, by
    `protocol`, from the data sets in `data`), or `answers:FILE` (rows with prompt and answer; the
    wrong one is another row's, at random by `seed`, or, as `answers-similar:FILE`, the most similar
    one)."""
    kind, colon, name = source.partition(":")
    if colon and kind == "task":
        check_protocol(protocol)
        return find_task(name, data).contrast(protocol, data, seed)  # type: ignore[arg-type]
    if colon and kind in ("answers", "answers-similar"):
        return read_answers(name, wrong="random" if kind == "answers" else "similar", seed=seed)
    if colon and kind == "builtin":
        return Contrast.builtin(name)
    return Contrast.from_csv(source) if source.endswith(".csv") else Contrast.from_jsonl(source)


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
