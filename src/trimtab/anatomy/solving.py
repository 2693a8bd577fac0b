"""Finds the branches of a block: which module outputs its input and output differ by.

The equation  out = scale * (in + sum of factor * term)  is solved with the fewest terms, first bit
for bit in the model's own arithmetic, and where no sum of outputs as they are does it, by weighted
least squares within rounding. What is found has to hold on both texts; `known` is what an earlier
layer of the same kind came to, which is tried first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from trimtab.anatomy.numbers import epsilon, is_sum
from trimtab.anatomy.proof import BlockCalls

#: Branches that a block may have, and outputs of modules above which only half as many are tried.
_MOST_TERMS, _MANY = 6, 20


#: Tensors of the stream's shape, each with the paths of the modules that return it.
Outputs = list[tuple[Tensor, list[str]]]


@dataclass(frozen=True)
class Sum:
    """A block as a sum: the paths of its terms in the order in which they run, and factors."""

    scale: float
    terms: tuple[str, ...]
    factors: tuple[float, ...]


def candidates(calls: BlockCalls) -> Outputs:
    """The different tensors of the stream's shape that modules inside a block return, with the
    paths of the modules that return each."""
    found: Outputs = []
    for call in calls.trace.calls[1:]:
        y = calls.each_token(call.y)
        if y is None or y.shape != calls.x.shape or not torch.isfinite(y).all():
            continue
        same = next((names for tensor, names in found if torch.equal(tensor, y)), None)
        if same is not None:
            same.append(call.name)
        elif not torch.equal(y, calls.x) and not torch.equal(y, calls.y) and y.any():
            found.append((y, [call.name]))
    return found


def solve(calls: BlockCalls, outputs: Outputs, known: Sequence[Sum] = ()) -> Sum | str:
    """The sum that a block is of some of its `candidates`, or why it is none."""
    for earlier in known:
        if _is(earlier, calls):
            return earlier
    picked = _plain_sum(calls, outputs)
    if picked is not None:
        return Sum(1.0, tuple(outputs[i][1][0] for i in picked), (1.0,) * len(picked))
    return _weighted_sum(calls, outputs)


def _is(claim: Sum, calls: BlockCalls) -> bool:
    terms = [calls.returned(path) for path in claim.terms]
    if any(term is None or term.shape != calls.x.shape for term in terms):
        return False
    factors = [claim.scale, *(claim.scale * factor for factor in claim.factors)]
    return is_sum(calls.y, [calls.x, *(t for t in terms if t is not None)], factors)


def _sizes(count: int) -> range:
    return range(1, min(count, _MOST_TERMS if count <= _MANY else _MOST_TERMS // 2) + 1)


def _weights(calls: BlockCalls) -> Tensor:
    """What makes small units count as much as massive ones."""
    size = calls.x.double().abs() + calls.y.double().abs()
    return 1 / (size + 1e-3 * calls.y.double().abs().median() + 1e-30).flatten()


def _slack(dtype: torch.dtype) -> float:
    eps = epsilon(dtype)
    return 3e-4 if eps < 1e-5 else 4 * eps


def _plain_sum(calls: BlockCalls, outputs: Outputs) -> tuple[int, ...] | None:
    """The fewest outputs that, added to the input as they are, give the block's output."""
    weights = _weights(calls)
    missing = (calls.y.double() - calls.x.double()).flatten() * weights
    columns = [tensor.double().flatten() * weights for tensor, _ in outputs]
    bound = _slack(calls.y.dtype) * float((calls.y.double().flatten() * weights).norm())
    for size in _sizes(len(outputs)):
        for picked in combinations(range(len(outputs)), size):
            rest = missing - sum(columns[i] for i in picked)
            if float(rest.norm()) <= bound and is_sum(
                calls.y, [calls.x, *(outputs[i][0] for i in picked)]
            ):
                return picked
    return None


def _weighted_sum(calls: BlockCalls, outputs: Outputs) -> Sum | str:
    """The fewest outputs of which a weighted sum with the input gives the block's output; of
    several with as many terms the one whose factors are mostly one."""
    weights = _weights(calls)
    tensors = [calls.x, *(tensor for tensor, _ in outputs)]
    matrix = torch.stack([tensor.double().flatten() * weights for tensor in tensors], 1)
    target = calls.y.double().flatten() * weights
    lengths = matrix.norm(dim=0)
    gram = (matrix / lengths).T @ (matrix / lengths)
    right = (matrix / lengths).T @ target
    bound = _slack(calls.y.dtype) * float(target.norm())

    def fit(columns: list[int]) -> Tensor | None:
        try:
            solved = torch.linalg.solve(gram[columns][:, columns], right[columns])
        except RuntimeError:  # two outputs are multiples of each other
            return None
        factors = solved / lengths[columns]
        if float(factors.min()) < 1e-3:
            return None
        if float((matrix[:, columns] @ factors - target).norm()) > bound:
            return None
        holds = is_sum(calls.y, [tensors[i] for i in columns], factors.tolist())
        return factors if holds else None

    without = None
    for size in _sizes(len(outputs)):
        found: list[tuple[int, Sum]] = []
        for picked in combinations(range(1, len(tensors)), size):
            factors = fit([0, *picked])
            if factors is not None:
                scale, *rest = factors.tolist()
                names = tuple(outputs[i - 1][1][0] for i in picked)
                ones = sum(abs(value - 1) < 1e-4 for value in factors.tolist())
                found.append((ones, Sum(scale, names, tuple(v / scale for v in rest))))
            if without is None and size <= 2:
                alone = fit(list(picked))
                if alone is not None:
                    parts = zip(alone.tolist(), picked, strict=True)
                    without = " + ".join(f"{c:.3g} * {outputs[i - 1][1][0]}" for c, i in parts)
        if found:
            return max(found, key=lambda each: each[0])[1]
    if without is not None:
        return f"its output is {without}, not its input plus branches"
    return "its output is not its input plus what modules inside of it return"
