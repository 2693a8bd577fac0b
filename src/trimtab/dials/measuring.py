"""A dial measured on its own model and texts, when a steering is made.

A strength of 1 means something else for every method, model and contrast. What is measured here is
what it does: at which dials the next token after the contrast's own prompts has moved by so many
nats, and how far the dial can be turned before plain text becomes hard to predict, which is where
what the model writes breaks.

A few dials are run, each once for both, and what lies between two of them is read off a power law.
`strength.budget` and `strength.cost_curve` measure the same as exactly as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from trimtab.contrasts import Contrast, spread
from trimtab.dials.budgets import calibration
from trimtab.dials.solving import BEYOND, Solution
from trimtab.dials.turning import Turning, dial_limits, divergence, idle_dial, read_at_dial
from trimtab.model import LanguageModel, with_images
from trimtab.reading import blocks_apart, plain_texts, run_lower
from trimtab.steering import STRENGTHS, Scope, Situation, Steering
from trimtab.terminal import progress

#: Nats per token of plain text at which the dial's range ends: tokens are then two to three times
#: less probable, and text that the model writes falls apart.
BREAKS = 1.0
#: The strength on which a dial stands by default, unless plain text costs more there than half of
#: what breaks it.
DEFAULT, MOST = "strong", BREAKS / 2
#: How many of the contrast's prompts are asked, and how long they may be in tokens.
_PROMPTS, _LONGEST = 8, 256
#: How many of the plain paragraphs are read, and how many tokens of each.
_PARAGRAPHS, _TOKENS = 4, 32
#: How many dials are run on one side at most; two neighbours of what is looked for are close enough
#: when one is so many times the other.
_DIALS, _CLOSE = 10, 2.0
#: The first size that is run: of a strength, and of an angle in degrees.
_START = (1.0, 10.0)


@dataclass(frozen=True)
class Probe:
    """What one dial does: KL of each prompt's next token, [prompts] in nats, and what plain text
    costs, in nats per token."""

    kl: tuple[float, ...]
    cost: float


#: A probe of a size of dial, which is its distance from the dial that does nothing.
Run = Callable[[float], Probe]
Figure = Callable[[Probe], float]
#: A figure of a probe, and the limit that it is to reach.
Goal = tuple[Figure, float]


def measured(
    language_model: LanguageModel,
    steering: Steering,
    contrast: Contrast,
    *,
    default: bool,
    beyond: bool = True,
) -> Steering:
    """The steering with its dial's range measured, and the dials of the named strengths in its
    calibration; with `default` it stands on the strong one, at which most behaviours show in what
    is written, or, where plain text would cost more than `MOST` nats per token there, on the one
    that costs so much.

    The range ends where plain text costs `BREAKS` nats per token, on either side; where it never
    does it stays the method's own, beyond which is looked only with `beyond` (a share that is taken
    away has its end by itself). A steering that sets an angle rather than turning by one (SAS, AAS)
    is returned as it is. One that acts on generated tokens, or where a text says so (turns, spans,
    token ids), is measured as if the prompt's last token were one of them.
    """
    if idle_dial(steering) is None:
        return steering
    prompts = _prompts(language_model, contrast)
    low, high = dial_limits(steering, BEYOND if beyond else 1.0)
    budgets = sorted(STRENGTHS.values())
    goals: list[Goal] = [(_median, kl) for kl in budgets]
    goals += [(_cost, MOST), (_cost, BREAKS)]
    with progress("measuring the dial", 2 * _DIALS) as advance:
        run = _runner(language_model, steering, prompts, advance)
        known = _ladder(run, goals, _START[steering.dial.unit != ""], high)
        solutions = [
            [_solution(known, _of_prompt(i), kl) for kl in budgets] for i in range(len(prompts))
        ]
        calibrated = calibration(budgets, prompts, {"positive": solutions})
        breaks = _solution(known, _cost, BREAKS)
        below, end = steering.dial.range
        end = breaks.dial if breaks.reached else end
        if low < 0:
            other = _ladder(lambda size: run(-size), [(_cost, BREAKS)], min(end, -low), -low)
            broken = _solution(other, _cost, BREAKS)
            below = -broken.dial if broken.reached else below
        where = steering.dial.default
        if default:
            strong = calibrated.positive[budgets.index(STRENGTHS[DEFAULT])] or end
            where = _tidy(min(strong, _solution(known, _cost, MOST).dial))
        cost = run(where).cost
    findings = {
        "prompts": len(prompts),
        "cost": cost if math.isfinite(cost) else None,
        "breaks": BREAKS if breaks.reached else None,
    }
    return replace(
        steering,
        dial=replace(steering.dial, default=where, range=(_tidy(below), _tidy(end))),
        calibration=calibrated,
        findings={**steering.findings, "measured": findings},
    )


# -- what is asked --------------------------------------------------------------------------------


def _prompts(language_model: LanguageModel, contrast: Contrast) -> list[Sequence[int]]:
    """Token ids of some prompts of the contrast, spread over it; of unpaired texts the texts, and
    where a pair has no prompt the first half of its negative side."""
    lm = language_model
    rows = list(dict.fromkeys(pair.prompt for pair in contrast.pairs if pair.prompt))
    if rows or not contrast.paired:
        encoded = lm.encode(rows or list(dict.fromkeys(text.text for text in contrast.texts)))
    else:
        sides = lm.encode(list(dict.fromkeys(pair.negative for pair in contrast.pairs)))
        encoded = [tokens[: (len(tokens) + 1) // 2] for tokens in sides]
    longest = min(_LONGEST, lm.max_length)
    # An image alone is as many tokens.
    most = [lm.max_length if sees else longest for sees in with_images(encoded)]
    short = [tokens for tokens, end in zip(encoded, most, strict=True) if 0 < len(tokens) <= end]
    if not short:  # the ends of what there is, which is where the next token is read from
        short = [tokens[-longest:] for tokens in encoded if tokens]
    return spread(short, _PROMPTS)


def _acting_on(steering: Steering, scope: Literal["all", "last"]) -> Steering:
    """The steering for texts that are only read, as it acts while they are written: on the
    prompt's `last` token, or on `all` tokens of plain text."""
    return replace(
        steering,
        interventions=tuple(
            replace(each, scope=Scope.parse(scope)) if _moves(each.scope, scope) else each
            for each in steering.interventions
        ),
    )


