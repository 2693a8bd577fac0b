"""The tasks of the evaluation, by name: trimtab's own, one file each, and installed packages'."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.contrasts import TABLES, Contrast, builtins, check_contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks import (
    boolq,
    bpo,
    copa,
    detox,
    gsm8k,
    mawps,
    mmlu,
    svamp,
    winogrande,
    writing,
    xstest,
)
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
from trimtab.files import exists, user_path
from trimtab.plugins import Extended

_OWN = (boolq, copa, winogrande, svamp, mawps, detox, bpo, xstest, mmlu, gsm8k, writing)


def _is_task(added: Any, name: str) -> bool:
    return isinstance(added, Task) and added.name == name


TASKS: Mapping[str, Task] = Extended(
    "task", {module.TASK.name: module.TASK for module in _OWN}, _is_task
)


def load_contrast(
    source: str | Path | Contrast,
    *,
    data: str | None = None,
    protocol: str = "trimtab",
    seed: int = 0,
) -> Contrast:
    """`builtin:NAME`, a .jsonl, .json, .csv or .tsv file, `task:NAME` (right against wrong answers
    of a task, by `protocol`, from the data sets in `data`), or `answers:FILE` (rows with prompt and
    answer; the wrong one is another row's, at random by `seed`, or, as `answers-similar:FILE`, the
    most similar one). A contrast is given back as it is."""
    if isinstance(source, Contrast):
        return source
    if isinstance(source, Path):
        source = str(source)
    if not isinstance(source, str):
        check_contrast(source)
    kind, colon, name = source.partition(":")
    if colon and kind == "task":
        check_protocol(protocol)
        return find_task(name, data).contrast(protocol, data, seed)  # type: ignore[arg-type]
    if colon and kind in ("answers", "answers-similar"):
        return read_answers(name, wrong="random" if kind == "answers" else "similar", seed=seed)
    if colon and kind == "builtin":
        return Contrast.builtin(name)
    meant = _meant_contrast(source)
    if meant and not exists(user_path(source)):
        raise TrimtabError(f"there is no file {source!r} with a contrast: did you mean {meant}?")
    return Contrast.from_file(source)


def _meant_contrast(source: str) -> str:
    """What a name that is no file stands for elsewhere, or nothing."""
    kind, colon, name = source.partition(":")
    if colon:
        return name if kind == "contrast" else ""
    known = {each: f"builtin:{each}" for each in builtins()}
    known = {each: f"task:{each}" for each, task in TASKS.items() if task.pairs} | known
    near = difflib.get_close_matches(source, known, n=1, cutoff=0.8)
    return known[near[0]] if near else ""


def find_task(name: str, data: str | None = None) -> Task:
    """A task by its name; `refusal:FILE` and `coherence:FILE` run over the user's own prompts."""
    kind, colon, file = name.partition(":")
    if colon and kind in MEASURES:
        return prompts_task(kind, file, data)
    if name not in TASKS:
        files = (f"{kind}:FILE" for kind in (*MEASURES, "perplexity"))
        known = ", ".join([*TASKS, *files, "contrast:SOURCE", "lm-eval:NAME"])
        meant = _meant_task(name)
        hint = f"did you mean {meant}? " if meant else ""
        raise TrimtabError(f"unknown task {name!r}: {hint}known are {known}")
    return TASKS[name]


def check_task(name: str, data: str | None = None) -> None:
    """Refuse a name that is no task, or whose file is not there, before a model is loaded. What
    lm-eval knows is known when it is loaded."""
    kind, colon, source = name.partition(":")
    if colon and kind == "contrast":
        load_contrast(source, data=data)
    elif not (colon and kind in ("lm-eval", "perplexity")):
        find_task(name, data)


def _meant_task(name: str) -> str:
    """What an unknown task may be, or nothing."""
    if Path(name).suffix.lower() in TABLES:
        return f"contrast:{name} (pairs), or refusal:{name} or coherence:{name} (prompts)"
    if Path(name).suffix.lower() == ".txt":
        return f"refusal:{name} or coherence:{name} (prompts), or perplexity:{name} (text)"
    if name in builtins():
        return f"contrast:builtin:{name}"
    return next(iter(difflib.get_close_matches(name, TASKS, n=1, cutoff=0.6)), "")
