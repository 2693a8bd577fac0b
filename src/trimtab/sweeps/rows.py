"""A task's rows, ready to measure many steerings on.

The rows are read once, what the blocks below steerings compute of one-token prompts, of the sides
of pairs and of plain text is kept for the next steering, and the unsteered model is measured once.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Part, Prompt, last_message, shared_rows
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation import (
    Asked,
    Attached,
    Judging,
    PreferenceJob,
    Sample,
    Settings,
    TaskJob,
    Wanted,
    asked_with,
    check_protocol,
    engine_of,
    find_job,
    find_task,
    kept_samples,
    load_contrast,
    misfit,
    samples,
    steering_of,
    task_name,
    with_words,
    words_of,
)
from trimtab.figures import (
    Difference,
    Estimate,
    Record,
    Result,
    bare_name,
    estimate_of,
    metric_of,
    paired_difference,
    weighted_interval,
)
from trimtab.model import LanguageModel
from trimtab.options import Answering, Choosing, Rows, ValidationRows, flat
from trimtab.reading import (
    Reading,
    ScaledUnit,
    StreamCache,
    next_tokens,
    plain_texts,
    scaled_log_p,
    side_readings,
)
from trimtab.reports import Run, object_in
from trimtab.steering import Steering
from trimtab.sweeps.ahead import Ahead

#: Characters of a token, at least: what answers are taken to be long by.
_CHARACTERS = 2
#: How far the right answer is ahead of the wrong one, in nats.
FINE = "log_odds"
#: Values of each metric, row by row; NaN where an answer was not clear.
Values = Mapping[str, Tensor]
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
        self._ahead = Ahead(self)
        if choosing.better not in (None, "more", "less"):
            raise TrimtabError(f"better is more or less, not {choosing.better!r}")
        check_protocol(choosing.protocol)
        self._asked, self._better = choosing.metric, choosing.better
        self._unsteered: dict[Part, list[Record]] = {}
        self._unsteered_values: dict[Part, Values] = {}
        self._kept_of_some: dict[int, StreamCache] = {}
        #: By part, and by the words before its prompts.
        self._readings_of: dict[tuple[Part, Any], list[Reading] | None] = {}
        other = choosing.validation_task
        tasks: dict[Part, Asked] = {"validation": asked if other is None else other, "test": asked}
        limits: dict[Part, int | None] = {"validation": rows.limit, "test": rows.test_limit}
        self.jobs: dict[Part, TaskJob | PreferenceJob] = {}
        for part, one in tasks.items():
            source: Part = "test" if part == "validation" and other is not None else part
            wanted = Wanted((choosing.protocol,), source, limits[part], rows.data, rows.split)
            self.jobs[part] = _job(one, wanted, measured.judging)
        if chooses and other is not None:
            _refuse_shared(self.jobs)
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
            self._readings_of[key] = _readings_for(
                self.language_model, self.jobs[part], part, attached
            )
        return self._readings_of[key]

    def change(self, values: Values, metric: str, part: Part = "validation") -> Difference:
        """Against the unsteered model."""
        return difference_of(self.values(None, part)[metric], values[metric])

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

    # -- what a steering costs on plain text ------------------------------------------------------

    def text_costs(self, steering: Attached, texts: int | None = None) -> Tensor:
        """How many nats each plain text gets harder to predict, [texts]: all, or the first
        `texts`, for who looks for a dial."""
        base = self._base_nll[:texts]  # first, so that it is the same whatever is steered
        return self._nll(steering, texts) - base

    def text_tokens(self, texts: int | None = None) -> Tensor:
        """How many tokens of each plain text are predicted, [texts] in float64."""
        tokens = [len(reading.positions) for reading in self._readings[:texts]]
        return torch.tensor(tokens, dtype=torch.float64)

    def cost(self, steering: Attached, texts: int | None = None) -> float:
        """How much harder plain text is to predict, in nats per token: all of it, or the first
        `texts`, for who looks for a dial."""
        return float(self.text_costs(steering, texts).sum() / self.text_tokens(texts).sum())

    def cost_interval(self, steering: Attached) -> Estimate:
        """The same with its 95 % interval (bootstrap over texts); n is how many texts there are."""
        return cost_interval(self.text_costs(steering), self.text_tokens())

    def perplexity(self, cost: float) -> float:
        """Perplexity of the plain text at so many nats more per token."""
        return math.exp(float(self._base_nll.sum()) / self._plain_tokens + cost)

    @cached_property
    def _readings(self) -> list[Reading]:
        found = []
        lm = self.language_model
        # A model may take shorter texts than there are.
        for tokens in (each[: lm.max_length] for each in lm.encode(plain_texts())):
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

    def _kept_of(self, count: int | None) -> StreamCache | None:
        """What is kept of the first `count` plain texts: of so many by themselves, since what runs
        together is rounded together, and is to be the same whatever was asked before."""
        if count is None or self.settings.kept is None:
            return self.settings.kept
        if count not in self._kept_of_some:
            self._kept_of_some[count] = StreamCache(self.language_model)
        return self._kept_of_some[count]

    def _nll(self, steering: Attached, count: int | None = None) -> Tensor:
        """Summed negative log-likelihood of each plain text, [texts] in nats; of words before it
        none is scored."""
        ahead = None if count is not None else self._ahead.nll(steering)
        if ahead is not None:
            return ahead
        if self.engine is not None:
            return self._ahead.summed(self.plain_work(steering, count), count)
        lm = self.language_model
        readings = with_words(lm, steering, self._readings[:count])
        kept = self._kept_of(count)
        found = torch.zeros(len(readings), dtype=torch.float64)
        for batch, some in next_tokens(lm, readings, steering_of(steering), kept=kept):
            found[list(batch.rows)] = torch.stack([-each.log_p.sum() for each in some])
        return found

    def plain_work(
        self, steering: Attached, count: int | None = None
    ) -> Generator[list[tuple[int, float]]]:
        """Of an engine: the same, some texts at a time, by their place."""
        assert self.engine is not None
        readings = with_words(self.language_model, steering, self._readings[:count])
        for batch, some in self.engine.next_tokens(readings, steering_of(steering), in_turns=True):
            sums = [float(-each.log_p.sum()) for each in some]
            yield list(zip(batch.rows, sums, strict=True))

    @property
    def plain_count(self) -> int:
        """How many plain texts there are."""
        return len(self._readings)


def cost_interval(costs: Tensor, tokens: Tensor) -> Estimate:
    """Nats per token of plain texts, [texts] each, with the 95 % interval."""
    return weighted_interval(costs / tokens, tokens)


def more_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric_of(metric).better == "more"


def choose(tried: Iterable[T], value: Callable[[T], float | None], maximise: bool) -> T | None:
    """What is best by its value, the first of those that are equal; None where none has one."""
    valued = [(each, known) for each in tried if (known := value(each)) is not None]
    sign = -1 if maximise else 1
    return min(valued, key=lambda pair: sign * pair[1], default=(None, None))[0]


# -- values row by row ----------------------------------------------------------------------------


def is_rate(values: Tensor) -> bool:
    """Whether each value says right or wrong."""
    clear = values[~values.isnan()]
    return bool(((clear == 0) | (clear == 1)).all())


def mean_of(metric: str, values: Tensor) -> Estimate:
    """The mean over the rows that were clear, with its interval."""
    clear = values[~values.isnan()]
    if not len(clear):
        raise TrimtabError(f"no answer was clear, so {metric} has no value")
    return estimate_of(metric, clear.tolist())


def difference_of(before: Tensor, after: Tensor) -> Difference:
    """`after` minus `before`, [rows] each, over the rows that are clear in both."""
    both = ~(before.isnan() | after.isnan())
    if not both.any():
        raise TrimtabError("no row is clear with and without steering: there is nothing to compare")
    return paired_difference((after - before)[both], flips=is_rate(before) and is_rate(after))


def values_of(records: Sequence[Record]) -> dict[str, Tensor]:
    """Each metric's values, [rows] in float64; NaN where an answer was not clear."""
    names = dict.fromkeys(name for record in records for name in record["values"])
    rows = [{name: record["values"].get(name) for name in names} for record in records]
    return {
        name: torch.tensor(
            [math.nan if row[name] is None else row[name] for row in rows], dtype=torch.float64
        )
        for name in names
    }


