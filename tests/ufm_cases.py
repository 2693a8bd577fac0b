"""The theory of steering strength by its definitions alone: cases and oracles.

`Case` draws a data set, both sides and a model; `oracle_p`, `oracle_log_odds` and `oracle_steered`
know nothing of trimtab: they use the definitions alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.strength.theory.ufm import ConceptData, SteeredUFM, perfect, sides, specification

GRID = np.linspace(-8, 8, 161)


@dataclass(frozen=True)
class Case:
    """A random problem; everything that a test needs to know about it."""

    concepts: int
    size: int
    epsilon: float
    contrastive: bool
    seed: int

    @property
    def data(self) -> ConceptData:
        data = specification(
            self.concepts * self.size, self.concepts, self.epsilon, seed=self.seed, contexts_each=4
        )
        weights = np.random.default_rng(self.seed).dirichlet(np.full(len(data.contexts), 2.0))
        return replace(data, weights=weights)

    @property
    def target(self) -> int:
        return self.seed % self.concepts

    def steered(self, shift: Any = 0.0) -> SteeredUFM:
        data = self.data
        opposite = (self.target + 1) % self.concepts if self.contrastive else None
        both = sides(data, self.target, 1 + self.seed % 4, opposite=opposite, seed=self.seed)
        return SteeredUFM(data, perfect(data, shift), self.target, *both)


def oracle_p(data: ConceptData) -> np.ndarray:
    """p(z | c_j) token by token, from definition 2.1."""
    size = len(data.a) // data.concepts
    return np.array(
        [
            [data.a[z] if z // size == concept else data.b[z] for z in range(len(data.a))]
            for concept in data.contexts
        ]
    )


def oracle_log_odds(steered: SteeredUFM) -> np.ndarray:
    """Definition 3.2, as a product and a root."""
    p = oracle_p(steered.data)
    above = np.prod([p[j] for j in steered.positive], axis=0)
    below = np.prod([p[j] for j in steered.negative], axis=0)
    return np.log(above / below) / len(steered.positive)


def oracle_steered(steered: SteeredUFM, alpha: float) -> np.ndarray:
    """σ(W (h_j + α v)), context by context, [m, V]."""
    H, W = steered.model.H, steered.model.W
    q = len(steered.positive)
    v = sum(H[:, j] for j in steered.positive) / q - sum(H[:, j] for j in steered.negative) / q
    rows = []
    for j in range(H.shape[1]):
        logits = W @ (H[:, j] + alpha * v)
        grown = np.exp(logits - logits.max())
        rows.append(grown / grown.sum())
    return np.array(rows)
