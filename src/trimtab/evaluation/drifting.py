"""Whether what steerings and prompts do lasts: over what stands between their words and the prompt,
and over a long text.

Turns: neutral exchanges (questions, and what the unsteered model answers; paragraphs of plain text
where prompts are taken as they are) are put before each prompt, behind the words that ask. The
gain is against the unsteered model behind the same turns. Positions: KL per generated token, from
the beginning to the end of long continuations of neutral prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab.contrasts import Prompt
from trimtab.evaluation.per_token import Continuations, neutral
from trimtab.evaluation.prompted import Attached, Prompted
from trimtab.figures import (
    Difference,
    Estimate,
    Record,
    changes_of,
    differences,
    mean_interval,
    paired_difference,
)
from trimtab.model import LanguageModel
from trimtab.reading import neutral_prompts, plain_texts
from trimtab.reports import Table, cell, difference_cell

#: Turns before each prompt, tokens of an answer among them, and tokens of a long text with the
#: stretches that it is looked at in.
TURNS, _ANSWER = (0, 2, 4), 48
LONG, STRETCHES = 128, 4


@dataclass(frozen=True)
class Repeated:
    """Rows of a task that are asked again: how one does (by `metric`, of which `more` may be
    better), and what makes their records under a name."""

    task: str
    metric: str
    more: bool
    records: Callable[[Attached, str | None], list[Record]]


@dataclass(frozen=True)
class TaskDrift:
    """By name: the gain over the unsteered model behind so many turns, and by how much it is
    another behind the most than behind the fewest (paired, row by row)."""

    task: str
    metric: str
    gains: Mapping[str, Mapping[int, Difference]]
    changes: Mapping[str, Difference]

    def table(self) -> Table:
        """What lasts over turns."""
        turns = list(next(iter(self.gains.values()), {}))
        rows = [
            [
                name,
                *(difference_cell(by.get(n), self.metric) for n in turns),
                difference_cell(self.changes.get(name), self.metric),
            ]
            for name, by in self.gains.items()
        ]
        return Table(
            f"Gain behind neutral turns: {self.task}",
            ["", *(f"{n} turns" for n in turns), "last minus first"],
            rows,
            "Against the unsteered model behind the same turns.",
        ).without_empty_columns()

    def gains_as_json(self) -> dict[str, Any]:
        return {
            name: [{"turns": n, **one.as_json()} for n, one in by.items()]
            for name, by in self.gains.items()
        }

    def as_json(self) -> dict[str, Any]:
        """For `--json` and results.json."""
        changes = {name: one.as_json() for name, one in self.changes.items()}
        own = {"gains": self.gains_as_json(), "changes": changes}
        return {"task": self.task, "metric": self.metric, **own}


@dataclass(frozen=True)
class Drift:
    """Whether effects last, on some tasks and over a long text: by name KL per generated token in
    each stretch of the text (first token, one behind the last), and by how much it is another in
    the last than in the first (paired, over texts that are that long)."""

    tasks: tuple[TaskDrift, ...]
    kl: Mapping[str, Mapping[tuple[int, int], Estimate]]
    kl_changes: Mapping[str, Estimate]

    def tables(self) -> list[Table]:
        """What lasts over turns, and over a long text."""
        stretches = list(next(iter(self.kl.values()), {}))
        long = [
            [name, *(cell(by.get(at)) for at in stretches), cell(self.kl_changes.get(name))]
            for name, by in self.kl.items()
        ]
        return [
            *(one.table() for one in self.tasks),
            Table(
                "KL per generated token over a long text, nats",
                ["", *(f"tokens {a + 1} to {b}" for a, b in stretches), "last minus first"],
                long,
            ).without_empty_columns(),
        ]

    def as_json(self) -> dict[str, Any]:
        """For `--json` and results.json; `gains` are those of the one task where there is one."""
        (alone,) = self.tasks if len(self.tasks) == 1 else (None,)
        return {
            **({} if alone is None else {"gains": alone.gains_as_json()}),
            "tasks": [one.as_json() for one in self.tasks],
            "kl": {
                name: [
                    {"first": a, "stop": b, "mean": one.value, "ci95": one.ci95}
                    for (a, b), one in by.items()
                ]
                for name, by in self.kl.items()
            },
            "kl_changes": {
                name: {"value": one.value, "ci95": one.ci95, "n": one.n}
                for name, one in self.kl_changes.items()
            },
        }


def drift(
    language_model: LanguageModel,
    tasks: Sequence[Repeated],
    subjects: Mapping[str, Attached],
    chat: bool,
    turns: Sequence[int] = TURNS,
) -> Drift:
    """How each of some steerings and prompts does on tasks behind turns, and over a long text;
    `chat` says whether the turns are a conversation's, or paragraphs of plain text."""
    said = _exchanges(language_model, chat, max(turns, default=0))
    found = tuple(_over_turns(one, subjects, said, turns) for one in tasks)
    continued = Continuations(language_model, neutral(language_model, chat), LONG)
    values = {name: continued.values(one) for name, one in subjects.items()}
    changed = {name: _first_to_last(each) for name, each in values.items()}
    return Drift(
        found,
        {name: _by_stretch(each) for name, each in values.items()},
        {name: one for name, one in changed.items() if one is not None},
    )


