"""A task's rows, ready to measure many steerings on.

The rows are read once, what the blocks below steerings compute of one-token prompts, of the sides
of pairs and of plain text is kept for the next steering, and the unsteered model is measured once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.contrasts import Part, Prompt
from trimtab.errors import TrimtabError
from trimtab.evaluation import (
    Asked,
    Attached,
    Judging,
    PreferenceJob,
    Sample,
    Settings,
    TaskJob,
    check_protocol,
    engine_of,
    kept_samples,
    misfit,
    samples,
    steering_of,
    task_name,
    words_of,
)
from trimtab.figures import Difference, Record, Result, bare_name, estimate_of, more_is_better
from trimtab.model import LanguageModel
from trimtab.options import Answering, Choosing, Rows, flat
from trimtab.reading import Reading, ScaledUnit, StreamCache, next_tokens, scaled_log_p
from trimtab.reports import Run, object_in
from trimtab.steering import Steering
from trimtab.sweeps.ahead import Ahead
from trimtab.sweeps.parts import jobs_of, refuse_shared
from trimtab.sweeps.plain_text import PlainText
from trimtab.sweeps.values import (
    FINE,
    Values,
    difference_of,
    is_rate,
    readings_for,
    values_of,
)

#: Characters of a token, at least: what answers are taken to be long by.
_CHARACTERS = 2
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How the settings of a method are measured: what makes one better, how a model answers, who
    judges."""

    choosing: Choosing = Choosing()
    answering: Answering = Answering()
    judging: Judging = Judging()


