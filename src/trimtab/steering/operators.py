"""The algebra: what a steering does to an activation, and how that folds into weights.

An operator acts on the units (the last dimension) of an activation x with one number, the dial d.
One that is affine in x at a fixed dial, x -> A x + c, is `linear`: it folds exactly into a linear
map that writes the activation (A W, A b + c) or into one that reads it (W A, b + W c).

    Scale   x_i <- (1 + d g_i) x_i     on chosen units, gain g     (AUSteer, SADI; a diagonal A)
    Add     x   <- x + d v                                         (CAA, ActAdd, ITI, STA; c = d v)
    Ablate  x   <- x - d r r'x         for a unit direction r      (directional ablation)
    Rotate  x   <- x - Px + U R_d U'x  in a plane U = [b1 b2]      (Selective Steering)
    Turn    x   <- x - Px + |Px| U (cos d, sin d)'                 (SAS and AAS; not linear)

where P = U U' and R_d turns by d degrees from b1 toward b2. No d x d matrix is ever formed.

A dial is a number, or a tensor that broadcasts against x without its last dimension: [rows, 1] for
one dial per row of x [rows, tokens, units]. Arithmetic runs in float32 or better and is cast back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.plugins import Extended

Dial = float | Tensor

#: How far from 1 and 0 the lengths and the product of a stored basis may be; `bind` and the folds
#: make it orthonormal anew. Published planes, kept in bfloat16, are off by up to 0.006.
_BASIS_TOLERANCE = 1e-2
#: Units that a site may have: a file must not say more, because whole rows of them are made.
WIDEST = 10**8


#: Marks a field that the first files lack: without it they mean its default.
CAME_LATER = {"came_later": True}


class Operator(Protocol):
    """What an operator can do, and all that anybody asks of it. Its fields are tensors, numbers,
    true or false, and text: what a steering file can hold.
    """

    @property
    def linear(self) -> bool: ...
    @property
    def identity(self) -> float | None:
        """The dial at which it does nothing, None if there is none."""

    @property
    def width(self) -> int:
        """The number of units of the site that it fits."""

    @property
    def size(self) -> int:
        """How many units it may change."""

    @property
    def acts(self) -> bool:
        """Whether it changes an activation at any dial."""

    @property
    def added(self) -> Tensor | None:
        """What it adds per unit of the dial, [units], where it does nothing else."""

    @property
    def plane(self) -> Tensor | None:
        """The plane that it turns in, [2, units]."""

    @property
    def farthest(self) -> float:
        """The dial, on either side, beyond which it does again what it does before."""

    @property
    def description(self) -> str:
        """What messages call it."""

    def bind(self, dial: Dial, device: torch.device | str) -> Callable[[Tensor], Tensor]:
        """The operator at one dial (or one per row), with all that can be computed beforehand."""

    def check(self) -> None:
        """Refuse tensors that do not go together."""


class LinearOperator(Operator, Protocol):
    """An operator that folds into weights: x -> A x + c."""

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        """A x for activations x [..., units]."""

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        """A' x, which is what a matrix that reads the site takes: W A = (A' W')'."""

    def offset(self, dial: float) -> Tensor:
        """c, [units]."""


class OperatorDefaults:
    """What is so of most operators."""

    def __repr__(self: Operator) -> str:
        return f"<{type(self).__name__} on {self.size} of {self.width} units>"

    @property
    def acts(self) -> bool:
        return True

    @property
    def added(self) -> Tensor | None:
        return None

    @property
    def plane(self) -> Tensor | None:
        return None

    @property
    def farthest(self) -> float:
        return math.inf

    @property
    def description(self) -> str:
        return type(self).__name__


class LinearDefaults(OperatorDefaults):
    """What is so of most linear operators: A is symmetric, and nothing is added."""

    def adjoint(self: LinearOperator, x: Tensor, dial: float) -> Tensor:
        return self.linear_part(x, dial)

    def offset(self: LinearOperator, dial: float) -> Tensor:
        return torch.zeros(self.width)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(LinearDefaults):
    """x_i <- (1 + dial * gain_i) x_i on the chosen units; the others stay as they are.

    units [k] int64, gain [k] float32. With `clamp_sign` a factor below 0 becomes 0, so that no
    activation changes its sign. With `absolute` it is x_i + dial * gain_i |x_i|, which is not
    linear.
    """

    units: Tensor
    gain: Tensor
    width: int
    clamp_sign: bool = False
    absolute: bool = field(default=False, metadata=CAME_LATER)

    identity = 0.0

    @property
    def linear(self) -> bool:
        return not self.absolute

    @property
    def size(self) -> int:
        return len(self.units)

    @property
    def acts(self) -> bool:
        return bool(self.gain.any())

    @property
    def description(self) -> str:
        return "a Scale that adds a multiple of |x|" if self.absolute else "Scale"

    def factors(self, dial: Dial, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each unit is multiplied by: [width], or [..., width] for a dial of shape [...]."""
        dials = torch.as_tensor(dial, dtype=dtype)
        chosen = 1 + dials.unsqueeze(-1) * self.gain.to(dials)
        if self.clamp_sign:
            chosen = chosen.clamp(min=0)
        factors = torch.ones(*dials.shape, self.width, dtype=dtype, device=dials.device)
        return factors.index_copy(-1, self.units.to(dials.device), chosen)

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        factors = self.factors(dial).to(device)
        if self.absolute:
            gammas = factors - 1
            return lambda x: (x + x.abs() * gammas).to(x.dtype)
        return lambda x: _like(x * factors, x)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x * self.factors(dial, x.dtype).to(x.device)

    def check(self) -> None:
        if self.units.shape != self.gain.shape or self.units.dim() != 1:
            raise TrimtabError(
                f"Scale has {list(self.units.shape)} units and {list(self.gain.shape)} gains: "
                "the two must be of one length"
            )
        if self.units.dtype != torch.int64:
            raise TrimtabError(f"Scale has units of type {self.units.dtype}, not torch.int64")
        if not 1 <= self.width <= WIDEST:
            raise TrimtabError(f"Scale has a width of {self.width:g} units, not 1 to {WIDEST:g}")
        if self.clamp_sign and self.absolute:
            raise TrimtabError("Scale cannot have both clamp_sign and absolute")
        _check_numbers("Scale", self.gain)
        out_of_range = len(self.units) > 0 and not (
            int(self.units.min()) >= 0 and int(self.units.max()) < self.width
        )
        if out_of_range or len(self.units.unique()) < len(self.units):
            raise TrimtabError(f"Scale names a unit twice, or one outside 0 to {self.width - 1}")


