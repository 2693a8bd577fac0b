"""The largest dial of a steering that keeps to a budget, for several budgets at once.

What a dial costs is the median over some prompts of KL(unsteered || steered) of the next token, in
nats. A few dials are run, each over all prompts in one batch, and each serves every budget; what is
returned was run itself and not read off between two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trimtab.model import LanguageModel
from trimtab.steering import Steering
from trimtab.strength import Turning, dial_limits, divergence

#: A dial is near enough when it costs this share of the budget or more; what is aimed at, and at
#: first, when no dial within the budget is known.
_NEAR, _AIM, _LOWER = 0.95, 0.98, 0.8
#: Between two dials of which one is so many times the other there is nothing to find.
_CLOSE = 1.01
#: Dials that are run for one budget at most, beside those that other budgets ran.
_TRIES = 8
#: A single unit may have to be scaled this many times further than the range of dials says.
_BEYOND = 100.0
#: KL goes with the square of the dial at first; one step goes this many times further at most.
_FURTHER = 8.0


@dataclass(frozen=True)
class Within:
    """A dial, what it costs in nats, and whether a larger one would cost more than the budget
    (else it is as far as the dial goes)."""

    dial: float
    kl: float
    reached: bool


def dials_within(
    language_model: LanguageModel,
    steering: Steering,
    texts: Sequence[Sequence[int]],
    budgets: Sequence[float],
) -> dict[float, Within]:
    """Of each budget the largest dial within it, before the first that exceeds it, up to a hundred
    times the steering's range; `texts` are prompts as token ids."""
    turning = Turning(language_model, steering, texts)
    every = range(len(texts))

    def cost(dial: float) -> float:
        found = torch.full((len(texts),), math.inf, dtype=torch.float64)
        for places, log_p in turning.log_p(every, [dial] * len(texts)):
            found[places] = divergence(turning.base[places], log_p).cpu()
        median = float(found.nan_to_num(math.inf, math.inf).quantile(0.5))
        return median if math.isfinite(median) else math.inf

    return largest_within(cost, budgets, dial_limits(steering, _BEYOND)[1])


def largest_within(
    cost: Callable[[float], float], budgets: Sequence[float], end: float
) -> dict[float, Within]:
    """The same for any cost of a dial."""
    known = {0.0: 0.0}
    found = {}
    for budget in sorted(set(budgets)):
        for _ in range(_TRIES):
            dial = _next(known, budget, end)
            if dial is None:
                break
            known[dial] = cost(dial)
        low, high = _around(known, budget)
        found[budget] = Within(low, known[low], high is not None or known[low] >= _NEAR * budget)
    return found


def _around(known: Mapping[float, float], budget: float) -> tuple[float, float | None]:
    """The first dial that exceeds a budget, if there is one, and the largest below it."""
    high = min((dial for dial, kl in known.items() if kl > budget), default=None)
    return max(dial for dial in known if high is None or dial < high), high


def _next(known: Mapping[float, float], budget: float, end: float) -> float | None:
    """Which dial to run next; None where the largest within the budget is known."""
    low, high = _around(known, budget)
    if known[low] >= _NEAR * budget:
        return None
    if high is None:
        if low >= end:
            return None
        if low == 0:
            return min(1.0, end)
        grown = math.sqrt(_AIM * budget / known[low]) if known[low] > 0 else _FURTHER
        return min(end, low * min(max(grown, 1.1), _FURTHER))
    if high <= _CLOSE * low:  # it jumps there
        return None
    above = known[high]
    if known[low] <= 0:  # nothing is known but that it goes with the square
        step = high * math.sqrt(_LOWER * budget / above) if above < math.inf else 0.0
        return max(step, high / _FURTHER, low + 0.1 * (high - low))
    if above == math.inf:
        return math.sqrt(low * high)
    power = math.log(above / known[low]) / math.log(high / low)
    step = float(low * (_AIM * budget / known[low]) ** (1 / power))
    margin = 0.05 * (high - low)
    return min(max(step, low + margin), high - margin)
