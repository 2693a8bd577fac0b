"""What is odd in a contrast, said before a model learns it: duplicates, prompts in two parts, sides
that hardly differ, columns and rows that look exchanged.

No program can know which side is meant to be the positive one: what is looked at is said in the
docstring of each question below, and the command shows two pairs for people to see.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.contrasts.contrast import Contrast
from trimtab.contrasts.held_out import grouped, plain
from trimtab.contrasts.rows import PARTS, Pair, Text, last_message

_SIDES = ("positive", "negative")
SINGLE = "there is one pair to fit on: what is its own and what is the behaviour are not told apart"
#: Findings that are said where a contrast is fitted on, too: a mistake in the file, most likely.
MISTAKES = ("columns", "constant", "repeats-prompt", "two-parts", "no-part")
#: Rows below which a habit of all of them is no sign of anything.
_FEW = 5
#: How many times as long one side is as the other, by their medians, before it is said.
_LONGER = 3.0
#: How far a row's words must speak for the other side, in nats per side, before it is said.
_EXCHANGED = 4.0
#: Marks after which a word begins with a blank.
_ENDS = tuple(".,;:!?)")


@dataclass(frozen=True)
class Finding:
    """Something odd, in words, and the rows that it is about, from 1 (none: the whole)."""

    kind: str
    says: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """The shortest, the median and the longest."""

    least: int
    median: float
    most: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        return cls(min(lengths), _median(lengths), max(lengths))


@dataclass(frozen=True)
class Checked:
    """What is in a contrast: rows by part and side, lengths by column, and what is odd."""

    name: str
    digest: str
    paired: bool
    rows: int
    parts: dict[str, dict[str, int]]
    lengths: dict[str, Lengths]
    unit: str
    warnings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(contrast: Contrast, lengths: dict[str, Sequence[int]] | None = None) -> Checked:
    """Look through a contrast; `lengths` are those of its columns in tokens, where a model is at
    hand, or else they are counted in words."""
    questions = _OF_PAIRS if contrast.paired else _OF_TEXTS
    counted = lengths or {
        column: [len(last_message(text).split()) for text in texts]
        for column, texts in columns(contrast).items()
    }
    return Checked(
        contrast.name,
        contrast.digest,
        contrast.paired,
        len(contrast),
        _parts(contrast),
        {column: Lengths.of(some) for column, some in counted.items()},
        "words" if lengths is None else "tokens",
        tuple(found for ask in questions if (found := ask(contrast)) is not None),
    )


def columns(contrast: Contrast) -> dict[str, list[Any]]:
    """The texts of a contrast by column: prompt, positive, negative, without columns that are
    empty."""
    if contrast.paired:
        found: dict[str, list[Any]] = {
            "prompt": [pair.prompt for pair in contrast.pairs],
            "positive": [pair.positive for pair in contrast.pairs],
            "negative": [pair.negative for pair in contrast.pairs],
        }
        return {column: texts for column, texts in found.items() if any(texts)}
    return {side: [text.text for text in contrast.texts if text.label == side] for side in _SIDES}


def _parts(contrast: Contrast) -> dict[str, dict[str, int]]:
    """Rows by part and side; those that name none are of "all" where no row does."""
    found: dict[str, dict[str, int]] = {}
    for part in (*PARTS, None):
        rows = [row for row in contrast.rows if row.part == part]
        if rows:
            name = part or ("none" if contrast.has_parts else "all")
            sides: list[str] = [row.label for row in rows if isinstance(row, Text)]
            found[name] = {side: sides.count(side) if sides else len(rows) for side in _SIDES}
    return found


# -- questions to any contrast --------------------------------------------------------------------


def _single(contrast: Contrast) -> Finding | None:
    if len(contrast) > 1 and not (contrast.has_parts and len(contrast.train) == 1):
        return None
    return Finding("single", SINGLE)


def _duplicates(contrast: Contrast) -> Finding | None:
    """Rows that are equal but for their part."""
    places: dict[Any, list[int]] = {}
    for number, row in enumerate(contrast.rows, 1):
        key = (
            (row.prompt, row.positive, row.negative)
            if isinstance(row, Pair)
            else (row.text, row.label)
        )
        places.setdefault(key, []).append(number)
    again = tuple(sorted(number for each in places.values() for number in each[1:]))
    return _about("duplicate", again, "the same as an earlier row")


def _without_part(contrast: Contrast) -> Finding | None:
    """Rows that name no part where others do: no command takes them."""
    if not contrast.has_parts:
        return None
    rows = tuple(n for n, row in enumerate(contrast.rows, 1) if row.part is None)
    return _about("no-part", rows, "no part is named, so that nothing takes them")


def _in_two_parts(contrast: Contrast) -> Finding | None:
    """Prompts, equal but for blanks and capitals, that are in more than one part."""
    found = [
        number + 1
        for group in grouped(contrast.rows)
        if len({contrast.rows[i].part for i in group} - {None}) > 1
        for number in group
    ]
    return _about(
        "two-parts", tuple(found), "the prompt is in another part too: what is held out is known"
    )


def _one_prompt(contrast: Contrast) -> Finding | None:
    """Whether some rows could be held out by their prompts."""
    if contrast.has_parts or not contrast.too_few or len(contrast) < 2:
        return None
    return Finding("too-few", f"{contrast.too_few}: nothing tells how a steering does on others")


# -- questions to pairs ---------------------------------------------------------------------------


def _hardly_differ(contrast: Contrast) -> Finding | None:
    """Sides that are equal but for blanks and capitals."""
    rows = tuple(
        n
        for n, pair in enumerate(contrast.pairs, 1)
        if plain(pair.positive) == plain(pair.negative)
    )
    return _about("hardly-differ", rows, "the sides differ in blanks or capitals only")


def _constant(contrast: Contrast) -> Finding | None:
    """A side that is the same text in every row, while the other is not."""
    if len(contrast) < _FEW:
        return None
    same = [
        side for side in _SIDES if len({plain(getattr(pair, side)) for pair in contrast.pairs}) == 1
    ]
    if len(same) != 1:
        return None
    text = getattr(contrast.pairs[0], same[0])
    return Finding("constant", f"the {same[0]} side is the same in every row ({_short(text)}): is "
                   "that column meant?")  # fmt: skip


def _repeats_prompt(contrast: Contrast) -> Finding | None:
    """Sides that are the prompt once more."""
    rows = tuple(
        n
        for n, pair in enumerate(contrast.pairs, 1)
        if plain(last_message(pair.prompt))
        and plain(last_message(pair.prompt)) in (plain(pair.positive), plain(pair.negative))
    )
    return _about("repeats-prompt", rows, "a side is the prompt itself: are the columns exchanged?")


def _asks(contrast: Contrast) -> Finding | None:
    """A side of which most texts end in a question mark, while hardly a prompt does."""
    if len(contrast) < _FEW:
        return None

    def asking(texts: Sequence[Any]) -> float:
        return sum(last_message(text).rstrip().endswith("?") for text in texts) / len(texts)

    found = columns(contrast)
    if asking(found.get("prompt", [""])) > 0.1:
        return None
    for side in _SIDES:
        if asking(found.get(side, [""])) >= 0.5:
            return Finding("columns", f"most texts of the {side} side end in a question mark and "
                           "hardly a prompt does: are the columns exchanged?")  # fmt: skip
    return None


def _contradict(contrast: Contrast) -> Finding | None:
    """Rows that say of one prompt the opposite of what another row says."""
    places = {
        (plain(pair.prompt), plain(pair.positive), plain(pair.negative)): number
        for number, pair in enumerate(contrast.pairs, 1)
    }
    rows = tuple(
        number
        for (prompt, positive, negative), number in places.items()
        if positive != negative and (prompt, negative, positive) in places
    )
    return _about("contradict", rows, "another row has the same sides exchanged")


def _exchanged(contrast: Contrast) -> Finding | None:
    """Rows whose words are those of the other side, by the words of all other rows: how many more
    of the positive than of the negative texts have each word, as a naive Bayes classifier has it.

    Said only where that tells the sides of four rows in five apart, and of those that it would
    have the other way round by a wide margin.
    """
    pairs = contrast.pairs
    if len(pairs) < 4 * _FEW:
        return None
    words = [(_words(pair.positive), _words(pair.negative)) for pair in pairs]
    with_word = [Counter(word for row in words for word in row[side]) for side in (0, 1)]

    def speaks(row: tuple[set[str], set[str]]) -> float:
        """Nats for the sides as they are, by the other rows."""
        total = 0.0
        for sign, side in ((1, row[0] - row[1]), (-1, row[1] - row[0])):
            for word in side:
                positive = with_word[0][word] - (word in row[0]) + 0.5
                negative = with_word[1][word] - (word in row[1]) + 0.5
                total += sign * math.log(positive / negative)
        return total

    scores = [speaks(row) for row in words]
    if sum(score > 0 for score in scores) < 0.8 * len(pairs):
        return None
    rows = tuple(n for n, score in enumerate(scores, 1) if score < -_EXCHANGED)
    return _about("exchanged", rows, "by their words the sides look exchanged")


def _glued(contrast: Contrast) -> Finding | None:
    """Sides that follow a plain prompt without a blank, so that two words become one."""
    rows = tuple(
        n
        for n, pair in enumerate(contrast.pairs, 1)
        if isinstance(pair.prompt, str)
        and (pair.prompt[-1:].isalnum() or pair.prompt[-1:] in _ENDS)
        and (pair.positive[:1].isalnum() or pair.negative[:1].isalnum())
    )
    if not rows:
        return None
    pair = contrast.pairs[rows[0] - 1]
    side = pair.positive if pair.positive[:1].isalnum() else pair.negative
    joined = _short(last_message(pair.prompt)[-20:] + side[:20])
    return _about("glued", rows, f"a side follows its prompt without a blank, as in {joined}")


def _longer(contrast: Contrast) -> Finding | None:
    """One side much longer than the other: a steering may learn length."""
    positive, negative = (
        _median([len(last_message(text).split()) for text in columns(contrast)[side]])
        for side in _SIDES
    )
    if min(positive, negative) < 1 or max(positive, negative) < _LONGER * min(positive, negative):
        return None
    more, times = ("positive", positive / negative) if positive > negative else (
        "negative", negative / positive)  # fmt: skip
    return Finding("longer", f"{more} texts are {times:.2g} times as long as the others (median "
                   "words): a steering may learn length")  # fmt: skip


_ANY: tuple[Callable[[Contrast], Finding | None], ...] = (
    _single, _duplicates, _without_part, _in_two_parts, _one_prompt, _longer,
)  # fmt: skip
_OF_TEXTS = _ANY
_OF_PAIRS = (
    *_ANY, _hardly_differ, _constant, _repeats_prompt, _asks, _contradict, _exchanged, _glued,
)  # fmt: skip


# -- words ----------------------------------------------------------------------------------------


def _about(kind: str, rows: tuple[int, ...], says: str) -> Finding | None:
    """A finding about rows, of which the first few are named."""
    if not rows:
        return None
    named = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return Finding(kind, f"row{'s' if len(rows) > 1 else ''} {named}: {says}", rows)


def _median(numbers: Sequence[int]) -> float:
    """Not of `statistics`, which takes longer to import than a page of help to show."""
    ordered, half = sorted(numbers), len(numbers) // 2
    return ordered[half] if len(numbers) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+(?:'\w+)?", text.lower()))
