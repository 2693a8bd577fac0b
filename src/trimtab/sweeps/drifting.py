"""Whether what steerings and prompts do lasts: over what stands between their words and the prompt,
and over a long text.

Turns: neutral exchanges (questions, and what the unsteered model answers; paragraphs of plain text
where prompts are taken as they are) are put before each prompt, behind the words that ask. The
gain is against the unsteered model behind the same turns. Positions: KL per generated token, from
the beginning to the end of long continuations of neutral prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab.contrasts import Prompt
from trimtab.evaluation import Attached, Prompted
from trimtab.figures import Difference, Estimate, mean_interval
from trimtab.model import LanguageModel
from trimtab.reading import neutral_prompts, plain_texts
from trimtab.reports import Table, cell, difference_cell
from trimtab.strength import Continuations, neutral
from trimtab.sweeps.differences import differences
from trimtab.sweeps.rows import TaskRows

#: Turns before each prompt, tokens of an answer among them, and tokens of a long text with the
#: stretches that it is looked at in.
TURNS, _ANSWER = (0, 2, 4), 48
LONG, STRETCHES = 128, 4


@dataclass(frozen=True)
class Drift:
    """By name: the gain over the unsteered model behind so many turns, and KL per generated token
    in each stretch of a long text (first token, one behind the last)."""

    metric: str
    gains: Mapping[str, Mapping[int, Difference]]
    kl: Mapping[str, Mapping[tuple[int, int], Estimate]]

    def tables(self) -> list[Table]:
        """What lasts over turns, and over a long text."""
        turns = list(next(iter(self.gains.values()), {}))
        stretches = list(next(iter(self.kl.values()), {}))
        rows = [
            [name, *(difference_cell(by.get(n), self.metric) for n in turns)]
            for name, by in self.gains.items()
        ]
        long = [[name, *(cell(by.get(at)) for at in stretches)] for name, by in self.kl.items()]
        return [
            Table(
                "Gain behind neutral turns",
                ["", *(f"{n} turns" for n in turns)],
                rows,
                "Against the unsteered model behind the same turns.",
            ),
            Table(
                "KL per generated token over a long text, nats",
                ["", *(f"tokens {a + 1} to {b}" for a, b in stretches)],
                long,
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        """For `--json` and results.json."""
        return {
            "gains": {
                name: [{"turns": n, **one.as_json()} for n, one in by.items()]
                for name, by in self.gains.items()
            },
            "kl": {
                name: [
                    {"first": a, "stop": b, "mean": one.value, "ci95": one.ci95}
                    for (a, b), one in by.items()
                ]
                for name, by in self.kl.items()
            },
        }


def drift(bench: TaskRows, subjects: Mapping[str, Attached], turns: Sequence[int] = TURNS) -> Drift:
    """How each of some steerings and prompts does on the test rows behind turns, and over a long
    text."""
    lm = bench.language_model
    chat = any(not isinstance(prompt, str) for prompt in bench.prompts(8, "test"))
    said = _exchanges(lm, chat, max(turns, default=0))
    gains: dict[str, dict[int, Difference]] = {name: {} for name in subjects}
    for count in turns:
        before = bench.records(behind(None, said[:count]), "test")
        after = {
            name: bench.records(behind(one, said[:count]), "test", name=name)
            for name, one in subjects.items()
        }
        found = differences(
            {name: (before, some) for name, some in after.items()}, bench.metric, bench.maximise
        )
        for name, one in found.items():
            gains[name][count] = one
    continued = Continuations(lm, neutral(lm, chat), LONG)
    return Drift(bench.metric, gains, {n: _by_stretch(continued, s) for n, s in subjects.items()})


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


def _by_stretch(continued: Continuations, attached: Attached) -> dict[tuple[int, int], Estimate]:
    """KL per token in each stretch, over the continuations that reach it."""
    values, step = continued.values(attached), LONG // STRETCHES
    found = {}
    for first in range(0, LONG, step):
        means = [each[first : first + step].mean() for each in values if len(each) > first]
        if means:
            found[first, first + step] = mean_interval(torch.stack(means))
    return found
