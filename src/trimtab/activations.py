"""One pass over a contrast: for every site that is asked for, running statistics.

Each method says what it wants: a site, which token's activation stands for a text, and which
statistic of the two sides. `collect` runs the model once for all of them. It keeps no activations:
a hook picks the wanted tokens out of a batch, the statistic takes them in, and they are gone, so
memory grows with sites and units, not with texts. Neither the LM head nor any block above the
highest wanted site is run.

A new statistic is a class with `update(positive, negative)`, which is handed the activations of
some texts of each side, [texts, units] in float32 and row by row the same pairs where the contrast
is paired.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from trimtab.anatomy import Edit, Point, site_order
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.hooks import hooked
from trimtab.packing import Batch, batches, encode_contrast, model_inputs
from trimtab.progress import progress

#: Whose activation stands for a text: its last token's, the mean over all its tokens, or the mean
#: over the tokens of its answer (what follows the prompt; paired contrasts only).
Token = Literal["last", "mean", "answer"]


class Statistic(Protocol):
    """What `collect` keeps of one site."""

    needs_pairs: bool

    def update(self, positive: Tensor, negative: Tensor) -> None: ...


@dataclass
class SignCounts:
    """How often a unit is larger on the positive side, and how often on the negative."""

    needs_pairs = True
    pairs: int = 0
    larger: Tensor | int = 0  # [units], pairs with x_pos > x_neg
    smaller: Tensor | int = 0

    def update(self, positive: Tensor, negative: Tensor) -> None:
        momentum = positive - negative
        self.pairs += len(momentum)
        self.larger = self.larger + (momentum > 0).sum(0)
        self.smaller = self.smaller + (momentum < 0).sum(0)

    def rates(self) -> tuple[Tensor, Tensor]:
        """r_pos and r_neg, [units] in float64; a pair with equal activations counts for neither."""
        larger, smaller = torch.as_tensor(self.larger), torch.as_tensor(self.smaller)
        return larger.double().cpu() / self.pairs, smaller.double().cpu() / self.pairs


@dataclass
class Means:
    """The mean activation of each side."""

    needs_pairs = False
    counts: list[int] = field(default_factory=lambda: [0, 0])
    sums: list[Any] = field(default_factory=lambda: [0.0, 0.0])  # [units] each

    def update(self, positive: Tensor, negative: Tensor) -> None:
        for side, activations in enumerate((positive, negative)):
            self.counts[side] += len(activations)
            # MPS has no float64; the few thousand additions of float32 there are exact enough.
            wide = activations if activations.device.type == "mps" else activations.double()
            self.sums[side] = self.sums[side] + wide.sum(0)

    @property
    def positive(self) -> Tensor:
        return self._mean(0)

    @property
    def negative(self) -> Tensor:
        return self._mean(1)

    @property
    def difference(self) -> Tensor:
        """mean over positives - mean over negatives, [units] in float64."""
        return self.positive - self.negative

    def _mean(self, side: int) -> Tensor:
        return torch.as_tensor(self.sums[side]).double().cpu() / self.counts[side]


@dataclass(frozen=True)
class Want:
    """One statistic of one site; equal wants are served once."""

    site: str
    token: Token
    statistic: type[Any]


S = TypeVar("S")


class Statistics(dict[Want, Any]):
    """What a pass has gathered."""

    def of(self, site: str, token: Token, statistic: type[S]) -> S:
        found: S = self[Want(site, token, statistic)]
        return found


class _Enough(Exception):  # noqa: N818, it is a signal and no error
    """Raised inside a forward pass once the highest wanted site has been seen."""


@torch.inference_mode()
def collect(
    language_model: Any,
    contrast: Contrast,
    wants: Iterable[Want],
    *,
    max_length: int | None = None,
) -> Statistics:
    """Run the model once over the contrast and return every wanted statistic.

    `max_length` is the longest text in tokens (default: what the model takes); prompts of longer
    ones are cut on the left, with a warning.
    """
    wanted = Statistics({want: want.statistic() for want in wants})
    if not wanted:
        return wanted
    if not contrast.paired:
        for want, statistic in wanted.items():
            if statistic.needs_pairs or want.token == "answer":
                raise TrimtabError(
                    f"{contrast.name} is unpaired, and this method compares the two sides of a "
                    "pair: give it rows with prompt, positive and negative"
                )
    rows = encode_contrast(language_model, contrast, max_length)
    labels = None
    if not contrast.paired:
        labels = torch.tensor([text.label == "positive" for text in contrast.texts])
    with progress("reading activations", len(rows)) as advance:
        for batch in batches(rows, language_model.batch_tokens):
            _run(language_model, batch, wanted, labels)
            advance(len(batch.rows))
    return wanted


def _run(language_model: Any, batch: Batch, wanted: Statistics, labels: Tensor | None) -> None:
    """One batch: hooks hand the wanted tokens of each site to its statistics."""
    anatomy, device = language_model.anatomy, language_model.device
    by_site: dict[str, dict[Token, list[Statistic]]] = {}
    for want, statistic in wanted.items():
        by_site.setdefault(want.site, {}).setdefault(want.token, []).append(statistic)
    pickers = {
        token: _Picker(batch, token, device) for token in sorted({want.token for want in wanted})
    }
    positive = None
    if labels is not None:
        positive = labels[[row.index for row in batch.rows]].to(device)
    last = max(by_site, key=site_order)

    def reader(site: str) -> Edit:
        def read(activation: Tensor) -> None:
            for token, statistics in by_site[site].items():
                picked = pickers[token].pick(activation)  # [rows, sides, units]
                if positive is None:
                    sides = (picked[:, 0], picked[:, 1])
                else:
                    mask = positive.to(picked.device)
                    sides = (picked[mask, 0], picked[~mask, 0])
                for statistic in statistics:
                    statistic.update(*sides)
            if site == last:
                raise _Enough

        return read

    edits: dict[Point, Edit] = {anatomy.point(site): reader(site) for site in by_site}
    with hooked(edits), suppress(_Enough):
        anatomy.body(**model_inputs(batch, language_model))


class _Picker:
    """Takes from [rows, tokens, units] what stands for each side: [rows, sides, units]."""

    def __init__(self, batch: Batch, token: Token, device: torch.device) -> None:
        place = batch.place  # [rows, sides, longest side]
        lengths = (place >= 0).sum(-1)
        self.columns: Tensor | None = None
        if token == "last":
            self.columns = place.gather(-1, (lengths - 1).unsqueeze(-1)).squeeze(-1).to(device)
            return
        start = torch.zeros_like(lengths)
        if token == "answer":
            start = torch.tensor([row.answers for row in batch.rows])
            start = torch.minimum(start, lengths - 1)  # an empty answer: its prompt's last token
        steps = torch.arange(place.shape[-1])
        taken = (steps >= start[..., None]) & (steps < lengths[..., None])
        weights = torch.zeros(*lengths.shape, batch.tokens.shape[1])
        weights.scatter_add_(-1, place.clamp(min=0), taken.float())
        self.weights = (weights / taken.sum(-1, keepdim=True)).to(device)

    def pick(self, activation: Tensor) -> Tensor:
        if self.columns is None:
            return torch.bmm(self.weights.to(activation.device), activation.float())
        columns = self.columns.to(activation.device)
        rows = torch.arange(len(columns), device=activation.device)[:, None]
        return activation[rows, columns].float()