@dataclass(frozen=True, eq=False, repr=False)
class Add(LinearDefaults):
    """x <- x + dial * vector; vector [units] float32."""

    vector: Tensor

    linear = True
    identity = 0.0

    @property
    def width(self) -> int:
        return len(self.vector)

    @property
    def size(self) -> int:
        return int(self.vector.count_nonzero())

    @property
    def acts(self) -> bool:
        return bool(self.vector.any())

    @property
    def added(self) -> Tensor:
        return self.vector

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        dials = torch.as_tensor(dial, dtype=torch.float32, device=device)
        shift = dials.unsqueeze(-1) * self.vector.to(device)
        return lambda x: _like(x + shift, x)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x

    def offset(self, dial: float) -> Tensor:
        return dial * self.vector.double()

    def check(self) -> None:
        if self.vector.dim() != 1 or not len(self.vector):
            raise TrimtabError(f"Add has a vector of shape {list(self.vector.shape)}, not [units]")
        _check_numbers("Add", self.vector)


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(LinearDefaults):
    """x <- x - dial * r r'x; direction r [units] float32 of length 1.

    At dial 1 nothing is left along r; at -1 what was there is doubled.
    """

    direction: Tensor

    linear = True
    identity = 0.0

    @property
    def width(self) -> int:
        return len(self.direction)

    @property
    def size(self) -> int:
        return int(self.direction.count_nonzero())

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        direction = orthonormal(self.direction[None])  # [1, units]
        if not isinstance(dial, Tensor):
            return _low_rank(direction.T, -dial * direction, device)
        rows, dials = _wides(direction, device), _wides(dial.unsqueeze(-1), device)

        def ablate(x: Tensor) -> Tensor:
            wide = _wide(x)
            r = rows[wide.dtype]
            changed: Tensor = wide - dials[wide.dtype] * (wide @ r.T) * r
            return changed.to(x.dtype)

        return ablate

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        r = orthonormal(self.direction[None]).to(x)
        return x - dial * (x @ r.T) * r

    def check(self) -> None:
        if self.direction.dim() != 1 or not len(self.direction):
            shape = list(self.direction.shape)
            raise TrimtabError(f"Ablate has a direction of shape {shape}, not [units]")
        _check_numbers("Ablate", self.direction)
        _check_orthonormal("Ablate", self.direction[None])


