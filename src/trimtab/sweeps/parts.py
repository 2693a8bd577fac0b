"""Which rows of a task stand for which part, and what methods are fitted on for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from trimtab.contrasts import Contrast, Part, last_message, shared_rows
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation import (
    Asked,
    Judging,
    PreferenceJob,
    TaskJob,
    Wanted,
    find_job,
    find_task,
    load_contrast,
    task_name,
)
from trimtab.options import Protocol, Rows, ValidationRows


def jobs_of(
    asked: Asked, validation: Asked | None, rows: Rows, protocol: Protocol, judging: Judging
) -> dict[Part, TaskJob | PreferenceJob]:
    """The job of each part: its own rows, or of the validation part the test rows of another task
    that stands in for them."""
    tasks: dict[Part, Asked] = {
        "validation": asked if validation is None else validation,
        "test": asked,
    }
    limits: dict[Part, int | None] = {"validation": rows.limit, "test": rows.test_limit}
    jobs: dict[Part, TaskJob | PreferenceJob] = {}
    for part, one in tasks.items():
        source: Part = "test" if part == "validation" and validation is not None else part
        wanted = Wanted((protocol,), source, limits[part], rows.data, rows.split)
        jobs[part] = _job(one, wanted, judging)
    return jobs


def _job(task: Asked, wanted: Wanted, judging: Judging) -> TaskJob | PreferenceJob:
    """The job of a part, for tasks that have validation rows."""
    name = task_name(task)
    kind = name.partition(":")[0]
    if kind in ("lm-eval", "perplexity"):
        raise TrimtabError(
            f"{name} has no validation rows to choose on: choose a task with a train part, or "
            "contrast:SOURCE"
        )
    trained = kind == "contrast" or find_task(name, wanted.data).train is not None
    if wanted.part == "validation" and not trained:
        raise TrimtabError(
            f"{name} has no validation rows to choose on: name another task whose rows stand in "
            "for them (--validation-task)"
        )
    job = find_job(task, wanted, judging)
    assert isinstance(job, TaskJob | PreferenceJob)
    return job


def refuse_shared(jobs: Mapping[Part, TaskJob | PreferenceJob]) -> None:
    """Refuse another task whose rows are among those that the choice is reported on."""
    validation, test = jobs["validation"], jobs["test"]
    sides = isinstance(validation, PreferenceJob) and isinstance(test, PreferenceJob)
    known = set(_rows(test, sides))
    shared = sum(row in known for row in _rows(validation, sides))
    if shared:
        raise TrimtabError(
            f"{shared} of the {validation.rows} rows of {validation.name} are among those of "
            f"{test.name}: what is chosen on rows cannot be reported on them; name another "
            "validation task"
        )


def _rows(job: TaskJob | PreferenceJob, sides: bool) -> list[Any]:
    """What tells rows apart, in whatever file they are: their prompts, with both sides of pairs.

    One task asks as text what another asks in a conversation, so the last message counts.
    """
    if isinstance(job, TaskJob):
        return [_bare(example.prompt) for example in job.entries[0].examples]
    return [
        (_bare(pair.prompt), _bare(pair.positive), _bare(pair.negative))
        if sides
        else _bare(pair.prompt)
        for pair in job.pairs
    ]


def _bare(prompt: Any) -> str:
    """A prompt's last message without the blanks that files differ in."""
    return " ".join(last_message(prompt).split())


def contrast_for(task: Asked, contrast: Contrast | str | None, rows: ValidationRows) -> Contrast:
    """What methods are fitted on: what was named, or the task's own train rows.

    Of a task that is a contrast these are the rows that its parts, or else the split, have for
    train, also where the same contrast is named once more. Another contrast is fitted on as it is;
    that its rows are among the test rows is warned about.
    """
    own = _own_contrast(task, rows)
    if contrast is None and own is not None:
        return own
    if contrast is None:
        name = task_name(task)
        if ":" in name:
            raise TrimtabError(f"{name} has nothing to fit on: name a contrast")
        return load_contrast(f"task:{name}", data=rows.data)
    given = load_contrast(contrast, data=rows.data)
    if own is None:
        return given
    if given.digest == own.digest and not given.has_parts:
        return own
    tested = [row for row in own.rows if row.part == "test"]
    shared = shared_rows(tested, given.train.rows)
    if shared:
        warnings.warn(
            f"{shared} of the {len(tested)} test rows of {task_name(task)} are among the rows of "
            f"{given.name} that methods are fitted on: what they do there says nothing of others",
            TrimtabWarning,
            stacklevel=2,
        )
    return given


def _own_contrast(task: Asked, rows: ValidationRows) -> Contrast | None:
    """The contrast that a task is, with its parts."""
    if not isinstance(task, Contrast):
        kind, _, source = task.partition(":")
        if kind != "contrast":
            return None
        task = load_contrast(source, data=rows.data)
    return task.with_parts(rows.split)
