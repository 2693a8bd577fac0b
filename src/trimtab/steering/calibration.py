"""Budgets and the dials that they allow, as `trimtab.strength.calibrate` measures them once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from trimtab.errors import TrimtabError, check_choice

#: The strengths that have names, in nats at the next token: where half of the prompts that a
#: steering was calibrated on use so much up.
STRENGTHS = {"gentle": 0.1, "clear": 0.5, "strong": 1.0}


@dataclass(frozen=True)
class Calibration:
    """At which dials so many nats of KL are used up, on `prompts` prompts.

    `kl` rises. Each side of the dial has, for every budget, the median dial of the prompts and the
    one at which 95 % of them stay within the budget; None where too few prompts use it up within
    the dial's range. A side that the dial does not have is empty.
    """

    kl: tuple[float, ...]
    prompts: int
    digest: str
    positive: tuple[float | None, ...] = ()
    positive_worst5: tuple[float | None, ...] = ()
    negative: tuple[float | None, ...] = ()
    negative_worst5: tuple[float | None, ...] = ()

    @property
    def strengths(self) -> dict[str, float]:
        """The dials of the strengths that have a name, of those that were reached."""
        dials = dict(zip(self.kl, self.positive, strict=False))
        found = {name: dials.get(kl) for name, kl in STRENGTHS.items()}
        return {name: dial for name, dial in found.items() if dial is not None}

    def dial(
        self, kl: float, side: Literal["positive", "negative"] = "positive", median: bool = False
    ) -> float:
        """The dial of a budget; between two that were measured, on a line in log KL and log dial.

        Below the smallest one KL goes with the square of the dial.
        """
        if not (math.isfinite(kl) and kl > 0):
            raise TrimtabError(f"a budget must be above 0 nats, not {kl}")
        check_choice("side", side, Literal["positive", "negative"])
        dials = getattr(self, side if median else f"{side}_worst5")
        known = [(b, d) for b, d in zip(self.kl, dials, strict=False) if d is not None]
        if not known:
            raise TrimtabError(f"this calibration has no dials of the {side} side")
        (first, dial), (last, _) = known[0], known[-1]
        if kl > last:
            raise TrimtabError(
                f"this steering is calibrated up to {last:g} nats, not to {kl:g}: calibrate it "
                "with a larger budget, or turn its dial by number"
            )
        if kl <= first:
            return float(dial * math.sqrt(kl / first))
        for (lower, a), (upper, b) in pairwise(known):
            if kl <= upper:
                span = math.log(upper) - math.log(lower)  # 0 for budgets that are next to equal
                share = (math.log(kl) - math.log(lower)) / span if span > 0 else 1.0
                return float(math.copysign(abs(a) ** (1 - share) * abs(b) ** share, b))
        raise AssertionError("unreachable: kl is at most the last one")

    @classmethod
    def rising(
        cls,
        kl: Sequence[float],
        prompts: int,
        digest: str,
        **columns: Sequence[float | None],
    ) -> Calibration:
        """A calibration from dials as they were found, made to rise with their budgets.

        Where KL does not rise with the dial (a rotation's falls again), a larger budget may have
        been met at a smaller dial than a smaller one. What keeps to the smaller one keeps to the
        larger one too, so it has at least that dial.
        """
        raised = {name: _raised(dials) for name, dials in columns.items()}
        for side in ("positive", "negative"):
            worst = raised.get(f"{side}_worst5", ())
            medians = raised.get(side, ())
            if len(worst) == len(medians):
                raised[side] = tuple(
                    max(median, low, key=abs) if median and low else median
                    for median, low in zip(medians, worst, strict=True)
                )
        return cls(tuple(kl), prompts, digest, **raised)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.kl))
        if not (self.kl and rising and all(math.isfinite(kl) and kl > 0 for kl in self.kl)):
            raise TrimtabError("a calibration's budgets must rise from above 0 nats")
        if self.prompts < 1:
            raise TrimtabError(f"a calibration on {self.prompts} prompts says nothing")
        if not (self.positive or self.negative):
            raise TrimtabError("a calibration has dials of neither side")
        for side, sign in (("positive", 1), ("negative", -1)):
            for name in (side, f"{side}_worst5"):
                self._check_column(name, sign)
            medians, worst = getattr(self, side), getattr(self, f"{side}_worst5")
            if len(medians) != len(worst):
                raise TrimtabError(f"a calibration has {side} or {side}_worst5, but not both")
            for median, low in zip(medians, worst, strict=True):
                if None not in (median, low) and abs(low) > abs(median):
                    raise TrimtabError(
                        f"a calibration's {side}_worst5 allows more than {side}, its median"
                    )

    def _check_column(self, name: str, sign: int) -> None:
        dials = getattr(self, name)
        if len(dials) not in (0, len(self.kl)):
            raise TrimtabError(f"a calibration has {len(self.kl)} budgets, {name} differs")
        given = [dial for dial in dials if dial is not None]
        if not all(math.isfinite(dial) and sign * dial > 0 for dial in given):
            raise TrimtabError(f"a calibration's {name} has a dial of the other side")
        if not all(abs(a) <= abs(b) for a, b in pairwise(given)):
            raise TrimtabError(f"a calibration's {name} does not rise with its budgets")


def _raised(dials: Sequence[float | None]) -> tuple[float | None, ...]:
    """Each dial, or the furthest one before it."""
    furthest = 0.0
    found: list[float | None] = []
    for dial in dials:
        if dial:  # neither None nor 0, which is for the checks to refuse
            furthest = max(furthest, abs(dial))
            dial = math.copysign(furthest, dial)
        found.append(dial)
    return tuple(found)