def _moves(scope: Scope, to: Literal["all", "last"]) -> bool:
    """Whether a text that is only read does not show what a scope does to one that is written."""
    if scope.by_content or scope.only_generated:
        return True
    return to == "all" and scope.holds(Situation("prompt")) is False and not scope.only_images


def _runner(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Sequence[int]],
    advance: Callable[[int], object],
) -> Run:
    """Probes a dial: prompts and plain text run from the lowest steered block on."""
    turning = Turning(language_model, _acting_on(steering, "last"), prompts)
    cost = _cost_of(language_model, _acting_on(steering, "all"))
    known: dict[float, Probe] = {}

    def run(dial: float) -> Probe:
        if dial not in known:
            kl = [math.inf] * len(prompts)
            for places, log_p in turning.log_p(range(len(prompts)), [dial] * len(prompts)):
                found = divergence(turning.base[places], log_p).nan_to_num(math.inf, math.inf)
                for place, value in zip(places, found.tolist(), strict=True):
                    kl[place] = value
            known[dial] = Probe(tuple(kl), cost(dial))
            advance(1)
        return known[dial]

    return run


@torch.no_grad()
def _cost_of(language_model: LanguageModel, steering: Steering) -> Callable[[float], float]:
    """Nats per token that a dial adds to plain text; infinite where numbers overflow."""
    lm, below = language_model, blocks_apart(language_model, [steering])
    texts = [tokens[:_TOKENS] for tokens in lm.encode(plain_texts()[:_PARAGRAPHS])]
    ends, streams = [len(text) for text in texts], run_lower(lm, texts, below)

    def nll(dial: float | None) -> float:
        read = read_at_dial(lm, steering, texts, streams, dial, ends)
        return -float(torch.cat([each.log_p for each in read]).mean())

    base = nll(None)

    @torch.no_grad()
    def cost(dial: float) -> float:
        found = nll(dial) - base
        return found if math.isfinite(found) else math.inf

    return cost


# -- finding dials --------------------------------------------------------------------------------


def _cost(probe: Probe) -> float:
    return probe.cost


def _median(probe: Probe) -> float:
    return float(np.median(probe.kl))


def _of_prompt(index: int) -> Figure:
    return lambda probe: probe.kl[index]


def _ladder(run: Run, goals: Sequence[Goal], start: float, end: float) -> dict[float, Probe]:
    """Probes by size, enough of them to read off where each goal is reached up to an end."""
    size = min(start, end)
    known = {size: run(size)}
    while len(known) < _DIALS:
        steps = (_step(known, goal, end) for goal in goals)
        following = next((step for step in steps if step is not None), None)
        if following is None or following in known:
            break
        known[following] = run(following)
    return dict(sorted(known.items()))


def _step(known: Mapping[float, Probe], goal: Goal, end: float) -> float | None:
    """The next size to run to find where a goal is reached; None where that is known."""
    figure, limit = goal
    over = [size for size, probe in known.items() if figure(probe) > limit]
    high = min(over, default=math.inf)
    low = max((size for size in known if size < high), default=0.0)
    if high == math.inf:
        return None if low >= end else min(end, low * _growth(figure(known[low]), limit, 1.5, 4.0))
    if low == 0.0:
        return high * _growth(figure(known[high]), limit, 0.1, 0.8)
    return None if high <= _CLOSE * low else math.sqrt(low * high)


def _growth(value: float, limit: float, least: float, most: float) -> float:
    """How many times further the limit is, if a figure goes with the square of the size."""
    return min(most, max(least, math.sqrt(limit / value) if value > 0 else most))


def _solution(known: Mapping[float, Probe], figure: Figure, limit: float) -> Solution:
    """The first size at which a figure reaches a limit, on a power law between two that were run;
    where none does, the largest."""
    points = [(size, figure(probe)) for size, probe in known.items()]
    size, value = points[0]
    if value > limit:  # below the smallest one, a square
        return Solution(
            size * math.sqrt(limit / value) if value < math.inf else size / 2, limit, True
        )
    for (a, low), (b, high) in pairwise(points):
        if high > limit:
            if low <= 0 or high == math.inf:
                return Solution(a, low, True)
            share = math.log(limit / low) / math.log(high / low)
            return Solution(a * (b / a) ** share, limit, True)
    size, value = points[-1]
    return Solution(size, value, False)


def _tidy(value: float) -> float:
    """Three digits: a dial is for people."""
    return float(f"{value:.3g}")
