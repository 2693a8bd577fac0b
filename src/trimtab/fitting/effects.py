"""The effect of scaling units on what a contrast is about, as one of the things that a pass reads.

"Units by effect": e_i = d m / d g_i at 0 for x_i <- (1 + g_i) x_i, where m is how much more
probable a pair's positive side is than its negative one. Its sign says which way to scale, whatever
the sign of the activation; a unit that nothing reads has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import Edit
from trimtab.errors import TrimtabError
from trimtab.fitting.gradients import Scored, Summed, run_gradients
from trimtab.model import LanguageModel, scope_weights
from trimtab.reading import Batch, Packed, answers_scored, scored_from
from trimtab.steering import Positions, Scope


@dataclass(frozen=True)
class Effect:
    """Stands in a `Want` in place of a token: not an activation is wanted but what scaling units
    does, summed over the tokens at which a steering of these `positions` (a scope) acts.

    Of a pair it is the effect on log p(positive | prompt) - log p(negative | prompt) in nats, or
    with `per_token` on the difference of the means per answer token. Of a text without a partner it
    is that on its mean log-likelihood per token, as if the model wrote it: all its tokens count.
    `counted` leaves out a text's first token ("rest"), or all others ("first").
    """

    positions: Positions = "all"
    per_token: bool = False
    counted: Literal["all", "first", "rest"] = "all"

    def __str__(self) -> str:
        """For file names."""
        per_token = ".per_token" if self.per_token else ""
        place = self.positions
        if not place.isalpha():
            place = hashlib.sha256(place.encode()).hexdigest()[:12]
        return f"effect.{place}.{self.counted}{per_token}"


@dataclass(frozen=True)
class Slope:
    """Reads the gradient itself, which is the effect of adding to each unit."""

    name = "slope"

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class HeadSums:
    """Reads the effect of scaling whole heads."""

    heads: int

    @property
    def name(self) -> str:
        return f"heads{self.heads}"

    @property
    def width(self) -> int:
        return self.heads

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        products: Tensor = (activation * gradient).unflatten(-1, (self.heads, -1))
        return products.sum(-1)


def check_scored(name: str, rows: Sequence[Packed]) -> None:
    """Refuse texts without a token that could be scored."""
    for row in rows:
        if len(row.sides) > 1:
            scored_from(row, name)
        elif row.common < 2:
            raise TrimtabError(f"{name}, row {row.index + 1}: the text has no token to score")


def effects_of(
    language_model: LanguageModel,
    batch: Batch,
    picks: Sequence[Any],
    readers: Mapping[str, Edit],
) -> dict[Any, Tensor]:
    """What picks of effects want of a batch, [rows, 1, numbers] each; `readers` see the activations
    of sites on the way."""
    paired = len(batch.rows[0].sides) > 1
    starts = [scored_from(row) if paired else 1 for row in batch.rows]
    weights = {
        token: _counted(language_model, batch, starts, token)
        for token in {pick.token for pick in picks}
    }
    rows = torch.tensor([row for row, _ in batch.owners()])
    found: dict[Any, Tensor] = {}
    for per_token in sorted({pick.token.per_token for pick in picks}):
        here = [pick for pick in picks if pick.token.per_token is per_token]
        sums: dict[str, dict[Any, Summed]] = {}
        for pick in here:
            sums.setdefault(pick.site, {})[pick] = Summed(weights[pick.token], pick.read)
        figure = partial(_figure, batch, starts, per_token or not paired)
        summed = run_gradients(language_model, batch, sums, [figure], {} if found else readers)
        for pick, (lines,) in summed.items():
            own = lines.new_zeros(len(batch.rows), lines.shape[-1])
            found[pick] = own.index_add_(0, rows.to(own.device), lines)[:, None]
    return found


def _figure(batch: Batch, starts: Sequence[int], per_token: bool, hidden: Tensor) -> Scored:
    """What is differentiated: log-probabilities of the answers, those of negative sides taken
    off."""
    lines: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for i, start in enumerate(starts):
        for side, (line, places, tokens) in enumerate(answers_scored(batch, i, start)):
            weight = (-1.0 if side else 1.0) / (max(1, len(tokens)) if per_token else 1)
            lines += [line] * len(tokens)
            columns += places
            targets += tokens
            weights += [weight] * len(tokens)
    return Scored(
        torch.tensor(lines), torch.tensor(columns), torch.tensor(targets), torch.tensor(weights)
    )


def _counted(
    language_model: LanguageModel, batch: Batch, starts: Sequence[int], effect: Effect
) -> Tensor:
    """How much each token counts, [lines, tokens]."""
    paired = len(batch.rows[0].sides) > 1
    scope = Scope.of(effect.positions)
    counted = torch.zeros(batch.tokens.shape)
    for i, start in enumerate(starts):
        for side, text in enumerate(batch.rows[i].texts()):
            line, columns = batch.place_of(i, side)
            taken = torch.ones(len(columns))
            # What is written has all of its tokens generated, also the first.
            if not scope.everywhere and (paired or scope.as_placed is None):
                weights = scope_weights(language_model.marks, scope, tuple(text), start)
                taken = torch.tensor(weights).to(counted)
            if effect.counted != "all":
                first = torch.arange(len(columns)) == 0
                taken = taken * (first if effect.counted == "first" else ~first)
            counted[line, columns] = taken
    return counted
