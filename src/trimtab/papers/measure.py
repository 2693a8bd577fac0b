"""What analyses measure steerings by: the rows of a task, and how they change.

A choice of one token is right or wrong, which is coarse; the same pass also says by how many nats
the right answer is ahead of the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab import options
from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached, TaskJob
from trimtab.figures import Estimate, estimate_of, mean_interval, paired_p
from trimtab.model import LanguageModel
from trimtab.reading import Reading, next_tokens, side_readings
from trimtab.sweeps import Bench, Measured, more_is_better

#: How far the right answer is ahead of the wrong one, in nats.
FINE = "log_odds"
#: Values of each metric, row by row; NaN where an answer was not clear.
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """One steering against another on the same rows, with a paired bootstrap interval (95 %).

    Of a metric that is right or wrong `gained` and `lost` count the flips and `p` is McNemar's
    exact test; of another one `p` is Wilcoxon's signed-rank test.
    """

    difference: float
    ci95: tuple[float, float]
    n: int
    p: float
    gained: int | None = None
    lost: int | None = None


class Rows:
    """The validation and test rows of a task, measured under any steering.

    The lower blocks run once for all steerings, as in `Bench`.
    """

    @options.flat
    def __init__(
        self,
        language_model: LanguageModel,
        task: str,
        rows: options.Rows = options.Rows(),
        *,
        seed: int = 0,
    ) -> None:
        self.language_model, self.task = language_model, task
        measured = Measured(answering=options.Answering(seed=seed))
        self.bench = Bench(language_model, task, rows, measured)
        self._choices: dict[Part, list[Reading] | None] = {}
        self._unsteered: dict[Part, Values] = {}

    @property
    def metric(self) -> str:
        """The metric that settings are chosen by: the first that the task has."""
        return next(iter(self.unsteered()))

    @property
    def maximise(self) -> bool:
        """Whether more of the metric is better."""
        return more_is_better(self.metric)

    @property
    def rate(self) -> str | None:
        """The metric by which a row is right or wrong, if there is one."""
        names = ("accuracy", "prefers", self.metric)
        found = self.unsteered()
        return next((name for name in names if name in found and is_rate(found[name])), None)

    @property
    def fine(self) -> str | None:
        """The metric in nats, if there is one."""
        return FINE if FINE in self.unsteered() else None

    def count(self, part: Part = "validation") -> int:
        """How many rows a part has."""
        return self.bench.rows(part)

    def targets(self, part: Part = "validation") -> list[Any]:
        """The right answer of each row, where there is one."""
        job = self.bench.jobs[part]
        if isinstance(job, TaskJob):
            return [example.target for example in job.entries[0].examples]
        return [None] * job.rows

    def unsteered(self, part: Part = "validation") -> Values:
        """The unsteered model."""
        if part not in self._unsteered:
            self._unsteered[part] = self.values(None, part)
        return self._unsteered[part]

    def values(self, steering: Attached, part: Part = "validation") -> Values:
        """The rows of a part under a steering: each metric's values, [rows] in float64."""
        if part not in self._choices:
            self._choices[part] = _choices(self.language_model, self.bench.jobs[part], part)
        readings = self._choices[part]
        if readings is not None:
            return self._chosen(readings, steering, part)
        records = self.bench.records(steering, part)
        names = dict.fromkeys(name for record in records for name in record["values"])
        return {
            name: torch.tensor(
                [
                    math.nan if (value := record["values"].get(name)) is None else value
                    for record in records
                ],
                dtype=torch.float64,
            )
            for name in names
        }

    def _chosen(self, readings: Sequence[Reading], steering: Attached, part: Part) -> Values:
        """One-token choices: whether the most probable token is right, and by how many nats the
        right answer is ahead."""
        lm, job, kept = self.language_model, self.bench.jobs[part], self.bench.settings.kept
        assert isinstance(job, TaskJob)
        job.check(steering)
        entry, task = job.entries[0], job.task
        read: Any = task.read
        right = torch.zeros(len(readings), dtype=torch.float64)
        ahead = torch.zeros(len(readings), dtype=torch.float64)
        for batch, found in next_tokens(lm, readings, steering, kept=kept):
            for i, each in zip(batch.rows, found, strict=True):
                text = lm.tokenizer.decode([int(each.best[0])], skip_special_tokens=True)
                right[i] = task.right(read(text, entry.protocol), entry.examples[i].target)
                ahead[i] = each.log_p[0] - each.log_p[1]
        return {"accuracy": right, FINE: ahead}

    def change(self, values: Values, metric: str, part: Part = "validation") -> Change:
        """Against the unsteered model."""
        return compare(self.unsteered(part)[metric], values[metric])

    def notes(self) -> list[str]:
        """What a reader of the figures should know about the task."""
        return self.bench.notes()


