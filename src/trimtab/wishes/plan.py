"""What is going to be done, and about how long it takes: in tokens that are read and written, and
in seconds at the speed of this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.contrasts import Contrast, Part, last_message
from trimtab.evaluation import Prompted
from trimtab.model import LanguageModel
from trimtab.options import Making, WishTexts
from trimtab.reading import cross_entropy, plain_texts
from trimtab.wishes.asking import NEW_TOKENS, PROMPTS
from trimtab.wishes.choosing import CHECKED, FINALISTS, RUNGS, SHARE, SHARES, TEXTS
from trimtab.wishes.pace import Speed
from trimtab.wishes.portfolio import Arm

#: Tokens around what is judged, of a prompt, of the plain texts together, and of one of them.
_AROUND, _PROMPT, _PLAIN, _TEXT = 80, 25, 1000, 55
#: How often an answer is read while it is judged, and how often a dial is tried.
_JUDGED, _DIALS = 3, 4
#: Characters of a token.
_CHARACTERS = 4
#: What a pass with gradients takes in passes over the same tokens, and one step of a training; a
#: steering runs about half of the blocks.
_GRADIENTS, _STEP, _UPPER = 3.0, 3.0, 0.6
#: Prompts that are asked, and tokens of their words on average.
_PROMPTED, _WORDS = 3, 60
#: Tokens that are read to find how far a dial may be turned.
RANGE = 10 * 8 * _PROMPT
#: Answers that are written at once, and their tokens, where the speed is measured.
_BATCH, _FEW_TOKENS = 16, 6
#: How much of a contrast is taken where there is no time for all of it, and pairs of each part that
#: are too few to go below.
CUTS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)
FEWEST: dict[Part, int] = {"train": 24, "validation": 8, "test": 12}
#: Of a wish's texts less is written where time is short: pairs of instructions, and tokens; below
#: so many questions too few pairs would be kept to fit on.
FEWEST_QUESTIONS = 28
LESS_TEXT = ((3, 48), (2, 48), (2, 36), (1, 36), (1, 24))


@dataclass(frozen=True)
class Step:
    """A part of the work in words: tokens that are read, and written; `least` is how many are read
    where everything is left out that may be."""

    name: str
    says: str
    read: float
    written: float = 0.0
    least: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """About how long it takes."""
        return speed.seconds(self.read, self.written)


@dataclass(frozen=True)
class Plan:
    """The steps in their order, and the speed of this machine."""

    steps: tuple[Step, ...]
    speed: Speed

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return sum(step.seconds(self.speed) for step in self.steps)

    def least_after(self, name: str, speed: Speed) -> float:
        """Seconds for what has to be done after a step, however little time there is."""
        names = [step.name for step in self.steps]
        return speed.seconds(sum(step.least for step in self.steps[names.index(name) + 1 :]))

    def step(self, name: str) -> Step:
        """One of the steps."""
        return next(step for step in self.steps if step.name == name)

    def lines(self) -> list[str]:
        """For people."""
        width = max(len(step.says) for step in self.steps)
        lines = [f"  {step.says:<{width}}  {about(step.seconds(self.speed))}"
                 for step in self.steps]  # fmt: skip
        return [f"plan, in all {about(self.seconds)} at the speed of this machine:", *lines]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"step": one.name, "says": one.says, "seconds": round(one.seconds(self.speed), 1)}
            for one in self.steps
        ]


def about(seconds: float) -> str:
    """A time for people."""
    return f"about {seconds / 60:.1f} min" if seconds >= 60 else f"about {max(1, seconds):.0f} s"


def speed_of(language_model: LanguageModel) -> Speed:
    """Measured on a few short texts, the first of them to warm up."""
    lm, texts = language_model, plain_texts()[:5]
    cross_entropy(lm, texts[:1])
    began = time.perf_counter()
    _, tokens = cross_entropy(lm, texts)
    reads = float(tokens.sum()) / max(1e-6, time.perf_counter() - began)
    taken = []
    for new in (1, 1 + _FEW_TOKENS):  # what is read before the first token is no writing
        began = time.perf_counter()
        lm.generate([texts[0][:40]] * _BATCH, max_new_tokens=new, min_new_tokens=new, chat=False,
                    batch_size=_BATCH)  # fmt: skip
        taken.append(time.perf_counter() - began)
    return Speed(reads, _FEW_TOKENS * _BATCH / max(1e-6, taken[1] - taken[0]))


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
        sizes: dict[Part, int] = {"train": rows // 2, "validation": rows // 4, "test": rows // 4}
        pair, said = _PROMPT + 2.0 * texts.max_new_tokens, "by the wish"
    else:
        rows, sizes, pair, said = 0, _sizes(contrast), pair_tokens(contrast), contrast.behaviour
    steps = [_writing(rows, texts.max_new_tokens)] if rows else []
    own = [arm for arm in arms if not arm.trained]
    validation, test = sizes["validation"], sizes["test"]
    passes = sizes["train"] * pair * (1 + _GRADIENTS)
    steps.append(
        Step("fit", f"fit {len(own)} settings of methods in one pass", passes, least=passes)
    )
    trained = len(arms) - len(own)
    if trained:
        steps.append(Step("train", f"train {trained} more", trained * 60 * 3 * pair * _STEP))
    dial = _DIALS * TEXTS * _TEXT * _UPPER
    says = f"turn each to {making.max_cost:g} nats per token"
    steps.append(Step("dials", says, len(arms) * dial, least=2 * dial))
    read = len(arms) * RUNGS[0] + len(arms) / SHARE * (RUNGS[1] - RUNGS[0])
    read += (FINALISTS + len(SHARES) - 1) * validation
    costs = (FINALISTS + len(SHARES) + 1) * _PLAIN * _UPPER
    says = f"halve them on {validation} validation pairs; trade-offs of what is left"
    least = (1 + _UPPER) * validation * pair + 3 * _PLAIN
    steps.append(Step(
        "choose", says, validation * pair + read * pair * _UPPER + costs + _PLAIN,
        (1 + CHECKED) * PROMPTS * NEW_TOKENS / 2, least,
    ))  # fmt: skip
    if said:
        asking = _PROMPTED * asked_tokens(validation, pair, _WORDS)
        least = asked_tokens(validation, pair, _WORDS / 4)
        steps.append(Step("ask", "ask for the same in prompts", asking, least=least))
    tested = 2.5 * test * pair + 2 * _PLAIN + RANGE + 8 * PROMPTS * NEW_TOKENS
    steps.append(Step(
        "test", f"measure on {test} test pairs, write samples and the report", tested,
        4 * PROMPTS * NEW_TOKENS, 3 * test * pair + 2 * _PLAIN + RANGE,
    ))  # fmt: skip
    return Plan(tuple(steps), speed)


def asked_tokens(rows: int, pair: float, words: float) -> float:
    """Tokens that are read to measure a prompt of so many tokens on pairs and on plain text."""
    return rows * (pair + words) + _PLAIN + words * _PLAIN / _TEXT


def _writing(rows: int, side: int) -> Step:
    says = f"write {rows} pairs of answers for the wish, and keep those that show it"
    return Step("contrast", says, 2 * rows * (side + _AROUND) * _JUDGED, 2 * rows * side)


def less_text(texts: WishTexts, speed: Speed, seconds: float) -> WishTexts:
    """As many texts of a wish as there are seconds for, or the fewest that make a contrast: fewer
    pairs of instructions, shorter answers, and at last fewer questions."""
    found = texts
    for pairs, tokens in LESS_TEXT:
        found = replace(texts, pairs=min(pairs, texts.pairs),
                        max_new_tokens=min(tokens, texts.max_new_tokens))  # fmt: skip
        taken = _writing(found.pairs * found.questions * found.answers, found.max_new_tokens)
        if taken.seconds(speed) <= seconds:
            return found
    return replace(found, questions=min(texts.questions, FEWEST_QUESTIONS))


def cut_to_time(plan: Plan, contrast: Contrast, seconds: float) -> dict[Part, int]:
    """So many pairs of each part that what has to be done on them takes no more than so many
    seconds, if that can be."""
    sizes = _sizes(contrast)
    for cut in CUTS:
        found = {part: min(size, max(FEWEST[part], round(cut * size)))
                 for part, size in sizes.items()}  # fmt: skip
        pair = pair_tokens(contrast)
        read = plan.step("fit").least * found["train"] / sizes["train"]
        read += plan.step("dials").least + 2 * pair * (found["validation"] + found["test"])
        if plan.speed.seconds(read + 4 * _PLAIN + RANGE) <= seconds:
            break
    return found


def _sizes(contrast: Contrast) -> dict[Part, int]:
    return {part: contrast.sizes.get(part, 0) for part in FEWEST}


def pair_tokens(contrast: Contrast) -> float:
    """Tokens that are read of a pair, from its characters: what both sides share is read once."""
    sides = sum(len(pair.positive) + len(pair.negative) for pair in contrast.pairs)
    return _PROMPT + max(2.0, sides / len(contrast.pairs) / _CHARACTERS)


def words_tokens(language_model: LanguageModel, words: Prompted) -> int:
    """Tokens of the words before a prompt."""
    said = [words.text, *(f"{last_message(prompt)} {answer}" for prompt, answer in words.examples)]
    return sum(map(len, language_model.encode([text for text in said if text])))