@dataclass(frozen=True, eq=False, repr=False)
class _InPlane(OperatorDefaults):
    """What turns in a plane; basis [2, units] float32, orthonormal."""

    basis: Tensor

    @property
    def width(self) -> int:
        return int(self.basis.shape[-1])

    @property
    def size(self) -> int:
        return int(self.basis.any(0).sum())

    @property
    def plane(self) -> Tensor:
        return self.basis

    def check(self) -> None:
        _check_plane(type(self).__name__, self.basis)


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(_InPlane, LinearDefaults):
    """Turns the part of x in a plane by `dial` degrees from b1 toward b2; the rest stays.

    basis [2, units] float32, orthonormal. Linear and orthogonal: lengths are kept.
    """

    linear = True
    identity = 0.0
    farthest = 180.0  # after half a turn it comes back

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        basis = orthonormal(self.basis)
        if not isinstance(dial, Tensor):
            return _low_rank(basis.T, _turned(dial) @ basis, device)
        angles = torch.deg2rad(dial.double()).unsqueeze(-1)  # [rows, 1, 1]
        planes = _wides(basis, device)
        lesses, sines = _wides(angles.cos() - 1, device), _wides(angles.sin(), device)

        def rotate(x: Tensor) -> Tensor:
            wide = _wide(x)
            plane, less, sine = (these[wide.dtype] for these in (planes, lesses, sines))
            first, second = (wide @ plane.T).split(1, dim=-1)
            change = torch.cat((less * first - sine * second, sine * first + less * second), dim=-1)
            return (wide + change @ plane).to(x.dtype)

        return rotate

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        basis = orthonormal(self.basis).to(x)
        return x + (x @ basis.T) @ (_turned(dial).to(x) @ basis)

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        return self.linear_part(x, -dial)


@dataclass(frozen=True, eq=False, repr=False)
class Turn(_InPlane):
    """Lays the part of x in a plane at `dial` degrees from b1 toward b2, keeping its length.

    basis [2, units] float32, orthonormal. With `adaptive` only where <x, b1> > 0. Unlike Rotate it
    is not linear, and at 0 degrees it is not the identity: all that is in the plane comes to lie
    on +b1.
    """

    adaptive: bool = False

    linear = False
    identity = None
    description = "Turn, which lays activations at an absolute angle,"

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        planes = _wides(orthonormal(self.basis), device)
        angle = torch.deg2rad(torch.as_tensor(dial, dtype=torch.float64))
        # [2], or [rows, 1, 2] for one dial per row.
        targets = _wides(torch.stack((angle.cos(), angle.sin()), dim=-1), device)

        def turn(x: Tensor) -> Tensor:
            wide = _wide(x)
            plane, target = planes[wide.dtype], targets[wide.dtype]
            inside = wide @ plane.T  # [..., 2]
            change: Tensor = inside.norm(dim=-1, keepdim=True) * target - inside
            if self.adaptive:
                change = change * (inside[..., :1] > 0)
            return (wide + change @ plane).to(x.dtype)

        return turn


def _is_operator(added: Any, name: str) -> bool:
    return is_dataclass(added) and getattr(added, "__name__", "") == name and hasattr(added, "bind")


#: Operators by the names that steering files have.
OPERATORS: Mapping[str, type[Any]] = Extended(
    "operator",
    {kind.__name__: kind for kind in (Scale, Add, Ablate, Rotate, Turn)},
    _is_operator,
)


def apply(operator: Operator, x: Tensor, dial: Dial) -> Tensor:
    """The operator on x [..., units] at a dial."""
    return operator.bind(dial, x.device)(x)


def orthonormal(basis: Tensor) -> Tensor:
    """Rows [1 or 2, units] made orthonormal by Gram-Schmidt from the first one, in float64."""
    rows = basis.double()
    first: Tensor = rows[0] / rows[0].norm()
    if len(rows) == 1:
        return first[None]
    # Twice, because once leaves what rounding left.
    second = rows[1] - (rows[1] @ first) * first
    second = second - (second @ first) * first
    return torch.stack((first, second / second.norm()))


