"""Values row by row: what rows ask of a model where no text is written, and figures of such values.

A choice between two answers of one token, and a pair, are read at single positions; other rows are
answered, and their records have the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached, PreferenceJob, TaskJob, asked_with
from trimtab.figures import Difference, Estimate, Record, estimate_of, paired_difference
from trimtab.model import LanguageModel
from trimtab.reading import Reading, side_readings

#: How far the right answer is ahead of the wrong one, in nats.
FINE = "log_odds"
#: Values of each metric, row by row; NaN where an answer was not clear.
Values = Mapping[str, Tensor]


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


def difference_of(before: Tensor, after: Tensor, *, more: bool) -> Difference:
    """`after` minus `before`, [rows] each, over the rows that are clear in both; `more` says
    whether more is better."""
    both = ~(before.isnan() | after.isnan())
    if not both.any():
        raise TrimtabError("no row is clear with and without steering: there is nothing to compare")
    flips = is_rate(before) and is_rate(after)
    return paired_difference((after - before)[both], flips=flips, more=more)


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


def readings_for(
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
