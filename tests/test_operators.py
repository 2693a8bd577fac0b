"""The operators' algebra, against formulas and matrices written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab import TrimtabError
from trimtab.steering.operators import (
    OPERATORS,
    Ablate,
    Add,
    Rotate,
    Scale,
    Turn,
    apply,
    fold_input,
    fold_output,
    orthonormal,
    to_tensors,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DIALS = st.floats(-30, 30, width=32)
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([(), (3,), (2, 5), (4, 1)])  # what comes before the units

#: Each unit on its own: the same numbers, bit for bit, however the rows are cut.
ALONE = ("Scale", "clamped", "Absolute", "Add")
LINEAR = ("Scale", "clamped", "Add", "Ablate", "Rotate")
ALL = (*LINEAR, "Absolute", "Turn", "Adaptive")
KINDS = st.sampled_from(ALL)
LINEARS = st.sampled_from(LINEAR)
PLANES = st.sampled_from(["Rotate", "Turn", "Adaptive"])
DEGREES = st.floats(-720, 720, width=32)

# Enough to find what fails for whole ranges of input, and quick.
quick = settings(max_examples=50, deadline=None)


def _operator(kind: str, seed: int, width: int = 12) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if kind == "Add":
        return Add(torch.randn(width, generator=generator))
    if kind in ("Ablate", "Rotate", "Turn", "Adaptive"):
        # float32 rows as a file holds them; the oracles make them exact again, by another way.
        rows = _exact(torch.randn(2, width, generator=generator)).float()
        if kind == "Ablate":
            return Ablate(rows[0])
        return Rotate(rows) if kind == "Rotate" else Turn(rows, adaptive=kind == "Adaptive")
    units = torch.randperm(width, generator=generator)[: seed % (width + 1)]
    gain = torch.randn(len(units), generator=generator)
    return Scale(units, gain, width, clamp_sign=kind == "clamped", absolute=kind == "Absolute")


def _exact(rows: Tensor) -> Tensor:
    """Rows made orthonormal in float64 by Householder's way; the first keeps its direction."""
    q, r = torch.linalg.qr(rows.double().T)
    return (q * r.diagonal().sign()).T


