"""Units in order of a score, flat over the units of several sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.fitting import Costs


@dataclass(frozen=True)
class Scores:
    """The score of every unit of some sites, one site's units after another's, with what else is
    known of each by column; all [units of all sites]. Of equal scores the larger `size` goes
    first. `costs` are those of the sites, where they were measured."""

    sites: Sequence[str]
    score: Tensor
    columns: Mapping[str, Tensor]
    size: Tensor | None = None
    costs: Sequence[Costs] = ()

    def ranked(self) -> Tensor:
        """Indices from the best unit to the worst; of equal ones the lower index first."""
        if self.size is None:
            return rank(self.score)
        by_size = rank(self.size)
        return by_size[rank(self.score[by_size])]

    def best(self, k: int) -> Tensor:
        """The indices of at most k units, those of the largest scores above 0, in rank order."""
        order = self.ranked()
        return order[self.score[order] > 0][:k]

    def with_columns(self, **columns: Tensor) -> Scores:
        """The same with some columns more, or others in their place."""
        return replace(self, columns={**self.columns, **columns})


def places(widths: Sequence[int], picked: Tensor) -> tuple[Tensor, Tensor]:
    """Of indices that are flat over the units of several sites: the number of each one's site, and
    its own number there."""
    site_of = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))[picked]
    unit_of = torch.cat([torch.arange(width) for width in widths])[picked]
    return site_of, unit_of


def rank(score: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; of equal ones the lower index first."""
    return score.sort(descending=True, stable=True).indices
