"""The operators' algebra, against formulas and matrices written out by hand: applying, dials,
dtypes, folding, checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from operator_formulas import (
    ALL,
    DEGREES,
    DIALS,
    DTYPES,
    LINEAR,
    PLANES,
    SEEDS,
    SHAPES,
    activation,
    formula,
    matrix_of,
    near,
    quick,
    random_operator,
)
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
    to_tensors,
)

#: Each unit on its own: the same numbers, bit for bit, however the rows are cut.
ALONE = ("Scale", "clamped", "Absolute", "Add", "Shift", "Interval", "Unbound")
#: Linear ones that add something, too.
OFFSETS = ("Add", "Constant", "Shift", "SetTo")
KINDS = st.sampled_from(ALL)
LINEARS = st.sampled_from(LINEAR)


# -- applying ---------------------------------------------------------------------------------


@quick
@given(KINDS, SEEDS, DIALS, SHAPES)
def test_is_what_its_formula_says(
    kind: str, seed: int, dial: float, shape: tuple[int, ...]
) -> None:
    operator, x = random_operator(kind, seed), activation(seed, shape)
    near(apply(operator, x, dial), formula(operator, x, dial))


@quick
@given(PLANES, SEEDS, DEGREES, SHAPES)
def test_angles_are_degrees_of_any_size(
    kind: str, seed: int, angle: float, shape: tuple[int, ...]
) -> None:
    operator, x = random_operator(kind, seed), activation(seed, shape)
    near(apply(operator, x, angle), formula(operator, x, angle), 3e-6)
    near(apply(operator, x.double(), angle), formula(operator, x, angle), 1e-12)
    near(apply(operator, x.double(), angle + 360), formula(operator, x, angle), 1e-12)


def test_which_operators_are_linear_and_where_they_do_nothing() -> None:
    assert [kind for kind in ALL if random_operator(kind, 5).linear] == list(LINEAR)
    assert [kind for kind in ALL if random_operator(kind, 5).identity is None] == [
        "Turn",
        "Adaptive",
        "features clamp",
    ]
    plane = torch.zeros(2, 12)
    plane[0, 3] = plane[1, 7] = 1.0
    for operator in (Rotate(plane), Turn(plane)):
        assert (operator.width, operator.size) == (12, 2)
    assert (Ablate(plane[0]).width, Ablate(plane[0]).size) == (12, 1)


@quick
@given(LINEARS, SEEDS, DIALS, st.floats(-3, 3, width=32))
def test_is_affine(kind: str, seed: int, dial: float, weight: float) -> None:
    operator = random_operator(kind, seed)
    x, y = activation(seed), activation(seed + 1)
    mixed = apply(operator, weight * x + (1 - weight) * y, dial)
    near(mixed, weight * apply(operator, x, dial) + (1 - weight) * apply(operator, y, dial), 1e-4)
    # Linear, not only affine, where there is no offset.
    if kind not in OFFSETS:
        near(apply(operator, weight * x, dial), weight * apply(operator, x, dial), 1e-4)
        assert not apply(operator, torch.zeros(12), dial).any()


@quick
@given(SEEDS, DIALS, DIALS)
def test_scale_twice_multiplies_factors(seed: int, first: float, second: float) -> None:
    for kind in ("Scale", "clamped"):
        operator, x = random_operator(kind, seed), activation(seed)
        twice = apply(operator, apply(operator, x, first), second)
        factors = torch.ones(12, dtype=torch.float64)
        for dial in (first, second):
            factors *= matrix_of(operator, dial)[0].diagonal()
        near(twice, x.double() * factors)


@quick
@given(SEEDS, DIALS, DIALS)
def test_add_twice_adds_dials(seed: int, first: float, second: float) -> None:
    operator, x = random_operator("Add", seed), activation(seed)
    twice = apply(operator, apply(operator, x, first), second)
    near(twice, apply(operator, x, first + second))
    near(apply(operator, apply(operator, x, first), -first), x)


@quick
@given(SEEDS, DIALS)
def test_clamped_scale_keeps_signs(seed: int, dial: float) -> None:
    operator, x = random_operator("clamped", seed), activation(seed)
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
        near(actual, expected, 3e-6 if actual.dtype == torch.float32 else 1e-12)


@quick
@given(KINDS, SEEDS, DIALS)
def test_one_dial_is_the_same_dial_in_every_row(kind: str, seed: int, dial: float) -> None:
    operator, x = random_operator(kind, seed), activation(seed, (3, 4))
    one = apply(operator, x, dial)
    for same in (torch.full((3, 1), dial), torch.tensor(dial), torch.full((3, 1), dial).double()):
        _same(kind, apply(operator, x, same), one)
        near(apply(operator, x.double(), same), one, 3e-6)


@quick
@given(KINDS, SEEDS, st.lists(DIALS, min_size=1, max_size=5))
def test_each_row_has_its_own_dial(kind: str, seed: int, dials: list[float]) -> None:
    operator, x = random_operator(kind, seed), activation(seed, (len(dials), 4))
    together = apply(operator, x, torch.tensor(dials)[:, None])
    one_token = apply(operator, x[:, -1:], torch.tensor(dials)[:, None])  # as in decoding
    assert one_token.shape == (len(dials), 1, 12)
    for row, dial in enumerate(dials):
        _same(kind, together[row], apply(operator, x[row], dial))
        _same(kind, one_token[row], apply(operator, x[row, -1:], dial))
        _same(kind, one_token[row], together[row, -1:])


def test_each_token_may_have_its_own_dial() -> None:
    for kind in ALL:
        operator, x = random_operator(kind, 5), activation(5, (2, 3))
        dials = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 4.0]])
        together = apply(operator, x, dials)
        for row in range(2):
            for token in range(3):
                alone = apply(operator, x[row, token], float(dials[row, token]))
                _same(kind, together[row, token], alone)


@quick
@given(
    KINDS.filter(lambda kind: kind not in ("Turn", "Adaptive", "features clamp")),
    SEEDS,
    st.sampled_from(DTYPES),
    SHAPES,
)
def test_nothing_happens_at_dial_zero(
    kind: str, seed: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    operator, x = random_operator(kind, seed), activation(seed, shape).to(dtype)
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
    operator, x = random_operator(kind, seed), activation(seed).to(dtype)
    result = apply(operator, x, torch.full((2, 1), dial) if per_row else dial)
    assert result.dtype is dtype
    exact = formula(operator, x, dial)
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
    operator, x = random_operator(kind, seed), activation(seed).to(dtype)
    dials: Any = torch.tensor([[dial], [dial / 2]]) if per_row else dial
    result = apply(operator, x, dials)
    assert torch.equal(result, apply(operator, x.float(), dials).to(dtype))


@pytest.mark.parametrize("kind", ["Ablate", "Rotate", "Turn"])
def test_rounding_on_the_way_would_be_seen(kind: str) -> None:
    """The test above could pass if float32 itself were rounded; this one knows the numbers."""
    operator, dial = random_operator(kind, 3, 256), 1.0 if kind == "Ablate" else 50.0
    x = activation(3, (4,), 256).bfloat16()
    exact = formula(operator, x, dial)
    right = (apply(operator, x, dial).double() - exact).abs().max()
    # The same formula with a basis in bfloat16, as if the operator were kept in the model's dtype.
    name = "direction" if kind == "Ablate" else "basis"
    rough = replace(operator, **{name: getattr(operator, name).bfloat16().float()})
    assert right <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()
    assert (formula(rough, x, dial) - exact).abs().max() > 1e-4
    near(apply(operator, x.float(), dial), exact, 1e-6)


@quick
@given(KINDS, SEEDS, DIALS, st.sampled_from(DTYPES))
def test_never_in_place(kind: str, seed: int, dial: float, dtype: torch.dtype) -> None:
    operator, x = random_operator(kind, seed), activation(seed).to(dtype)
    before, tensors = x.clone(), {k: v.clone() for k, v in to_tensors(operator)[0].items()}
    weight = activation(seed + 2, (12,))
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
        operator = random_operator(kind, 9)
        for dial in (2.0, torch.tensor([[2.0], [-1.0]])):
            bound = operator.bind(dial, "cpu")
            for dtype in DTYPES:
                x = activation(3).to(dtype)
                assert torch.equal(bound(x), apply(operator, x, dial))
                assert torch.equal(bound(x[:, -1:]), apply(operator, x[:, -1:], dial))


@pytest.mark.parametrize("kind", ALL)
def test_it_works_where_the_activations_are(kind: str) -> None:
    """The meta device stands for a card: a tensor left on the CPU cannot be mixed with it."""
    operator = random_operator(kind, 9)
    for dtype in DTYPES:
        x = torch.empty(2, 3, 12, device="meta", dtype=dtype)
        for dial in (2.0, torch.tensor([[2.0], [0.0]])):
            changed = apply(operator, x, dial)
            assert (changed.device.type, changed.dtype, changed.shape) == ("meta", dtype, x.shape)


@pytest.mark.parametrize("kind", ALL)
def test_a_strided_activation_is_one_too(kind: str) -> None:
    operator, x = random_operator(kind, 4), activation(4, (5, 3))
    turned = x.transpose(0, 1)
    near(apply(operator, turned, 2.0), formula(operator, x, 2.0).transpose(0, 1))
    assert apply(operator, x[:0], 2.0).shape == (0, 3, 12)


# -- folding ----------------------------------------------------------------------------------


@quick
@given(LINEARS, SEEDS, DIALS)
def test_adjoint_is_the_transposed_linear_part(kind: str, seed: int, dial: float) -> None:
    operator = random_operator(kind, seed)
    x, y = activation(seed).double(), activation(seed + 1).double()
    left = (operator.linear_part(x, dial) * y).sum(-1)
    right = (x * operator.adjoint(y, dial)).sum(-1)
    scale = (x.norm(dim=-1) * y.norm(dim=-1)) * (1 + abs(dial) * 5)
    assert ((left - right).abs() <= 1e-12 * scale).all()


@quick
@given(LINEARS, SEEDS, DIALS)
def test_linear_part_and_offset_make_the_operator(kind: str, seed: int, dial: float) -> None:
    operator, x = random_operator(kind, seed), activation(seed).double()
    linear, offset = matrix_of(operator, dial)
    near(operator.linear_part(x, dial), x @ linear.T, 1e-13)
    near(operator.offset(dial).double(), offset, 1e-13)


@quick
@given(
    LINEARS, SEEDS, DIALS, st.sampled_from([(), (4,)]), st.sampled_from([3, 12, 20]), st.booleans()
)
def test_fold_output(
    kind: str, seed: int, dial: float, experts: tuple[int, ...], inputs: int, biased: bool
) -> None:
    operator = random_operator(kind, seed)
    weight = activation(seed, (*experts, 12), inputs)  # [(experts,) out, in]
    bias = activation(seed + 1, ())[:12] if biased else None
    folded, folded_bias = fold_output(operator, dial, weight, bias)
    assert folded.dtype is torch.float64
    linear, offset = matrix_of(operator, dial)
    near(folded, torch.einsum("ij,...jk->...ik", linear, weight.double()), 1e-13)
    # And, beside the matrices, as what it is for: the output of the map, then the operator.
    x = activation(seed + 2, (5,), inputs).double()
    old = torch.einsum("...ij,tj->...ti", weight.double(), x)
    if bias is not None:
        old = old + bias.double()
    near(torch.einsum("...ij,tj->...ti", folded, x) + folded_bias, old @ linear.T + offset, 1e-12)


@quick
@given(
    LINEARS, SEEDS, DIALS, st.sampled_from([(), (4,)]), st.sampled_from([3, 12, 20]), st.booleans()
)
def test_fold_input(
    kind: str, seed: int, dial: float, experts: tuple[int, ...], outputs: int, biased: bool
) -> None:
    operator = random_operator(kind, seed)
    weight = activation(seed, (*experts, outputs))  # [(experts,) out, in]
    bias = activation(seed + 1, experts, outputs) if biased else None
    folded, folded_bias = fold_input(operator, dial, weight, bias)
    assert folded.dtype is torch.float64
    linear, offset = matrix_of(operator, dial)
    near(folded, torch.einsum("...ij,jk->...ik", weight.double(), linear), 1e-13)
    x = activation(seed + 2, (5,)).double()
    steered = x @ linear.T + offset
    old_bias = 0 if bias is None else bias.double().unsqueeze(-2)
    near(
        torch.einsum("...ij,tj->...ti", folded, x) + folded_bias.unsqueeze(-2),
        torch.einsum("...ij,tj->...ti", weight.double(), steered) + old_bias,
        1e-12,
    )


def test_folding_happens_where_the_weights_are() -> None:
    # The meta device stands for a card: a tensor left on the CPU cannot be mixed with it.
    weight = torch.empty(12, 12, device="meta")
    for kind in LINEAR:
        operator = random_operator(kind, 5)
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
    "ablate cube": (lambda: Ablate(torch.ones(1, 2, 2)), r"\[1, 2, 2\], not \[units\]"),
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
    operator = random_operator(kind, seed)
    operator.check()
    tensors, other = to_tensors(operator)
    again = OPERATORS[type(operator).__name__](**tensors, **other)
    assert torch.equal(apply(again, activation(seed), 2.0), apply(operator, activation(seed), 2.0))
