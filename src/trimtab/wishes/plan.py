"""What is going to be done, and about how long it takes: from how fast the model reads and writes
on this machine, which is measured first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.model import LanguageModel
from trimtab.options import Making, WishTexts
from trimtab.reading import cross_entropy, plain_texts
from trimtab.wishes.asking import NEW_TOKENS, PROMPTS
from trimtab.wishes.choosing import FINALISTS, RUNGS, SHARE, SHARES, TEXTS
from trimtab.wishes.portfolio import Arm

#: Tokens around what is judged, of a prompt, of the plain texts together, and of one of them.
_AROUND, _PROMPT, _PLAIN, _TEXT = 80, 25, 1000, 55
#: How often an answer is read while it is judged, and how often a dial is tried.
_JUDGED, _DIALS = 5, 4
#: What a pass with gradients takes, and one step of a training, in passes over the same tokens; a
#: steering runs about half of the blocks.
_GRADIENTS, _STEP, _UPPER = 4.0, 3.0, 0.6
#: Of the words before prompts: how many there are.
_PROMPTED = 3
#: Answers that are written at once.
_BATCH = 16


@dataclass(frozen=True)
class Speed:
    """Tokens a second that the model reads, and writes, many at once."""

    reads: float
    writes: float


@dataclass(frozen=True)
class Step:
    """A part of the work in words, and about how many seconds it takes."""

    name: str
    says: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The steps in their order."""

    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return sum(step.seconds for step in self.steps)

    def after(self, name: str) -> float:
        """Of the steps that come after one."""
        names = [step.name for step in self.steps]
        return sum(step.seconds for step in self.steps[names.index(name) + 1 :])

    def lines(self) -> list[str]:
        """For people."""
        width = max(len(step.says) for step in self.steps)
        lines = [f"  {step.says:<{width}}  {_about(step.seconds)}" for step in self.steps]
        return [f"plan, in all {_about(self.seconds)} at the speed of this machine:", *lines]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"step": step.name, "says": step.says, "seconds": round(step.seconds, 1)}
            for step in self.steps
        ]


def _about(seconds: float) -> str:
    return f"about {seconds / 60:.1f} min" if seconds >= 60 else f"about {max(1, seconds):.0f} s"


def speed_of(language_model: LanguageModel) -> Speed:
    """Measured on a few short texts, the first of them to warm up."""
    lm, texts = language_model, plain_texts()[:2]
    cross_entropy(lm, texts[:1])
    began = time.perf_counter()
    _, tokens = cross_entropy(lm, texts)
    reads = float(tokens.sum()) / max(1e-6, time.perf_counter() - began)
    began = time.perf_counter()
    lm.generate([texts[0][:40]] * _BATCH, max_new_tokens=4, min_new_tokens=4, chat=False)
    return Speed(reads, 4 * _BATCH / max(1e-6, time.perf_counter() - began))


def plan_for(
    speed: Speed,
    arms: Sequence[Arm],
    making: Making,
    texts: WishTexts,
    contrast: Contrast | None,
) -> Plan:
    """The steps for a contrast that is there, or for one that is still to be written."""
    if contrast is None:
        rows = texts.pairs * texts.questions * texts.answers
        sizes = {"train": rows // 2, "validation": rows // 4, "test": rows // 4}
        side = float(texts.max_new_tokens)
    else:
        rows, sizes, side = 0, contrast.sizes, _side(contrast)
    pair = 2 * (side + _PROMPT)
    steps = [_writing(speed, rows, side)] if rows else []
    own = [arm for arm in arms if not arm.trained]
    validation, test = sizes["validation"], sizes["test"]
    passes = sizes["train"] * pair * (1 + _GRADIENTS)
    steps.append(
        Step("fit", f"fit {len(own)} settings of methods in one pass", passes / speed.reads)
    )
    trained = len(arms) - len(own)
    if trained:
        taken = trained * 60 * 3 * pair * _STEP / speed.reads
        steps.append(Step("train", f"train {trained} more", taken))
    dials = len(arms) * _DIALS * TEXTS * _TEXT * _UPPER / speed.reads
    steps.append(Step("dials", f"turn each to {making.max_cost:g} nats per token", dials))
    read = len(arms) * RUNGS[0] + len(arms) / SHARE * (RUNGS[1] - RUNGS[0])
    read += FINALISTS * len(SHARES) * validation
    choosing = read * pair * _UPPER + FINALISTS * (len(SHARES) + 2) * _PLAIN * _UPPER
    says = f"halve them on {validation} validation pairs; trade-offs of what is left"
    steps.append(Step("choose", says, choosing / speed.reads))
    asking = _PROMPTED * (validation * pair * 1.5 + _PLAIN)
    steps.append(Step("ask", "ask for the same in prompts", asking / speed.reads))
    tested = 3 * (test * pair + _PLAIN) / speed.reads
    written = 3 * PROMPTS * NEW_TOKENS / speed.writes
    says = f"measure on {test} test pairs, write samples and the report"
    steps.append(Step("test", says, tested + written + 8 * PROMPTS * NEW_TOKENS / speed.reads))
    return Plan(tuple(steps))


def _writing(speed: Speed, rows: int, side: float) -> Step:
    says = f"write {rows} pairs of answers for the wish, and keep those that show it"
    judged = 2 * rows * (side + _AROUND) * _JUDGED / speed.reads
    return Step("contrast", says, 2 * rows * side / speed.writes + judged)


def _side(contrast: Contrast) -> float:
    """Tokens of a side, from its characters."""
    sides = [len(pair.positive) + len(pair.negative) for pair in contrast.pairs]
    return max(1.0, sum(sides) / (2 * len(sides)) / 4)
