"""A self-organising map of texts: neurons on a small grid, each of which stands for texts that are
alike, and whose neighbours stand for similar ones.

"SOM Directions Are Better than One: Multi-Directional Refusal Suppression" (2511.08379): 4 x 4
neurons on hexagons, 10,000 steps, each of which moves the neuron nearest to one text, and a little
those around it, towards that text:

    w_j <- w_j + eta(t) exp(-|j - nearest|^2 / 2 sigma^2) (x - w_j),      eta(t) = .01 / (1 + 2t/T)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE, STEPS, RATE, SIGMA = 4, 10_000, 0.01, 0.3


def neurons(texts: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The neurons of texts [texts, units], and to how many texts each is the nearest: [16, units]
    in float64 and [16]. They begin as texts that are drawn, and texts come in a drawn order."""
    generator = torch.Generator().manual_seed(seed)
    x = texts.double()
    drawn = torch.randint(len(x), (SIDE * SIDE,), generator=generator)
    order = torch.randperm(len(x), generator=generator).tolist()
    around, found = _around(), x[drawn].clone()
    for step in range(STEPS):
        away = x[order[step % len(order)]] - found
        nearest = int(away.square().sum(-1).argmin())
        rate = RATE / (1 + 2 * step / STEPS)
        found += (rate * around[nearest])[:, None] * away
    hits = torch.cdist(x, found).argmin(-1).bincount(minlength=len(found))
    return found, hits


def _around() -> Tensor:
    """How much of a step of one neuron each other takes part in, [neurons, neurons]."""
    places = torch.tensor(
        [
            (column + 0.5 * (row % 2), row * math.sqrt(3) / 2)
            for row in range(SIDE)
            for column in range(SIDE)
        ],
        dtype=torch.float64,
    )
    return torch.exp(-torch.cdist(places, places).square() / (2 * SIGMA**2))