def _readings_for(
    language_model: LanguageModel, job: Any, part: Part, attached: Attached
) -> list[Reading] | None:
    """What the rows ask of a model where no text is written: both sides of each pair, or at the end
    of a prompt the right and the wrong answer; None where answers have to be written."""
    if isinstance(job, PreferenceJob):
        return job.readings(language_model, attached)
    return _choices(language_model, job, part, attached) if isinstance(job, TaskJob) else None


def _choices(
    language_model: LanguageModel, job: TaskJob, part: Part, attached: Attached
) -> list[Reading] | None:
    """Readings that ask for the right and the wrong answer at the prompt's last token; None where
    the task is no choice between two answers of one token."""
    task, entry = job.task, job.entries[0]
    if task.generation.new_tokens != 1 or not task.options or not task.pairs or not task.read:
        return None
    rows = task.rows(part, entry.protocol, job.wanted.data)[: job.wanted.limit]
    pairs = task.pairs(rows, entry.protocol, 0)
    prompts = [example.prompt for example in entry.examples]
    if [pair.prompt for pair in pairs] != prompts:
        return None
    asked = asked_with(language_model, attached, prompts)
    put = (replace(pair, prompt=prompt) for pair, prompt in zip(pairs, asked, strict=True))
    sides = side_readings(language_model, Contrast(tuple(put), task.name))
    readings = []
    for right, wrong, tokens in zip(
        sides[0::2], sides[1::2], language_model.encode(asked), strict=True
    ):
        last = (len(tokens) - 1,)
        if not (right.tokens == wrong.tokens == tuple(tokens)):
            return None
        if not (right.positions == wrong.positions == last):
            return None
        targets = (right.targets or ()) + (wrong.targets or ())
        readings.append(Reading(right.tokens, last * 2, len(tokens), targets))
    return readings


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


def _refuse_shared(jobs: Mapping[Part, TaskJob | PreferenceJob]) -> None:
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
