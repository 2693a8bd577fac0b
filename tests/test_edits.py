"""What a difference of two matrices looks like: each kind of edit, made by its formula, is told by
its numbers alone, in full and in half precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.exchange.edits import edit_of, precision_of, rounding

OUT, IN = 48, 80
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(width: int, count: int, seed: int = 1) -> Tensor:
    """Orthonormal columns."""
    return torch.linalg.qr(drawn(width, count, seed=seed)).Q


def rotation(width: int, degrees: float) -> Tensor:
    """A turn in a plane, as a matrix."""
    one, two = directions(width, 2).T
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    plane = (c - 1) * (torch.outer(one, one) + torch.outer(two, two))
    return torch.eye(width).double() + plane + s * (torch.outer(two, one) - torch.outer(one, two))


def ablation(width: int, strength: float, count: int = 1) -> Tensor:
    r = directions(width, count)
    return torch.eye(width).double() - strength * r @ r.T


def scaling(width: int, factors: dict[int, float]) -> Tensor:
    diagonal = torch.ones(width).double()
    for unit, factor in factors.items():
        diagonal[unit] = factor
    return diagonal.diag()


#: The kind, what is told of it, and the matrices of its output and of its input.
CASES: dict[str, tuple[str, dict[str, Any], Tensor | None, Tensor | None]] = {
    "rows": ("scaled rows", {"scaled": 3}, scaling(OUT, {1: 1.5, 7: -0.25, 40: 0.0}), None),
    "columns": ("scaled columns", {"scaled": 2}, None, scaling(IN, {0: 3.0, 79: 0.5})),
    "written": ("ablation", {"side": "output", "strength": 1.0}, ablation(OUT, 1), None),
    "read": ("ablation", {"side": "input", "strength": 1.0}, None, ablation(IN, 1)),
    "half": ("ablation", {"side": "output", "strength": 0.5}, ablation(OUT, 0.5), None),
    "three": ("ablation", {"directions": 3}, ablation(OUT, 1, 3), None),
    "more": ("ablation", {"side": "input", "strength": -1.0}, None, ablation(IN, -1)),
    "turned": ("rotation", {"side": "output", "degrees": 35.0}, rotation(OUT, 35), None),
    "turned back": ("rotation", {"side": "input", "degrees": 20.0}, None, rotation(IN, -20)),
    "turned a little": ("rotation", {"side": "output"}, rotation(OUT, 3), None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_edits_are_told_apart(case: str, dtype: torch.dtype) -> None:
    kind, numbers, left, right = CASES[case]
    base = drawn(OUT, IN).to(dtype)
    wide = base.double()
    wide = wide if left is None else left @ wide
    wide = wide if right is None else wide @ right
    found = edit_of(base, wide.to(dtype))
    assert found.kind == kind, found
    for name, value in numbers.items():
        if isinstance(value, float):
            assert found.numbers[name] == pytest.approx(value, rel=1e-5 + 3 * rounding(base))
        else:
            assert found.numbers[name] == value
    assert found.precision == str(dtype).removeprefix("torch.")
    assert "\n" not in found.words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (64, 64)])
def test_a_merged_adapter_is_of_its_rank(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base = drawn(*shape).to(dtype)
    change = 0.1 * drawn(shape[0], 4, seed=2) @ drawn(4, shape[1], seed=3)
    other = (base.double() + change).to(dtype)
    found = edit_of(base, other)
    assert (found.kind, found.rank, found.full) == ("low rank", 4, min(shape))
    expected = torch.linalg.svdvals(other.double() - base.double())
    assert found.singular_values == pytest.approx(expected[:8].tolist(), abs=1e-6)
    assert found.tolerance is not None
    assert expected[3] > found.tolerance > expected[4]


def test_a_map_that_is_no_projection() -> None:
    base = drawn(OUT, IN).float()
    u, v = drawn(OUT, 3, seed=4), drawn(OUT, 3, seed=5)
    found = edit_of(base, ((torch.eye(OUT).double() + 0.1 * u @ v.T) @ base.double()).float())
    assert (found.kind, found.rank, found.numbers["side"]) == ("map", 3, "output")


def test_training_is_no_edit_of_a_kind() -> None:
    for dtype in DTYPES:
        base = drawn(OUT, IN).to(dtype)
        found = edit_of(base, (base.double() + 0.02 * drawn(OUT, IN, seed=6)).to(dtype))
        assert found.kind == "dense", dtype
        assert found.rank is not None
        assert found.rank > OUT // 2


def test_an_ablation_with_noise_is_no_ablation() -> None:
    base = drawn(OUT, IN).float()
    other = (ablation(OUT, 1) @ base.double()).float() + 1e-4 * drawn(OUT, IN, seed=7).float()
    assert edit_of(base, other).kind == "dense"


def test_rounding_alone() -> None:
    base = drawn(OUT, IN).float()
    for dtype in (torch.bfloat16, torch.float16):
        stored = base.to(dtype).float()  # in float32, though all numbers are those of half
        assert precision_of(stored) == dtype
        found = edit_of(base, stored)
        assert (found.kind, found.rank) == ("rounding", None)
        assert found.words == f"rounded to {found.precision}, and nothing else"
    assert edit_of(base, (base.double() * (1 + 5e-8)).float()).kind == "slight"
    # Half precision that differs from half precision is more than rounding.
    half = base.bfloat16()
    assert edit_of(half, (half.float() * 1.02).bfloat16()).kind == "scaled rows"


def test_vectors() -> None:
    zeros, some = torch.zeros(8), torch.arange(8).float()
    assert edit_of(zeros, some, added=True).kind == "constant"
    assert edit_of(some, some + 1).words == "8 of 8 numbers changed"


def test_experts_are_looked_at_one_by_one() -> None:
    base = drawn(4, OUT, IN).float()
    cut = (ablation(OUT, 1) @ base.double()).float()
    found = edit_of(base, cut)
    assert (found.kind, found.rank, found.numbers["experts"]) == ("ablation", 1, 4)
    mixed = cut.clone()
    mixed[0] = (scaling(OUT, {2: 2.0}) @ base[0].double()).float()
    assert edit_of(base, mixed).kind == "several"
    one = base.clone()
    one[2] = cut[2]
    assert edit_of(base, one).kind == "ablation"
