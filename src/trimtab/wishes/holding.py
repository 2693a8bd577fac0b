"""Whether the answers that are written under a steering hold together: how much of them repeats,
beside those of the model as it is.

The limit of cost is kept on plain text. What the model writes may fall apart all the same, as in
"1. 1.1.1.1"; so some answers to validation prompts are written and looked at before anything is
chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evaluation import looping

#: The share of a text's runs of four words or signs that were there before, from which on it has
#: fallen apart: the same as of a text that is written for a contrast.
LOOPS = 0.3
#: How much larger the share of such answers may be than in the model as it is.
_MORE = 0.2


@dataclass(frozen=True)
class Held:
    """Of `n` answers how many fall apart under a steering and without it, and the mean share of
    what repeats in either."""

    n: int
    steered: int
    unsteered: int
    repeats: float
    base_repeats: float

    @property
    def holds(self) -> bool:
        """Whether the answers fall apart hardly more often than they do anyway."""
        return self.steered - self.unsteered <= _MORE * self.n

    def __str__(self) -> str:
        return (
            f"{self.steered} of {self.n} answers repeat themselves ({self.unsteered} of {self.n} "
            "unsteered)"
        )

    def as_json(self) -> dict[str, Any]:
        fallen = {"steered": self.steered, "unsteered": self.unsteered, "n": self.n}
        repeats = {"steered": self.repeats, "unsteered": self.base_repeats}
        return {"fall_apart": fallen, "repetition": repeats, "holds": self.holds}


def held_together(texts: Sequence[str], base: Sequence[str]) -> Held:
    """Answers under a steering beside those of the model as it is, prompt by prompt."""
    shares, before = ([looping(text) for text in each] for each in (texts, base))
    n = max(1, len(texts))
    steered, unsteered = (sum(share > LOOPS for share in each) for each in (shares, before))
    return Held(len(texts), steered, unsteered, sum(shares) / n, sum(before) / n)
