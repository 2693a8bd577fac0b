"""Kernels over depth: how much of a steering each block gets.

    w(l) = max (1 + |l - position| / distance (min - 1))   where |l - position| <= distance, else 0

`max` is reached at `position`, which need not be a whole block; `min` is what is left of it, as a
share, at `distance` blocks away. The shape, and the ranges that are searched, are those of the
ablations that are searched by trials: attention and FFN each have a kernel of their own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A triangle over depth, in blocks; a weight below 0 is none."""

    max: float
    position: float
    min: float
    distance: float

    def weight(self, layer: int) -> float:
        """The weight of a block."""
        away = abs(layer - self.position)
        if away > self.distance:
            return 0.0
        share = away / self.distance if self.distance else 0.0
        return max(0.0, self.max * (1 + share * (self.min - 1)))


def ranges_of_kernels(layers: int) -> dict[str, tuple[float, float]]:
    """What a search draws each number of the two kernels from, of a model of so many blocks: for
    FFNs a maximum may be drawn below 0, which leaves them alone."""
    last = float(max(layers - 1, 1))
    shape = {
        "position": (0.6 * last, last),
        "min": (0.0, 1.0),
        "distance": (1.0, max(0.6 * last, 2.0)),
    }
    return {
        f"{part}_{name}": ends
        for part, lowest in (("attn", 0.8), ("ffn", -0.25))
        for name, ends in {"max": (lowest, 1.5), **shape}.items()
    }
