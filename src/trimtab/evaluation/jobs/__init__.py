"""The work of an evaluation, one job for each task: what its records are and how they are made.

Every job has a `name`, says what it is for the record (`describe`), and `run`s: records of one
model, steered or not, a batch at a time, without those that are there already.
"""

from __future__ import annotations

import json

from trimtab.contrasts import Contrast
from trimtab.evaluation.jobs.harness import HarnessJob
from trimtab.evaluation.jobs.job import Asked, Attached, Done, Job, Judging, Planned, Wanted
from trimtab.evaluation.jobs.perplexity import PerplexityJob
from trimtab.evaluation.jobs.preference import PreferenceJob
from trimtab.evaluation.jobs.task import TaskJob
from trimtab.evaluation.tasks import find_task
from trimtab.figures import Record


def misfit(record: Record, planned: Record | None) -> str:
    """Why a record is not that of the example that is planned in its place, or nothing."""
    if planned is None:
        return "it has the index of no example"
    for key, value in planned.items():
        if key in record and record[key] != json.loads(json.dumps(value)):
            return f"it is not of the example with its index ({key})"
    if record.get("figures"):
        return "it has figures of a whole task, and is of one example"
    return ""


def task_name(task: Asked) -> str:
    """What a task is called in tables and records."""
    return f"contrast:{task.name}" if isinstance(task, Contrast) else task


def find_job(task: Asked, wanted: Wanted, judging: Judging) -> Job:
    """The job of a task by its name, or of a contrast."""
    name = task_name(task)
    if isinstance(task, Contrast):
        return PreferenceJob.of(name, task, wanted)
    kind, colon, rest = name.partition(":")
    if colon and kind == "lm-eval":
        return HarnessJob(name, rest, wanted)
    if colon and kind == "perplexity":
        return PerplexityJob(name, rest, wanted)
    if colon and kind == "contrast":
        return PreferenceJob.of(name, rest, wanted)
    return TaskJob.of(find_task(name, wanted.data), wanted, judging)
