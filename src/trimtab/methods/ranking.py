"""Units in order of a score, flat over the units of several sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def rank(score: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; of equal ones the lower index first."""
    return score.sort(descending=True, stable=True).indices
