"""Ablation, rotation and turning, against their geometry."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from operator_formulas import (
    DEGREES,
    DIALS,
    DTYPES,
    PLANES,
    SEEDS,
    SHAPES,
    activation,
    exactly,
    formula,
    matrix_of,
    near,
    quick,
    random_operator,
)
from trimtab.steering.operators import Ablate, Rotate, Turn, apply, orthonormal

# -- ablation ---------------------------------------------------------------------------------


def _exact_activation(seed: int, shape: tuple[int, ...] = (2, 5), width: int = 12) -> Tensor:
    return activation(seed, shape, width).double()


@quick
@given(SEEDS)
def test_ablating_once_leaves_nothing_and_twice_is_once(seed: int) -> None:
    operator, x = random_operator("Ablate", seed), _exact_activation(seed)
    r = exactly(operator.direction[None])[0]
    for dial in (1.0, torch.ones(2, 1)):
        once = apply(operator, x, dial)
        assert (once @ r).abs().max() <= 1e-12
        near(apply(operator, once, dial), once, 1e-14)
    # What is at a right angle to r stays.
    beside = exactly(torch.stack((operator.direction, torch.ones(12))))[1]
    near(once @ beside, x @ beside, 1e-13)
    near(apply(operator, beside, 1.0), beside, 1e-14)
    # In float32 what is left is what rounding leaves.
    assert (apply(operator, x.float(), 1.0).double() @ r).abs().max() <= 1e-5


@quick
@given(SEEDS, DIALS, DIALS)
def test_ablating_leaves_a_share_of_the_direction(seed: int, first: float, second: float) -> None:
    operator, x = random_operator("Ablate", seed), _exact_activation(seed)
    r = exactly(operator.direction[None])[0]
    assert torch.allclose(apply(operator, x, first) @ r, (1 - first) * (x @ r), atol=1e-10)
    twice = apply(operator, apply(operator, x, first), second)
    assert torch.allclose(twice @ r, (1 - first) * (1 - second) * (x @ r), atol=1e-8)
    assert torch.allclose(apply(operator, x, -1.0) @ r, 2 * (x @ r), atol=1e-12)  # doubled
    # 2 is the mirror, so that twice is nothing at all.
    near(apply(operator, apply(operator, x, 2.0), 2.0), x, 1e-13)
    # Which way r points does not matter.
    near(apply(Ablate(-operator.direction), x, first), apply(operator, x, first), 1e-12)


@quick
@given(SEEDS, DIALS)
def test_ablating_is_symmetric(seed: int, dial: float) -> None:
    operator = random_operator("Ablate", seed)
    matrix = apply(operator, torch.eye(12).double(), dial)
    near(matrix, matrix.T, 1e-14)
    values = torch.linalg.eigvalsh(matrix).sort().values
    expected = torch.cat((torch.ones(11).double(), torch.tensor([1 - dial], dtype=torch.float64)))
    near(values, expected.sort().values, 1e-12)


# -- rotation: Selective Steering's ------------------------------------------------------------


@quick
@given(SEEDS, DEGREES, SHAPES)
def test_rotating_keeps_lengths(seed: int, angle: float, shape: tuple[int, ...]) -> None:
    operator, x = random_operator("Rotate", seed), _exact_activation(seed, shape)
    for wide, tolerance in ((x, 1e-12), (x.float(), 1e-5)):
        before, after = wide.double().norm(dim=-1), apply(operator, wide, angle).norm(dim=-1)
        assert ((after.double() / before - 1).abs() <= tolerance).all()


@quick
@given(SEEDS, DEGREES, DEGREES)
def test_rotations_are_a_group(seed: int, first: float, second: float) -> None:
    operator, x = random_operator("Rotate", seed), _exact_activation(seed)
    assert torch.equal(apply(operator, x, 0.0), x)
    near(apply(operator, x, 360.0), x, 1e-14)
    near(apply(operator, x, -360.0), x, 1e-14)
    twice = apply(operator, apply(operator, x, first), second)
    near(twice, apply(operator, x, first + second), 1e-12)
    near(apply(operator, apply(operator, x, first), -first), x, 1e-12)


@quick
@given(SEEDS, DEGREES)
def test_a_rotation_is_orthogonal_and_turns_the_plane_only(seed: int, angle: float) -> None:
    operator = random_operator("Rotate", seed)
    matrix = apply(operator, torch.eye(12).double(), angle).T  # column by column
    one = torch.eye(12).double()
    near(matrix.T @ matrix, one, 1e-13)
    near(matrix.T, apply(operator, one, -angle).T, 1e-13)
    assert abs(float(torch.linalg.det(matrix)) - 1) <= 1e-12
    b = exactly(operator.basis)
    # Within the plane, in the coordinates of b1 and b2: determinant 1 too, by this very angle.
    inside = b @ matrix @ b.T
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    near(inside, torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64), 1e-12)
    # At a right angle to it nothing moves.
    rest = torch.linalg.qr(torch.cat((b, torch.eye(12).double())).T).Q[:, 2:]
    near(matrix @ rest, rest, 1e-13)


@quick
@given(SEEDS)
def test_half_a_turn_mirrors_the_plane(seed: int) -> None:
    operator, x = random_operator("Rotate", seed), _exact_activation(seed)
    b = exactly(operator.basis)
    near(apply(operator, x, 180.0), x - 2 * (x @ b.T) @ b, 1e-13)
    near(apply(operator, b[0], 90.0), b[1], 1e-13)  # from b1 toward b2
    near(apply(operator, b[1], 90.0), -b[0], 1e-13)


# -- laying at an angle: SAS and AAS -----------------------------------------------------------


def _angle(operator: Any, x: Tensor) -> Tensor:
    """Where the part in the plane points, in degrees from b1 toward b2."""
    b = exactly(operator.basis)
    return torch.rad2deg(torch.atan2(x.double() @ b[1], x.double() @ b[0]))


def _apart(one: Tensor, other: Tensor | float) -> float:
    """The largest difference of angles in degrees, round the circle."""
    return float(((one - other + 180) % 360 - 180).abs().max())


@quick
@given(SEEDS, DEGREES, SHAPES)
def test_turning_keeps_lengths_too(seed: int, angle: float, shape: tuple[int, ...]) -> None:
    """With an orthonormal basis; that it does not is a matter of rounded bases only."""
    x = _exact_activation(seed, shape)
    for kind in ("Turn", "Adaptive"):
        operator = random_operator(kind, seed)
        for wide, tolerance in ((x, 1e-12), (x.float(), 1e-5)):
            before, after = wide.double().norm(dim=-1), apply(operator, wide, angle).norm(dim=-1)
            assert ((after.double() / before - 1).abs() <= tolerance).all()


@quick
@given(SEEDS, DEGREES)
def test_turn_goes_to_the_angle_and_rotate_by_it(seed: int, angle: float) -> None:
    turn, x = random_operator("Turn", seed), _exact_activation(seed)
    rotate = Rotate(turn.basis)
    assert _apart(_angle(turn, apply(turn, x, angle)), angle) <= 1e-6
    assert _apart(_angle(turn, apply(rotate, x, angle)), _angle(turn, x) + angle) <= 1e-6
    per_row = torch.tensor([[angle], [angle / 2]])
    both = apply(turn, x, per_row)
    assert _apart(_angle(turn, both), per_row.double()) <= 1e-4
    near(apply(rotate, x, per_row)[1], apply(rotate, x[1], angle / 2), 1e-12)


@quick
@given(SEEDS, DEGREES, DEGREES)
def test_the_last_turn_wins(seed: int, first: float, second: float) -> None:
    operator, x = random_operator("Turn", seed), _exact_activation(seed)
    twice = apply(operator, apply(operator, x, first), second)
    near(twice, apply(operator, x, second), 1e-12)


@quick
@given(SEEDS, DEGREES)
def test_turn_is_not_linear_and_discards_the_sign(seed: int, angle: float) -> None:
    operator, x = random_operator("Turn", seed), _exact_activation(seed)
    b = exactly(operator.basis)
    mirrored = x - 2 * (x @ b[0])[..., None] * b[0]  # the other sign along b1
    near(apply(operator, mirrored, angle), apply(operator, x, angle), 1e-12)
    assert (mirrored - x).abs().max() > 1e-3  # two activations, one result
    # Odd maps give -f(x) for -x; here the part in the plane comes out the same.
    same = (apply(operator, -x, angle) - apply(operator, x, angle)) @ b.T
    assert same.abs().max() <= 1e-12
    # But a longer activation makes a longer one.
    near(apply(operator, 3 * x, angle), 3 * apply(operator, x, angle), 1e-12)


@quick
@given(SEEDS)
def test_turn_at_zero_lays_all_on_b1(seed: int) -> None:
    operator, x = random_operator("Turn", seed), _exact_activation(seed)
    b = exactly(operator.basis)
    laid = apply(operator, x, 0.0)
    near(laid @ b[0], (x @ b.T).norm(dim=-1), 1e-12)
    assert (laid @ b[1]).abs().max() <= 1e-12
    assert (laid - x).abs().max() > 1e-3  # not the identity


@quick
@given(SEEDS, DEGREES, st.sampled_from(DTYPES))
def test_adaptive_is_turn_where_b1_is_positive(seed: int, angle: float, dtype: torch.dtype) -> None:
    operator, x = random_operator("Adaptive", seed), activation(seed, (4, 10)).to(dtype)
    inside = x.double() @ exactly(operator.basis)[0] > 0
    assert inside.any()
    assert not inside.all()
    for dial in (angle, 0.0, torch.tensor([[angle], [0.0], [-angle], [90.0]])):
        adaptive, turned = apply(operator, x, dial), apply(Turn(operator.basis), x, dial)
        assert torch.equal(adaptive[~inside], x[~inside])
        assert torch.equal(adaptive[inside], turned[inside])
        assert (adaptive[inside] != x[inside]).any()  # at 0 degrees too


def test_adaptive_is_strict_about_zero() -> None:
    operator = Turn(torch.eye(4)[:2], adaptive=True)
    x = torch.tensor([[0.0, 3, 1, 1], [-1, 3, 1, 1], [1e-20, 3, 1, 1], [0, 0, 5, 5]])
    turned = apply(operator, x, 0.0)
    assert torch.equal(turned[[0, 1, 3]], x[[0, 1, 3]])
    assert torch.equal(turned[2], torch.tensor([3.0, 0, 1, 1]))
    # Nothing in the plane: nothing to lay anywhere, and no division by its length.
    assert torch.equal(apply(Turn(torch.eye(4)[:2]), x[3], 77.0), x[3])


# -- the basis --------------------------------------------------------------------------------


@quick
@given(PLANES, SEEDS, DEGREES)
def test_flipping_b2_turns_the_angle_round(kind: str, seed: int, angle: float) -> None:
    operator, x = random_operator(kind, seed), _exact_activation(seed)
    flipped = replace(operator, basis=operator.basis * torch.tensor([[1.0], [-1.0]]))
    near(apply(flipped, x, angle), apply(operator, x, -angle), 1e-12)
    if kind == "Rotate":  # and of both nothing
        near(apply(replace(operator, basis=-operator.basis), x, angle), apply(operator, x, angle))
    else:  # but turning b1 round is half a turn for what lays at an angle
        around = replace(operator, basis=-operator.basis)
        if kind == "Turn":
            near(apply(around, x, angle + 180), apply(operator, x, angle), 1e-12)


@pytest.mark.parametrize("kind", ["Ablate", "Rotate", "Turn", "Adaptive"])
def test_a_rounded_basis_is_made_orthonormal_at_use(kind: str) -> None:
    """Bases that were kept in bfloat16 are off by up to 0.5 %, and so would each length be."""
    for seed in range(5):
        exact = random_operator(kind, seed, 576)
        name = "direction" if kind == "Ablate" else "basis"
        rounded = getattr(exact, name).bfloat16().float()
        operator = replace(exact, **{name: rounded})
        rows = rounded.reshape(-1, 576).double()
        assert (rows @ rows.T - torch.eye(len(rows)).double()).abs().max() > 1e-6  # it is off
        operator.check()  # but not so far that it must be a mistake
        x = _exact_activation(seed, (2, 5), 576)
        dial = 1.0 if kind == "Ablate" else 75.0
        for dials in (dial, torch.full((2, 1), dial)):
            changed = apply(operator, x.float(), dials).double()
            assert (changed - formula(operator, x.float(), dial)).abs().max() < 1e-5
            wide = apply(operator, x, dials)
            assert (wide - formula(operator, x, dial)).abs().max() < 1e-12
            if kind == "Ablate":
                assert (wide @ rows[0]).abs().max() < 1e-12
            else:
                assert (wide.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-6
                assert (changed.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-6
        if operator.linear:
            near(operator.linear_part(x, dial), formula(operator, x, dial), 1e-13)
            near(operator.adjoint(x, dial), x @ matrix_of(operator, dial)[0], 1e-13)


@quick
@given(SEEDS, st.sampled_from([0.0, 0.5, 0.999, 1 - 1e-5]))
def test_orthonormal_rows_keep_the_first_direction(seed: int, lean: float) -> None:
    rows = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
    rows[1] = lean * rows[0] + (1 - lean) * rows[1]  # nearly parallel at the last ones
    made = orthonormal(rows)
    assert made.dtype is torch.float64
    near(made @ made.T, torch.eye(2).double(), 1e-12)
    near(made[0], rows[0].double() / rows[0].double().norm(), 1e-14)
    assert made[1] @ rows[1].double() > 0
    # Within the plane of the two, whatever they were.
    near(rows.double() @ made.T @ made, rows.double(), 1e-12)
    near(orthonormal(3 * rows[:1]), made[:1], 1e-7)
