"""Receipts: what a steering does beside what it is for, on tasks that have nothing to do with it.

A slice of MMLU, of GSM8K and of XSTest from the user's directory of data sets; neutral questions
(repetition, language) and plain text, which come with trimtab. What is missing is said.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib.resources import files

from trimtab.contrasts import spread
from trimtab.evaluation.jobs import Job, Judging, PerplexityJob, TaskJob, Wanted, find_job
from trimtab.evaluation.tasks import find_task
from trimtab.evaluation.tasks.data import source_file

#: The tasks, and plain text beside them.
_TASKS = ("mmlu", "gsm8k", "xstest", "writing")
PLAIN = "plain text"


def receipts(
    wanted: Wanted, judging: Judging, limit: int, others: Collection[str] = ()
) -> tuple[list[Job], list[str]]:
    """Jobs of so many rows each, spread over what there is, without `others` that are asked
    already; and what is left out, with the reason."""
    jobs: list[Job] = []
    notes = []
    own = replace(wanted, protocols=("trimtab",), part="test", limit=None)
    for name in (name for name in _TASKS if name not in others):
        source = find_task(name).test
        if source_file(source, wanted.data) is None:
            notes.append(
                f"the receipt {name} is left out: it needs {source.file} in the directory of data "
                "sets (--data)"
            )
            continue
        job = find_job(name, own, judging)
        if isinstance(job, TaskJob):
            jobs.append(job.shuffled(spread(range(job.rows), limit)))
    path = str(files("trimtab") / "data" / "plain.txt")
    return [*jobs, PerplexityJob(PLAIN, path, replace(own, limit=limit), by_line=True)], notes
