"""What the operators are of each other, and what holds of what they make of an activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from operator_formulas import (
    ALL,
    DIALS,
    SEEDS,
    activation,
    exactly,
    near,
    quick,
    random_operator,
)
from trimtab import TrimtabError
from trimtab.steering import fold_output
from trimtab.steering.operators import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Operator,
    Respond,
    Scale,
    Shift,
    apply,
    from_tensors,
    to_tensors,
)

#: A share of the way.
SHARES = st.floats(0, 1, width=32)
BOUND = st.floats(-3, 3, width=32)


def rows(seed: int, count: int, width: int = 12) -> Tensor:
    """Orthonormal rows [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    return exactly(torch.randn(count, width, generator=generator)).float()


def vector(seed: int, width: int = 12) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def along(x: Tensor, direction: Tensor) -> Tensor:
    return x.double() @ direction.double()


def same(one: Operator, other: Operator, x: Tensor, dial: float, tolerance: float = 1e-5) -> None:
    near(apply(one, x, dial), apply(other, x, dial).double(), tolerance)
    near(apply(one, x.double(), dial), apply(other, x.double(), dial), 1e-6)


# -- affine maps ------------------------------------------------------------------------------


@quick
@given(SEEDS, DIALS, st.integers(1, 4))
def test_affine_is_what_it_serves(seed: int, dial: float, rank: int) -> None:
    x, basis, added = activation(seed), rows(seed, rank), vector(seed)
    same(Affine(-basis.T, basis.T), Ablate(basis), x, dial, 1e-4)
    nothing = torch.zeros(12, 1)
    same(Affine(nothing, nothing, added), Add(added), x, dial)
    only_adds = Affine(nothing, basis[:1].T, added).added
    assert only_adds is not None
    assert torch.equal(only_adds, added)
    assert Affine(-basis.T, basis.T).added is None


@quick
@given(SEEDS, SHARES, BOUND)
def test_setting_what_lies_along_a_direction_in_three_ways(
    seed: int, share: float, value: float
) -> None:
    x, v = activation(seed), rows(seed, 1)[0]
    affine = Affine(-v[:, None], v[:, None], value * v)
    clamp = Clamp(v, value, value)
    same(affine, clamp, x, share)
    taken_out = apply(Ablate(v), x.double(), share)
    near(apply(Add(value * v), taken_out, share), apply(clamp, x.double(), share), 1e-6)
    near(along(apply(clamp, x.double(), 1.0), v), torch.full((2, 5), value).double(), 1e-6)
    same(Clamp(v, 0.0, 0.0), Ablate(v), x, share)


@quick
@given(SEEDS)
def test_an_edit_in_a_subspace_sets_its_coordinates(seed: int) -> None:
    """LoReFT: R'(Wx + b - Rx), so that R y = W x + b; W = R and b = 0 change nothing."""
    x, r = activation(seed).double(), rows(seed, 3)
    w, b = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)), vector(seed, 3)
    edited = apply(Affine(r.T, (w - r).T, b @ r), x, 1.0)
    near(edited @ r.double().T, x @ w.double().T + b.double(), 1e-5)
    others = torch.eye(12).double() - r.double().T @ r.double()
    near(edited @ others, x @ others, 1e-5)
    assert torch.equal(apply(Affine(r.T, (r - r).T, 0 * b @ r), x, 1.0), x)


