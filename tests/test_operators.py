"""The operators' algebra, against formulas and matrices written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab import TrimtabError
from trimtab.operators import OPERATORS, Add, Scale, apply, fold_input, fold_output, to_tensors

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DIALS = st.floats(-30, 30, width=32)
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([(), (3,), (2, 5), (4, 1)])  # what comes before the units
KINDS = st.sampled_from(["Scale", "clamped", "Add"])

# Enough to find what fails for whole ranges of input, and quick.
quick = settings(max_examples=50, deadline=None)


def _operator(kind: str, seed: int, width: int = 12) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if kind == "Add":
        return Add(torch.randn(width, generator=generator))
    units = torch.randperm(width, generator=generator)[: seed % (width + 1)]
    gain = torch.randn(len(units), generator=generator)
    return Scale(units, gain, width, clamp_sign=kind == "clamped")


def _activation(seed: int, shape: tuple[int, ...] = (2, 5), width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 3 * torch.randn(*shape, width, generator=generator)


def _matrix(operator: Any, dial: float) -> tuple[Tensor, Tensor]:
    """A and c of x -> A x + c in float64, from the formulas at the head of operators.py."""
    linear = torch.eye(operator.width, dtype=torch.float64)
    offset = torch.zeros(operator.width, dtype=torch.float64)
    if isinstance(operator, Add):
        return linear, dial * operator.vector.double()
    for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
        factor = 1 + dial * gain
        linear[unit, unit] = max(factor, 0.0) if operator.clamp_sign else factor
    return linear, offset


def _near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max() if actual.numel() else 0
    assert difference <= tolerance * (1 + expected.double().abs().max())


# -- applying ---------------------------------------------------------------------------------


@quick
@given(KINDS, SEEDS, DIALS, SHAPES)
def test_is_the_affine_map_of_its_formula(
    kind: str, seed: int, dial: float, shape: tuple[int, ...]
) -> None:
    operator, x = _operator(kind, seed), _activation(seed, shape)
    linear, offset = _matrix(operator, dial)
    _near(apply(operator, x, dial), x.double() @ linear.T + offset)


@quick
@given(KINDS, SEEDS, DIALS, st.floats(-3, 3, width=32))
def test_is_affine(kind: str, seed: int, dial: float, weight: float) -> None:
    operator = _operator(kind, seed)
    x, y = _activation(seed), _activation(seed + 1)
    mixed = apply(operator, weight * x + (1 - weight) * y, dial)
    _near(mixed, weight * apply(operator, x, dial) + (1 - weight) * apply(operator, y, dial), 1e-4)
    # Linear, not only affine, where there is no offset.
    if kind != "Add":
        _near(apply(operator, weight * x, dial), weight * apply(operator, x, dial))
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


@quick
@given(KINDS, SEEDS, DIALS)
def test_one_dial_is_the_same_dial_in_every_row(kind: str, seed: int, dial: float) -> None:
    operator, x = _operator(kind, seed), _activation(seed, (3, 4))
    per_row = torch.full((3, 1), dial)
    assert torch.equal(apply(operator, x, dial), apply(operator, x, per_row))
    assert torch.equal(apply(operator, x, dial), apply(operator, x, torch.tensor(dial)))


@quick
@given(KINDS, SEEDS, st.lists(DIALS, min_size=1, max_size=5))
def test_each_row_has_its_own_dial(kind: str, seed: int, dials: list[float]) -> None:
    operator, x = _operator(kind, seed), _activation(seed, (len(dials), 4))
    together = apply(operator, x, torch.tensor(dials)[:, None])
    for row, dial in enumerate(dials):
        assert torch.equal(together[row], apply(operator, x[row], dial))


def test_each_token_may_have_its_own_dial() -> None:
    for kind in ("Scale", "clamped", "Add"):
        operator, x = _operator(kind, 5), _activation(5, (2, 3))
        dials = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 4.0]])
        together = apply(operator, x, dials)
        for row in range(2):
            for token in range(3):
                alone = apply(operator, x[row, token], float(dials[row, token]))
                assert torch.equal(together[row, token], alone)


@quick
@given(KINDS, SEEDS, st.sampled_from(DTYPES), SHAPES)
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
    linear, offset = _matrix(operator, dial)
    exact = x.double() @ linear.T + offset
    # One rounding to the dtype, after float32: half a unit in the last place, and float32's own.
    half_step = torch.finfo(dtype).eps / 2 * exact.abs()
    wide = 1e-6 * (1 + abs(dial)) * (1 + x.double().abs()) * 4
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
@given(KINDS, SEEDS, DIALS, st.sampled_from(DTYPES))
def test_never_in_place(kind: str, seed: int, dial: float, dtype: torch.dtype) -> None:
    operator, x = _operator(kind, seed), _activation(seed).to(dtype)
    before, tensors = x.clone(), {k: v.clone() for k, v in to_tensors(operator)[0].items()}
    weight = _activation(seed + 2, (12,))
    weight_before = weight.clone()
    result = apply(operator, x, dial)
    fold_output(operator, dial, weight, None)
    fold_input(operator, dial, weight, weight[0])
    assert torch.equal(x, before)
    assert torch.equal(weight, weight_before)
    assert all(torch.equal(v, tensors[k]) for k, v in to_tensors(operator)[0].items())
    result.zero_()  # a result of its own, also where the operator did nothing
    assert torch.equal(x, before)


def test_bound_once_and_used_often() -> None:
    for kind in ("Scale", "clamped", "Add"):
        operator = _operator(kind, 9)
        bound = operator.bind(2.0, "cpu")
        for dtype in DTYPES:
            x = _activation(3).to(dtype)
            assert torch.equal(bound(x), apply(operator, x, 2.0))


# -- folding ----------------------------------------------------------------------------------


@quick
@given(KINDS, SEEDS, DIALS)
def test_adjoint_is_the_transposed_linear_part(kind: str, seed: int, dial: float) -> None:
    operator = _operator(kind, seed)
    x, y = _activation(seed).double(), _activation(seed + 1).double()
    left = (operator.linear_part(x, dial) * y).sum(-1)
    right = (x * operator.adjoint(y, dial)).sum(-1)
    scale = (x.norm(dim=-1) * y.norm(dim=-1)) * (1 + abs(dial) * 5)
    assert ((left - right).abs() <= 1e-12 * scale).all()


@quick
@given(KINDS, SEEDS, DIALS)
def test_linear_part_and_offset_make_the_operator(kind: str, seed: int, dial: float) -> None:
    operator, x = _operator(kind, seed), _activation(seed).double()
    linear, offset = _matrix(operator, dial)
    _near(operator.linear_part(x, dial), x @ linear.T, 1e-13)
    _near(operator.offset(dial).double(), offset, 1e-13)


@quick
@given(
    KINDS, SEEDS, DIALS, st.sampled_from([(), (4,)]), st.sampled_from([3, 12, 20]), st.booleans()
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
    KINDS, SEEDS, DIALS, st.sampled_from([(), (4,)]), st.sampled_from([3, 12, 20]), st.booleans()
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
    for kind in ("Scale", "clamped", "Add"):
        operator = _operator(kind, 5)
        for fold in (fold_output, fold_input):
            for tensor in (
                *fold(operator, 2.0, weight, None),
                *fold(operator, 2.0, weight, weight[0]),
            ):
                assert tensor.device.type == "meta"


# -- checks -----------------------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")


def _scale(units: Any, gain: Any, width: int = 4) -> Scale:
    return Scale(torch.as_tensor(units), torch.as_tensor(gain), width)


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
