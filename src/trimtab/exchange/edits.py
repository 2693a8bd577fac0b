"""What one tensor of a checkpoint became in another: how far they are apart, the rank of the
difference, and which kind of edit would have made it.

A matrix is [out, in] here. What rounding alone makes is known from the numbers of the changed one,
and nothing below it counts: neither in a rank, nor against a kind of edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

#: Singular values that are told.
_TOLD = 8
#: A difference is of low rank up to this share of the full one, and a map is fitted up to so many
#: directions.
_LOW, _FITTED = 0.25, 64
#: How much more than rounding can make may be left over where an edit explains a difference.
_SLACK = 1.5
#: Smallest singular value that can be told from the largest, because their squares are computed.
_SQUARES = 1e-7


@dataclass(frozen=True)
class Edit:
    """What a difference looks like: in one word, in words, and in numbers.

    `rank` of `full` singular values are above `tolerance`, which is what rounding to `precision`
    can make; `singular_values` has the largest ones. They are None of vectors. Of an ablation
    `directions` [units, rank] are those that were ablated, orthonormal, in float64.
    """

    kind: str
    words: str
    numbers: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    full: int | None = None
    singular_values: tuple[float, ...] = ()
    tolerance: float | None = None
    precision: str = ""
    directions: Tensor | None = field(default=None, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        """All but the directions, which may be the same in many tensors."""
        record = {name: value for name, value in vars(self).items() if name != "directions"}
        return {**record, "singular_values": list(self.singular_values)}


_SLIGHT = Edit("slight", "changed by no more than rounding may make")


def precision_of(tensor: Tensor) -> torch.dtype:
    """The smallest type that holds every number of a tensor, whatever it is stored in."""
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype == dtype or torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)):
            return dtype
    return tensor.dtype


def rounding(tensor: Tensor) -> float:
    """How far a number of this tensor may be off by rounding, as a share of the number."""
    return torch.finfo(precision_of(tensor)).eps / 2


def edit_of(base: Tensor, other: Tensor, added: bool = False) -> Edit:
    """What became of `base`, from which `other` differs; `added` where it had no such tensor, and a
    bias of zeros stands for it. More than two dimensions are matrices one behind the other
    (experts)."""
    precision = precision_of(other)
    if torch.equal(base.to(precision).to(other.dtype), other):
        words = f"rounded to {_name(precision)}, and nothing else"
        return Edit("rounding", words, precision=_name(precision))
    if base.dim() < 2:
        return _edit_of_vector(base, other, added)
    edits = [_edit_of_matrix(*pair) for pair in _matrices(base, other)]
    first = max(edits, key=lambda edit: edit.singular_values[:1])
    if len(edits) == 1:
        return first
    same = {edit.kind for edit in edits} == {first.kind}
    kind = first.kind if same else "several"
    words = first.words if same else "several kinds of edits"
    return Edit(
        kind,
        f"{words} ({len(edits)} experts)",
        {**(first.numbers if same else {}), "experts": len(edits)},
        max(edit.rank or 0 for edit in edits),
        first.full,
        first.singular_values,
        first.tolerance,
        first.precision,
        first.directions if same else None,
    )


def _matrices(base: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices of which something differs."""
    pairs = zip(base.flatten(0, -3), other.flatten(0, -3), strict=True) if base.dim() > 2 else [
        (base, other)
    ]  # fmt: skip
    for one, two in pairs:
        if not torch.equal(one, two):
            yield one, two


def _edit_of_vector(base: Tensor, other: Tensor, added: bool) -> Edit:
    changed = int((base != other).sum())
    numbers = {"changed": changed, "of": base.numel()}
    precision = _name(precision_of(other))
    if added or not base.any():
        return Edit("constant", "a constant added", numbers, precision=precision)
    words = f"{changed} of {base.numel()} numbers changed"
    return Edit("vector", words, numbers, precision=precision)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _edit_of_matrix(base: Tensor, other: Tensor) -> Edit:
    precision = precision_of(other)
    share = torch.finfo(precision).eps / 2
    wide, was = other.double(), base.double()
    change = wide - was
    noise = _noise(wide, share)
    values = _singular_values(change)
    tolerance = max(noise, _SQUARES * float(values[0]))
    rank = int((values > tolerance).sum())
    return replace(
        _kind(was, wide, change, rank, share),
        rank=rank,
        full=min(base.shape),
        singular_values=tuple(values[:_TOLD].tolist()),
        tolerance=tolerance,
        precision=_name(precision),
    )


def _noise(wide: Tensor, share: float) -> float:
    """The largest singular value that rounding may make: that of independent errors, and no less
    than the error of the longest row and column."""
    rows, columns = wide.shape
    spread = float(wide.norm()) * (math.sqrt(rows) + math.sqrt(columns))
    longest = max(float(wide.norm(dim=dim).max()) for dim in (0, 1))
    return share * max(spread / math.sqrt(rows * columns), longest)


def _gram(change: Tensor) -> Tensor:
    """The products of the rows, or of the columns where these are fewer."""
    return change @ change.T if change.shape[0] <= change.shape[1] else change.T @ change


