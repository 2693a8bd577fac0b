"""The theory of steering strength, on a language model small enough to be solved by hand.

M. Taimeskhanov, S. Vaiter, D. Garreau, "Towards Understanding Steering Strength"
(arXiv 2602.02712), sections 2 and 3 and appendix B. A vocabulary falls into concepts of equal
size, each context is of one concept, and a token follows contexts of its own concept with
probability a_z and all others with b_z < a_z. The unconstrained features model (UFM) gives each
context a free vector h_j and reads the logits W h_j off it; it is steered along the difference
of means v by adding α v to h_j.

    data = specification(gamma=..., omega=...)             # V = 9, G = 3, ε = 0.05
    positive, negative = sides(data, target=0, q=4)        # random; opposite=1: contrastive
    steered = SteeredUFM(data, perfect(data), 0, positive, negative)
    steered.delta_p([0.5, 1, 2])                           # [alphas, contexts, vocabulary]

NumPy in float64 throughout. m is the number of contexts, V the size of the vocabulary, d the
width of the model; tokens, contexts and concepts are counted from 0. Logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, logsumexp, softmax

from trimtab.errors import TrimtabError
from trimtab.strength.theory.data import Array, ConceptData, check_index, sides, specification

__all__ = [
    "UFM",
    "ConceptData",
    "SteeredUFM",
    "Training",
    "perfect",
    "sides",
    "specification",
    "train",
]


@dataclass(frozen=True, eq=False)
class UFM:
    """f(c_j) = W h_j (Def. 2.2)."""

    W: Array  # [V, d]
    H: Array  # [d, m], the columns are the h_j

    def __post_init__(self) -> None:
        if self.W.ndim != 2 or self.H.ndim != 2 or self.W.shape[1] != self.H.shape[0]:
            raise TrimtabError(
                f"W is {self.W.shape} and H is {self.H.shape}: give W as (vocabulary, width) "
                "and H as (width, contexts)"
            )

    @property
    def logits(self) -> Array:
        """[m, V]."""
        return np.asarray(self.H.T @ self.W.T)

    def cross_entropy(self, data: ConceptData) -> float:
        """-Σ_j π_j Σ_z p(z | c_j) log σ_z(f(c_j)), in nats (B.5)."""
        return _cross_entropy(data, self.logits)


def perfect(data: ConceptData, shift: ArrayLike = 0.0) -> UFM:
    """A UFM that knows the data exactly (assumption 2), without training: W = log p, H = 1.

    `shift` is a constant β_j added to all logits of each context, one number or [m]; it
    changes no probability, steered or not.
    """
    log_p = np.log(data.probabilities) + np.broadcast_to(shift, (len(data.contexts),))[:, None]
    return UFM(log_p.T, np.eye(len(data.contexts)))


@dataclass(frozen=True, eq=False)
class Training:
    """A trained UFM, and how near it came to the data."""

    model: UFM
    loss: float  # cross-entropy, nats
    entropy: float  # of the data: the lowest possible loss
    iterations: int


def train(
    data: ConceptData, width: int | None = None, *, seed: int = 0, iterations: int = 2000
) -> Training:
    """W and H from a small random start, by L-BFGS on the cross-entropy (sections 2.2 and B.1).

    `width` is d. G, the default, always suffices: the logits of all contexts are log b and one
    direction a concept.
    """
    width = data.concepts if width is None else width
    if width < 1 or iterations < 1:
        raise TrimtabError(f"width is {width} and iterations {iterations}: both are at least 1")
    V, m = data.vocabulary, len(data.contexts)
    start = 0.1 * np.random.default_rng(seed).standard_normal((V + m) * width)

    def unpacked(flat: Array) -> UFM:
        return UFM(flat[: V * width].reshape(V, width), flat[V * width :].reshape(width, m))

    def loss_and_gradient(flat: Array) -> tuple[float, Array]:
        model = unpacked(flat)
        logits = model.logits
        wrong = data.pi[:, None] * (softmax(logits, 1) - data.probabilities)  # [m, V]
        gradient = [(model.H @ wrong).T.ravel(), (wrong @ model.W).T.ravel()]
        return _cross_entropy(data, logits), np.concatenate(gradient)

    options = {"maxiter": iterations, "maxfun": 4 * iterations, "ftol": 0.0, "gtol": 1e-9}
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    model = unpacked(found.x)
    return Training(model, model.cross_entropy(data), data.entropy, int(found.nit))


@dataclass(frozen=True, eq=False)
class SteeredUFM:
    """f_α(c_j) = W (h_j + α v), v = mean over P of h - mean over N of h (eq. 3).

    P are contexts of the target concept, N as many others. Everything takes its arrays of α
    as a number or a list and returns [alphas, m, V], [alphas, m] or [alphas]; `context` picks
    one context and leaves the axis m out.

    Expectations, peaks and limits are those of the model as it is. Where it is perfect, they
    are those of the paper; its proofs about M's signs and about the cross-entropy's minimum at
    α = 0 need the perfect model.
    """

    data: ConceptData
    model: UFM
    target: int
    positive: tuple[int, ...]  # P
    negative: tuple[int, ...]  # N
    # Log-odds nearer than this share of their spread count as equal. A trained model's ties
    # are as rough as its probabilities: give it more.
    tie: float = 1e-9

    def __post_init__(self) -> None:
        shape = self.model.logits.shape
        if shape != self.data.probabilities.shape:
            raise TrimtabError(
                f"the model has {shape[0]} contexts and {shape[1]} tokens, the data "
                f"{len(self.data.contexts)} and {self.data.vocabulary}: use a model of this data"
            )
        _check_sides(self)

    @cached_property
    def vector(self) -> Array:
        """v, [d]."""
        H = self.model.H
        return np.asarray(H[:, self.positive].mean(1) - H[:, self.negative].mean(1))

    @cached_property
    def log_odds(self) -> Array:
        """M(z), the mean of log p(z | c) over P minus that over N, [V] (Def. 3.2)."""
        log_p = log_softmax(self.model.logits, 1)
        return np.asarray(log_p[list(self.positive)].mean(0) - log_p[list(self.negative)].mean(0))

    @cached_property
    def closed_log_odds(self) -> Array:
        """M(z) from the data alone, [V]: ln(a/b) > 0 on the target, else -(q_z/q) ln(a/b) ≤ 0.

        q_z counts the contexts in N that are of z's concept (Lemma B.4).
        """
        data, ratio = self.data, np.log(self.data.a / self.data.b)
        counts = np.bincount([data.contexts[j] for j in self.negative], minlength=data.concepts)
        share = np.repeat(counts, data.size) / len(self.negative)
        return np.where(data.tokens_of(self.target), ratio, -share * ratio)

    @cached_property
    def highest(self) -> NDArray[np.bool_]:
        """Which tokens have the highest log-odds, [V]; they win as α → ∞."""
        return np.asarray(self.log_odds >= self.log_odds.max() - self._slack)

    @cached_property
    def lowest(self) -> NDArray[np.bool_]:
        """Which tokens have the lowest log-odds, [V]; they win as α → -∞."""
        return np.asarray(self.log_odds <= self.log_odds.min() + self._slack)

    # Tokens: section 3.1.

    def logits(self, alphas: ArrayLike, context: int | None = None) -> Array:
        """W (h_j + α v)."""
        embeddings = self.model.H[:, self._chosen(context)].T  # [m, d]
        values = _alphas(alphas)
        with np.errstate(over="ignore", invalid="ignore"):
            steps = values[:, None, None] * self.vector  # [alphas, 1, d]
            logits = (embeddings + steps) @ self.model.W.T
        if not np.all(np.isfinite(logits)):
            largest = np.abs(values).max()
            raise TrimtabError(f"alphas: {largest:g} is more than the logits can hold; use `limit`")
        return _without(context, logits)

    def log_probabilities(self, alphas: ArrayLike, context: int | None = None) -> Array:
        """log σ_z(f_α(c_j))."""
        return np.asarray(log_softmax(self.logits(alphas, context), -1))

    def probabilities(self, alphas: ArrayLike, context: int | None = None) -> Array:
        """σ_z(f_α(c_j)), by Lemma B.3 equal to p e^(αM) / Σ p e^(αM)."""
        return np.exp(self.log_probabilities(alphas, context))

    def delta_p(self, alphas: ArrayLike, context: int | None = None) -> Array:
        """Δp(z | c_j, α), the gain in probability over the unsteered model (Def. 3.1)."""
        return self.probabilities(alphas, context) - self.probabilities(0.0, context)

    def expectation(self, alphas: ArrayLike) -> Array:
        """E_α[M] under the steered next-token probabilities, [alphas, m]; rises with α (B.3)."""
        return np.asarray(self.probabilities(alphas) @ self.log_odds)

    def variance(self, alphas: ArrayLike) -> Array:
        """Var_α(M), the derivative of E_α[M], [alphas, m] (eq. 10)."""
        away = self.log_odds - self.expectation(alphas)[..., None]
        return np.asarray((self.probabilities(alphas) * away**2).sum(-1))

    def slope(self, alphas: ArrayLike) -> Array:
        """dΔp/dα = σ_z (M(z) - E_α[M]), [alphas, m, V] (Lemma B.5)."""
        away = self.log_odds - self.expectation(alphas)[..., None]
        return np.asarray(self.probabilities(alphas) * away)

    def peaks(self) -> Array:
        """α_(j,z), where Δp is at its peak, [m, V] (Theorem 3.3).

        +inf for tokens of the highest log-odds, which rise everywhere, and -inf for those of
        the lowest, which fall everywhere.
        """
        log_p = self.log_probabilities(0.0)[0]
        return np.array([[self._peak(row, z) for z in range(len(row))] for row in log_p])

    def limit(self, sign: int) -> Array:
        """Δp as α → ∞ (`sign` 1) or -∞ (`sign` -1), [m, V] (Proposition B.1)."""
        p = self.probabilities(0.0)[0]
        left = np.where(self._extreme(sign), p, 0.0)
        return np.asarray(left / left.sum(1, keepdims=True) - p)

    def peak_margin(self) -> float:
        """Remark 3.4's condition: M(z_1) - β ln(ρ/β), z_1 the target's least token.

        ρ and β are what the target's tokens have together inside and outside of its contexts.
        Where this is positive, the target's peaks are at positive α for all contexts *outside*
        the target. It is sufficient, not necessary, and says nothing of contexts inside.
        """
        inside = self.data.tokens_of(self.target)
        rho, beta = self.data.a[inside].sum(), self.data.b[inside].sum()
        return float(self.log_odds[inside].min() - beta * np.log(rho / beta))

    # Concepts: section 3.2.

    def concept_probability(self, concept: int, alphas: ArrayLike) -> Array:
        """F_C,j(α), the probability of all tokens of a concept together, [alphas, m]."""
        inside = self.data.tokens_of(concept)
        return np.asarray(self.probabilities(alphas)[..., inside].sum(-1))

    def concept_increase(self, concept: int, alphas: ArrayLike) -> Array:
        """Δp(C | c_j, α), the mean of Δp over the tokens of a concept, [alphas, m] (Def. 3.5)."""
        return np.asarray(self.delta_p(alphas)[..., self.data.tokens_of(concept)].mean(-1))

    def concept_tanh(self, concept: int, alphas: ArrayLike) -> Array:
        """The same as tanh, [alphas, m]: (1/2|C|) [tanh((ν + r)/2) - tanh(r/2)] (Theorem 3.6).

        r = logit F_C(0), and ν is `concept_reparametrisation`.
        """
        inside = self.data.tokens_of(concept)
        log_p = self.log_probabilities(0.0)[0]
        r = logsumexp(log_p[:, inside], 1) - logsumexp(log_p[:, ~inside], 1)
        nu = self.concept_reparametrisation(concept, alphas)
        return np.asarray((np.tanh((nu + r) / 2) - np.tanh(r / 2)) / (2 * self.data.size))

    def concept_reparametrisation(self, concept: int, alphas: ArrayLike) -> Array:
        """ν_j(α), the integral from 0 to α of μ_C - μ_(not C), [alphas, m] (B.4).

        μ_A is the mean of M over the steered tokens in A: the derivative of the logarithm of
        Σ_A p e^(αM), so that the integral needs no quadrature.
        """
        inside = self.data.tokens_of(concept)
        log_p = self.log_probabilities(0.0)[0]  # [m, V]
        tilted = log_p + _alphas(alphas)[:, None, None] * self.log_odds  # [alphas, m, V]
        grown = [
            logsumexp(tilted[..., part], -1) - logsumexp(log_p[:, part], -1)
            for part in (inside, ~inside)
        ]
        return np.asarray(grown[0] - grown[1])

    def concept_limit(self, concept: int, sign: int) -> Array:
        """Δp(C) as α → ∞ (`sign` 1) or -∞ (-1), [m].

        A concept with no token of highest or lowest log-odds loses all that it had, -F_C(0)/|C|,
        at both ends. (The paper's prose says that it returns to its unsteered value; its formula
        says this.)
        """
        return np.asarray(self.limit(sign)[:, self.data.tokens_of(concept)].mean(1))

    # Cross-entropy: section 3.3.

    def cross_entropy(self, alphas: ArrayLike) -> Array:
        """CE(f_α) on the data in nats, [alphas] (B.5)."""
        return np.array([_cross_entropy(self.data, logits) for logits in self.logits(alphas)])

    def delta_cross_entropy(self, alphas: ArrayLike) -> Array:
        """ΔCE(α) = CE(f_α) - CE(f), [alphas] (Def. 3.7)."""
        gained = self.log_probabilities(alphas) - self.log_probabilities(0.0)
        return np.asarray(-(self.data.probabilities * gained).sum(-1) @ self.data.pi)

    def cross_entropy_slope(self, alphas: ArrayLike) -> Array:
        """dΔCE/dα = Σ_j π_j (E_α[M] - E_p[M]), [alphas]; 0 at α = 0 for a perfect model."""
        return np.asarray(
            (self.expectation(alphas) - self.data.probabilities @ self.log_odds) @ self.data.pi
        )

    def curvature(self, alphas: ArrayLike = 0.0) -> Array:
        """d²ΔCE/dα² = Σ_j π_j Var_α(M) ≥ 0, [alphas]; ΔCE ≈ ½ curvature(0) α² (Thm 3.8)."""
        return np.asarray(self.variance(alphas) @ self.data.pi)

    @cached_property
    def _slack(self) -> float:
        return float(self.tie * np.ptp(self.log_odds))

    def _extreme(self, sign: int) -> NDArray[np.bool_]:
        if sign not in (1, -1):
            raise TrimtabError(f"sign is {sign}: 1 for α → ∞, or -1 for α → -∞")
        return self.highest if sign == 1 else self.lowest

    def _chosen(self, context: int | None) -> list[int]:
        if context is None:
            return list(range(len(self.data.contexts)))
        check_index(context, len(self.data.contexts), "context")
        return [context]

    def _peak(self, log_p: Array, token: int) -> float:
        """The root of E_α[M] = M(z), z the token, for one context's log p [V].

        With D = M - M(z) the equation is Σ p e^(αD) D = 0. We compare the logarithms of its
        positive and its negative part: their difference g never under- or overflows, and its
        slope lies between the least and the greatest that D's two sides allow, so that g(0)
        gives the bracket.
        """
        if self.highest[token]:
            return np.inf
        if self.lowest[token]:
            return -np.inf
        D = self.log_odds - self.log_odds[token]
        up, down = np.greater(D, self._slack), np.less(D, -self._slack)
        above, below = log_p[up] + np.log(D[up]), log_p[down] + np.log(-D[down])

        def g(alpha: float) -> float:
            rising = np.logaddexp.reduce(above + alpha * D[up])
            return float(rising - np.logaddexp.reduce(below + alpha * D[down]))

        slopes = (D[up].min() - D[down].max(), D[up].max() - D[down].min())
        ends = sorted(-g(0.0) / slope for slope in slopes)
        spare = 1e-9 * (1 + max(map(abs, ends)))  # the ends may be the root, but for rounding
        return float(brentq(g, ends[0] - spare, ends[1] + spare))


def _cross_entropy(data: ConceptData, logits: Array) -> float:
    return float(-data.pi @ (data.probabilities * log_softmax(logits, 1)).sum(1))


def _alphas(alphas: ArrayLike) -> Array:
    values = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    if values.ndim != 1 or not np.all(np.isfinite(values)):
        raise TrimtabError("alphas: give one finite number, or a list of them")
    return values


def _without(context: int | None, values: Array) -> Array:
    """[alphas, m, V], less the axis m where one context was chosen."""
    return values if context is None else values[:, 0]


def _check_sides(steered: SteeredUFM) -> None:
    data, target = steered.data, steered.target
    check_index(target, data.concepts, "concept")
    P, N = steered.positive, steered.negative
    if not P or len(P) != len(N):
        raise TrimtabError(f"P has {len(P)} contexts and N {len(N)}: give as many to both")
    _check_members(P, "P", data, target, inside=True)
    _check_members(N, "N", data, target, inside=False)


def _check_members(
    members: Iterable[int], name: str, data: ConceptData, target: int, inside: bool
) -> None:
    seen: set[int] = set()
    for j in members:
        check_index(j, len(data.contexts), "context")
        if j in seen:
            raise TrimtabError(f"context {j} is in {name} twice: give each once")
        if (data.contexts[j] == target) is not inside:
            raise TrimtabError(
                f"context {j} in {name} is of concept {data.contexts[j]}: {name} takes contexts "
                f"{'of the' if inside else 'outside the'} target, concept {target}"
            )
        seen.add(j)
