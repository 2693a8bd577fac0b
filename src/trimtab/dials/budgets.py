"""The dial that a budget allows: how far a steering can be turned before it changes what the model
expects next by more than so many nats.

The measure is KL(unsteered || steered) of the next token's distribution after a prompt. Near the
dial that does nothing, a step t changes the logits by t g with g their derivative (one forward-mode
derivative), and so

    KL = t^2 / 2 * Var_p(g) + o(t^2)

which gives the first guess; secant steps in log KL against log t, kept between what was too little
and what was too much, correct it. All prompts and both directions run together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from trimtab.contrasts import Prompt, as_messages, last_message
from trimtab.dials.turning import (
    Turning,
    check_turns,
    dial_limits,
    divergence,
    idle_dial,
    refuse_generated,
)
from trimtab.errors import TrimtabError, TrimtabWarning, check_choice
from trimtab.figures import Estimate
from trimtab.files import json_digest
from trimtab.model import ImageText, LanguageModel
from trimtab.reports import Presented, Table, number_text
from trimtab.steering import Calibration, Steering
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
#: The budgets of a calibration, in nats.
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class PromptBudget:
    """The dial of one prompt, and the KL in nats that was measured there.

    `reached` is false where even the end of the range costs less than the budget: the dial is then
    that end. Where KL jumps past the budget (experts that are routed anew, the rounding of
    bfloat16) `kl` is less too, and the dial the last one that keeps to it. `in_range` is false
    where the dial is outside the steering's sensible range, which happens only on request.
    """

    prompt: Prompt
    dial: float
    kl: float
    reached: bool = True
    in_range: bool = True


@dataclass(frozen=True, repr=False)
class Budget(Presented):
    """The dials at which a budget of `kl` nats is used up, on one side of the dial.

    `dial` is the median over prompts; at `worst5_dial` 95 % of the prompts stay within the budget.
    `other` is the other side, where it was asked for and the dial has one.
    """

    kl: float
    dial: float
    worst5_dial: float
    per_prompt: tuple[PromptBudget, ...]
    other: Budget | None = None

    @property
    def unreached(self) -> int:
        """How many prompts do not use up the budget within the range."""
        return sum(not found.reached for found in self.per_prompt)

    @property
    def summary(self) -> str:
        """One sentence: how far the dial may be turned."""
        said = [self._allowed()] if self.other is None else [self._allowed(), self.other._allowed()]
        n = len(self.per_prompt)
        ends = sum(one.unreached for one in (self, self.other) if one is not None)
        more = f"; {ends} prompts do not use it up before the dial ends" if ends else ""
        return f"A budget of {self.kl:g} nats allows {', and '.join(said)} (n = {n}){more}."

    def _allowed(self) -> str:
        return (
            f"a dial of {number_text(self.dial)} for half of the prompts and "
            f"{number_text(self.worst5_dial)} for 95 % of them"
        )

    def tables(self) -> list[Table]:
        """The dial of each prompt, and the KL there; a table for each side of the dial."""
        tables = [] if self.other is None else self.other.tables()
        rows = [
            [_start_of(one.prompt), number_text(one.dial), number_text(one.kl), _to_know(one)]
            for one in self.per_prompt
        ]
        side = "negative" if self.dial < 0 else "positive"
        table = Table(
            f"Dials of {self.kl:g} nats, {side} side",
            ["prompt", "dial", "KL, nats", "to know"],
            [*rows, ["half of the prompts", number_text(self.dial), "", ""],
             ["95 % of the prompts", number_text(self.worst5_dial), "", ""]],
        )  # fmt: skip
        return [table.without_empty_columns(), *tables]

    def plot(self, ax: Any = None) -> Any:
        """The dial of each prompt, and the two of all of them: on the matplotlib axes `ax` or those
        of a new figure; they are returned."""
        from trimtab.reports import DOWN, UP, Line, axes_for, forest  # loads matplotlib

        axes = axes_for(ax, (6.5, 1.2 + 0.26 * len(self.per_prompt)))
        sides = [one for one in (self, self.other) if one is not None]
        lines = []
        for one, colour in zip(sides, (UP, DOWN), strict=False):
            at = range(len(one.per_prompt))
            dials = [Estimate(p.dial, p.dial, p.dial, 1) for p in one.per_prompt]
            lines.append(Line("", list(at), dials, colour))
            axes.axvline(one.dial, color=colour, linewidth=1, label="half of the prompts")
            style = {"linestyle": ":", "label": "95 % of the prompts"}
            axes.axvline(one.worst5_dial, color=colour, linewidth=1.2, **style)
        names = [_start_of(one.prompt).replace("$", r"\$") for one in self.per_prompt]
        forest(axes, names, lines, apart=0.0, xlabel=f"dial at {self.kl:g} nats")
        axes.legend(frameon=False, fontsize=8)
        return axes

    def as_json(self) -> dict[str, Any]:
        """What `trimtab strength budget --json` prints."""
        rows = [
            {
                "prompt": as_messages(found.prompt),
                "dial": found.dial,
                "kl": found.kl,
                "reached": found.reached,
                "in_range": found.in_range,
            }
            for found in self.per_prompt
        ]
        sides = {} if self.other is None else {"negative": self.other.as_json()}
        return {
            "kl": self.kl,
            "dial": self.dial,
            "worst5_dial": self.worst5_dial,
            "per_prompt": rows,
            **sides,
        }


def _start_of(prompt: Prompt) -> str:
    """The beginning of a prompt in one line."""
    text = " ".join(last_message(prompt).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _to_know(found: PromptBudget) -> str:
    if not found.in_range:
        return "outside the sensible range"
    return "" if found.reached else "end of the dial"


def budget(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    kl: float = 0.1,
    *,
    side: Side | Literal["both"] = "both",
    chat: bool | None = None,
    beyond_range: bool = False,
    force: bool = False,
) -> Budget:
    """The dial at which KL(unsteered || steered) of the next token's distribution reaches `kl`
    nats, for each prompt and for all of them.

    `side` is the positive or the negative dial, or both: the negative one is then `.other`, and
    a dial without a negative side has none. `chat` puts prompts through the chat template (default:
    where the model has one). `beyond_range` looks up to a hundred times further than the dial's
    sensible range. KL need not rise with the dial (a rotation's falls again): the dial is one at
    which it equals the budget, as a rule the first. Refused for steerings that do nothing at no
    dial (SAS, AAS).
    """
    _check_budgets([kl])
    wanted, encoded = _encoded(language_model, prompts, chat)
    found: dict[Side, Budget] = {}
    per_side = solve(language_model, steering, encoded, [kl], side, beyond_range, force)
    for one, solutions in per_side.items():
        rows = tuple(
            _prompt_budget(steering, prompt, solution[0])
            for prompt, solution in zip(wanted, solutions, strict=True)
        )
        median, worst = _of_set([row.dial for row in rows])
        found[one] = Budget(kl, median, worst, rows)
        _warn_unreached([solution[0] for solution in solutions], steering, kl)
    if set(found) == {"positive", "negative"}:
        return replace(found["positive"], other=found["negative"])
    return next(iter(found.values()))


def _prompt_budget(steering: Steering, prompt: Prompt, solution: Solution) -> PromptBudget:
    low, high = steering.dial.range
    inside = low <= solution.dial <= high
    return PromptBudget(prompt, solution.dial, solution.kl, solution.reached, inside)


def _of_set(dials: Sequence[float]) -> tuple[float, float]:
    """Median, and the dial that no more than 5 % of the prompts bear less than."""
    sizes = np.abs(dials)
    worst = float(np.quantile(sizes, 0.05, method="lower"))
    return float(np.median(dials)), math.copysign(worst, dials[0])


def calibrate(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    kl: Sequence[float] = BUDGETS,
    *,
    chat: bool | None = None,
    force: bool = False,
) -> Steering:
    """The same steering, with the dials of some budgets written into it: `steering.at(kl=0.1)`.

    A budget that less than half of the prompts use up within the dial's range has no median dial.
    """
    budgets = sorted({float(one) for one in kl})
    _check_budgets(budgets)
    _, encoded = _encoded(language_model, prompts, chat)
    per_side = solve(language_model, steering, encoded, budgets, "both", False, force)
    return replace(steering, calibration=calibration(budgets, encoded, per_side))


def calibration(
    budgets: Sequence[float],
    texts: Sequence[Sequence[int]],
    per_side: Mapping[Side, Sequence[Sequence[Solution]]],
) -> Calibration:
    """What the solutions of some texts (token ids) say of budgets that rise."""
    columns: dict[str, tuple[float | None, ...]] = {}
    for side, solutions in per_side.items():
        dials, worst = [], []
        for i in range(len(budgets)):
            reached = [solution[i].reached for solution in solutions]
            median, lowest = _of_set([solution[i].dial for solution in solutions])
            dials.append(median if sum(reached) * 2 > len(reached) else None)
            worst.append(lowest if sum(reached) >= 0.05 * len(reached) else None)
        columns |= {side: tuple(dials), f"{side}_worst5": tuple(worst)}
    seen = [text.digests for text in texts if isinstance(text, ImageText)]
    digest = json_digest([*map(list, texts), *seen], separators=(",", ":"))
    return Calibration.rising(budgets, len(texts), digest, **columns)


def _encoded(
    language_model: LanguageModel, prompts: Sequence[Any], chat: bool | None
) -> tuple[list[Prompt], list[Sequence[int]]]:
    wanted = language_model.prompts(prompts, chat)
    if not wanted:
        raise TrimtabError("there is no prompt to keep a budget on")
    return wanted, language_model.fitting(wanted)


def _check_budgets(budgets: Sequence[float]) -> None:
    if not budgets:
        raise TrimtabError("there is no budget: name some, in nats")
    for one in budgets:
        if not (math.isfinite(one) and one > 0):
            raise TrimtabError(f"a budget must be above 0 nats, not {one}")


def dials_for(
    language_model: LanguageModel,
    steering: Steering,
    texts: Sequence[Sequence[int]],
    kl: float,
    force: bool = False,
) -> list[float]:
    """The dial of each text (token ids), on the side of the dial on which the steering stands."""
    _check_budgets([kl])
    side: Side = "negative" if steering.setting < 0 else "positive"
    found = solve(language_model, steering, texts, [kl], side, force=force)[side]
    _warn_unreached([solution[0] for solution in found], steering, kl)
    return [solution[0].dial for solution in found]


def _warn_unreached(solutions: Sequence[Solution], steering: Steering, kl: float) -> None:
    ends = sorted({solution.dial for solution in solutions if not solution.reached}, key=abs)
    if ends:
        count = sum(not solution.reached for solution in solutions)
        warnings.warn(
            f"{count} of {len(solutions)} prompts cost less than {kl:g} nats as far as the dial "
            f"goes: their dial is its end, {ends[-1]:g}{steering.dial.unit}",
            TrimtabWarning,
            stacklevel=3,
        )


# -- finding the dial -----------------------------------------------------------------------------


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


def searched(steering: Steering, kl: float) -> Generator[float, float, Solution]:
    """The search for the dial of one text, on the side on which the steering stands, for whoever
    has a model elsewhere: it yields dials, takes the KL at each, and returns what was found. What
    has no such dial is refused at once."""
    _check_budgets([kl])
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