def _singular_values(change: Tensor) -> Tensor:
    """Largest first."""
    squares: Tensor = torch.linalg.eigvalsh(_gram(change))
    return squares.clamp(min=0).sqrt().flip(0)


def _bases(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The directions [out, rank] and [in, rank] in which a difference of low rank lies."""
    one = torch.linalg.eigh(_gram(change)).eigenvectors.flip(1)[:, :rank]
    left = change.shape[0] <= change.shape[1]
    two = torch.linalg.qr((change.T if left else change) @ one).Q
    return (one, two) if left else (two, one)


def _kind(
    was: Tensor,
    wide: Tensor,
    change: Tensor,
    rank: int,
    share: float,
) -> Edit:
    """The simplest kind of edit that leaves nothing over but rounding."""
    if rank == 0:
        return _SLIGHT
    for side, one, two in (("rows", was, wide), ("columns", was.T, wide.T)):
        found = _scaled(side, one, two, share)
        if found is not None:
            return found
    full = min(change.shape)
    if rank <= min(_FITTED, max(1, int(_LOW * full))):
        outs, ins = _bases(change, rank)
        for side, basis, one, two in (
            ("output", outs, was, change),
            ("input", ins, was.T, change.T),
        ):
            # Along one direction, of as many as there are.
            noise = share * float(wide.norm()) / math.sqrt(len(basis))
            found = _mapped(side, basis, one, two, noise)
            if found is not None:
                return found
    if rank <= max(1, int(_LOW * full)):
        return Edit("low rank", f"low rank ({rank} of {full}), as a merged adapter")
    return Edit("dense", "changed throughout, as by training or quantising")


def _scaled(side: str, was: Tensor, wide: Tensor, share: float) -> Edit | None:
    """Whether each row is the old one times a factor."""
    squares = was.square().sum(1)
    factors = (wide * was).sum(1) / squares.clamp(min=1e-300)
    left_over = (wide - factors[:, None] * was).norm(dim=1)
    if not (left_over <= _SLACK * share * wide.norm(dim=1).clamp(min=1e-300)).all():
        return None
    changed = (factors - 1).abs() > _SLACK * share
    changed &= squares > 0
    if not changed.any():
        return _SLIGHT
    low, high = float(factors[changed].min()), float(factors[changed].max())
    count, whole = int(changed.sum()), len(factors)
    alike = high - low <= _SLACK * share * abs(high)
    between = f"{low:.4g}" if alike else f"{low:.4g} to {high:.4g}"
    what = f"{count} of {whole} {side} scaled by {between}"
    numbers = {"scaled": count, "of": whole, "factors": [low, high]}
    return Edit(f"scaled {side}", what, numbers)


def _mapped(side: str, basis: Tensor, was: Tensor, change: Tensor, noise: float) -> Edit | None:
    """Whether a difference [out, in] is a map within a few directions of the output: change =
    basis S basis' was, for `basis` [out, rank]."""
    held, moved = basis.T @ was, basis.T @ change  # [rank, in]
    rank = basis.shape[1]
    if rank > held.shape[1] // 2:  # then there is always one
        return None
    s = torch.linalg.lstsq(held.T, moved.T).solution.T  # [rank, rank]
    if float((moved - s @ held).norm()) > _along(noise, rank):
        return _mapped_from_elsewhere(side, was, moved, noise)
    # How well rounding lets the map be known; of two kinds the one that fits better.
    unsure = max(1e-6, 10 * noise / max(float(torch.linalg.svdvals(held)[-1]), 1e-300))
    eye = torch.eye(rank, dtype=s.dtype)
    strength, turned = -float(s.diagonal().mean()), s + eye
    off = float((s + strength * eye).abs().max())
    off_turned = float((turned @ turned.T - eye).abs().max()) if rank == 2 else math.inf
    if off <= min(unsure, off_turned):
        of = "a direction" if rank == 1 else f"{rank} directions"
        how = "ablated" if abs(strength - 1) <= unsure else f"times {1 - strength:.4g}"
        numbers = {"directions": rank, "strength": strength, "side": side}
        return Edit("ablation", f"{of} of its {side} {how}", numbers, directions=basis)
    if off_turned <= unsure:
        angle = abs(math.degrees(math.atan2(float(turned[1, 0]), float(turned[0, 0]))))
        words = f"its {side} turned by {angle:.4g} degrees in a plane"
        return Edit("rotation", words, {"degrees": angle, "side": side})
    words = f"its {side} mapped within {rank} directions"
    return Edit("map", words, {"directions": rank, "side": side})


def _mapped_from_elsewhere(side: str, was: Tensor, moved: Tensor, noise: float) -> Edit | None:
    """Whether what is added along some directions, [rank, in], is read from the output at all.
    Where the output has as many units as the input, anything is."""
    rank = len(moved)
    if rank + was.shape[0] > was.shape[1]:
        return None
    read = torch.linalg.lstsq(was.T, moved.T).solution.T  # [rank, out]
    if float((moved - read @ was).norm()) > _along(noise, rank):
        return None
    words = f"its {side} mapped through {rank} directions"
    return Edit("map", words, {"directions": rank, "side": side})


def _along(noise: float, rank: int) -> float:
    """What rounding may leave over along some directions."""
    return 3 * _SLACK * noise * math.sqrt(rank)