class TaskRows:
    """Measures steerings, and words before prompts, on the validation and test rows of a task.

    `asked` is a task of ours, contrast:SOURCE or a contrast, and `task` its name;
    `measured.choosing.validation_task` is another one whose test rows stand in for the validation
    rows, for tasks that have none (refusal:FILE). `shuffle`
    is a seed for the order of the validation rows. `resumed` false runs all blocks for every
    steering. The model's weights must stay as they are. `chooses` false: nothing is chosen on the
    validation rows, so that they may be the test rows.
    """

    @flat
    def __init__(
        self,
        language_model: LanguageModel,
        asked: Asked,
        rows: Rows = Rows(limit=None),
        measured: Measured = Measured(),
        *,
        shuffle: int | None = None,
        resumed: bool = True,
        chooses: bool = True,
    ) -> None:
        self.language_model, self.task = language_model, task_name(asked)
        choosing, answering = measured.choosing, measured.answering
        self.engine = engine_of(answering)
        kept = StreamCache(language_model) if resumed and self.engine is None else None
        self.settings = Settings(
            answering.seed,
            answering.batch_size,
            answering.max_new_tokens,
            kept=kept,
            engine=self.engine,
        )
        #: What steerings, and words before it, cost on plain text.
        self.plain = PlainText(language_model, kept, self.engine)
        self._ahead = Ahead(self)
        if choosing.better not in (None, "more", "less"):
            raise TrimtabError(f"better is more or less, not {choosing.better!r}")
        check_protocol(choosing.protocol)
        self._asked, self._better = choosing.metric, choosing.better
        self._unsteered: dict[Part, list[Record]] = {}
        self._unsteered_values: dict[Part, Values] = {}
        #: By part, and by the words before its prompts.
        self._readings_of: dict[tuple[Part, Any], list[Reading] | None] = {}
        other = choosing.validation_task
        self.jobs = jobs_of(asked, other, rows, choosing.protocol, measured.judging)
        if chooses and other is not None:
            refuse_shared(self.jobs)
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
    def words(self) -> Any:
        """The task, or the contrast, that says in words what is asked for (`behaviour`,
        `opposite`), if it does."""
        job = self.jobs["test"]
        return job.task if isinstance(job, TaskJob) else job.contrast

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
        found: list[Record] | None = None
        if start == 0 and stop in (None, self.rows(part)):
            found = self._ahead.records(steering, part)
        if found is None:
            found = []
            with closing(self.work(steering, part, start, stop)) as batches:
                for some in batches:
                    found += some
        named = [{**record, "steering": name, "index": record["index"] + start} for record in found]
        return sorted(named, key=lambda record: record["index"])

    def work(
        self, steering: Attached, part: Part, start: int = 0, stop: int | None = None
    ) -> Generator[list[Record]]:
        """Records of these rows, counted from 0, a batch at a time."""
        job = self.jobs[part].part(start, stop if stop is not None else self.rows(part))
        if isinstance(job, TaskJob):
            job.check(steering)
        yield from job.run(self.language_model, steering, set(), self.settings)

    def ask_ahead(
        self, steerings: Sequence[Steering], parts: Sequence[Part], max_cost: float | None
    ) -> None:
        """Of an engine: what all of some steerings come to, in one continuous batch, for those who
        ask about each of them next; rows only of those that keep the limit of cost."""
        self._ahead.ask(steerings, parts, max_cost)

    def unsteered(self, part: Part) -> list[Record]:
        """Records of the unsteered model."""
        if part not in self._unsteered:
            self._unsteered[part] = self.records(None, part)
        return self._unsteered[part]

    def recall(self, part: Part, records: Sequence[Record]) -> None:
        """Take the unsteered model's records from an earlier run, not to run it again."""
        self._unsteered[part] = list(records)

    def kept(self, run: Run, file: str, part: Part, name: Any = None) -> list[Record] | None:
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

    def recorded(
        self, run: Run | None, file: str, steering: Attached, part: Part, name: Any = None
    ) -> list[Record]:
        """Records of all rows of a part, from a run directory, or made and kept there."""
        kept = None if run is None else self.kept(run, file, part, name)
        if kept is not None:
            return kept
        if steering is None:
            made = self.unsteered(part)
        else:
            made = self.records(steering, part, name=name)
        if run is not None:
            run.keep(file, made)
        return made

    def result(self, records: Sequence[Record]) -> Result:
        """The metric over some records of one steering; those without the metric do not count."""
        given = [r["values"][self.metric] for r in records if self.metric in r["values"]]
        clear = [value for value in given if value is not None]
        unclear, first = len(given) - len(clear), records[0]
        name = first["task"], first["protocol"], self.metric
        if not clear:
            return Result(*name, None, 0, None, first["steering"], unclear)
        mean = estimate_of(self.metric, clear)
        return Result(*name, mean.value, mean.n, mean.ci95, first["steering"], unclear)

    # -- row by row ------------------------------------------------------------------------------

    def values(self, steering: Attached, part: Part = "validation") -> Values:
        """The rows of a part under a steering: each metric's values, [rows] in float64, NaN where
        an answer was not clear.

        A choice of one token is right or wrong, which is coarse; of such tasks the same pass also
        says by how many nats the right answer is ahead (log_odds).
        """
        if steering is None and part in self._unsteered_values:
            return self._unsteered_values[part]
        readings = self._asked_readings(part, steering)
        if readings is None:
            values: Values = values_of(self.records(steering, part))
        elif isinstance(self.jobs[part], PreferenceJob):
            values = self._preferred(readings, steering)
        else:
            values = self._chosen(readings, steering, part)
        if steering is None:
            self._unsteered_values[part] = values
        return values

    def _chosen(self, readings: Sequence[Reading], steering: Attached, part: Part) -> Values:
        """One-token choices: whether the most probable token is right, and by how many nats the
        right answer is ahead."""
        lm, job, kept = self.language_model, self.jobs[part], self.settings.kept
        assert isinstance(job, TaskJob)
        job.check(steering)
        entry, task = job.entries[0], job.task
        read: Any = task.read
        right = torch.zeros(len(readings), dtype=torch.float64)
        ahead = torch.zeros(len(readings), dtype=torch.float64)
        for batch, answers in next_tokens(lm, readings, steering_of(steering), kept=kept):
            for i, answer in zip(batch.rows, answers, strict=True):
                text = lm.tokenizer.decode([int(answer.best[0])], skip_special_tokens=True)
                right[i] = task.right(read(text, entry.protocol), entry.examples[i].target)
                ahead[i] = answer.log_p[0] - answer.log_p[1]
        return {"accuracy": right, FINE: ahead}

    def _preferred(self, readings: Sequence[Reading], steering: Attached) -> Values:
        """Pairs, of which each has two readings: by how many nats the positive side is ahead, and
        whether it is."""
        kept, log_p = self.settings.kept, torch.zeros(len(readings), dtype=torch.float64)
        steered = steering_of(steering)
        for batch, sides in next_tokens(self.language_model, readings, steered, kept=kept):
            log_p[list(batch.rows)] = torch.stack([side.log_p.sum() for side in sides])
        ahead = log_p[0::2] - log_p[1::2]
        return {FINE: ahead, "prefers": (ahead > 0).double()}

    def scaled(self, units: Sequence[ScaledUnit], part: Part = "validation") -> Tensor:
        """By how many nats the right answer is ahead with one unit scaled at a time, [units, rows];
        units are rows of a batch. Only of tasks that have that metric (`fine`)."""
        readings = self._asked_readings(part, None)
        if readings is None:
            raise TrimtabError(f"{self.task} is answered in words: it has no {FINE}")
        if isinstance(self.jobs[part], TaskJob):  # which ask for the right answer and the wrong
            readings = [
                replace(one, positions=(position,), targets=(target,))
                for one in readings
                for position, target in zip(one.positions, one.targets or (), strict=True)
            ]
        log_p = scaled_log_p(self.language_model, readings, units)[1:]
        return log_p[:, 0::2] - log_p[:, 1::2]

    def _asked_readings(self, part: Part, attached: Attached) -> list[Reading] | None:
        """What is read of each row with the words before it, made once; None where answers are
        written."""
        key = part, words_of(attached)
        if key not in self._readings_of:
            self._readings_of[key] = readings_for(
                self.language_model, self.jobs[part], part, attached
            )
        return self._readings_of[key]

    def change(self, values: Values, metric: str, part: Part = "validation") -> Difference:
        """Against the unsteered model."""
        more = self.maximise if metric == self.metric else more_is_better(metric)
        return difference_of(self.values(None, part)[metric], values[metric], more=more)

    @property
    def first(self) -> str:
        """The first metric that the task has, row by row."""
        return next(iter(self.values(None)))

    @property
    def rate(self) -> str | None:
        """The metric by which a row is right or wrong, if there is one."""
        values = self.values(None)
        names = ("accuracy", "prefers", self.first)
        return next((name for name in names if name in values and is_rate(values[name])), None)

    @property
    def fine(self) -> str | None:
        """The metric in nats, if there is one."""
        return FINE if FINE in self.values(None) else None

    def targets(self, part: Part = "validation") -> list[Any]:
        """The right answer of each row, where there is one."""
        job = self.jobs[part]
        if isinstance(job, TaskJob):
            return [example.target for example in job.entries[0].examples]
        return [None] * job.rows

    def prompts(self, most: int, part: Part = "validation") -> list[Prompt]:
        """The first prompts of a part, each once, for budgets and times."""
        job = self.jobs[part]
        if isinstance(job, TaskJob):
            return [example.prompt for example in job.entries[0].examples][:most]
        return list(dict.fromkeys(pair.prompt for pair in job.pairs))[:most]

    @property
    def asks_chats(self) -> bool:
        """Whether its prompts are conversations."""
        return any(not isinstance(prompt, str) for prompt in self.prompts(8, "test"))

    def every_prompt(self) -> list[Prompt]:
        """The prompts of both parts."""
        return [*self.prompts(sys.maxsize), *self.prompts(sys.maxsize, "test")]

    @property
    def new_tokens(self) -> int:
        """How many tokens are written after a prompt at most."""
        job = self.jobs["test"]
        if not isinstance(job, TaskJob):
            longest = (max(len(pair.positive), len(pair.negative)) for pair in job.pairs)
            return max(longest) // _CHARACTERS
        named = self.language_model.anatomy.name
        return self.settings.max_new_tokens or job.task.generation.tokens_for(named)

    def samples(self, steerings: Mapping[str, Any], run: Run) -> tuple[Sample, ...]:
        """What the model writes on some test prompts, unsteered and under each steering; from the
        results of the run where it is finished."""
        results = None if run.path is None else object_in(run.path / "results.json")
        kept = kept_samples(results, steerings)
        if kept:
            return kept
        planned = self.jobs["test"].planned(self.language_model).values()
        return samples(self.language_model, steerings, [row["prompt"] for row in planned])


def choose(tried: Iterable[T], value: Callable[[T], float | None], maximise: bool) -> T | None:
    """What is best by its value, the first of those that are equal; None where none has one."""
    valued = [(each, known) for each in tried if (known := value(each)) is not None]
    sign = -1 if maximise else 1
    return min(valued, key=lambda pair: sign * pair[1], default=(None, None))[0]
