"""Which method, place and dial: successive halving on validation rows, and the trade-offs of what
is left.

Each arm is first turned as far as the limit of cost allows, so that all are compared at one cost.
The best by some validation rows go on to more of them, those that are left to all rows, and the
best of these is tried at smaller dials too. No other has more gain for as little cost: that is the
front, and its end is chosen, unless the answers that are written there fall apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from trimtab.dials import dial_limits
from trimtab.figures import Estimate, mean_interval
from trimtab.steering import Steering
from trimtab.terminal import progress
from trimtab.wishes.holding import Held
from trimtab.wishes.measuring import Measures
from trimtab.wishes.pace import Pace
from trimtab.wishes.portfolio import Arm, Fits
from trimtab.wishes.work import Work

#: Validation rows of the rungs before the last, which takes all.
RUNGS = (8, 16)
#: Arms that go on after each rung: a share of them, but no fewer than are tried at many dials.
SHARE, FINALISTS = 3, 3
#: Plain texts that are read while dials are looked for; what is left is held to all of them.
TEXTS = 5
#: What the best one is tried at, as shares of the dial that the limit of cost allows.
SHARES = (1.0, 0.7, 0.4, 0.2)
#: Of so many, the best first, is looked at whether their answers hold together.
CHECKED = 4
#: A dial is as far as a limit allows when its cost is this share of it or more; what is aimed at;
#: how often it is tried; how much further a try may go, and how far beyond a method's own range.
_NEAR, _AIM, _TRIES, _GROWTH, _BEYOND = 0.85, 0.93, 8, 6.0, 100.0
#: Dials at which the search begins: of a strength, and of an angle in degrees.
_START = (1.0, 10.0)

#: What a steering runs of a pass; plain texts together, and one of them, in tokens; how often a
#: dial is tried on all of them; pairs that a training reads, counted as passes without gradients.
_UPPER, _PLAIN, _TEXT, _SEARCHED, _TRAINING = 0.6, 1000, 55, 4, 540

#: Says of a steering, and what it is known by, whether what is written under it holds together.
Hold = Callable[[str, Callable[[], Steering]], Held | None]
State = Literal["chosen", "tried", "stopped", "refused", "dear", "set aside", "left out"]


@dataclass(frozen=True)
class Tried:
    """An arm at a dial: what it costs on plain text and gains on `gain.n` validation rows."""

    arm: str
    dial: float
    cost: float
    gain: Estimate

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.arm,
            "dial": self.dial,
            "cost": self.cost,
            "gain": self.gain.value,
            "gain_ci95": self.gain.ci95,
            "n": self.gain.n,
        }


@dataclass(frozen=True)
class Row:
    """What became of an arm; `best` is at the dial of its most gain."""

    name: str
    method: str
    params: dict[str, Any]
    state: State
    best: Tried | None = None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        own = {"dial": None, "cost": None, "gain": None, "gain_ci95": None, "n": 0}
        said = {**own, **({} if self.best is None else self.best.as_json())}
        about = {"name": self.name, "method": self.method, "params": self.params}
        return {**said, **about, "state": self.state, "why": self.why}


@dataclass(frozen=True)
class Choice:
    """Every arm, everything that was tried on all validation rows, what was chosen, and whether the
    answers that are written under it hold together (None: nobody looked)."""

    rows: tuple[Row, ...]
    tried: tuple[Tried, ...]
    best: Tried | None
    held: Held | None = None

    @property
    def front(self) -> tuple[Tried, ...]:
        """Those than which no other gains as much for less, from the least cost to the most."""
        found: list[Tried] = []
        for one in sorted(self.tried, key=lambda one: (one.cost, -one.gain.value)):
            if not found or one.gain.value > found[-1].gain.value:
                found.append(one)
        return tuple(found)


@dataclass
class Chooser:
    """Chooses among arms on the validation rows; `say` is told what goes on. `pair` is how many
    tokens a row has about, `after` how many seconds what has to come after this takes."""

    arms: Sequence[Arm]
    fits: Fits
    measures: Measures
    work: Work
    pace: Pace
    max_cost: float
    pair: float
    after: Callable[[], float]
    say: Callable[[str], object]
    left_out: list[str] = field(default_factory=list)
    _rows: dict[str, Row] = field(default_factory=dict)

    def choose(self, hold: Hold) -> Choice:
        """The best of all arms whose answers hold together, which `hold` says of a name and a
        steering."""
        far = self._turned_up()
        count = self.measures.bench.rows("validation")
        left = list(far)
        for rung, rows in enumerate(sorted({min(rows, count) for rows in RUNGS})):
            if rows == count or len(left) <= FINALISTS:
                break
            if not self.pace.allows(f"{rows} rows", self._reading(len(left) * rows) + self._least):
                self.left_out.append(f"the round on {rows} validation pairs")
                break
            self.say(f"rung {rung + 1}: {len(left)} settings on {rows} of {count} validation rows")
            left = self._rung(far, left, rows)
        self.say(f"{len(left)} settings on all {count} validation rows, the best at smaller dials")
        tried = self._finals(far, left)
        best, held = self._holding(tried, hold)
        if best is not None:
            own = replace(self._rows[best.arm], state="chosen", best=best, why="")
            self._rows[best.arm] = own
        every = tuple(self._rows[arm.name] for arm in self.arms)
        return Choice(every, tuple(tried), best, held)

    def _holding(self, tried: Sequence[Tried], hold: Hold) -> tuple[Tried | None, Held | None]:
        """What gains most within the limit and writes answers that hold together; where none of
        the best does, that of which most do."""
        allowed = [one for one in tried if one.cost <= self.max_cost]
        ranked = sorted(allowed, key=lambda one: -one.gain.value)
        clear = [one for one in ranked if one.gain.low > 0][:CHECKED]
        fallen: list[tuple[Tried, Held]] = []
        for one in clear:
            find = partial(self._steering, one.arm, one.dial)
            held = hold(tried_key(one.arm, one.dial), find)
            if held is None or held.holds:
                return one, held
            self.say(f"{one.arm} at {one.dial:.4g} is set aside: {held}")
            row = self._rows[one.arm]
            self._rows[one.arm] = replace(row, state="set aside", why=f"at {one.dial:.4g}, {held}")
            fallen.append((one, held))
        if fallen:
            return min(fallen, key=lambda one: (one[1].steered, -one[0].gain.value))
        return next(iter(ranked), None), None

    def _mark(self, arm: Arm, state: State, best: Tried | None = None, why: str = "") -> None:
        self._rows[arm.name] = Row(arm.name, arm.method.name, arm.params, state, best, why)

    # -- dials at the limit -----------------------------------------------------------------------

    def _turned_up(self) -> dict[str, float]:
        """The dial of each arm at which plain text costs what the limit allows."""
        found: dict[str, float] = {}
        skipped: list[str] = []
        with progress("turning dials to the limit of cost", len(self.arms)) as advance:
            for arm in self.arms:
                taken = 4 * TEXTS * _TEXT * _UPPER + (_TRAINING * self.pair if arm.trained else 0)
                # What is found is still to be compared.
                compared = self._reading(RUNGS[0] * (len(found) + 1)) + self._least
                needed = self.pace.speed.seconds(taken) + compared
                if found and not self.pace.allows(arm.name, needed):
                    self._mark(arm, "left out", why="no time was left")
                    skipped.append(arm.name)
                    continue
                with self.pace.reading(taken):
                    dial = self._at_limit(arm)
                if dial is not None:
                    found[arm.name] = dial
                advance(1)
        if skipped:
            of = f"{len(skipped)} of {len(self.arms)} settings of methods"
            self.left_out.append(f"{of}: {', '.join(skipped)}")
        return found

    def _reading(self, rows: float, plain: float = 0.0) -> float:
        """Seconds for so many rows, and plain texts, under a steering."""
        return self.pace.speed.seconds(_UPPER * (rows * self.pair + plain * _PLAIN))

    @property
    def _least(self) -> float:
        """Seconds for one setting on all rows, with the model as it is, and what has to come
        after."""
        rows = self.measures.bench.rows("validation")
        unsteered = self._reading(rows, 1) / _UPPER
        return unsteered + self._reading(rows, _SEARCHED) + self.after()

    def _at_limit(self, arm: Arm) -> float | None:
        why = self.fits.why_not(arm.name)
        if why:
            self._mark(arm, "refused", why=why)
            return None
        dial = self._searched(arm.name, None, TEXTS)
        if dial is None:
            self._mark(arm, "dear", why="every dial that was tried costs more than the limit")
        else:
            self._mark(arm, "stopped")
        return dial

    def _searched(self, name: str, start: float | None, texts: int | None) -> float | None:
        """The dial at the limit of cost on some plain texts, or on all (None)."""

        def search() -> float | None:
            steering, method = self.fits.steering(name), self.fits.arms[name].method
            high = dial_limits(steering, _BEYOND if method.looks_beyond else 1.0)[1]
            first = min(high, start or _START[steering.dial.unit != ""])
            return dial_at(lambda dial: self._cost(name, dial, texts), self.max_cost, first, high)

        return self.work.recall(f"dial of {name} on {texts or 'all'} texts", search)

    def _cost(self, name: str, dial: float, texts: int | None) -> float:
        return self.measures.cost(lambda: self._steering(name, dial), tried_key(name, dial), texts)

    def _steering(self, name: str, dial: float) -> Steering:
        return replace(self.fits.steering(name), value=dial)

    # -- rungs ------------------------------------------------------------------------------------

    def _rung(self, far: Mapping[str, float], left: Sequence[str], rows: int) -> list[str]:
        """The arms that do most on so many validation rows, in the order of their gain."""
        tried = []
        before = max((each for each in RUNGS if each < rows), default=0)
        with progress(f"{rows} validation rows", len(left)) as advance:
            for name in left:
                with self.pace.reading(_UPPER * self.pair * (rows - before)):
                    tried.append(self._tried(name, far[name], rows, TEXTS))
                self._rows[name] = replace(self._rows[name], best=tried[-1])
                advance(1)
        ranked = sorted(tried, key=lambda one: -one.gain.value)
        return [one.arm for one in ranked[: max(FINALISTS, math.ceil(len(left) / SHARE))]]

    def _finals(self, far: Mapping[str, float], left: Sequence[str]) -> list[Tried]:
        """What is left, on all validation rows, and the best of it at every share of its dial."""
        tried: list[Tried] = []
        rows = self.measures.bench.rows("validation")
        ends: dict[str, float] = {}
        dials = 0
        with progress("all validation rows", len(left) + len(SHARES) - 1) as advance:
            for name in left:
                needed = self._reading(rows, _SEARCHED) + self.after()
                if tried and not self.pace.allows(f"{name} on all rows", needed):
                    continue
                with self.pace.reading(_UPPER * (rows * self.pair + _SEARCHED * _PLAIN)):
                    ends[name] = self._searched(name, far[name], None) or far[name]
                    tried.append(self._tried(name, ends[name], rows, None))
                advance(1)
            for share in SHARES[1:] if tried else ():
                name = max(tried, key=lambda one: (one.cost <= self.max_cost, one.gain.value)).arm
                dial = ends[name] * share
                if not self.pace.allows(
                    tried_key(name, dial), self._reading(rows, 1) + self.after()
                ):
                    continue
                with self.pace.reading(_UPPER * (rows * self.pair + _PLAIN)):
                    tried.append(self._tried(name, dial, rows, None))
                dials += 1
                advance(1)
        if len(ends) < len(left):
            self.left_out.append(f"{len(left) - len(ends)} of {len(left)} settings on all rows")
        if tried and dials < len(SHARES) - 1:
            missing = len(SHARES) - 1 - dials
            self.left_out.append(f"{missing} of {len(SHARES)} dials of the best setting")
        for name in ends:
            best = max((one for one in tried if one.arm == name), key=lambda one: one.gain.value)
            self._rows[name] = replace(self._rows[name], state="tried", best=best)
        return tried

    def _tried(self, name: str, dial: float, rows: int, texts: int | None) -> Tried:
        """On so many of the validation rows, of which those of the rungs below are known; with its
        cost on so many plain texts."""
        key, pieces, start = tried_key(name, dial), [], 0
        for stop in sorted({min(stop, rows) for stop in (*RUNGS, rows)}):
            some = self.measures.gains(
                lambda: self._steering(name, dial), key, "validation", start, stop
            )
            pieces.append(some)
            start = stop
        cost = self._cost(name, dial, texts)
        return Tried(name, dial, cost, mean_interval(torch.cat(pieces)))


def tried_key(name: str, dial: float) -> str:
    """What an arm at a dial is known by."""
    return f"{name} at {dial!r}"


def dial_at(cost: Callable[[float], float], limit: float, start: float, end: float) -> float | None:
    """The largest dial up to an end whose cost is within a limit and near it; None where each that
    is tried costs more. From one dial to the next the cost is taken for a power law."""
    known: dict[float, float] = {}
    dial = start
    for _ in range(_TRIES):
        known[dial] = found = cost(dial)
        if _NEAR * limit <= found <= limit or (found <= limit and dial >= end):
            break
        low = max((one for one, paid in known.items() if paid <= limit), default=0.0)
        high = min((one for one, paid in known.items() if paid > limit and one > low), default=end)
        guess = dial * _further(known, dial, limit)
        if not low < guess < high:
            untried = high == end and end not in known
            guess = end if untried else math.sqrt(max(low, high / 100) * high)
        dial = guess
    return max((one for one, paid in known.items() if paid <= limit), default=None)


def _further(known: Mapping[float, float], dial: float, limit: float) -> float:
    """How many times further the dial may be, by what it costs there and cost before."""
    paid = known[dial]
    if paid <= 0:
        return _GROWTH
    power, others = 2.0, [one for one, other in known.items() if one != dial and other > 0]
    if others and math.isfinite(paid):
        nearest = min(others, key=lambda one: abs(math.log(one / dial)))
        if math.isfinite(known[nearest]) and known[nearest] != paid:
            power = math.log(known[nearest] / paid) / math.log(nearest / dial)
    further: float = (_AIM * limit / paid) ** (1 / min(4.0, max(0.5, power)))
    return min(_GROWTH, max(1 / _GROWTH, further))
