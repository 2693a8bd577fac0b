"""Evaluates a model on tasks, unsteered and steered, and compares the two on the same examples.

Every example leaves a record; all figures are computed from the records, so that a run which was
interrupted and continued gives the table of one that was not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.contrasts import Contrast, last_message
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation.answering import OTHERWISE, AnsweredBy, Settings, engine_of
from trimtab.evaluation.drifting import Repeated, drift
from trimtab.evaluation.jobs import (
    Asked,
    HarnessJob,
    Job,
    Judging,
    PreferenceJob,
    TaskJob,
    Wanted,
    find_job,
    misfit,
    task_name,
)
from trimtab.evaluation.metrics.judges import Chat
from trimtab.evaluation.metrics.pairwise import verdicts
from trimtab.evaluation.prompted import Attached, Prompted, steering_of, words_of
from trimtab.evaluation.receipts import receipts
from trimtab.evaluation.rounds import in_turns, one_by_one
from trimtab.evaluation.tasks import check_protocol
from trimtab.figures import Record, more_is_better, paired
from trimtab.model import LanguageModel, check_model
from trimtab.options import Answering, Evaluated, Harness, Keep, flat, record
from trimtab.reports import Evaluation, Picture, Run, Table, evaluation_page, summarise
from trimtab.steering import Steering, Steerings, no_steering, together

#: What is evaluated: one steering (or several that act together, or words before prompts), some
#: alternatives, or alternatives by name.
Alternatives = Attached | Sequence[Steering | Steerings | Prompted] | Mapping[str, Any]


@flat
def evaluate(
    language_model: LanguageModel,
    tasks: Asked | Sequence[Asked],
    *,
    steering: Alternatives = None,
    unsteered: bool = True,
    rows: Evaluated = Evaluated(),
    answering: Answering = AnsweredBy(),
    judging: Judging = Judging(),
    harness: Harness = Harness(),
    keep: Keep = Keep(),
    force: bool = False,
) -> Evaluation:
    """Evaluate a model on tasks, unsteered (unless `unsteered` is false) and steered.

    `tasks` are names of `TASKS`, or refusal:FILE, coherence:FILE, perplexity:FILE, contrast:SOURCE
    (pairs, named as for `load_contrast`), lm-eval:NAME, or a `Contrast`, whose pairs are asked as
    those of contrast:NAME. Where a contrast's rows name no part, the `split` draws them (see
    `Contrast.with_parts`), and a steering that was fitted on rows of the part is said to be.
    `steering` is one steering or `a + b`, or `Prompted` words before each prompt; a list or a
    mapping by name holds alternatives, each evaluated by itself.
    `data` names the directory of data sets (default: TRIMTAB_DATA, else the hub). `limit` takes
    the first examples of each task. `few_shot`, `chat` (through the chat template) and `task_files`
    (directories) are for tasks of lm-eval. `toxicity` names the scorer of detox: offline, detoxify
    or a URL; `judges` say whether a response complies (trimtab.metrics.judges); `preference` is the
    chat model that compares answers (bpo). `receipts` measures side effects beside the tasks, on
    `receipts_limit` rows each: mmlu, gsm8k, xstest, free answers, plain text; `drift` whether what
    steerings and words do lasts, over turns before the prompts of tasks of ours and pairs, and over
    a long text. `output` names a run directory, in which a run that was interrupted goes on.
    `engine` (`tt.VLLM`) runs the model in place of transformers, all of this in one continuous
    batch; what it cannot answer alike (lm-eval, sampled answers) is refused. Drift over a long text
    is read by transformers all the same.
    """
    check_model(language_model)
    asked = [tasks] if isinstance(tasks, str | Contrast) else list(dict.fromkeys(tasks))
    names = _names(asked)
    protocols = tuple(dict.fromkeys(rows.protocol))
    for one in protocols:
        check_protocol(one)
    if not (names or rows.receipts or rows.drift) or not protocols:
        raise TrimtabError(f"there is no {'protocol' if names else 'task'}")
    if rows.limit is not None and rows.limit < 1:
        raise TrimtabError(f"the limit must be 1 or more, not {rows.limit}")
    new_tokens = answering.max_new_tokens
    if answering.batch_size < 1 or (new_tokens is not None and new_tokens < 1):
        raise TrimtabError("the batch size and the number of new tokens must be 1 or more")
    subjects = _subjects(steering, unsteered)
    engine = engine_of(answering)
    for attached in subjects.values():
        with language_model.steered(steering_of(attached), force=force):
            pass  # says at once what does not fit, not after hours
        if engine is not None:
            engine.prepare(together(steering_of(attached)), force=force)
    wanted = Wanted(
        protocols,
        rows.part,
        rows.limit,
        rows.data,
        rows.split,
        harness.few_shot,
        harness.chat,
        tuple(str(directory) for directory in harness.task_files),
        None if keep.output is None else Path(keep.output),
    )
    if rows.drift and set(subjects) == {None}:
        raise TrimtabError("drift is of an effect: name a steering, or words before prompts")
    jobs = [find_job(task, wanted, judging) for task in asked]
    own_jobs = list(jobs)
    missing: list[str] = []
    if rows.receipts:
        more_jobs, missing = receipts(wanted, judging, rows.receipts_limit, names)
        jobs += more_jobs
    for job in jobs:
        if isinstance(job, TaskJob):
            for attached in subjects.values():
                job.check(attached)
    if engine is not None:
        refuse_elsewhere(jobs)
    settings = Settings(answering.seed, answering.batch_size, new_tokens, force, engine=engine)
    preference = judging.preference
    config = {
        "tasks": [job.describe() for job in jobs],
        "protocols": list(protocols),
        **record(rows, answering),
        "preference": None if preference is None else preference.name,
        "model": language_model.described,
        **({} if engine is None else {"engine": engine.name}),
        "steerings": {str(name): _described(attached) for name, attached in subjects.items()},
    }
    notes = list(dict.fromkeys([n for job in jobs for n in job.notes()] + _trained(jobs, subjects)))
    notes += missing
    with Run(keep.output, config, keep.overwrite, alone=True) as run:
        run.check(_reason(language_model, jobs, subjects))
        runs = (
            (name, job.run(language_model, attached, _done(run.records, job.name, name), settings))
            for name, attached in subjects.items()
            for job in jobs
        )
        count = len(subjects) * len(jobs)
        each = one_by_one(runs) if engine is None else in_turns(runs, "evaluating", count)
        # Closed at once if writing fails, or the model would stay steered for a while.
        with closing(each) as batches:
            for name, records in batches:
                if records:
                    run.append([{"steering": name, **record} for record in records])
        for job in jobs:
            if isinstance(job, TaskJob) and job.task.pairwise:
                reason = _incomparable(preference, subjects)
                if reason:
                    notes.append(f"{job.name}: no answers were compared; {reason}")
                elif preference is not None:
                    size = answering.batch_size
                    for records in _preferences(run.records, job.name, preference, size):
                        run.append(records)
        ordered = _in_order(run.records, subjects, jobs, protocols)
        evaluation = summarise(ordered, dict(vars(language_model.identity)), notes)
        if rows.drift:
            evaluation = _with_drift(evaluation, language_model, own_jobs, subjects, settings)
        run.finish(evaluation.as_json(), partial(_page, evaluation, run, subjects))
    return evaluation


def _page(
    evaluation: Evaluation,
    run: Run,
    subjects: Mapping[str | None, Any],
    environment: dict[str, Any],
) -> str:
    from trimtab.evaluation.shown_page import pictures_of, written_table  # loads matplotlib

    more: list[Table | Picture] = [*pictures_of(evaluation, subjects), *written_table(evaluation)]
    return evaluation_page(evaluation, run, environment, more)


def refuse_elsewhere(jobs: Sequence[Job]) -> None:
    """Refuse what an engine would answer otherwise than transformers, or not at all."""
    for job in jobs:
        if isinstance(job, HarnessJob):
            raise TrimtabError(f"{job.name} runs its own way, with transformers: leave it out")
        if isinstance(job, TaskJob) and job.task.generation.sampled:
            raise TrimtabError(f"{job.name} samples its answers, as {OTHERWISE}")


def _with_drift(
    evaluation: Evaluation,
    language_model: LanguageModel,
    jobs: Sequence[Job],
    subjects: Mapping[str | None, Attached],
    settings: Settings,
) -> Evaluation:
    """With how long effects last: on the rows of jobs that words can be put before, by the first
    metric of each."""
    found: list[Repeated] = []
    prompts: list[Any] = []
    notes = list(evaluation.notes)
    for job in jobs:
        of_job = [result.metric for result in evaluation.results if result.task == job.name]
        if isinstance(job, TaskJob | PreferenceJob) and of_job:
            found.append(_repeated(job, language_model, settings, of_job[0]))
            prompts += [row["prompt"] for row in job.planned(language_model).values()]
        else:
            notes.append(f"{job.name}: nothing can be put before its prompts, so no drift over it")
    steered = {str(name): one for name, one in subjects.items() if name is not None}
    chat = any(not isinstance(each, str) for each in prompts) if prompts else language_model.chats
    lasting = drift(language_model, found, steered, chat)
    return replace(evaluation, drift=lasting, notes=tuple(notes))


def _repeated(
    job: TaskJob | PreferenceJob, language_model: LanguageModel, settings: Settings, metric: str
) -> Repeated:
    """The rows of a job under its first protocol, to be asked again."""
    one = replace(job, entries=job.entries[:1]) if isinstance(job, TaskJob) else job

    def records(attached: Attached, name: str | None) -> list[Record]:
        with closing(one.run(language_model, attached, set(), settings)) as batches:
            made = [{**record, "steering": name} for some in batches for record in some]
        return sorted(made, key=lambda record: int(record["index"]))

    return Repeated(job.name, metric, more_is_better(metric), records)


def _names(tasks: Sequence[Asked]) -> list[str]:
    names = [task_name(task) for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise TrimtabError(f"two tasks are called {name!r}: give their contrasts other names")
    return names


def _trained(jobs: Sequence[Job], subjects: Mapping[str | None, Any]) -> list[str]:
    """Which steerings are to answer what they were fitted on, also warned about."""
    said = [
        note
        for job in jobs
        if isinstance(job, PreferenceJob)
        for attached in subjects.values()
        if (note := job.trained(attached))
    ]
    for note in dict.fromkeys(said):
        warnings.warn(note, TrimtabWarning, stacklevel=4)
    return said


def _reason(
    language_model: LanguageModel, jobs: Sequence[Job], subjects: Mapping[str | None, Any]
) -> Callable[[Record], str]:
    """Why a record is none of this evaluation, or nothing."""
    by_name = {job.name: job for job in jobs}
    planned: dict[str, Any] = {}  # made where there are records, because it takes some work

    def reason(record: Record) -> str:
        name = record["task"].removesuffix(_COMPARED)
        if name not in by_name:
            return "its task is none of this run"
        if record["steering"] not in subjects:
            return "its steering is none of this run"
        if name not in planned:
            planned[name] = by_name[name].planned(language_model)
        if planned[name] is None:
            return ""
        return misfit(record, planned[name].get((record["protocol"], record["index"])))

    return reason


def _in_order(
    records: Sequence[Record],
    subjects: Mapping[str | None, Any],
    jobs: Sequence[Job],
    protocols: Sequence[str],
) -> list[Record]:
    """Records as an uninterrupted run has them: by steering, task and protocol."""
    names = [job.name for job in jobs]
    order = {
        (task, protocol, steering): (compared, i, j, k)
        for compared, suffix in enumerate(("", _COMPARED))
        for i, steering in enumerate(subjects)
        for j, task in enumerate(name + suffix for name in names)
        for k, protocol in enumerate(("", *protocols))
    }
    return sorted(records, key=lambda r: order[r["task"], r["protocol"], r["steering"]])


def _done(records: Sequence[Record], task: str, steering: str | None) -> set[tuple[str, int]]:
    """(protocol, index) of what is there already."""
    return {
        (record["protocol"], record["index"])
        for record in records
        if (record["task"], record["steering"]) == (task, steering)
    }


def _incomparable(preference: Chat | None, subjects: Mapping[str | None, Any]) -> str:
    """Why no pairs of answers can be judged, if so."""
    if preference is None:
        return "no judge was named"
    if None not in subjects or len(subjects) == 1:
        return "that takes a steering, and the unsteered model beside it"
    return ""


#: What is added to a task's name where its answers are compared.
_COMPARED = ", compared"


def _preferences(
    records: Sequence[Record], task: str, chat: Chat, batch_size: int
) -> Iterator[list[Record]]:
    """Records of the judge's verdicts on steered against unsteered answers."""
    judged = {
        (record["protocol"], record["steering"], record["index"])
        for record in records
        if record["task"] == task + _COMPARED
    }
    pairs = [
        (before, after)
        for before, after in paired(records)
        if after["task"] == task
        and (after["protocol"], after["steering"], after["index"]) not in judged
    ]
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        started = time.perf_counter()
        found = verdicts(
            chat,
            [
                (last_message(after["prompt"]), _said(after), _said(before))
                for before, after in some
            ],
        )
        seconds = (time.perf_counter() - started) / len(some)
        yield [
            {key: after[key] for key in ("steering", "protocol", "index", "id")}
            | {"task": task + _COMPARED, "values": values, "seconds": round(seconds, 4)}
            for (_, after), values in zip(some, found, strict=True)
        ]