@quick
@given(SEEDS, st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_a_linear_gate_twice_is_one_of_another_strength(
    seed: int, first: float, second: float
) -> None:
    """AlphaSteer: x + s <u, x> r; s then t is s + t + s t <u, r>."""
    x, u, r = activation(seed).double(), vector(seed) / 4, vector(seed + 1) / 4
    gate = Affine(r[:, None], u[:, None])
    twice = apply(gate, apply(gate, x, first), second)
    strength = first + second + first * second * float(u.double() @ r.double())
    near(twice, x + strength * along(x, u)[..., None] * r.double(), 1e-6)


@quick
@given(SEEDS, DIALS, st.integers(2, 5))
def test_only_the_span_of_the_directions_counts(seed: int, dial: float, count: int) -> None:
    x, basis = activation(seed), rows(seed, count)
    mixing = rows(seed + 1, count, count)  # an orthogonal matrix
    same(Ablate(basis), Ablate(mixing @ basis), x, dial, 1e-4)
    done = apply(Ablate(basis), x.double(), 1.0)
    assert (done @ basis.double().T).abs().max() < 1e-6
    near(apply(Ablate(basis), done, 1.0), done, 1e-6)
    assert torch.equal(apply(Ablate(basis[:1]), x, dial), apply(Ablate(basis[0]), x, dial))


def test_a_basis_that_is_nearly_orthonormal_is_made_so_and_any_other_is_refused() -> None:
    basis, x = rows(3, 4, 64), activation(3, (5,), 64)
    rough = basis.bfloat16().float()
    Ablate(rough).check()
    left = apply(Ablate(rough), x.double(), 1.0) @ exactly(rough).T
    assert left.abs().max() < 1e-9
    weight = torch.randn(64, 7).double()
    assert (exactly(rough) @ fold_output(Ablate(rough), 1.0, weight, None)[0]).abs().max() < 1e-9
    skewed = torch.stack((basis[0], basis[1], (basis[0] + basis[2]) / math.sqrt(2)))
    with pytest.raises(TrimtabError, match="not 3 directions of length 1 at right angles"):
        Ablate(skewed).check()


# -- a map for each unit ----------------------------------------------------------------------


@quick
@given(SEEDS, DIALS)
def test_a_shift_is_a_scale_and_an_added_vector(seed: int, dial: float) -> None:
    x, units = activation(seed), torch.randperm(12)[:5]
    slope, shift = vector(seed, 5), vector(seed + 1, 5)
    scale = Scale(units, slope - 1, 12)
    same(Shift(units, slope, torch.zeros(5), 12), scale, x, dial, 1e-4)
    added = torch.zeros(12).index_copy(0, units, shift)
    only_adds = Shift(units, torch.ones(5), shift, 12)  # Mean-AcT
    same(only_adds, Add(added), x, dial)
    assert only_adds.added is not None
    assert torch.equal(only_adds.added, added)
    both = Shift(units, slope, shift, 12)
    near(apply(both, x, dial), apply(scale, x, dial) + dial * added.double(), 1e-4)
    assert both.added is None


@quick
@given(SEEDS, st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_a_map_at_two_dials_is_not_one_at_their_sum(seed: int, first: float, second: float) -> None:
    """(1 - d) x + d T(x) with T(x) = w x + b: d then e is d + e + d e (w - 1)."""
    x, slope, shift = activation(seed).double(), vector(seed), vector(seed + 1)
    shifted = Shift(torch.arange(12), slope, shift, 12)
    twice = apply(shifted, apply(shifted, x, first), second)
    wide, added = slope.double() - 1, shift.double()
    expected = x + (first + second + first * second * wide) * (wide * x + added)
    near(twice, expected, 1e-5)
    near(apply(shifted, x, 1.0), slope.double() * x + added, 1e-6)


def test_outside_of_its_interval_a_unit_stays_as_it_is() -> None:
    units, ends = torch.tensor([2, 0]), (torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 2.0]))
    shifted = Shift(units, torch.tensor([2.0, 0.0]), torch.tensor([0.5, 7.0]), 3, *ends)
    x = torch.tensor([[0.5, 9.0, 0.5], [0.0, 9.0, -1.0], [2.0, 9.0, 1.0], [1.5, 9.0, 0.0]])
    expected = torch.tensor([[7.0, 9.0, 1.5], [0.0, 9.0, -1.0], [2.0, 9.0, 1.0], [7.0, 9.0, 0.5]])
    assert torch.equal(apply(shifted, x, 1.0), expected)  # at an end it is outside
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(apply(shifted, x.to(dtype), 1.0), expected.to(dtype))
    assert not shifted.linear
    assert shifted.added is None


# -- bounds -----------------------------------------------------------------------------------


