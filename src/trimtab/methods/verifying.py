"""Units by effect, verified: each of the best is scaled alone, for real, at the strength wanted.

An effect is a derivative at 0, and what a unit does at a large gamma may be something else: the
gain is measured on some pairs, and the units that gain most are kept. Where units are chosen for
what they cost, a unit counts by

    r |r| / 1/2 c gamma^2        for its measured gain r, with its cost c

which is the score e^2 / c with what was measured in place of what was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, spread
from trimtab.fitting import Effect, Effects, Sides
from trimtab.methods.effects import dear
from trimtab.methods.ranking import Scores, places
from trimtab.model import LanguageModel
from trimtab.reading import Reading, ScaledUnit, scaled_log_p, side_readings, text_readings
from trimtab.steering import Positions, Steering

#: How many times more units are measured than are kept.
CANDIDATES = 4


@dataclass(frozen=True)
class Verification:
    """Texts on which gains are measured: each reading's log-probability counts by its weight, and
    those of a pair count together. `positive` says of unpaired texts which side they are on."""

    language_model: LanguageModel
    readings: Sequence[Reading]
    weights: Tensor  # [readings]
    positions: Positions
    positive: Tensor | None

    @property
    def rows(self) -> int:
        """How many pairs, or texts of the positive side."""
        return len(self.readings) // 2 if self.positive is None else int(self.positive.sum())

    def gains(
        self, units: Sequence[ScaledUnit], steering: Steering | None = None
    ) -> tuple[Tensor, Tensor]:
        """What scaling each unit alone gains in nats per pair, beyond what a steering does that is
        on the model, and its standard error: [units] each. What overflows gains less than nothing.
        """
        log_p = scaled_log_p(self.language_model, self.readings, units, self.positions, steering)
        broken = ~log_p[1:].isfinite().all(1)
        gained = (log_p[1:].nan_to_num(0.0) - log_p[0]) * self.weights  # [units, readings]
        if self.positive is None:
            of_pairs = gained.unflatten(1, (-1, 2)).sum(-1).T
            sides = of_pairs, of_pairs[:0]
        else:
            sides = gained.T[self.positive], gained.T[~self.positive]
        found = Effects()
        found.update(Sides(*sides, *(torch.arange(len(side)) for side in sides)))
        return found.mean.masked_fill(broken, -torch.inf), found.error


def verification(
    language_model: LanguageModel,
    contrast: Contrast,
    count: int,
    effect: Effect,
    max_length: int | None,
) -> Verification:
    """So many pairs of a contrast, or texts of each side, spread over it."""
    lm, few = language_model, _spread(contrast, count)
    if few.paired:
        readings = side_readings(lm, few, max_length)
        weights = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(few))
        if effect.per_token:
            weights /= _lengths(readings)
        return Verification(lm, readings, weights, effect.positions, None)
    readings = text_readings(lm, few, max_length)
    positive = torch.tensor([row.label == "positive" for row in few.texts])
    return Verification(lm, readings, 1 / _lengths(readings), "all", positive)


def _spread(contrast: Contrast, count: int) -> Contrast:
    if contrast.paired:
        return replace(contrast, rows=tuple(spread(contrast.pairs, count)))
    sides = ([t for t in contrast.texts if t.label == label] for label in ("positive", "negative"))
    return replace(contrast, rows=tuple(text for side in sides for text in spread(side, count)))


def _lengths(readings: Sequence[Reading]) -> Tensor:
    """How many tokens of each are scored; an answer of none counts as one."""
    return torch.tensor([max(1, len(r.positions)) for r in readings], dtype=torch.float64)


def verified(
    check: Verification,
    found: Scores,
    candidates: Tensor,
    gammas: Tensor,
    per_nat: bool,
    steering: Steering | None = None,
) -> Scores:
    """The scores with those of the candidates measured at `gammas`, and no other unit above 0. New
    columns, 0 for units that were not measured:

    real       nats per pair that scaling the unit alone gains; `real_error` its standard error
    predicted  what its effect says that it would
    """
    widths = [cost.samples.shape[1] for cost in found.costs]
    of_site, units = (each.tolist() for each in places(widths, candidates))
    scaled = [
        ScaledUnit(found.sites[site], unit, gamma)
        for site, unit, gamma in zip(of_site, units, gammas.tolist(), strict=True)
    ]
    real, error = check.gains(scaled, steering)
    score = real
    if per_nat:
        cost = 0.5 * dear(found.columns["cost"])[candidates] * gammas.square()
        score = real * real.abs() / cost
    columns = {
        "score": score,
        "real": real,
        "real_error": error,
        "predicted": gammas * found.columns["effect"][candidates],
    }
    every = {
        name: torch.zeros_like(found.score).index_copy(0, candidates, column)
        for name, column in columns.items()
    }
    return replace(found.with_columns(**every), score=every["score"], size=None)
