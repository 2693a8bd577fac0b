"""Directions that tell two sides' activations apart, and readers: a direction and a bias whose
score of an activation is a logit.

    mean      m = mean(positive) - mean(negative)
    lda       C^-1 m, with C the pooled covariance within the sides, shrunk towards its diagonal
    logistic  the weights of a logistic regression, for activations as they are
    lat       the first principal component of the pairs' differences, each with a random sign

Differences that all point one way have most of their length in their mean, which centring takes
away: with random signs their mean is near 0 and the axis stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.fitting import logistic

Estimator = Literal["logistic", "lda", "lat", "mean"]


@dataclass(frozen=True)
class Settings:
    """What the estimators are told: the L2 penalty of `logistic`, the shrinkage of `lda` (None: by
    Ledoit and Wolf's formula), whether `lat` is centred, and the seed of its signs."""

    l2: float = 10.0
    shrinkage: float | None = None
    centred: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Reader:
    """The score of an activation x is <x, direction> + bias; the direction [units] in float64."""

    direction: Tensor
    bias: float

    def scores(self, x: Tensor) -> Tensor:
        found: Tensor = x.double() @ self.direction + self.bias
        return found


def reader_of(estimator: Estimator, x: Tensor, positive: Tensor, settings: Settings) -> Reader:
    """A reader from activations [texts, units] and which of the texts are positive."""
    if estimator == "logistic":
        direction, bias = logistic(x, positive, 1 / settings.l2)
        return Reader(direction.double(), bias)
    x = x.double()
    if estimator == "lda":
        return _discriminant(x, positive, settings.shrinkage)
    direction = _lat(x, positive, settings) if estimator == "lat" else _means(x, positive)
    return _as_logit(direction, x, positive)


def direction_of(estimator: Estimator, x: Tensor, positive: Tensor, settings: Settings) -> Tensor:
    """The same as a direction alone, [units] in float64; of any length."""
    x = x.double()
    if estimator == "mean":
        return _means(x, positive)
    if estimator == "lat":
        return _lat(x, positive, settings)
    return reader_of(estimator, x, positive, settings).direction


def _means(x: Tensor, positive: Tensor) -> Tensor:
    return x[positive].mean(0) - x[~positive].mean(0)


def _discriminant(x: Tensor, positive: Tensor, shrinkage: float | None) -> Reader:
    """Fisher's discriminant with both sides equally probable. In units of each unit's spread within
    the sides its matrix is (1 - s) R + s, R their correlations."""
    a, b = x[positive].mean(0), x[~positive].mean(0)
    within = x - torch.where(positive[:, None], a, b)
    n, units = within.shape
    spread = within.square().mean(0).sqrt().clamp(min=1e-6)
    z, apart = within / spread, (a - b) / spread
    share = _shrinkage(z) if shrinkage is None else shrinkage
    if share == 0 and n - 2 < units:
        raise TrimtabError(
            f"probe: {n} texts do not tell the covariance of {units} units: leave shrinkage out, "
            "or give it more texts"
        )
    weights = _solved(z, share, apart) / spread
    return Reader(weights, -float(weights @ (a + b)) / 2)


def _shrinkage(z: Tensor) -> float:
    from sklearn.covariance import ledoit_wolf_shrinkage

    if len(z) < 4:
        raise TrimtabError(
            f"probe: {len(z)} texts are too few for lda, which needs 2 or more of each side: give "
            "it more, or take mean"
        )
    return float(ledoit_wolf_shrinkage(z.numpy(), assume_centered=True))


def _solved(z: Tensor, share: float, right: Tensor) -> Tensor:
    """((1 - share) z'z / n + share)^-1 right, in as many dimensions as there are texts where these
    are fewer than units."""
    n, units = z.shape
    weight = (1 - share) / n
    if share > 0 and n < units:
        if weight == 0:
            return right / share
        small = z @ z.T + share / weight * torch.eye(n, dtype=z.dtype)
        found: Tensor = (right - z.T @ torch.linalg.solve(small, z @ right)) / share
        return found
    matrix = weight * z.T @ z + share * torch.eye(units, dtype=z.dtype)
    found = torch.linalg.solve(matrix, right)
    return found


def _lat(x: Tensor, positive: Tensor, settings: Settings) -> Tensor:
    """The axis of the pairs' differences; texts without pairs are paired in their order. It points
    to where the positive texts are."""
    n = min(int(positive.sum()), int((~positive).sum()))
    differences = x[positive][:n] - x[~positive][:n]
    signs = np.random.default_rng(settings.seed).choice([-1.0, 1.0], n)
    rows = torch.from_numpy(signs)[:, None] * differences
    if settings.centred:
        rows = rows - rows.mean(0)
    if not bool(rows.any()):
        raise TrimtabError(
            "probe: lat sees no difference that is left when their mean is taken away: give it "
            "more pairs"
        )
    axis: Tensor = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    return axis if float(axis @ _means(x, positive)) >= 0 else -axis


def _as_logit(direction: Tensor, x: Tensor, positive: Tensor) -> Reader:
    """The logit of two normal distributions of one spread, which the sides have along a
    direction."""
    along = x @ direction
    a, b = along[positive], along[~positive]
    spread = torch.cat((a - a.mean(), b - b.mean())).square().mean()
    if not spread > 0:
        raise TrimtabError(
            "probe: the texts of each side are all alike along its direction, so that no logit can "
            "be told: give it more texts"
        )
    scale = float((a.mean() - b.mean()) / spread)
    return Reader(scale * direction, -scale * float(a.mean() + b.mean()) / 2)
