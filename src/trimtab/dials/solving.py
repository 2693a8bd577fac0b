"""Finding the dial at which KL(unsteered || steered) of the next token equals a budget.

Near the dial that does nothing, a step t changes the logits by t g with g their derivative (one
forward-mode derivative), and so

    KL = t^2 / 2 * Var_p(g) + o(t^2)

which gives the first guess; secant steps in log KL against log t, kept between what was too little
and what was too much, correct it. All prompts and both directions run together.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from trimtab.dials.turning import (
    Turning,
    check_turns,
    dial_limits,
    divergence,
    idle_dial,
    refuse_generated,
)
from trimtab.errors import TrimtabError, check_choice
from trimtab.model import LanguageModel
from trimtab.steering import Steering
from trimtab.terminal import progress

Side = Literal["positive", "negative"]

#: A dial is found when its KL is this close to the budget, as a share of it.
TOLERANCE = 0.01
#: Where else to look, as shares of the dial's end, before a budget counts as not used up within the
#: range: a rotation often costs most between a quarter of a turn and its end.
_ON_THE_WAY = (0.75, 0.5, 0.25)
#: KL that passes the budget within this share of a dial jumps: nothing closer is there to find.
_JUMP = 1e-5
_STEPS = 40
#: Where a search begins that has no derivative, as a share of the dial's end.
_FIRST = 1 / 16
#: Prompts that are worked on at once, which bounds the memory for what is kept of them.
_TOKENS_AT_ONCE, _TEXTS_AT_ONCE = 16384, 256
#: `beyond_range` goes this many times further.
BEYOND = 100.0


@dataclass(frozen=True)
class Solution:
    """A dial, the KL there, and whether going further would exceed the budget (else the dial is
    the end of its range)."""

    dial: float
    kl: float
    reached: bool


def solve(
    language_model: LanguageModel,
    steering: Steering,
    texts: Sequence[Sequence[int]],
    budgets: Sequence[float],
    side: Side | Literal["both"] = "both",
    beyond_range: bool = False,
    force: bool = False,
) -> dict[Side, list[list[Solution]]]:
    """For each side the solutions of each text (token ids), one for each budget."""
    check_turns(language_model, steering, force)
    _refuse_no_idle(steering)
    ends = _ends(steering, side, beyond_range)
    found: dict[Side, list[list[Solution]]] = {one: [] for one in ends}
    with progress("finding dials", len(texts)) as advance:
        for some in _chunks(texts):
            turning = Turning(language_model, steering, some, force=force)
            searches = _searches(turning, ends, budgets)
            _run(turning, searches)
            for one, per_text in found.items():
                for i in range(len(some)):
                    own = (s for s in searches if (s.text, s.side) == (i, one))
                    per_text.append([search.solution() for search in own])
            advance(len(some))
    return found


def _refuse_no_idle(steering: Steering) -> None:
    if idle_dial(steering) is None:
        raise TrimtabError(
            f"a {steering.method} steering does nothing at no dial: it sets an angle rather than "
            "turning by one, so a dial has no size that could be kept to a budget"
        )


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse what is no size of a budget, in nats."""
    if not budgets:
        raise TrimtabError("there is no budget: name some, in nats")
    for one in budgets:
        if not (math.isfinite(one) and one > 0):
            raise TrimtabError(f"a budget must be above 0 nats, not {one}")


def searched(steering: Steering, kl: float) -> Generator[float, float, Solution]:
    """The search for the dial of one text, on the side on which the steering stands, for whoever
    has a model elsewhere: it yields dials, takes the KL at each, and returns what was found. What
    has no such dial is refused at once."""
    check_budgets([kl])
    _refuse_no_idle(steering)
    refuse_generated(steering)
    side: Side = "negative" if steering.setting < 0 else "positive"
    end = _ends(steering, side, beyond_range=False)[side]
    return _asking(_Search(0, side, end, kl, _FIRST * end))


def _asking(search: _Search) -> Generator[float, float, Solution]:
    for _ in range(_STEPS):
        search.tell(search.guess, (yield search.dial))
        if search.found is None:
            search.advance()
        if search.found is not None:
            break
    return search.solution()


def _ends(
    steering: Steering, side: Side | Literal["both"], beyond_range: bool
) -> dict[Side, float]:
    """How far the dial may be turned on each of the sides that are asked for."""
    check_choice("side", side, Side | Literal["both"])
    low, high = dial_limits(steering, BEYOND if beyond_range else 1.0)
    both: dict[Side, float] = {"positive": high, "negative": -low}
    ends = {one: end for one, end in both.items() if end > 0 and side in (one, "both")}
    if not ends:
        dial = steering.dial
        raise TrimtabError(
            f"the dial {dial.name} of this {steering.method} steering has no "
            f"{'side' if side == 'both' else f'{side} side'}: it goes from {low:g} to {high:g}"
        )
    return ends


