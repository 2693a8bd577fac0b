"""When two activations are the same, as far as a model's arithmetic can tell.

Massive activations (one unit a thousand times the others) make any tolerance against the largest
value worthless: in Qwen2.5-0.5B a whole branch would go unnoticed. So sums are compared bit for
bit where they can be, and unit by unit against what was added up there where they cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor


def epsilon(dtype: torch.dtype) -> float:
    """The rounding of one operation; sums over hundreds of terms lose a little more."""
    return max(torch.finfo(dtype).eps, 1e-6)


def flat(x: Tensor) -> Tensor:
    """[..., units] as [tokens, units]."""
    return x.reshape(-1, x.shape[-1])


def within(a: Tensor, b: Tensor, size: Tensor, times: float, dtype: torch.dtype) -> bool:
    """Whether two tensors differ by a few roundings of what was added up, unit by unit."""
    room = times * epsilon(dtype) * size.double() + 1e-12
    return bool(((a.double() - b.double()).abs() <= room).all())


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Token by token, whether two tensors [tokens, units] differ by less than a share of the
    largest unit of that token."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    largest = b.abs().amax(-1).clamp(min=1e-12)
    return bool(((a - b).abs().amax(-1) <= tolerance * largest).all())


def ratio(a: Tensor, b: Tensor) -> float:
    """The factor c with which c * a comes closest to b, small units counting as much as large."""
    a, b = a.double(), b.double()
    weight = 1 / (a.abs() + b.abs() + 1e-3 * b.abs().median() + 1e-30).square()
    below = float((a * a * weight).sum())
    return float((a * b * weight).sum()) / below if below else 0.0


def multiple(a: Tensor, b: Tensor, factor: float) -> bool:
    """Whether b is factor * a."""
    if a.shape != b.shape:
        return False
    if factor == 1.0 and torch.equal(a, b):
        return True
    return within(factor * a.double(), b, b.abs(), 4, b.dtype)


def factor_of(a: Tensor, b: Tensor) -> float | None:
    """The factor with which b is a; None where it is none."""
    if a.shape != b.shape:
        return None
    factor = 1.0 if torch.equal(a, b) else ratio(a, b)
    return factor if factor and multiple(a, b, factor) else None


def is_sum(total: Tensor, terms: Sequence[Tensor], factors: Sequence[float] | None = None) -> bool:
    """Whether a tensor is the sum of others, each times its factor.

    Bit for bit, in some order of adding, where all factors are one; otherwise within rounding.
    """
    factors = [1.0] * len(terms) if factors is None else factors
    if all(factor == 1.0 for factor in factors) and _adds_up(total, terms):
        return True
    summed = sum((f * t.double() for f, t in zip(factors, terms, strict=True)), torch.zeros(()))
    size = sum(
        (abs(f) * t.double().abs() for f, t in zip(factors, terms, strict=True)), torch.zeros(())
    )
    times = 8 if total.dtype in (torch.float32, torch.float64) else 2
    return within(summed, total, size, times, total.dtype)


def _adds_up(total: Tensor, terms: Sequence[Tensor]) -> bool:
    """Whether adding one after the other, or the first one last, gives the same bits."""
    if len(terms) > 5:  # more orders than are worth trying
        return False
    for order in permutations(terms):
        partial = order[0]
        for term in order[1:]:
            partial = partial + term
        if torch.equal(partial, total):
            return True
    for order in permutations(terms[1:]) if len(terms) > 2 else ():
        partial = order[0]
        for term in order[1:]:
            partial = partial + term
        if torch.equal(terms[0] + partial, total):
            return True
    return False