def fold_output(
    operator: LinearOperator,
    dial: float,
    weight: Tensor,
    bias: Tensor | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights [..., out, in] whose output is the operator of the old output: A W, A b + c; with c
    for what is `factor` times that output."""
    columns = weight.double().transpose(-1, -2)  # each column of W is an activation [out]
    new = operator.linear_part(columns, dial).transpose(-1, -2)
    offset = operator.offset(dial).to(new) / factor
    return new, offset if bias is None else operator.linear_part(bias.double(), dial) + offset


def fold_input(
    operator: LinearOperator,
    dial: float,
    weight: Tensor,
    bias: Tensor | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights [..., out, in] that read the operator of their old input: W A, b + W c; with c for
    what is the input divided by `factor`."""
    wide = weight.double()
    shift = wide @ (operator.offset(dial).to(wide) / factor)
    return operator.adjoint(wide, dial), shift if bias is None else bias.double() + shift


def to_tensors(operator: Operator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An operator's tensors and its other fields, by name."""
    values = {item.name: getattr(operator, item.name) for item in fields(operator)}  # type: ignore[arg-type]
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def from_tensors(name: str, given: dict[str, Any]) -> Operator:
    """An operator from its name and what `to_tensors` gives, after every check."""
    kind = OPERATORS.get(name)
    if kind is None:
        raise TrimtabError(
            f"unknown operator '{shown(name)}': install the package that adds it, if there is one"
        )
    types = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    needed = {item.name for item in fields(kind) if not item.metadata.get("came_later")}
    if not needed <= set(given) <= set(known):
        raise TrimtabError(
            f"{name} needs {', '.join(known)}; the file has {shown(', '.join(given)) or 'nothing'}"
        )
    for key, value in given.items():
        if type(value) is not types[key]:
            raise TrimtabError(f"{key} of {name} has the wrong type")
    operator: Operator = kind(**given)
    operator.check()
    return operator


def _turned(degrees: float) -> Tensor:
    """R - 1 as it acts on rows [.., 2]: coordinates c become c + c @ this, in float64."""
    angle = math.radians(degrees)
    less, sine = math.cos(angle) - 1, math.sin(angle)
    return torch.tensor([[less, sine], [-sine, less]], dtype=torch.float64)


def _low_rank(down: Tensor, up: Tensor, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """x -> x + (x down) up for down [units, rank] and up [rank, units]."""
    downs, ups = _wides(down, device), _wides(up, device)

    def change(x: Tensor) -> Tensor:
        wide = _wide(x)
        down, up = downs[wide.dtype], ups[wide.dtype]
        if x.dim() == 3 and x.shape[1] == 1:  # a token of each row: fewer calls are faster
            return _like(wide + (wide @ down) @ up, x)
        flat = wide.reshape(-1, x.shape[-1])
        return _like(torch.addmm(flat, flat @ down, up).view(x.shape), x)

    return change


def _wides(numbers: Tensor, device: torch.device | str) -> dict[torch.dtype, Tensor]:
    """The numbers on a device in both types in which activations are computed."""
    wides = {torch.float32: numbers.to(device=device, dtype=torch.float32)}
    if torch.device(device).type != "mps":  # which has no float64
        wides[torch.float64] = numbers.to(device=device, dtype=torch.float64)
    return wides


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x in another's dtype; asked first, because `to` takes as long as a small addition."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _check_numbers(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TrimtabError(f"{name} has numbers of type {tensor.dtype}, not torch.float32")
    if not torch.isfinite(tensor).all():
        raise TrimtabError(f"{name} holds NaN or infinity")


def _check_plane(name: str, basis: Tensor) -> None:
    if basis.dim() != 2 or basis.shape[0] != 2 or basis.shape[1] < 2:
        raise TrimtabError(f"{name} has a basis of shape {list(basis.shape)}, not [2, units]")
    _check_numbers(name, basis)
    _check_orthonormal(name, basis)


def _check_orthonormal(name: str, basis: Tensor) -> None:
    wide = basis.double()
    error = (wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max()
    if not error <= _BASIS_TOLERANCE:
        what = "two directions of length 1 at a right angle" if len(wide) == 2 else "of length 1"
        raise TrimtabError(f"{name}'s basis is not {what}: it is off by {float(error):.2g}")