def _said(record: Record) -> str:
    """What was answered, without what was thought before it."""
    return str(record.get("answer", record["output"]))


def _subjects(steering: Alternatives, unsteered: bool) -> dict[str | None, Any]:
    """What is evaluated, by name; None is the unsteered model."""
    subjects: dict[str | None, Any] = {None: None} if unsteered else {}
    if isinstance(steering, Mapping):
        alternatives: list[Any] = list(steering.items())
    elif steering is None:
        alternatives = []
    else:
        single = isinstance(steering, Steering | Steerings | Prompted | str)
        several: Any = [steering] if single else steering
        alternatives = [(getattr(one, "label", ""), one) for one in several]
    for name, one in alternatives:
        if not (isinstance(one, Prompted) or (isinstance(one, Steering | Steerings) and one)):
            raise no_steering(one)
        if name in subjects:
            raise TrimtabError(f"two steerings are called {name!r}: name them, {{name: steering}}")
        subjects[name] = one
    if not subjects:
        raise TrimtabError("there is nothing to evaluate: name a steering, or the unsteered model")
    return subjects


def _described(attached: Attached) -> list[dict[str, Any]]:
    """For the configuration: the steerings, and the words before prompts."""
    found: list[dict[str, Any]] = [
        {"label": one.label, "dial": one.setting, "sha256": one.digest}
        for one in together(steering_of(attached))
    ]
    if isinstance(attached, Prompted) and words_of(attached) is not None:
        found.append({"prompt": attached.text, "examples": len(attached.examples)})
        found[-1]["sha256"] = attached.digest
    return found