@quick
@given(SEEDS, SHARES, BOUND, st.floats(0, 3, width=32))
def test_what_a_clamp_does_to_what_lies_along_its_direction(
    seed: int, share: float, low: float, more: float
) -> None:
    x, y, v = activation(seed).double(), activation(seed + 1).double(), rows(seed, 1)[0]
    clamp = Clamp(v, low, low + more)
    before, after = along(x, v), along(apply(clamp, x, share), v)
    near(after, (1 - share) * before + share * before.clamp(low, low + more), 1e-6)
    once = apply(clamp, x, 1.0)
    near(apply(clamp, once, 1.0), once, 1e-9)  # idempotent
    apart = (apply(clamp, x, share) - apply(clamp, y, share)).norm(dim=-1)
    assert (apart <= (x - y).norm(dim=-1) * (1 + 1e-9)).all()
    rest = torch.eye(12).double() - torch.outer(v, v).double() / (v.double() @ v.double())
    near(once @ rest, x @ rest, 1e-6)
    # As an added vector, whose dial each token has for itself.
    wanted = torch.full_like(before, low) - before
    lifted = x + torch.where(wanted > 0, wanted, 0.0)[..., None] * v.double()
    near(apply(Clamp(v, low), x, 1.0), lifted, 1e-6)


@quick
@given(SEEDS, SHARES)
def test_bounds_that_are_not_there(seed: int, share: float) -> None:
    x, v = activation(seed), rows(seed, 1)[0]
    for nowhere in (Clamp(v), Clamp(v, -math.inf, math.inf)):
        assert torch.equal(apply(nowhere, x, share), x)
        assert nowhere.linear
        assert not nowhere.acts
    for one, other in (
        (Clamp(v, 0.5), Clamp(v, 0.5, math.inf)),
        (Clamp(v, None, 0.5), Clamp(v, -math.inf, 0.5)),
    ):
        assert torch.equal(apply(one, x, share), apply(other, x, share))
    inside = Clamp(v, -1e3, 1e3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(apply(inside, x.to(dtype), share), x.to(dtype))
    both = apply(Clamp(v, 0.0), apply(Clamp(v, None, 0.0), x.double(), 1.0), 1.0)
    near(both, apply(Ablate(v), x.double(), 1.0), 1e-9)


@quick
@given(SEEDS, SHARES, SHARES)
def test_clamps_along_directions_at_a_right_angle_commute(
    seed: int, first: float, second: float
) -> None:
    x, (one, other) = activation(seed).double(), rows(seed, 2)
    a, b = Clamp(one, -0.5, 0.5), Clamp(other, 0.25)
    near(
        apply(b, apply(a, x, first), second),
        apply(a, apply(b, x, second), first),
        1e-6,
    )


# -- lengths ----------------------------------------------------------------------------------


@quick
@given(SEEDS, st.floats(-20, 20, width=32))
def test_an_added_vector_that_keeps_the_length(seed: int, dial: float) -> None:
    h, v = activation(seed).double(), rows(seed, 1)[0]
    kept = apply(Add(v, "always"), h, dial)
    near(kept.norm(dim=-1), h.norm(dim=-1), 1e-9)
    length = h.norm(dim=-1)
    cosine, t = along(h, v) / length, dial / length
    expected = (cosine + t) / (1 + 2 * t * cosine + t.square()).sqrt()
    near(along(kept, v) / length, expected, 1e-6)
    # On the arc between h and v: of the two and nothing else, and in between.
    both = torch.stack((h, v.double().expand_as(h)), -1)
    parts = torch.linalg.lstsq(both, kept[..., None]).solution
    near((both @ parts)[..., 0], kept, 1e-6)
    assert (parts[..., 0, 0] > 0).all()
    assert (parts[..., 1, 0] * dial >= -1e-9).all()
    # As large as wanted, both: the result is as much larger.
    near(apply(Add(v, "always"), 8 * h, 8 * dial), 8 * kept, 1e-9)


@quick
@given(SEEDS, st.floats(-20, 20, width=32))
def test_a_cap_shortens_what_grew_and_leaves_what_did_not(seed: int, dial: float) -> None:
    h, v = activation(seed).double(), rows(seed, 1)[0]
    moved = apply(Add(v), h, dial)
    capped, kept = apply(Add(v, "cap"), h, dial), apply(Add(v, "always"), h, dial)
    grew = moved.norm(dim=-1) > h.norm(dim=-1)
    assert torch.equal(capped[grew], kept[grew])
    assert torch.equal(capped[~grew], moved[~grew])


def test_where_a_kept_length_ends() -> None:
    h, v = activation(3).double(), rows(3, 1)[0]
    for sign in (1.0, -1.0):
        far = apply(Add(v, "always"), h, sign * 1e9)
        near(far, sign * h.norm(dim=-1, keepdim=True) * v.double(), 1e-6)
    nothing = torch.zeros(3, 12)
    for keeps in ("always", "cap"):
        assert not apply(Add(v, keeps), nothing, 2.0).any()
        assert not apply(Add(v, keeps), -2.0 * v[None], 2.0).any()  # nothing is left to be long
        assert Add(v, keeps).added is None
        assert not Add(v, keeps).linear


# -- what is added as much as a reader fires --------------------------------------------------


@quick
@given(SEEDS, DIALS, st.floats(-3, 3, width=32))
def test_respond_adds_where_its_reader_fires(seed: int, dial: float, bias: float) -> None:
    x, v, reader = activation(seed), vector(seed), vector(seed + 1)
    respond = Respond(v, reader, bias)
    fires = along(x, reader) + bias > 0
    steered = apply(respond, x, dial)
    assert torch.equal(steered[~fires], x[~fires])
    same(respond, Affine(v[:, None], reader[:, None], bias * v), x[fires], dial, 1e-4)
    # Twice the dial is twice the change; a reader that never fires, and one that always does.
    x = x.double()
    near(apply(respond, x, 2 * dial) - x, 2 * (apply(respond, x, dial) - x), 1e-9)
    always = Respond(v, torch.zeros_like(v), 1.0)
    same(always, Add(v), x, dial)
    assert not Respond(v, torch.zeros_like(v), -1.0).acts


# -- derivatives, files -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_derivative_by_the_dial(kind: str) -> None:
    """Against differences; bounds and intervals have none just where they begin."""
    operator, x = random_operator(kind, 7), activation(7).double()
    dials = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
    steps = torch.ones_like(dials)
    found = torch.func.jvp(lambda d: apply(operator, x, d), (dials,), (steps,))[1]
    step = 1e-3  # operators on single units have their dials in float32
    difference = apply(operator, x, dials + step) - apply(operator, x, dials - step)
    near(found, difference / (2 * step), 1e-3)


@pytest.mark.parametrize("kind", ALL)
def test_what_a_file_holds_of_it(kind: str) -> None:
    operator = random_operator(kind, 4)
    tensors, others = to_tensors(operator)
    assert all(value is not None for value in others.values())
    again = from_tensors(type(operator).__name__, {**tensors, **others})
    assert torch.equal(apply(again, activation(4), 0.5), apply(operator, activation(4), 0.5))
    assert again.details == operator.details


def test_files_say_nothing_of_what_is_as_it_was() -> None:
    assert to_tensors(Add(torch.ones(3)))[1] == {}
    assert to_tensors(Add(torch.ones(3), "cap"))[1] == {"keep_norm": "cap"}
    assert to_tensors(Clamp(torch.ones(3), -math.inf, 2))[1] == {"high": 2.0}
    assert list(to_tensors(Ablate(torch.ones(3)))[0]) == ["direction"]
    assert list(to_tensors(Affine(torch.ones(3, 1), torch.ones(3, 1)))[0]) == ["u", "v"]


_NAN, _INF = math.nan, math.inf
UNITS, ONE, UNIT = torch.arange(2), torch.ones(2), torch.tensor([1.0, 0.0])

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "keep_norm": (lambda: Add(ONE, "sometimes"), "keep_norm is 'sometimes': known are no, always"),
    "affine vectors": (lambda: Affine(ONE, ONE), r"u of shape \[2\]"),
    "affine shapes": (lambda: Affine(torch.ones(2, 1), torch.ones(2, 2)), r"v of shape \[2, 2\]"),
    "affine empty": (lambda: Affine(torch.ones(2, 0), torch.ones(2, 0)), "k 1 or more"),
    "affine c": (
        lambda: Affine(torch.ones(2, 1), torch.ones(2, 1), torch.ones(3)),
        r"c of .*\[3\]",
    ),
    "affine nan": (lambda: Affine(torch.ones(2, 1), torch.full((2, 1), _NAN)), "NaN"),
    "affine inf": (lambda: Affine(torch.ones(2, 1), torch.ones(2, 1), ONE * _INF), "infinity"),
    "affine double": (lambda: Affine(torch.ones(2, 1).double(), torch.ones(2, 1)), "float32"),
    "shift lengths": (lambda: Shift(UNITS, ONE[:1], ONE, 4), r"\[2\] units and \[1\] slopes"),
    "shift shifts": (lambda: Shift(UNITS, ONE, ONE[:1], 4), r"\[1\] shifts"),
    "shift nan": (lambda: Shift(UNITS, ONE, ONE * _NAN, 4), "NaN"),
    "shift unit": (lambda: Shift(UNITS + 3, ONE, ONE, 4), "outside 0 to 3"),
    "shift twice": (lambda: Shift(UNITS * 0, ONE, ONE, 4), "twice"),
    "shift one end": (lambda: Shift(UNITS, ONE, ONE, 4, ONE), "needs low and high"),
    "shift no end": (lambda: Shift(UNITS, ONE, ONE, 4, ONE, ONE * _INF), "infinity"),
    "shift turned": (lambda: Shift(UNITS, ONE, ONE, 4, ONE, -ONE), "lower end is above"),
    "shift ends": (lambda: Shift(UNITS, ONE, ONE, 4, ONE, ONE[:1]), r"\[1\] upper ends"),
    "clamp matrix": (lambda: Clamp(torch.eye(2), 0.0), r"\[2, 2\], not \[units\]"),
    "clamp long": (lambda: Clamp(2 * UNIT, 0.0), "of length 1"),
    "clamp nan": (lambda: Clamp(UNIT * _NAN, 0.0), "NaN"),
    "clamp turned": (lambda: Clamp(UNIT, 1.0, -1.0), "low = 1 above high = -1"),
    "clamp beyond": (lambda: Clamp(UNIT, _INF), "low = inf, which is no bound"),
    "clamp no number": (lambda: Clamp(UNIT, 0.0, _NAN), "high = nan, which is no bound"),
    "clamp far": (lambda: Clamp(UNIT, 1e39), "no bound"),
    "respond shapes": (lambda: Respond(ONE, torch.ones(3), 0.0), r"\[2\] and a reader of .*\[3\]"),
    "respond matrix": (lambda: Respond(torch.eye(2), torch.eye(2), 0.0), r"must be \[units\]"),
    "respond nan": (lambda: Respond(ONE, ONE * _NAN, 0.0), "NaN"),
    "respond bias": (lambda: Respond(ONE, ONE, _INF), "bias = inf, which is no finite number"),
}


@pytest.mark.parametrize("name", BAD)
def test_check_refuses(name: str) -> None:
    make, says = BAD[name]
    with pytest.raises(TrimtabError, match=says) as caught:
        make().check()
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_something_else_is_refused() -> None:
    for fields in ({"keep_norm": "sometimes"}, {"keep_norm": None}, {"keep_norm": ["cap"]}):
        with pytest.raises(TrimtabError, match="keep_norm of Add has the wrong type"):
            from_tensors("Add", {"vector": ONE, **fields})
    for low in (1, True, "0", [0.0]):
        with pytest.raises(TrimtabError, match="low of Clamp has the wrong type"):
            from_tensors("Clamp", {"direction": UNIT, "low": low})
