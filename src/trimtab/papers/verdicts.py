"""Whether what a paper found is found here: its figures and its sentences held against ours.

A figure of the paper that is a change from its unsteered model is held against our change: the
same direction or not, larger or smaller. One without such a baseline is held against ours as it
is. A sentence is checked where the recipe says how (`Claim`), and else stands in words alone; one
that this run has no figures for is told as such.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from trimtab.papers.recipe import Claim, Published, Recipe
from trimtab.papers.result import Value
from trimtab.reports import Table

#: Our figures by row and column.
Values = Mapping[str, Mapping[str, Value]]
#: What differs by no more than this share is alike.
_ALIKE = 0.1
#: The verdict on a sentence that a scale or a part of a recipe has no figures for.
_UNMEASURED = "not measured here"


def verdicts(recipe: Recipe, ours: Values, scale: str) -> list[Table]:
    """A line for each finding that can be held against ours at a scale; no table where none can."""
    rows = []
    for label, columns in ours.items():
        published = [one for one in recipe.published if label in one.rows]
        if published and label != recipe.baseline:
            said = [_figure(recipe, published, ours, label, column) for column in columns]
            rows += [[label, *line] for line in _together([one for one in said if one])]
    for claim in recipe.claims:
        of = ours if scale in claim.scales else ()
        held = [line for label in of for line in _claimed(claim, ours, label)]
        rows += held or [[claim.says, "says so", "", _UNMEASURED]]
    heads = ["finding", "paper", "ours", "verdict"]
    return [Table("Is it found here?", heads, rows, _NOTE)] if rows else []


_NOTE = (
    "No clear change: the intervals overlap. Alike: within 10 %, or between figures of the paper's "
    "models."
)
Line = tuple[str, str, str]


def _together(said: Sequence[Line]) -> list[Line]:
    """One line for a row: of several columns how often each verdict is given."""
    if len(said) < 2:
        return list(said)
    counts = Counter(verdict for *_, verdict in said)
    words = ", ".join(f"{verdict} ({count} of {len(said)})" for verdict, count in counts.items())
    return [("see above", "see above", words)]


# -- figures --------------------------------------------------------------------------------------


def _figure(
    recipe: Recipe, published: Sequence[Published], ours: Values, label: str, column: str
) -> Line | None:
    """One figure of ours beside those of the paper's models; None where one of them has none."""
    own, base = ours[label][column], ours.get(recipe.baseline or "", {}).get(column)
    mine, unit = number(own), published[0].unit
    theirs = [(one, number(one.rows[label].get(column))) for one in published]
    levels = [value for _, value in theirs if value is not None]
    if mine is None or not levels:
        return None
    if recipe.baseline is None:
        return _range(levels), own.shown(unit), _level(levels, _in(unit, own, mine))
    start = None if base is None else number(base)
    changes = [
        value - begun
        for one, value in theirs
        if value is not None
        and (begun := number(one.rows.get(recipe.baseline, {}).get(column))) is not None
    ]
    if base is None or start is None or not changes:
        return None
    change = _in(unit, own, mine) - _in(unit, base, start)
    return _range(changes, "+"), f"{change:+.3g}", _direction(changes, change, _apart(own, base))


def number(value: Value | float | str | None) -> float | None:
    """A figure, also where it is written out in words; None for any other words."""
    plain = value.value if isinstance(value, Value) else value
    with suppress(TypeError, ValueError):
        return float(plain)  # type: ignore[arg-type]
    return None


def _in(unit: str, value: Value, own: float) -> float:
    """In the paper's unit."""
    return 100 * own if unit == "%" and value.share else own


def _range(values: Sequence[float], sign: str = "") -> str:
    low, high = min(values), max(values)
    return f"{low:{sign}.4g}" if low == high else f"{low:{sign}.4g} to {high:{sign}.4g}"


def _apart(one: Value, other: Value) -> bool:
    """Whether two figures differ, and their intervals, where they have any, do not overlap. Of a
    single example nothing says how much chance there is in it."""
    if 1 in (one.n, other.n):
        return False
    if one.ci95 is None or other.ci95 is None:
        return one.value != other.value
    return one.ci95[0] > other.ci95[1] or other.ci95[0] > one.ci95[1]


def _direction(paper: Sequence[float], ours: float, clear: bool) -> str:
    if not clear:
        return "no clear change"
    same = [abs(change) for change in paper if change * ours > 0]
    if not same:
        return "contradicts"
    return f"same direction, {_size(same, abs(ours), 'smaller', 'larger')}"


def _level(paper: Sequence[float], ours: float) -> str:
    return _size(paper, ours, "lower than the paper's", "higher than the paper's")


def _size(paper: Sequence[float], ours: float, lower: str, higher: str) -> str:
    low, high = min(paper), max(paper)
    if ours < low - _ALIKE * abs(low):
        return lower
    return higher if ours > high + _ALIKE * abs(high) else "alike"


# -- sentences ------------------------------------------------------------------------------------


def _claimed(claim: Claim, ours: Values, label: str) -> list[list[str]]:
    """A claim held against one of our rows, if it is about that."""
    found = re.fullmatch(rf"(.*, )?(?:{claim.ours})", label)
    if found is None:
        return []
    rows = []
    for column, own in ours[label].items():
        mine = number(own)
        other = _other(claim, ours, found[1] or "", column)
        if mine is None or (other is None and claim.between is None):
            continue
        where = (found[1] or "").removesuffix(", ")
        place = ", ".join(word for word in (where, column) if word and word != "value")
        against = "" if other is None else f" against {other.shown('')}"
        finding = f"{claim.says} ({place})" if place else claim.says
        verdict = _held(claim, own, mine, other)
        rows.append([finding, "says so", f"{own.shown('')}{against}", verdict])
    return rows


def _other(claim: Claim, ours: Values, prefix: str, column: str) -> Value | None:
    """The figure that a claim holds ours against: a number, or that of another row of the same
    part."""
    for other in (claim.above, claim.below, claim.like):
        if isinstance(other, float | int):
            return Value(other)
        if other is not None:
            names = (name for name in ours if re.fullmatch(re.escape(prefix) + other, name))
            return next((ours[name].get(column) for name in names), None)
    return None


def _held(claim: Claim, own: Value, mine: float, other: Value | None) -> str:
    if claim.between is not None:
        low, high = claim.between
        return "agrees" if low <= mine <= high else "contradicts"
    theirs = None if other is None else number(other)
    if other is None or theirs is None:
        return "cannot be told"
    if claim.like is not None:
        near = abs(mine - theirs) <= _ALIKE * abs(theirs) or not _apart(own, other)
        return "agrees" if near else "contradicts"
    right = mine > theirs if claim.above is not None else mine < theirs
    if not _apart(own, other):
        return "no clear difference"
    return "agrees" if right else "contradicts"
