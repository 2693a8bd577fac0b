"""Single units scaled for real, many of them at once: each is a row of a batch.

What scaling one unit does to some texts takes a pass over them. Of a thousand units these would be
a thousand passes of small batches that all begin alike. Here the blocks below a unit's layer run
once for all units of that layer, from one layer to the next, and a batch of the blocks above has a
row for each unit and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.anatomy import Edit, hooked, is_hooked, site_order
from trimtab.model import (
    LanguageModel,
    Sequences,
    batches_by_length,
    refuse_dropout,
    scope_weights,
    unsound,
    with_images,
)
from trimtab.reading.abilities import blocks_apart
from trimtab.reading.reader import Reading, read_columns
from trimtab.reading.streams import run_lower, run_upper
from trimtab.steering import Positions, Scope, Steering
from trimtab.terminal import progress


@dataclass(frozen=True)
class ScaledUnit:
    """One unit of a site, which is multiplied by 1 + gamma."""

    site: str
    unit: int
    gamma: float


@torch.inference_mode()
def scaled_log_p(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    units: Sequence[ScaledUnit],
    positions: Positions = "all",
    steering: Steering | None = None,
) -> Tensor:
    """The log-probability of the targets of each reading together: first as the model is, then
    with one unit scaled at a time, [1 + units, readings] in nats (float64).

    `positions` are the tokens at which units are scaled; `steering` is on the model meanwhile.
    Batches have at most `batch_tokens` tokens, and of the streams below only one layer's are held.
    What overflows where a unit is scaled is not finite.
    """
    lm, texts = language_model, [reading.tokens for reading in readings]
    refuse_dropout(lm.model)
    whole, on = is_hooked(lm.model), () if steering is None else (steering,)
    at_site: dict[str, list[int]] = {}
    for row, unit in enumerate(units, 1):
        at_site.setdefault(unit.site, []).append(row)
    found = torch.zeros(len(units) + 1, len(readings), dtype=torch.float64)
    streams, done = [torch.empty(0)] * len(texts), 0
    sites = sorted(at_site, key=site_order) or lm.anatomy.sites("resid")[-1:]
    with progress("scaling units", len(units)) as advance:
        for site in sites:
            blocks = 0 if whole else blocks_apart(lm, on, sites=[site])
            streams, done = run_lower(lm, texts, blocks, streams, done), blocks
            # No unit is scaled in the first row, which the lowest site runs.
            rows = ([0] if site == sites[0] else []) + at_site.get(site, [])
            scaled = [units[row - 1] if row else ScaledUnit(site, 0, 0.0) for row in rows]
            with lm.steered(steering) as sequences:
                sequences.may_miss_images = True
                batches = _Batches(lm, readings, positions, streams, blocks, sequences)
                found[rows] = batches.log_p(scaled)
            advance(len(at_site.get(site, [])))
    broken = (~found[0].isfinite()).nonzero().flatten().tolist()
    if broken:
        labels = [each.label for each in on]
        raise unsound(f"text {broken[0] + 1}", labels, lm.dtype)
    return found


@dataclass(frozen=True)
class _Batches:
    """Readings, of which the first `blocks` blocks have run already."""

    language_model: LanguageModel
    readings: Sequence[Reading]
    positions: Positions
    streams: Sequence[Tensor]
    blocks: int
    sequences: Sequences

    def log_p(self, scaled: Sequence[ScaledUnit]) -> Tensor:
        """Of the readings' targets with each of some units of a site scaled, [units, readings]."""
        lm, texts = self.language_model, [reading.tokens for reading in self.readings]
        rows = [(unit, text) for unit in range(len(scaled)) for text in range(len(texts))]
        lengths, sees = [len(texts[text]) for _, text in rows], with_images(texts)
        apart = [sees[text] for _, text in rows]
        found = torch.zeros(len(scaled), len(texts), dtype=torch.float64)
        for places in batches_by_length(lengths, lm.batch_tokens, apart=apart):
            units, own = zip(*(rows[place] for place in places), strict=True)
            found[list(units), list(own)] = self._batch([scaled[unit] for unit in units], own)
        return found

    def _batch(self, scaled: Sequence[ScaledUnit], texts: Sequence[int]) -> Tensor:
        """Of one reading (by its index) for each unit, [rows]."""
        lm, readings = self.language_model, [self.readings[text] for text in texts]
        self.sequences.given_ends = [reading.prompt for reading in readings]
        edit, site = _scaling(lm, scaled, readings, self.positions), scaled[0].site
        with hooked(lm.anatomy.body, {lm.anatomy.point(site): edit}):
            tokens, streams = [r.tokens for r in readings], [self.streams[i] for i in texts]
            hidden = run_upper(lm, tokens, streams, self.blocks)
        columns, targets = zip(*((r.positions, r.targets or ()) for r in readings), strict=True)
        return torch.stack([n.log_p.sum() for n in read_columns(lm, hidden, columns, targets)])


def _scaling(
    language_model: LanguageModel,
    scaled: Sequence[ScaledUnit],
    readings: Sequence[Reading],
    positions: Positions,
) -> Edit:
    """Scales one unit of a site in each row of a batch."""
    factors = torch.ones(len(scaled), 1, language_model.anatomy.width(scaled[0].site))
    units = torch.tensor([each.unit for each in scaled])
    factors[torch.arange(len(scaled)), 0, units] = torch.tensor([1 + each.gamma for each in scaled])
    steered = _steered(language_model, readings, positions)

    def edit(x: Tensor) -> Tensor:
        own = factors.to(x.device)
        if steered is not None:
            own = 1 + (own - 1) * steered[:, -x.shape[1] :, None].to(x.device)
        return (x * own).to(x.dtype)

    return edit


def _steered(
    language_model: LanguageModel, readings: Sequence[Reading], positions: Positions
) -> Tensor | None:
    """How much of its gamma a unit is scaled by at each token, [rows, tokens]; None: by all."""
    scope = Scope.of(positions)
    if scope.everywhere:
        return None
    weights = [
        torch.tensor(scope_weights(language_model.marks, scope, reading.tokens, reading.prompt))
        for reading in readings
    ]
    return pad_sequence(weights, batch_first=True)