def _activation(seed: int, shape: tuple[int, ...] = (2, 5), width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 3 * torch.randn(*shape, width, generator=generator)


def _matrix(operator: Any, dial: float) -> tuple[Tensor, Tensor]:
    """A and c of x -> A x + c in float64, from the formulas at the head of operators.py."""
    linear = torch.eye(operator.width, dtype=torch.float64)
    offset = torch.zeros(operator.width, dtype=torch.float64)
    if isinstance(operator, Ablate):
        r = operator.direction.double() / operator.direction.double().norm()
        return linear - dial * torch.outer(r, r), offset
    if isinstance(operator, Rotate):
        b1, b2 = _exact(operator.basis)
        cos, sin = math.cos(math.radians(dial)), math.sin(math.radians(dial))
        linear = linear + (cos - 1) * (torch.outer(b1, b1) + torch.outer(b2, b2))
        return linear + sin * (torch.outer(b2, b1) - torch.outer(b1, b2)), offset
    if isinstance(operator, Add):
        return linear, dial * operator.vector.double()
    for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
        factor = 1 + dial * gain
        linear[unit, unit] = max(factor, 0.0) if operator.clamp_sign else factor
    return linear, offset


def _formula(operator: Any, x: Tensor, dial: float) -> Tensor:
    """What any operator makes of one or more activations, token by token, in float64."""
    if isinstance(operator, Turn):
        b1, b2 = _exact(operator.basis)
        angle = math.radians(dial)
        flat = []
        for h in x.double().reshape(-1, operator.width):
            first, second = float(h @ b1), float(h @ b2)
            length = math.hypot(first, second)
            rest = h - first * b1 - second * b2
            laid = rest + length * (math.cos(angle) * b1 + math.sin(angle) * b2)
            flat.append(h if operator.adaptive and not first > 0 else laid)
        return torch.stack(flat).reshape(x.shape)
    if isinstance(operator, Scale) and operator.absolute:
        result = x.double().clone()
        for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
            result[..., unit] += dial * gain * x[..., unit].double().abs()
        return result
    linear, offset = _matrix(operator, dial)
    return x.double() @ linear.T + offset


def _near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max() if actual.numel() else 0
    assert difference <= tolerance * (1 + expected.double().abs().max())


# -- applying ---------------------------------------------------------------------------------


@quick
@given(KINDS, SEEDS, DIALS, SHAPES)
def test_is_what_its_formula_says(
    kind: str, seed: int, dial: float, shape: tuple[int, ...]
) -> None:
    operator, x = _operator(kind, seed), _activation(seed, shape)
    _near(apply(operator, x, dial), _formula(operator, x, dial))


@quick
@given(PLANES, SEEDS, DEGREES, SHAPES)
def test_angles_are_degrees_of_any_size(
    kind: str, seed: int, angle: float, shape: tuple[int, ...]
) -> None:
    operator, x = _operator(kind, seed), _activation(seed, shape)
    _near(apply(operator, x, angle), _formula(operator, x, angle), 3e-6)
    _near(apply(operator, x.double(), angle), _formula(operator, x, angle), 1e-12)
    _near(apply(operator, x.double(), angle + 360), _formula(operator, x, angle), 1e-12)


def test_which_operators_are_linear_and_where_they_do_nothing() -> None:
    assert [kind for kind in ALL if _operator(kind, 5).linear] == list(LINEAR)
    assert [kind for kind in ALL if _operator(kind, 5).identity is None] == ["Turn", "Adaptive"]
    plane = torch.zeros(2, 12)
    plane[0, 3] = plane[1, 7] = 1.0
    for operator in (Rotate(plane), Turn(plane)):
        assert (operator.width, operator.size) == (12, 2)
    assert (Ablate(plane[0]).width, Ablate(plane[0]).size) == (12, 1)


@quick
@given(LINEARS, SEEDS, DIALS, st.floats(-3, 3, width=32))
def test_is_affine(kind: str, seed: int, dial: float, weight: float) -> None:
    operator = _operator(kind, seed)
    x, y = _activation(seed), _activation(seed + 1)
    mixed = apply(operator, weight * x + (1 - weight) * y, dial)
    _near(mixed, weight * apply(operator, x, dial) + (1 - weight) * apply(operator, y, dial), 1e-4)
    # Linear, not only affine, where there is no offset.
    if kind != "Add":
        _near(apply(operator, weight * x, dial), weight * apply(operator, x, dial), 1e-4)
        assert not apply(operator, torch.zeros(12), dial).any()


@quick
@given(SEEDS, DIALS, DIALS)
def test_scale_twice_multiplies_factors(seed: int, first: float, second: float) -> None:
    for kind in ("Scale", "clamped"):
        operator, x = _operator(kind, seed), _activation(seed)
        twice = apply(operator, apply(operator, x, first), second)
        factors = torch.ones(12, dtype=torch.float64)
        for dial in (first, second):
            factors *= _matrix(operator, dial)[0].diagonal()
        _near(twice, x.double() * factors)


@quick
@given(SEEDS, DIALS, DIALS)
def test_add_twice_adds_dials(seed: int, first: float, second: float) -> None:
    operator, x = _operator("Add", seed), _activation(seed)
    twice = apply(operator, apply(operator, x, first), second)
    _near(twice, apply(operator, x, first + second))
    _near(apply(operator, apply(operator, x, first), -first), x)


@quick
@given(SEEDS, DIALS)
def test_clamped_scale_keeps_signs(seed: int, dial: float) -> None:
    operator, x = _operator("clamped", seed), _activation(seed)
    free = Scale(operator.units, operator.gain, operator.width)
    clamped, flipped = apply(operator, x, dial), apply(free, x, dial)
    assert (clamped * x >= 0).all()
    # Where the free one keeps the sign the two are the same; elsewhere the clamped one is zero.
    keeps = flipped * x >= 0
    assert torch.equal(clamped[keeps], flipped[keeps])
    assert not clamped[~keeps].any()


def test_scale_changes_the_chosen_units_only() -> None:
    operator = Scale(torch.tensor([4, 1]), torch.tensor([0.5, -2.0]), 6)
    x = torch.tensor([1.0, 2.0, 3.0, -4.0, -5.0, float("inf")])
    expected = torch.tensor([1.0, 2 * (1 - 3 * 2.0), 3.0, -4.0, -5 * (1 + 3 * 0.5), float("inf")])
    assert torch.equal(apply(operator, x, 3.0), expected)
    assert (operator.size, operator.width) == (2, 6)
    assert Add(torch.tensor([0.0, 1.0, -1.0])).size == 2


# -- dials ------------------------------------------------------------------------------------


def _same(kind: str, actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit, but for the order of sums where units are mixed."""
    if kind in ALONE:
        assert torch.equal(actual, expected)
    else:
        _near(actual, expected, 3e-6 if actual.dtype == torch.float32 else 1e-12)


@quick
@given(KINDS, SEEDS, DIALS)
def test_one_dial_is_the_same_dial_in_every_row(kind: str, seed: int, dial: float) -> None:
    operator, x = _operator(kind, seed), _activation(seed, (3, 4))
    one = apply(operator, x, dial)
    for same in (torch.full((3, 1), dial), torch.tensor(dial), torch.full((3, 1), dial).double()):
        _same(kind, apply(operator, x, same), one)
        _near(apply(operator, x.double(), same), one, 3e-6)


@quick
@given(KINDS, SEEDS, st.lists(DIALS, min_size=1, max_size=5))
def test_each_row_has_its_own_dial(kind: str, seed: int, dials: list[float]) -> None:
    operator, x = _operator(kind, seed), _activation(seed, (len(dials), 4))
    together = apply(operator, x, torch.tensor(dials)[:, None])
    one_token = apply(operator, x[:, -1:], torch.tensor(dials)[:, None])  # as in decoding
    assert one_token.shape == (len(dials), 1, 12)
    for row, dial in enumerate(dials):
        _same(kind, together[row], apply(operator, x[row], dial))
        _same(kind, one_token[row], apply(operator, x[row, -1:], dial))
        _same(kind, one_token[row], together[row, -1:])


def test_each_token_may_have_its_own_dial() -> None:
    for kind in ALL:
        operator, x = _operator(kind, 5), _activation(5, (2, 3))
        dials = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 4.0]])
        together = apply(operator, x, dials)
        for row in range(2):
            for token in range(3):
                alone = apply(operator, x[row, token], float(dials[row, token]))
                _same(kind, together[row, token], alone)


@quick
@given(
    KINDS.filter(lambda kind: kind not in ("Turn", "Adaptive")),
    SEEDS,
    st.sampled_from(DTYPES),
    SHAPES,
)
def test_nothing_happens_at_dial_zero(
    kind: str, seed: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    operator, x = _operator(kind, seed), _activation(seed, shape).to(dtype)
    assert operator.identity == 0.0
    assert torch.equal(apply(operator, x, 0.0), x)
    if shape == (2, 5):
        # A row at zero beside a row that is steered.
        both = apply(operator, x, torch.tensor([[0.0], [7.0]]))
        assert torch.equal(both[0], x[0])


# -- dtypes -----------------------------------------------------------------------------------


@quick
@given(KINDS, SEEDS, DIALS, st.sampled_from(DTYPES), st.booleans())
def test_dtype_is_kept_and_arithmetic_is_wide(
    kind: str, seed: int, dial: float, dtype: torch.dtype, per_row: bool
) -> None:
    operator, x = _operator(kind, seed), _activation(seed).to(dtype)
    result = apply(operator, x, torch.full((2, 1), dial) if per_row else dial)
    assert result.dtype is dtype
    exact = _formula(operator, x, dial)
    # One rounding to the dtype, after float32: half a unit in the last place, and float32's own.
    half_step = torch.finfo(dtype).eps / 2 * exact.abs()
    reach = x.double().abs() if kind in ALONE else x.double().norm(dim=-1, keepdim=True)
    wide = 1e-6 * (1 + abs(dial)) * (1 + reach) * 4
    assert ((result.double() - exact).abs() <= half_step + wide).all()


def test_half_precision_does_not_round_on_the_way() -> None:
    # 1 + 2^-9 does not exist in bfloat16: a factor rounded to the activation's dtype would be 1.
    x = torch.full((4,), 256.0, dtype=torch.bfloat16)
    scale = Scale(torch.arange(4), torch.full((4,), 2.0**-9), 4)
    assert torch.equal(apply(scale, x, 4.0), torch.full_like(x, 258.0))
    # Nor does 256.5 before another 1.5 comes to it; 100.5 in float16 overflows on the way.
    assert torch.equal(apply(Add(torch.full((4,), 0.5)), x, 4.0), torch.full_like(x, 258.0))
    big = torch.full((4,), 2.0, dtype=torch.float16)
    assert torch.equal(apply(Add(torch.full((4,), 1e5)), big, 1e-5), torch.full_like(big, 3.0))


@quick
@given(KINDS, SEEDS, DIALS, st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_half_precision_is_float32_and_one_rounding(
    kind: str, seed: int, dial: float, dtype: torch.dtype, per_row: bool
) -> None:
    operator, x = _operator(kind, seed), _activation(seed).to(dtype)
    dials: Any = torch.tensor([[dial], [dial / 2]]) if per_row else dial
    result = apply(operator, x, dials)
    assert torch.equal(result, apply(operator, x.float(), dials).to(dtype))


@pytest.mark.parametrize("kind", ["Ablate", "Rotate", "Turn"])
def test_rounding_on_the_way_would_be_seen(kind: str) -> None:
    """The test above could pass if float32 itself were rounded; this one knows the numbers."""
    operator, dial = _operator(kind, 3, 256), 1.0 if kind == "Ablate" else 50.0
    x = _activation(3, (4,), 256).bfloat16()
    exact = _formula(operator, x, dial)
    right = (apply(operator, x, dial).double() - exact).abs().max()
    # The same formula with a basis in bfloat16, as if the operator were kept in the model's dtype.
    name = "direction" if kind == "Ablate" else "basis"
    rough = replace(operator, **{name: getattr(operator, name).bfloat16().float()})
    assert right <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()
    assert (_formula(rough, x, dial) - exact).abs().max() > 1e-4
    _near(apply(operator, x.float(), dial), exact, 1e-6)


@quick
@given(KINDS, SEEDS, DIALS, st.sampled_from(DTYPES))
def test_never_in_place(kind: str, seed: int, dial: float, dtype: torch.dtype) -> None:
    operator, x = _operator(kind, seed), _activation(seed).to(dtype)
    before, tensors = x.clone(), {k: v.clone() for k, v in to_tensors(operator)[0].items()}
    weight = _activation(seed + 2, (12,))
    weight_before = weight.clone()
    result = apply(operator, x, dial)
    apply(operator, x, torch.tensor([[dial], [0.0]]))
    if operator.linear:
        fold_output(operator, dial, weight, None)
        fold_input(operator, dial, weight, weight[0])
    assert torch.equal(x, before)
    assert torch.equal(weight, weight_before)
    assert all(torch.equal(v, tensors[k]) for k, v in to_tensors(operator)[0].items())
    result.zero_()  # a result of its own, also where the operator did nothing
    assert torch.equal(x, before)


def test_bound_once_and_used_often() -> None:
    for kind in ALL:
        operator = _operator(kind, 9)
        for dial in (2.0, torch.tensor([[2.0], [-1.0]])):
            bound = operator.bind(dial, "cpu")
            for dtype in DTYPES:
                x = _activation(3).to(dtype)
                assert torch.equal(bound(x), apply(operator, x, dial))
                assert torch.equal(bound(x[:, -1:]), apply(operator, x[:, -1:], dial))


@pytest.mark.parametrize("kind", ALL)
def test_it_works_where_the_activations_are(kind: str) -> None:
    """The meta device stands for a card: a tensor left on the CPU cannot be mixed with it."""
    operator = _operator(kind, 9)
    for dtype in DTYPES:
        x = torch.empty(2, 3, 12, device="meta", dtype=dtype)
        for dial in (2.0, torch.tensor([[2.0], [0.0]])):
            changed = apply(operator, x, dial)
            assert (changed.device.type, changed.dtype, changed.shape) == ("meta", dtype, x.shape)


@pytest.mark.parametrize("kind", ALL)
def test_a_strided_activation_is_one_too(kind: str) -> None:
    operator, x = _operator(kind, 4), _activation(4, (5, 3))
    turned = x.transpose(0, 1)
    _near(apply(operator, turned, 2.0), _formula(operator, x, 2.0).transpose(0, 1))
    assert apply(operator, x[:0], 2.0).shape == (0, 3, 12)


# -- folding ----------------------------------------------------------------------------------


@quick
@given(LINEARS, SEEDS, DIALS)
def test_adjoint_is_the_transposed_linear_part(kind: str, seed: int, dial: float) -> None:
    operator = _operator(kind, seed)
    x, y = _activation(seed).double(), _activation(seed + 1).double()
    left = (operator.linear_part(x, dial) * y).sum(-1)
    right = (x * operator.adjoint(y, dial)).sum(-1)
    scale = (x.norm(dim=-1) * y.norm(dim=-1)) * (1 + abs(dial) * 5)
    assert ((left - right).abs() <= 1e-12 * scale).all()


@quick
@given(LINEARS, SEEDS, DIALS)
def test_linear_part_and_offset_make_the_operator(kind: str, seed: int, dial: float) -> None:
    operator, x = _operator(kind, seed), _activation(seed).double()
    linear, offset = _matrix(operator, dial)
    _near(operator.linear_part(x, dial), x @ linear.T, 1e-13)
    _near(operator.offset(dial).double(), offset, 1e-13)


@quick
@given(
    LINEARS, SEEDS, DIALS, st.sampled_from([(), (4,)]), st.sampled_from([3, 12, 20]), st.booleans()
)
def test_fold_output(
    kind: str, seed: int, dial: float, experts: tuple[int, ...], inputs: int, biased: bool
) -> None:
    operator = _operator(kind, seed)
    weight = _activation(seed, (*experts, 12), inputs)  # [(experts,) out, in]
    bias = _activation(seed + 1, ())[:12] if biased else None
    folded, folded_bias = fold_output(operator, dial, weight, bias)
    assert folded.dtype is torch.float64
    linear, offset = _matrix(operator, dial)
    _near(folded, torch.einsum("ij,...jk->...ik", linear, weight.double()), 1e-13)
    # And, beside the matrices, as what it is for: the output of the map, then the operator.
    x = _activation(seed + 2, (5,), inputs).double()
    old = torch.einsum("...ij,tj->...ti", weight.double(), x)
    if bias is not None:
        old = old + bias.double()
    _near(torch.einsum("...ij,tj->...ti", folded, x) + folded_bias, old @ linear.T + offset, 1e-12)


@quick
@given(
    LINEARS, SEEDS, DIALS, st.sampled_from([(), (4,)]), st.sampled_from([3, 12, 20]), st.booleans()
)
def test_fold_input(
    kind: str, seed: int, dial: float, experts: tuple[int, ...], outputs: int, biased: bool
) -> None:
    operator = _operator(kind, seed)
    weight = _activation(seed, (*experts, outputs))  # [(experts,) out, in]
    bias = _activation(seed + 1, experts, outputs) if biased else None
    folded, folded_bias = fold_input(operator, dial, weight, bias)
    assert folded.dtype is torch.float64
    linear, offset = _matrix(operator, dial)
    _near(folded, torch.einsum("...ij,jk->...ik", weight.double(), linear), 1e-13)
    x = _activation(seed + 2, (5,)).double()
    steered = x @ linear.T + offset
    old_bias = 0 if bias is None else bias.double().unsqueeze(-2)
    _near(
        torch.einsum("...ij,tj->...ti", folded, x) + folded_bias.unsqueeze(-2),
        torch.einsum("...ij,tj->...ti", weight.double(), steered) + old_bias,
        1e-12,
    )


def test_folding_happens_where_the_weights_are() -> None:
    # The meta device stands for a card: a tensor left on the CPU cannot be mixed with it.
    weight = torch.empty(12, 12, device="meta")
    for kind in LINEAR:
        operator = _operator(kind, 5)
        for fold in (fold_output, fold_input):
            for tensor in (
                *fold(operator, 2.0, weight, None),
                *fold(operator, 2.0, weight, weight[0]),
            ):
                assert tensor.device.type == "meta"


# -- ablation ---------------------------------------------------------------------------------


def _exact_activation(seed: int, shape: tuple[int, ...] = (2, 5), width: int = 12) -> Tensor:
    return _activation(seed, shape, width).double()


@quick
@given(SEEDS)
def test_ablating_once_leaves_nothing_and_twice_is_once(seed: int) -> None:
    operator, x = _operator("Ablate", seed), _exact_activation(seed)
    r = _exact(operator.direction[None])[0]
    for dial in (1.0, torch.ones(2, 1)):
        once = apply(operator, x, dial)
        assert (once @ r).abs().max() <= 1e-12
        _near(apply(operator, once, dial), once, 1e-14)
    # What is at a right angle to r stays.
    beside = _exact(torch.stack((operator.direction, torch.ones(12))))[1]
    _near(once @ beside, x @ beside, 1e-13)
    _near(apply(operator, beside, 1.0), beside, 1e-14)
    # In float32 what is left is what rounding leaves.
    assert (apply(operator, x.float(), 1.0).double() @ r).abs().max() <= 1e-5


@quick
@given(SEEDS, DIALS, DIALS)
def test_ablating_leaves_a_share_of_the_direction(seed: int, first: float, second: float) -> None:
    operator, x = _operator("Ablate", seed), _exact_activation(seed)
    r = _exact(operator.direction[None])[0]
    assert torch.allclose(apply(operator, x, first) @ r, (1 - first) * (x @ r), atol=1e-10)
    twice = apply(operator, apply(operator, x, first), second)
    assert torch.allclose(twice @ r, (1 - first) * (1 - second) * (x @ r), atol=1e-8)
    assert torch.allclose(apply(operator, x, -1.0) @ r, 2 * (x @ r), atol=1e-12)  # doubled
    # 2 is the mirror, so that twice is nothing at all.
    _near(apply(operator, apply(operator, x, 2.0), 2.0), x, 1e-13)
    # Which way r points does not matter.
    _near(apply(Ablate(-operator.direction), x, first), apply(operator, x, first), 1e-12)


@quick
@given(SEEDS, DIALS)
def test_ablating_is_symmetric(seed: int, dial: float) -> None:
    operator = _operator("Ablate", seed)
    matrix = apply(operator, torch.eye(12).double(), dial)
    _near(matrix, matrix.T, 1e-14)
    values = torch.linalg.eigvalsh(matrix).sort().values
    expected = torch.cat((torch.ones(11).double(), torch.tensor([1 - dial], dtype=torch.float64)))
    _near(values, expected.sort().values, 1e-12)


# -- rotation: Selective Steering's ------------------------------------------------------------


@quick
@given(SEEDS, DEGREES, SHAPES)
def test_rotating_keeps_lengths(seed: int, angle: float, shape: tuple[int, ...]) -> None:
    operator, x = _operator("Rotate", seed), _exact_activation(seed, shape)
    for wide, tolerance in ((x, 1e-12), (x.float(), 1e-5)):
        before, after = wide.double().norm(dim=-1), apply(operator, wide, angle).norm(dim=-1)
        assert ((after.double() / before - 1).abs() <= tolerance).all()


@quick
@given(SEEDS, DEGREES, DEGREES)
def test_rotations_are_a_group(seed: int, first: float, second: float) -> None:
    operator, x = _operator("Rotate", seed), _exact_activation(seed)
    assert torch.equal(apply(operator, x, 0.0), x)
    _near(apply(operator, x, 360.0), x, 1e-14)
    _near(apply(operator, x, -360.0), x, 1e-14)
    twice = apply(operator, apply(operator, x, first), second)
    _near(twice, apply(operator, x, first + second), 1e-12)
    _near(apply(operator, apply(operator, x, first), -first), x, 1e-12)


@quick
@given(SEEDS, DEGREES)
def test_a_rotation_is_orthogonal_and_turns_the_plane_only(seed: int, angle: float) -> None:
    operator = _operator("Rotate", seed)
    matrix = apply(operator, torch.eye(12).double(), angle).T  # column by column
    one = torch.eye(12).double()
    _near(matrix.T @ matrix, one, 1e-13)
    _near(matrix.T, apply(operator, one, -angle).T, 1e-13)
    assert abs(float(torch.linalg.det(matrix)) - 1) <= 1e-12
    b = _exact(operator.basis)
    # Within the plane, in the coordinates of b1 and b2: determinant 1 too, by this very angle.
    inside = b @ matrix @ b.T
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    _near(inside, torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64), 1e-12)
    # At a right angle to it nothing moves.
    rest = torch.linalg.qr(torch.cat((b, torch.eye(12).double())).T).Q[:, 2:]
    _near(matrix @ rest, rest, 1e-13)


@quick
@given(SEEDS)
def test_half_a_turn_mirrors_the_plane(seed: int) -> None:
    operator, x = _operator("Rotate", seed), _exact_activation(seed)
    b = _exact(operator.basis)
    _near(apply(operator, x, 180.0), x - 2 * (x @ b.T) @ b, 1e-13)
    _near(apply(operator, b[0], 90.0), b[1], 1e-13)  # from b1 toward b2
    _near(apply(operator, b[1], 90.0), -b[0], 1e-13)


# -- laying at an angle: SAS and AAS -----------------------------------------------------------


def _angle(operator: Any, x: Tensor) -> Tensor:
    """Where the part in the plane points, in degrees from b1 toward b2."""
    b = _exact(operator.basis)
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
        operator = _operator(kind, seed)
        for wide, tolerance in ((x, 1e-12), (x.float(), 1e-5)):
            before, after = wide.double().norm(dim=-1), apply(operator, wide, angle).norm(dim=-1)
            assert ((after.double() / before - 1).abs() <= tolerance).all()


@quick
@given(SEEDS, DEGREES)
def test_turn_goes_to_the_angle_and_rotate_by_it(seed: int, angle: float) -> None:
    turn, x = _operator("Turn", seed), _exact_activation(seed)
    rotate = Rotate(turn.basis)
    assert _apart(_angle(turn, apply(turn, x, angle)), angle) <= 1e-6
    assert _apart(_angle(turn, apply(rotate, x, angle)), _angle(turn, x) + angle) <= 1e-6
    per_row = torch.tensor([[angle], [angle / 2]])
    both = apply(turn, x, per_row)
    assert _apart(_angle(turn, both), per_row.double()) <= 1e-4
    _near(apply(rotate, x, per_row)[1], apply(rotate, x[1], angle / 2), 1e-12)


@quick
@given(SEEDS, DEGREES, DEGREES)
def test_the_last_turn_wins(seed: int, first: float, second: float) -> None:
    operator, x = _operator("Turn", seed), _exact_activation(seed)
    twice = apply(operator, apply(operator, x, first), second)
    _near(twice, apply(operator, x, second), 1e-12)


@quick
@given(SEEDS, DEGREES)
def test_turn_is_not_linear_and_discards_the_sign(seed: int, angle: float) -> None:
    operator, x = _operator("Turn", seed), _exact_activation(seed)
    b = _exact(operator.basis)
    mirrored = x - 2 * (x @ b[0])[..., None] * b[0]  # the other sign along b1
    _near(apply(operator, mirrored, angle), apply(operator, x, angle), 1e-12)
    assert (mirrored - x).abs().max() > 1e-3  # two activations, one result
    # Odd maps give -f(x) for -x; here the part in the plane comes out the same.
    same = (apply(operator, -x, angle) - apply(operator, x, angle)) @ b.T
    assert same.abs().max() <= 1e-12
    # But a longer activation makes a longer one.
    _near(apply(operator, 3 * x, angle), 3 * apply(operator, x, angle), 1e-12)


@quick
@given(SEEDS)
def test_turn_at_zero_lays_all_on_b1(seed: int) -> None:
    operator, x = _operator("Turn", seed), _exact_activation(seed)
    b = _exact(operator.basis)
    laid = apply(operator, x, 0.0)
    _near(laid @ b[0], (x @ b.T).norm(dim=-1), 1e-12)
    assert (laid @ b[1]).abs().max() <= 1e-12
    assert (laid - x).abs().max() > 1e-3  # not the identity


@quick
@given(SEEDS, DEGREES, st.sampled_from(DTYPES))
def test_adaptive_is_turn_where_b1_is_positive(seed: int, angle: float, dtype: torch.dtype) -> None:
    operator, x = _operator("Adaptive", seed), _activation(seed, (4, 10)).to(dtype)
    inside = x.double() @ _exact(operator.basis)[0] > 0
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
    operator, x = _operator(kind, seed), _exact_activation(seed)
    flipped = replace(operator, basis=operator.basis * torch.tensor([[1.0], [-1.0]]))
    _near(apply(flipped, x, angle), apply(operator, x, -angle), 1e-12)
    if kind == "Rotate":  # and of both nothing
        _near(apply(replace(operator, basis=-operator.basis), x, angle), apply(operator, x, angle))
    else:  # but turning b1 round is half a turn for what lays at an angle
        around = replace(operator, basis=-operator.basis)
        if kind == "Turn":
            _near(apply(around, x, angle + 180), apply(operator, x, angle), 1e-12)


@pytest.mark.parametrize("kind", ["Ablate", "Rotate", "Turn", "Adaptive"])
def test_a_rounded_basis_is_made_orthonormal_at_use(kind: str) -> None:
    """Bases that were kept in bfloat16 are off by up to 0.5 %, and so would each length be."""
    for seed in range(5):
        exact = _operator(kind, seed, 576)
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
            assert (changed - _formula(operator, x.float(), dial)).abs().max() < 1e-5
            wide = apply(operator, x, dials)
            assert (wide - _formula(operator, x, dial)).abs().max() < 1e-12
            if kind == "Ablate":
                assert (wide @ rows[0]).abs().max() < 1e-12
            else:
                assert (wide.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-6
                assert (changed.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-6
        if operator.linear:
            _near(operator.linear_part(x, dial), _formula(operator, x, dial), 1e-13)
            _near(operator.adjoint(x, dial), x @ _matrix(operator, dial)[0], 1e-13)


@quick
@given(SEEDS, st.sampled_from([0.0, 0.5, 0.999, 1 - 1e-5]))
def test_orthonormal_rows_keep_the_first_direction(seed: int, lean: float) -> None:
    rows = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
    rows[1] = lean * rows[0] + (1 - lean) * rows[1]  # nearly parallel at the last ones
    made = orthonormal(rows)
    assert made.dtype is torch.float64
    _near(made @ made.T, torch.eye(2).double(), 1e-12)
    _near(made[0], rows[0].double() / rows[0].double().norm(), 1e-14)
    assert made[1] @ rows[1].double() > 0
    # Within the plane of the two, whatever they were.
    _near(rows.double() @ made.T @ made, rows.double(), 1e-12)
    _near(orthonormal(3 * rows[:1]), made[:1], 1e-7)


# -- checks -----------------------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")


def _scale(units: Any, gain: Any, width: int = 4) -> Scale:
    return Scale(torch.as_tensor(units), torch.as_tensor(gain), width)


def _plane(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "lengths": (lambda: _scale([0, 1], [1.0]), r"\[2\] units and \[1\] gains"),
    "matrix": (lambda: _scale([[0, 1]], [[1.0, 1.0]]), "one length"),
    "nan": (lambda: _scale([0, 1], [1.0, _NAN]), "NaN"),
    "inf": (lambda: _scale([0, 1], [_INF, 1.0]), "infinity"),
    "too large": (lambda: _scale([0, 4], [1.0, 1.0]), "0 to 3"),
    "negative": (lambda: _scale([-1, 1], [1.0, 1.0]), "0 to 3"),
    "twice": (lambda: _scale([1, 1], [1.0, 1.0]), "twice"),
    "int32 units": (lambda: _scale(torch.tensor([0], dtype=torch.int32), [1.0]), "int64"),
    "float units": (lambda: _scale([0.0], [1.0]), "int64"),
    "float64 gains": (lambda: _scale([0], torch.ones(1).double()), "float32"),
    "int gains": (lambda: _scale([0], [1]), "float32"),
    "no width": (lambda: Scale(torch.tensor([], dtype=torch.long), torch.ones(0), -1), "width"),
    "add matrix": (lambda: Add(torch.ones(2, 2)), r"\[2, 2\]"),
    "add number": (lambda: Add(torch.tensor(1.0)), r"\[units\]"),
    "add empty": (lambda: Add(torch.ones(0)), r"\[0\]"),
    "add nan": (lambda: Add(torch.tensor([1.0, _NAN])), "NaN"),
    "add inf": (lambda: Add(torch.tensor([1.0, -_INF])), "infinity"),
    "add float16": (lambda: Add(torch.ones(2).half()), "float32"),
    "add ints": (lambda: Add(torch.ones(2).long()), "float32"),
    "both": (
        lambda: Scale(torch.tensor([0]), torch.ones(1), 4, clamp_sign=True, absolute=True),
        "clamp_sign and absolute",
    ),
    "ablate matrix": (lambda: Ablate(torch.eye(2)), r"\[2, 2\], not \[units\]"),
    "ablate number": (lambda: Ablate(torch.tensor(1.0)), r"\[\], not \[units\]"),
    "ablate empty": (lambda: Ablate(torch.ones(0)), r"\[0\], not \[units\]"),
    "ablate zero": (lambda: Ablate(torch.zeros(4)), "Ablate.* of length 1"),
    "ablate long": (lambda: Ablate(torch.tensor([1.0, 0.1])), "Ablate.* of length 1"),
    "ablate short": (lambda: Ablate(torch.tensor([0.99, 0.0])), "off by 0.02"),
    "ablate nan": (lambda: Ablate(torch.tensor([1.0, _NAN])), "NaN"),
    "ablate float64": (lambda: Ablate(torch.tensor([1.0, 0.0]).double()), "float32"),
}
for _name, _turner in (("rotate", Rotate), ("turn", Turn)):
    _says = f"{_turner.__name__}'s basis is not two directions of length 1 at a right angle"
    BAD |= {
        f"{_name} vector": (lambda t=_turner: t(torch.ones(4)), r"\[4\], not \[2, units\]"),
        f"{_name} one row": (lambda t=_turner: t(torch.eye(4)[:1]), r"\[1, 4\], not \[2, units\]"),
        f"{_name} three rows": (lambda t=_turner: t(torch.eye(4)[:3]), r"\[3, 4\]"),
        f"{_name} columns": (lambda t=_turner: t(torch.eye(4)[:, :2]), r"\[4, 2\]"),
        f"{_name} cube": (lambda t=_turner: t(torch.ones(2, 2, 2)), r"\[2, 2, 2\]"),
        f"{_name} one unit": (lambda t=_turner: t(torch.ones(2, 1)), r"\[2, 1\]"),
        f"{_name} b1 long": (lambda t=_turner: t(_plane([2.0, 0, 0], [0, 1, 0])), _says),
        f"{_name} b2 zero": (lambda t=_turner: t(_plane([1.0, 0, 0], [0, 0, 0])), _says),
        f"{_name} skewed": (lambda t=_turner: t(_plane([1.0, 0, 0], [0.6, 0.8, 0])), _says),
        f"{_name} same": (lambda t=_turner: t(_plane([1.0, 0, 0], [1, 0, 0])), _says),
        f"{_name} nan": (lambda t=_turner: t(_plane([1.0, 0, 0], [0, 1, _NAN])), "NaN"),
        f"{_name} inf": (lambda t=_turner: t(_plane([1.0, 0, 0], [0, _INF, 0])), "infinity"),
        f"{_name} half": (lambda t=_turner: t(torch.eye(2).half()), "float32"),
    }


@pytest.mark.parametrize("name", BAD)
def test_check_refuses(name: str) -> None:
    make, says = BAD[name]
    with pytest.raises(TrimtabError, match=says) as caught:
        make().check()
    assert "\n" not in str(caught.value)


@quick
@given(KINDS, SEEDS)
def test_check_accepts_what_is_right(kind: str, seed: int) -> None:
    operator = _operator(kind, seed)
    operator.check()
    tensors, other = to_tensors(operator)
    again = OPERATORS[type(operator).__name__](**tensors, **other)
    assert torch.equal(
        apply(again, _activation(seed), 2.0), apply(operator, _activation(seed), 2.0)
    )
