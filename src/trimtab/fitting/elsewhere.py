"""A pass over a contrast by an engine in place of transformers: which tokens are read of each text,
and what is made of them.

Each side of a row is a request of its own, all of them in one continuous batch; what they share is
computed once where it is not read. Sums are made where the model runs, and other activations are
handed over text by text, so that memory grows with the texts under way, not with all there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.reading import Engine, Packed, Stretch

if TYPE_CHECKING:
    from trimtab.fitting.activations import Pick


def read_by(
    engine: Engine, rows: Sequence[tuple[Packed, Sequence[Pick]]], device: torch.device
) -> Iterator[tuple[Packed, dict[Pick, Tensor]]]:
    """Rows with what is to be picked of each, as they come: [1, sides, units] in float32."""
    texts: list[tuple[Sequence[int], list[Stretch]]] = []
    owners: list[tuple[int, int]] = []
    for number, (row, picks) in enumerate(rows):
        if row.seen:
            raise TrimtabError(
                f"row {row.index + 1} has images, and {engine.name} is given text only here: leave "
                "the engine out"
            )
        for side, text in enumerate(row.texts()):
            wanted = dict.fromkeys(stretch_of(pick, row, side) for pick in picks)
            texts.append((text, list(wanted)))
            owners.append((number, side))
    #: Of each row that is under way, by side: what was read, by stretch.
    read: dict[int, dict[int, Mapping[Stretch, Tensor]]] = {}
    for place, found in engine.activations(texts):
        number, side = owners[place]
        sides = read.setdefault(number, {})
        sides[side] = dict(zip(texts[place][1], found, strict=True))
        row, picks = rows[number]
        if len(sides) < len(row.sides):
            continue
        del read[number]
        yield (
            row,
            {
                pick: torch.stack(
                    [
                        _picked(pick, stretch, sides[each][stretch].to(device))
                        for each in range(len(row.sides))
                        for stretch in [stretch_of(pick, row, each)]
                    ]
                )[None]
                for pick in picks
            },
        )


def stretch_of(pick: Pick, row: Packed, side: int) -> Stretch:
    """Which tokens of one side of a row stand for it, and whether each of them is asked for."""
    length, token = row.common + row.sides[side], pick.token
    if isinstance(token, int):
        # Too short are only rows that this pick is not wanted of: any token will do.
        first = max(0, length + token)
        return Stretch(pick.site, first, first + 1, whole=True)
    over, pool = getattr(token, "over", token), getattr(token, "pool", "mean")
    starts = {"answer": min(row.answers[side], length - 1), "rest": min(1, length - 1)}
    whole = pick.read is not None or pool == "max"
    return Stretch(pick.site, starts.get(str(over), 0), length, whole)


def _picked(pick: Pick, stretch: Stretch, found: Tensor) -> Tensor:
    """What stands for a side, [units] in float32, of a stretch's activations or their sum."""
    read: Any = pick.read
    if read is not None:
        found = read(found)
    if isinstance(pick.token, int):
        return found[0].float()
    pool = getattr(pick.token, "pool", "mean")
    if pool == "max":
        return found.amax(0).float()
    total = found.sum(0) if stretch.whole else found
    return (total if pool == "sum" else total / (stretch.stop - stretch.first)).float()
