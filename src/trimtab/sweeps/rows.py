"""A task's rows, ready to measure many steerings on.

The rows are read once, what the blocks below steerings compute of one-token prompts, of the sides
of pairs and of plain text is kept for the next steering, and the unsteered model is measured once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Part, last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import (
    Attached,
    Judging,
    PreferenceJob,
    Settings,
    TaskJob,
    Wanted,
    check_protocol,
    find_job,
    find_task,
    load_contrast,
    misfit,
)
from trimtab.figures import Record, Result, bare_name, estimate_of, metric_of
from trimtab.model import LanguageModel
from trimtab.options import Answering, Choosing, Rows, flat
from trimtab.reading import Reading, StreamCache, next_tokens
from trimtab.reports import SharedRun
from trimtab.sweeps.effect import plain_texts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How the settings of a method are measured: what makes one better, how a model answers, who
    judges."""

    choosing: Choosing = Choosing()
    answering: Answering = Answering()
    judging: Judging = Judging()


class Bench:
    """Measures steerings on the validation and the test rows of a task.

    `task` is one of ours or contrast:SOURCE; `measured.choosing.validation_task` another one whose
    test rows stand in for the validation rows, for tasks that have none (refusal:FILE). `shuffle`
    is a seed for the order of the validation rows. `resumed` false runs all blocks for every
    steering. The model's weights must stay as they are. `chooses` false: nothing is chosen on the
    validation rows, so that they may be the test rows.
    """

    @flat
    def __init__(
        self,
        language_model: LanguageModel,
        task: str,
        rows: Rows = Rows(limit=None),
        measured: Measured = Measured(),
        *,
        shuffle: int | None = None,
        resumed: bool = True,
        chooses: bool = True,
    ) -> None:
        self.language_model, self.task = language_model, task
        choosing, answering = measured.choosing, measured.answering
        kept = StreamCache(language_model) if resumed else None
        self.settings = Settings(
            answering.seed, answering.batch_size, answering.max_new_tokens, kept=kept
        )
        if choosing.better not in (None, "more", "less"):
            raise TrimtabError(f"better is more or less, not {choosing.better!r}")
        check_protocol(choosing.protocol)
        self._asked, self._better = choosing.metric, choosing.better
        self._unsteered: dict[Part, list[Record]] = {}
        other = choosing.validation_task
        names: dict[Part, str] = {"validation": other or task, "test": task}
        limits: dict[Part, int | None] = {"validation": rows.limit, "test": rows.test_limit}
        self.jobs: dict[Part, TaskJob | PreferenceJob] = {}
        for part, name in names.items():
            source: Part = "test" if part == "validation" and other else part
            wanted = Wanted((choosing.protocol,), source, limits[part], rows.data)
            self.jobs[part] = _job(name, wanted, measured.judging)
        if chooses and other is not None:
            _refuse_shared(task, other, self.jobs)
        if shuffle is not None:
            order = list(range(self.jobs["validation"].rows))
            random.Random(shuffle).shuffle(order)
            self.jobs["validation"] = self.jobs["validation"].shuffled(order)

    def rows(self, part: Part) -> int:
        """How many rows a part has."""
        return self.jobs[part].rows

    def describe(self) -> dict[str, Any]:
        """For the configuration of a run."""
        return {part: job.describe() for part, job in self.jobs.items()}

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        return list(dict.fromkeys(note for job in self.jobs.values() for note in job.notes()))

    @cached_property
    def metric(self) -> str:
        """The metric that counts: by default the first that the task has. Of a metric of which
        there is only one, what stands in brackets need not be said."""
        every = [record["values"] for record in self.unsteered("validation")]
        known: list[str] = list(dict.fromkeys(name for values in every for name in values))
        if not known:
            raise TrimtabError(f"{self.task} rates no single answer: there is nothing to choose by")
        if self._asked is None:
            return known[0]
        if self._asked in known:
            return self._asked
        named = [name for name in known if bare_name(name) == self._asked]
        if len(named) != 1:
            raise TrimtabError(
                f"{self.task} has no metric {self._asked!r}: it has {', '.join(known)}"
            )
        return named[0]

    @property
    def maximise(self) -> bool:
        """Whether more of the metric is better."""
        if self._better is not None:
            return self._better == "more"
        return more_is_better(self.metric)

    def records(
        self,
        steering: Attached,
        part: Part,
        start: int = 0,
        stop: int | None = None,
        name: Any = None,
    ) -> list[Record]:
        """Records of the rows from one to another, under the name of the steering."""
        job = self.jobs[part].part(start, stop if stop is not None else self.rows(part))
        if isinstance(job, TaskJob):
            job.check(steering)
        found: list[Record] = []
        with closing(job.run(self.language_model, steering, set(), self.settings)) as batches:
            for some in batches:
                found += [{**record, "steering": name} for record in some]
        for record in found:
            record["index"] += start
        return sorted(found, key=lambda record: record["index"])

    def unsteered(self, part: Part) -> list[Record]:
        """Records of the unsteered model."""
        if part not in self._unsteered:
            self._unsteered[part] = self.records(None, part)
        return self._unsteered[part]

    def recall(self, part: Part, records: Sequence[Record]) -> None:
        """Take the unsteered model's records from an earlier run, not to run it again."""
        self._unsteered[part] = list(records)

    def kept(self, run: SharedRun, file: str, part: Part, name: Any = None) -> list[Record] | None:
        """Records of all rows of a part under the name of a steering, from a run directory, or
        None; those that are not of these rows are refused."""

        def reason(records: list[Record]) -> str:
            planned = list(self.jobs[part].planned(self.language_model).values())
            if len(records) != len(planned):
                return f"it has {len(records)} records for {len(planned)} rows"
            for index, (record, wanted) in enumerate(zip(records, planned, strict=True)):
                why = misfit(record, wanted if record["index"] == index else None)
                if not why and (record["task"], record["steering"]) != (self.jobs[part].name, name):
                    why = "it is of another task or steering"
                if why:
                    return f"line {index + 1}: {why}"
            return ""

        return run.scored(file, reason)

    def result(self, records: Sequence[Record]) -> Result:
        """The metric over some records of one steering; those without the metric do not count."""
        given = [r["values"][self.metric] for r in records if self.metric in r["values"]]
        clear = [value for value in given if value is not None]
        unclear, first = len(given) - len(clear), records[0]
        name = first["task"], first["protocol"], self.metric
        if not clear:
            return Result(*name, None, 0, None, first["steering"], unclear)
        found = estimate_of(self.metric, clear, None)
        interval = (found.low, found.high)
        return Result(*name, found.value, found.n, interval, first["steering"], unclear)

    # -- what a steering costs on plain text ------------------------------------------------------

    def cost(self, steering: Attached) -> float:
        """How much harder plain text is to predict, in nats per token."""
        return float((self._nll(steering) - self._base_nll).sum() / self._plain_tokens)

    def perplexity(self, cost: float) -> float:
        """Perplexity of the plain text at so many nats more per token."""
        return math.exp(float(self._base_nll.sum()) / self._plain_tokens + cost)

    @cached_property
    def _readings(self) -> list[Reading]:
        found = []
        for tokens in self.language_model.fitting(plain_texts()):
            # Plain text is all prompt, as in metrics.likelihood.cross_entropy; its last token is
            # read, because to a steering it is the last.
            asked = tuple(range(len(tokens) - 1))
            found.append(Reading(tuple(tokens), asked, len(tokens), tuple(tokens[1:])))
        return found

    @cached_property
    def _base_nll(self) -> Tensor:
        return self._nll(None)

    @cached_property
    def _plain_tokens(self) -> int:
        return sum(len(reading.positions) for reading in self._readings)

    def _nll(self, steering: Attached) -> Tensor:
        """Summed negative log-likelihood of each plain text, [texts] in nats."""
        kept = self.settings.kept
        found = torch.zeros(len(self._readings), dtype=torch.float64)
        for batch, some in next_tokens(self.language_model, self._readings, steering, kept=kept):
            found[list(batch.rows)] = torch.stack([-each.log_p.sum() for each in some])
        return found


