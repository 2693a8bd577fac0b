"""What is taken out: directions of the difference between two sides, in the ways that ablation has
of finding them.

    one        r = unit(mean(h^pos) - mean(h^neg))
    svd        the k right singular vectors of the differences that hold most of them: of a pair's
               sides, or of each positive text and the negative mean
    som        neuron_j - mean(h^neg) for the k neurons of a self-organising map of the positive
               texts that most texts are nearest to

`outside` takes out of directions what lies along others, so that ablating leaves these alone;
`cleaned` as much of it as a ridge leaves, where the others are means of groups of texts:

    r <- unit(r - C (C'C + lambda I)^-1 C'r),    C the groups' means, each of length 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.fitting import Means, Samples, Statistics, Want
from trimtab.methods.som import neurons
from trimtab.steering import Ablate, orthonormal

Finding = Literal["svd", "som"]
#: What is left of a direction when others are taken out of it, at least, to be one.
_LEFT = 1e-4


@dataclass(frozen=True)
class Winsorised:
    """Reads an activation with no unit beyond the quantile q of its own units' sizes."""

    q: float

    @property
    def name(self) -> str:
        return f"winsorised-{self.q:g}"

    def __call__(self, activation: Tensor) -> Tensor:
        x = activation.float()
        limit = x.abs().quantile(self.q, dim=-1, keepdim=True)
        return x.clamp(-limit, limit)


class Source(NamedTuple):
    """Where directions are read: a site, a token from the end, in which form, on which rows."""

    site: str
    token: int
    read: Winsorised | None = None
    rows: frozenset[int] | None = None

    def want(self, statistic: type) -> Want:
        return Want(self.site, self.token, statistic, read=self.read, rows=self.rows)


def unit(vector: Tensor) -> Tensor:
    """A vector as a direction, of length 1."""
    return vector.div(vector.norm())


def found_directions(
    statistics: Statistics, source: Source, count: int, by: Finding, seed: int
) -> Tensor:
    """Directions of the difference at a source, [count, units] in float64 of length 1, not at right
    angles where they are of a map."""
    means: Means = statistics[source.want(Means)]
    if not means.difference.any():
        raise TrimtabError(f"ablation: the two sides do not differ at {source.site}")
    if count == 1:
        return unit(means.difference)[None]
    samples: Samples = statistics[source.want(Samples)]
    texts, positive, rows = samples.texts()
    shown, other = texts[positive].double(), means.negative
    if by == "som":
        return statistics.once(
            (source, count, by, seed), lambda: _of_map(shown, other, count, seed)
        )
    paired = torch.equal(rows[positive], rows[~positive])
    differences = shown - (texts[~positive].double() if paired else other)
    return statistics.once((source, count, by), lambda: _of_svd(differences, count))


def _of_svd(differences: Tensor, count: int) -> Tensor:
    """The directions that hold most of the differences, [texts, units], each the way that the mean
    difference leads."""
    _, sizes, vectors = torch.linalg.svd(differences, full_matrices=False)
    if count > len(sizes) or not sizes[count - 1] > 1e-6 * sizes[0]:
        held = int((sizes > 1e-6 * sizes[0]).sum())
        raise TrimtabError(
            f"ablation: {count} directions are asked for, and the differences of "
            f"{len(differences)} texts have {held}: ask for fewer, or give more texts"
        )
    chosen = vectors[:count]
    along = chosen @ differences.mean(0)
    signs = torch.where(along < 0, -1.0, 1.0).to(chosen)
    turned: Tensor = signs[:, None] * chosen
    return turned


def _of_map(shown: Tensor, other: Tensor, count: int, seed: int) -> Tensor:
    """From the mean of the other side to the neurons that most texts are nearest to."""
    found, hits = neurons(shown, seed)
    if count > int((hits > 0).sum()):
        raise TrimtabError(
            f"ablation: {count} directions are asked for, and texts are nearest to "
            f"{int((hits > 0).sum())} neurons of the map: ask for fewer"
        )
    best = hits.argsort(descending=True, stable=True)[:count]
    away = found[best] - other
    return away.div(away.norm(dim=-1, keepdim=True))


def outside(directions: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Directions [k, units] without what lies along others, of length 1 again."""
    basis: list[Tensor] = []
    for other in others:
        rest = unit(other)
        for _ in range(2):  # twice, because once leaves what rounding left
            for done in basis:
                rest = rest - (rest @ done) * done
        if float(rest.norm()) > _LEFT:
            basis.append(unit(rest))
    rest = directions
    for _ in range(2):
        for done in basis:
            rest = rest - (rest @ done)[:, None] * done
    sizes = rest.norm(dim=-1, keepdim=True)
    if not (sizes > _LEFT * directions.norm(dim=-1, keepdim=True)).all():
        raise TrimtabError(
            "ablation: a direction lies along the mean of the negative side, so that nothing is "
            "left of it: leave project out"
        )
    return rest.div(sizes)


def centroids_of(texts: Tensor, count: int, seed: int) -> Tensor:
    """The means of so many groups of texts [texts, units], each of length 1: [count, units] in
    float64, by k-means."""
    from sklearn.cluster import KMeans

    x = texts.double().cpu().numpy()
    distinct = len(np.unique(x, axis=0))
    if count > distinct:
        raise TrimtabError(
            f"ablation: {count} groups of texts to spare are asked for, and {distinct} texts "
            "differ: ask for fewer (spare_groups), or give more texts"
        )
    found = KMeans(count, n_init=4, random_state=seed).fit(x).cluster_centers_
    centroids = torch.from_numpy(found).double()
    return centroids.div(centroids.norm(dim=-1, keepdim=True))


def cleaned(directions: Tensor, centroids: Tensor, ridge: float) -> Tensor:
    """Directions [k, units] without their ridge projection on centroids, of length 1 again."""
    gram = centroids @ centroids.T
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    along = torch.linalg.solve(system, centroids @ directions.T)  # [centroids, k]
    rest = directions - along.T @ centroids
    sizes = rest.norm(dim=-1, keepdim=True)
    if not (sizes > _LEFT * directions.norm(dim=-1, keepdim=True)).all():
        raise TrimtabError(
            "ablation: a direction lies in the span of the texts to spare, so that nothing is left "
            "of it: raise spare_ridge, or ask for fewer groups (spare_groups)"
        )
    clean: Tensor = rest.div(sizes)
    return clean


def between(low: Tensor, high: Tensor, share: float) -> Tensor:
    """The direction at a share of the way from one to another, [1, units] each."""
    return unit(torch.lerp(low[0], high[0], share))[None]


def operators_of(directions: Tensor, compose: bool) -> list[Ablate]:
    """What takes directions [k, units] out: all of their span at once, or one after the other, the
    last one first."""
    if len(directions) == 1:
        return [Ablate(directions[0].float())]
    if compose:
        return [Ablate(direction.float()) for direction in directions.flip(0)]
    if not float(torch.linalg.svdvals(directions)[-1]) > _LEFT:
        raise TrimtabError(
            f"ablation: of {len(directions)} directions one lies in the span of the others: ask "
            "for fewer"
        )
    return [Ablate(orthonormal(directions).float())]