def _over_turns(
    task: Repeated,
    subjects: Mapping[str, Attached],
    said: Sequence[tuple[Prompt, str]],
    turns: Sequence[int],
) -> TaskDrift:
    gains: dict[str, dict[int, Difference]] = {name: {} for name in subjects}
    by_row: dict[str, dict[int, list[float | None]]] = {name: {} for name in subjects}
    for count in turns:
        before = task.records(behind(None, said[:count]), None)
        after = {
            name: task.records(behind(one, said[:count]), name) for name, one in subjects.items()
        }
        pairs = {name: (before, some) for name, some in after.items()}
        for name, one in differences(pairs, task.metric, task.more).items():
            gains[name][count] = one
        for name, some in after.items():
            by_row[name][count] = changes_of(before, some, task.metric)
    changes = {name: _changed(by, turns, task.more) for name, by in by_row.items()}
    return TaskDrift(
        task.task,
        task.metric,
        gains,
        {name: one for name, one in changes.items() if one is not None},
    )


def _changed(
    by: Mapping[int, Sequence[float | None]], turns: Sequence[int], more: bool
) -> Difference | None:
    """Each row's gain behind the most turns minus that behind the fewest."""
    if len(turns) < 2:
        return None
    rows = zip(by[turns[0]], by[turns[-1]], strict=True)
    both = [last - first for first, last in rows if first is not None and last is not None]
    if not both:
        return None
    return paired_difference(torch.tensor(both, dtype=torch.float64), flips=False, more=more)


def behind(attached: Attached, turns: Sequence[tuple[Prompt, str]]) -> Prompted:
    """The same steering or words, with turns between the words and the prompt."""
    own = attached if isinstance(attached, Prompted) else Prompted(steering=attached)
    return replace(own, examples=(*own.examples, *turns))


def _exchanges(lm: LanguageModel, chat: bool, count: int) -> list[tuple[Prompt, str]]:
    """Neutral questions with the unsteered model's answers, or paragraphs of plain text."""
    if not (chat and lm.chats):
        return [("", text) for text in plain_texts()[::-1][:count]]
    asked = [row["prompt"] for row in neutral_prompts() if row["language"] == "en"][::-1][:count]
    chats: list[Prompt] = [(("user", prompt),) for prompt in asked]
    written = lm.generate(chats, max_new_tokens=_ANSWER) if chats else []
    return [(prompt, one.text) for prompt, one in zip(chats, written, strict=True)]


def _by_stretch(values: Sequence[torch.Tensor]) -> dict[tuple[int, int], Estimate]:
    """KL per token in each stretch, over the continuations that reach it."""
    found = {}
    for first, stop in _stretches():
        means = [each[first:stop].mean() for each in values if len(each) > first]
        if means:
            found[first, stop] = mean_interval(torch.stack(means))
    return found


def _first_to_last(values: Sequence[torch.Tensor]) -> Estimate | None:
    """KL per token in the last stretch minus that in the first, over continuations that have
    both."""
    first, last = _stretches()[0], _stretches()[-1]
    means = [
        each[slice(*last)].mean() - each[slice(*first)].mean()
        for each in values
        if len(each) > last[0]
    ]
    return mean_interval(torch.stack(means)) if means and first != last else None


def _stretches() -> list[tuple[int, int]]:
    step = LONG // STRETCHES
    return [(first, first + step) for first in range(0, LONG, step)]