def _chunks(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts in order, few enough at once to keep what the model computes for them."""
    some: list[Sequence[int]] = []
    tokens = 0
    for text in texts:
        if some and (tokens + len(text) > _TOKENS_AT_ONCE or len(some) == _TEXTS_AT_ONCE):
            yield some
            some, tokens = [], 0
        some.append(text)
        tokens += len(text)
    if some:
        yield some


@dataclass
class _Search:
    """The search for one dial; sizes are distances from the dial that does nothing."""

    text: int
    side: Side
    end: float
    budget: float
    guess: float
    #: Size and KL of what was too little, and of what was too much.
    low: tuple[float, float] = (0.0, 0.0)
    high: tuple[float, float] | None = None
    #: The last two points that say how KL grows.
    recent: list[tuple[float, float]] = field(default_factory=list)
    rounds: int = 0
    looked_back: int = 0
    found: Solution | None = None

    @property
    def dial(self) -> float:
        return self.guess if self.side == "positive" else -self.guess

    def tell(self, size: float, kl: float) -> None:
        """A point that was measured, here or for another budget of the same text and side."""
        if self.found is not None:
            return
        if abs(kl / self.budget - 1) <= TOLERANCE:
            self.found = self._at(size, kl, True)
        elif kl < self.budget:
            if size > self.low[0] and (self.high is None or size < self.high[0]):
                self.low = (size, kl)
        elif self.high is None or size < self.high[0]:  # also where KL is not a number
            self.high = (size, kl)
            if size < self.low[0]:  # KL rose and fell again: what comes first counts
                self.low = (0.0, 0.0)
        if size == self.guess and kl > 0 and math.isfinite(kl):
            self.recent = [*self.recent[-1:], (size, kl)]

    def advance(self) -> None:
        """The next guess, or the end of the search where nothing in reach has the budget's KL."""
        self.rounds += 1
        if self.high is not None:
            if self.high[0] - self.low[0] <= _JUMP * self.high[0]:
                self.found = self._at(*self.low, True)
            else:
                self.guess = self._between()
        elif self.low[0] < self.end:
            self.guess = min(self.end, self._further())
        elif self.looked_back < len(_ON_THE_WAY):
            self.guess = _ON_THE_WAY[self.looked_back] * self.end
            self.looked_back += 1
        else:
            self.found = self._at(*self.low, False)

    def _further(self) -> float:
        size, kl = self.low
        grown = size * (self.budget / kl) ** (1 / self._power()) if kl > 0 else math.inf
        return float(max(1.01 * self.guess, min(grown, 4 * self.guess)))

    def _between(self) -> float:
        """KL goes with a power of the size, as the last points say; in turns with halving, and
        after long halving only, for curves that are no such power."""
        assert self.high is not None
        below, above = self.low[0], self.high[0]
        if self.rounds > 16 or (self.rounds > 6 and self.rounds % 2):
            return math.sqrt(below * above) if 0 < 4 * below < above else (below + above) / 2
        size, kl = self._nearest()
        step = size * (self.budget / kl) ** (1 / self._power())
        margin = 0.002 * (above - below)
        return float(min(max(step, below + margin), above - margin))

    def _nearest(self) -> tuple[float, float]:
        """The point of the two whose KL is closer to the budget."""
        assert self.high is not None
        if not math.isfinite(self.high[1]):
            return (self.high[0] / 4, self.budget)  # much too far
        if self.low[1] <= 0:
            return self.high
        off = [abs(math.log(kl / self.budget)) for _, kl in (self.low, self.high)]
        return self.low if off[0] < off[1] else self.high

    def _power(self) -> float:
        """KL is quadratic near nothing; further off, what the last two points show."""
        if self.high is not None and self.low[1] > 0 and math.isfinite(self.high[1]):
            (s, a), (t, b) = self.low, self.high
        elif len(self.recent) == 2:
            (s, a), (t, b) = self.recent
        else:
            return 2.0
        if s == t or a == b:
            return 2.0
        return min(max(math.log(b / a) / math.log(t / s), 0.3), 8.0)

    def _at(self, size: float, kl: float, reached: bool) -> Solution:
        return Solution(math.copysign(size, self.dial), kl, reached)

    def solution(self) -> Solution:
        return self.found or self._at(*self.low, self.high is not None)


def _searches(turning: Turning, ends: dict[Side, float], budgets: Sequence[float]) -> list[_Search]:
    """Searches that begin where the local curvature of KL expects the budgets."""
    texts = range(len(turning.texts))
    curvature = [0.0] * len(texts)
    idle = idle_dial(turning.steering)
    assert idle is not None
    for places, logits, slope in turning.derivative(texts, [idle] * len(texts)):
        for place, value in zip(places, variance(logits, slope).tolist(), strict=True):
            curvature[place] = value
    searches = []
    for text in texts:
        for side, end in ends.items():
            for one in budgets:
                known = math.isfinite(curvature[text]) and curvature[text] > 0
                guess = math.sqrt(2 * one / curvature[text]) if known else 1.0
                searches.append(_Search(text, side, end, one, min(guess, end)))
    return searches


def variance(logits: Tensor, slope: Tensor) -> Tensor:
    """Var_p of the logits' derivative, [rows] in float64: the second derivative of KL."""
    p, slope = logits.double().softmax(-1), slope.double()
    mean = (p * slope).sum(-1, keepdim=True)
    return (p * (slope - mean).square()).sum(-1)


def _run(turning: Turning, searches: Sequence[_Search]) -> None:
    """Measure and correct until every search has its dial; what one finds out helps the others of
    the same text and side."""
    family: dict[tuple[int, Side], list[_Search]] = {}
    for search in searches:
        family.setdefault((search.text, search.side), []).append(search)
    for _ in range(_STEPS):
        open_ones = [search for search in searches if search.found is None]
        if not open_ones:
            return
        asked = {(search.text, search.side, search.guess): search.dial for search in open_ones}
        keys = list(asked)
        for places, log_p in turning.log_p([key[0] for key in keys], list(asked.values())):
            base = turning.base[[keys[place][0] for place in places]]
            for place, kl in zip(places, divergence(base, log_p).tolist(), strict=True):
                text, side, size = keys[place]
                for search in family[text, side]:
                    search.tell(size, kl)
        for search in open_ones:
            if search.found is None:
                search.advance()