def _choices(language_model: LanguageModel, job: Any, part: Part) -> list[Reading] | None:
    """Readings that ask for the right and the wrong answer at the prompt's last token; None where
    the task is no choice between two answers of one token."""
    if not isinstance(job, TaskJob):
        return None
    task, entry = job.task, job.entries[0]
    if task.generation.new_tokens != 1 or not task.options or not task.pairs or not task.read:
        return None
    rows = task.rows(part, entry.protocol, job.wanted.data)[: job.wanted.limit]
    pairs = task.pairs(rows, entry.protocol, 0)
    prompts = [example.prompt for example in entry.examples]
    if [pair.prompt for pair in pairs] != prompts:
        return None
    sides = side_readings(language_model, Contrast(tuple(pairs), task.name))
    found = []
    for right, wrong, tokens in zip(
        sides[0::2], sides[1::2], language_model.encode(prompts), strict=True
    ):
        last = (len(tokens) - 1,)
        if not (right.tokens == wrong.tokens == tuple(tokens)):
            return None
        if not (right.positions == wrong.positions == last):
            return None
        targets = (right.targets or ()) + (wrong.targets or ())
        found.append(Reading(right.tokens, last * 2, len(tokens), targets))
    return found


# -- figures --------------------------------------------------------------------------------------


def is_rate(values: Tensor) -> bool:
    """Whether each value says right or wrong."""
    clear = values[~values.isnan()]
    return bool(((clear == 0) | (clear == 1)).all())


def figure(metric: str, values: Tensor) -> Estimate:
    """The mean over the rows that were clear, with its interval."""
    clear = values[~values.isnan()]
    if not len(clear):
        raise TrimtabError(f"no answer was clear, so {metric} has no value")
    return estimate_of(metric, clear.tolist(), None)


def compare(before: Tensor, after: Tensor) -> Change:
    """Paired: `after` minus `before`, [rows] each."""
    both = ~(before.isnan() | after.isnan())
    if not both.any():
        raise TrimtabError("no row is clear with and without steering: there is nothing to compare")
    differences = (after - before)[both]
    found = mean_interval(differences)
    ends, p = (found.low, found.high), paired_p(differences.tolist())
    if is_rate(before) and is_rate(after):
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        return Change(found.value, ends, found.n, p, gained, lost)
    return Change(found.value, ends, found.n, p)


# -- choosing on validation rows ------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One steering that was tried: its parameters, its values on the validation rows."""

    params: dict[str, Any]
    steering: Any
    values: Values = field(repr=False)

    def figure(self, metric: str) -> Estimate:
        return figure(metric, self.values[metric])


def chosen(rows: Rows, settings: Sequence[Setting]) -> Setting:
    """The setting of the best metric on the validation rows, the first of those that are equal."""
    sign = -1 if rows.maximise else 1
    return min(settings, key=lambda setting: sign * setting.figure(rows.metric).value)


def plain(change: Change | Estimate) -> dict[str, Any]:
    """For JSON."""
    return asdict(change)
