"""The data set of the theory of steering strength: a vocabulary in concepts, and contexts.

M. Taimeskhanov, S. Vaiter, D. Garreau, "Towards Understanding Steering Strength"
(arXiv 2602.02712), section 2.1 and appendices B.1 and B.3. `ufm.py` has the model of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimtab.errors import TrimtabError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ConceptData:
    """p(z | c_j): a_z where token and context share their concept, b_z elsewhere (Def. 2.1).

    Concept k owns the tokens k s ... (k + 1) s - 1, s = V / G. Raises TrimtabError where
    assumption 1, 0 < b_z < a_z < 1, does not hold or probabilities do not sum to one.
    """

    a: Array  # [V]
    b: Array  # [V]
    concepts: int  # G
    contexts: tuple[int, ...]  # the concept of each context, [m]
    weights: Array | None = None  # π_j, how often each context occurs, [m]; equal when left out

    def __post_init__(self) -> None:
        fixed = object.__setattr__
        fixed(self, "a", _vector(self.a, "a"))
        fixed(self, "b", _vector(self.b, "b"))
        fixed(self, "contexts", tuple(int(concept) for concept in self.contexts))
        _check_sizes(self)
        equal = np.full(len(self.contexts), 1 / len(self.contexts))
        fixed(self, "weights", equal if self.weights is None else _vector(self.weights, "weights"))
        _check_assumption(self)
        _check_sums(self)

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.a)

    @property
    def size(self) -> int:
        """s = V / G, the tokens of one concept."""
        return self.vocabulary // self.concepts

    @property
    def pi(self) -> Array:
        """π_j, how often each context occurs, [m]."""
        assert self.weights is not None  # __post_init__ sets it
        return self.weights

    def tokens_of(self, concept: int) -> NDArray[np.bool_]:
        """Which tokens are of this concept, [V]."""
        check_index(concept, self.concepts, "concept")
        return np.asarray(np.arange(self.vocabulary) // self.size == concept)

    def contexts_of(self, concept: int) -> tuple[int, ...]:
        """The contexts of this concept."""
        check_index(concept, self.concepts, "concept")
        return tuple(j for j, owner in enumerate(self.contexts) if owner == concept)

    @cached_property
    def probabilities(self) -> Array:
        """p(z | c_j), [m, V]."""
        return np.stack([self._row(concept) for concept in self.contexts])

    @cached_property
    def entropy(self) -> float:
        """-Σ_j π_j Σ_z p log p in nats: no model has a lower cross-entropy."""
        p = self.probabilities
        return float(-self.pi @ (p * np.log(p)).sum(1))

    def _row(self, concept: int) -> Array:
        return np.where(self.tokens_of(concept), self.a, self.b)


def specification(
    vocabulary: int = 9,
    concepts: int = 3,
    epsilon: float = 0.05,
    *,
    gamma: ArrayLike | None = None,
    omega: ArrayLike | None = None,
    seed: int | None = None,
    contexts_each: int = 4,
) -> ConceptData:
    """a_z = (1 - ε) γ_z and b_z = ε ω_z / (G - 1), appendix B.3; ε in (0, (G - 1) / G).

    `gamma` and `omega` ([V], positive, one in sum over each concept) are uniform when left out,
    or random with a `seed`. Uniform ones are the data set that the paper trains on (B.1); there
    all tokens of the target tie for the highest log-odds, so none of them has a bump.
    """
    if concepts < 2 or vocabulary < concepts or vocabulary % concepts:
        raise TrimtabError(
            f"{vocabulary} tokens cannot be split into {concepts} equal concepts: "
            "give at least 2 concepts, and a vocabulary that is a multiple of them"
        )
    if not 0 < epsilon < (concepts - 1) / concepts:
        raise TrimtabError(
            f"epsilon is {epsilon:g}: with {concepts} concepts it lies between 0 and "
            f"{(concepts - 1) / concepts:g}"
        )
    if contexts_each < 1:
        raise TrimtabError(f"contexts_each is {contexts_each}: each concept needs a context")
    size = vocabulary // concepts
    inside, outside = 1 - epsilon, epsilon / (concepts - 1)
    g, o = _shares(gamma, "gamma", size, concepts), _shares(omega, "omega", size, concepts)
    if seed is not None:
        rng = np.random.default_rng(seed)
        drawn = [rng.dirichlet(np.full(size, 2.0), concepts).ravel() for _ in range(2)]
        g, o = g if gamma is not None else drawn[0], o if omega is not None else drawn[1]
        # Assumption 1 holds where the two are equal: bring the drawn one nearer to the other.
        while (gamma is None or omega is None) and np.any(inside * g <= outside * o):
            g, o = (g, (o + g) / 2) if omega is None else ((g + o) / 2, o)
    contexts = tuple(concept for concept in range(concepts) for _ in range(contexts_each))
    return ConceptData(inside * g, outside * o, concepts, contexts)


def sides(
    data: ConceptData, target: int, q: int, *, opposite: int | None = None, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """P and N, q contexts each: P of the target; N of `opposite` (contrastive) or any other."""
    inside = data.contexts_of(target)
    if opposite == target:
        raise TrimtabError(f"opposite is {opposite}, the target itself: choose another concept")
    if opposite is None:
        outside = tuple(j for j, concept in enumerate(data.contexts) if concept != target)
    else:
        outside = data.contexts_of(opposite)
    for name, pool in (("target", inside), ("negative side", outside)):
        if not 1 <= q <= len(pool):
            raise TrimtabError(f"q is {q}: the {name} has {len(pool)} contexts to choose from")
    rng = np.random.default_rng(seed)
    positive, negative = (sorted(rng.choice(pool, q, replace=False)) for pool in (inside, outside))
    return tuple(int(j) for j in positive), tuple(int(j) for j in negative)


def _vector(values: ArrayLike, name: str) -> Array:
    """A copy that nobody can change."""
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or not np.all(np.isfinite(vector)):
        raise TrimtabError(f"{name}: give one row of finite numbers, not {vector.shape}")
    vector.flags.writeable = False
    return vector


def _shares(values: ArrayLike | None, name: str, size: int, concepts: int) -> Array:
    """γ or ω, checked; uniform when there is none."""
    if values is None:
        return np.full(size * concepts, 1 / size)
    shares = _vector(values, name)
    if len(shares) != size * concepts:
        raise TrimtabError(f"{name} has {len(shares)} numbers: give one a token, {size * concepts}")
    sums = shares.reshape(concepts, size).sum(1)
    if np.any(shares <= 0) or not np.allclose(sums, 1, rtol=0, atol=1e-9):
        raise TrimtabError(f"{name}: give positive numbers that sum to 1 over each {size} tokens")
    return shares


def check_index(index: int, count: int, name: str) -> None:
    """Raise TrimtabError unless there is a context (or concept, as named) of this number."""
    if not 0 <= index < count:
        raise TrimtabError(f"{name} {index} does not exist: choose one of 0 to {count - 1}")


def _check_sizes(data: ConceptData) -> None:
    if len(data.a) != len(data.b):
        raise TrimtabError(f"a has {len(data.a)} tokens, b {len(data.b)}: give as many to both")
    if data.concepts < 2 or not len(data.a) or len(data.a) % data.concepts:
        raise TrimtabError(
            f"{len(data.a)} tokens cannot be split into {data.concepts} equal concepts: "
            "give at least 2 concepts, and a vocabulary that is a multiple of them"
        )
    if not data.contexts:
        raise TrimtabError("the data has no contexts: give the concept of at least one")
    for concept in data.contexts:
        check_index(concept, data.concepts, "concept")


def _check_assumption(data: ConceptData) -> None:
    for token, (a, b) in enumerate(zip(data.a, data.b, strict=True)):
        if not 0 < b < a < 1:
            raise TrimtabError(
                f"token {token} has a = {a:g} and b = {b:g}: assumption 1 wants 0 < b < a < 1"
            )


def _check_sums(data: ConceptData) -> None:
    for concept in range(data.concepts):
        total = data._row(concept).sum()
        if abs(total - 1) > 1e-9:
            raise TrimtabError(
                f"the probabilities after a context of concept {concept} sum to {total:g}: "
                "a over its tokens and b over all others must sum to 1"
            )
    if len(data.pi) != len(data.contexts):
        raise TrimtabError(
            f"there are {len(data.pi)} weights and {len(data.contexts)} contexts: give one each"
        )
    if np.any(data.pi <= 0) or abs(data.pi.sum() - 1) > 1e-9:
        raise TrimtabError("weights: give one positive number a context, 1 in sum")
