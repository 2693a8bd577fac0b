"""Which rows of a contrast are held out: parts drawn at random, so that no prompt is on two sides,
and the rows that a steering was fitted on found again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimtab.contrasts.images import Image
from trimtab.contrasts.rows import Content, Pair, Part, Prompt, Text
from trimtab.options import Split

Row = Pair | Text
#: Different prompts below which nothing is held out by default: a fifth of them would be no test.
LEAST = 20


def drawn_parts(rows: Sequence[Row], split: Split) -> list[Part]:
    """A part for each row. Rows that share their prompt have the same one; of unpaired texts each
    label is dealt out by itself."""
    draw = random.Random(split.seed)
    parts: list[Part] = ["train"] * len(rows)
    for groups in _strata(rows):
        draw.shuffle(groups)
        count = sum(map(len, groups))
        wanted: list[tuple[Part, float]] = [("test", split.test), ("validation", split.validation)]
        for part, share in wanted:
            taken = 0
            # One group stays in train whatever the sizes.
            while len(groups) > 1 and taken < round(share * count):
                group = groups.pop()
                taken += len(group)
                for index in group:
                    parts[index] = part
    return parts


def too_few(rows: Sequence[Row]) -> str:
    """Why these are too few to hold some of them out, or nothing."""
    strata = _strata(rows)
    count, least = min(map(len, strata)), LEAST // len(strata)
    if count >= least:
        return ""
    if len(strata) == 1:
        prompts = "1 prompt is" if count == 1 else f"{count} different prompts are"
        return f"{prompts} too few to hold some out ({LEAST} are the least)"
    return f"{count} texts of a label are too few to hold some out ({least} are the least)"


def _strata(rows: Sequence[Row]) -> list[list[list[int]]]:
    """The groups of rows that belong together; of unpaired texts those of each label."""
    by_label: dict[str, list[list[int]]] = {}
    for group in grouped(rows):
        first = rows[group[0]]
        by_label.setdefault(first.label if isinstance(first, Text) else "", []).append(group)
    return list(by_label.values())


def grouped(rows: Sequence[Row]) -> list[list[int]]:
    """The numbers of rows whose prompts are equal but for blanks and capitals, in their order.

    Pairs without a prompt belong together that share a side.
    """
    first: dict[Any, int] = {}
    leads_to = list(range(len(rows)))  # an earlier row of the same group, or the row itself

    def leader(index: int) -> int:
        while leads_to[index] != index:
            leads_to[index] = leads_to[leads_to[index]]
            index = leads_to[index]
        return index

    for index, row in enumerate(rows):
        for key in _keys(row):
            one, other = sorted((leader(first.setdefault(key, index)), leader(index)))
            leads_to[other] = one
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(leader(index), []).append(index)
    return list(groups.values())


def _keys(row: Row) -> list[Any]:
    if isinstance(row, Text):
        return [plain(row.text)]
    if plain(row.prompt):
        return [plain(row.prompt)]
    return [plain(row.positive), plain(row.negative)]


def plain(prompt: Prompt) -> Any:
    """A prompt without what is no difference to a reader: blanks, capitals, where images lie."""
    if isinstance(prompt, str):
        return " ".join(prompt.split()).casefold()
    return tuple((role, _plain_content(content)) for role, content in prompt)


def _plain_content(content: Content) -> Any:
    if isinstance(content, str):
        return plain(content)
    return tuple(each.digest if isinstance(each, Image) else plain(each) for each in content)


def shared_rows(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """How many of the rows are among the others, whatever part they are of."""
    known = {replace(row, part=None) for row in others}
    return sum(replace(row, part=None) in known for row in rows)