def more_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric_of(metric).better == "more"


def _job(name: str, wanted: Wanted, judging: Judging) -> TaskJob | PreferenceJob:
    """The job of a part, for tasks that have validation rows."""
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
    job = find_job(name, wanted, judging)
    assert isinstance(job, TaskJob | PreferenceJob)
    return job


def _refuse_shared(
    task: str, validation_task: str, jobs: Mapping[Part, TaskJob | PreferenceJob]
) -> None:
    """Refuse another task whose rows are among those that the choice is reported on."""
    validation, test = jobs["validation"], jobs["test"]
    sides = isinstance(validation, PreferenceJob) and isinstance(test, PreferenceJob)
    known = set(_rows(test, sides))
    shared = sum(row in known for row in _rows(validation, sides))
    if shared:
        raise TrimtabError(
            f"{shared} of the {validation.rows} rows of {validation_task} are among those of "
            f"{task}: what is chosen on rows cannot be reported on them; name another validation "
            "task"
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


def contrast_for(task: str, contrast: Contrast | str | None, data: str | None) -> Contrast:
    """What methods are fitted on: what was named, or the task's own train rows."""
    if isinstance(contrast, Contrast):
        return contrast
    if contrast is not None:
        return load_contrast(contrast, data=data)
    kind, colon, source = task.partition(":")
    if colon and kind == "contrast":
        return load_contrast(source, data=data)
    if colon:
        raise TrimtabError(f"{task} has nothing to fit on: name a contrast")
    return load_contrast(f"task:{task}", data=data)
