"""How far lengths drift when the plane of an angular steering is kept in bfloat16.

SAS and SS keep the length of an activation exactly if the two axes of their plane are of length 1
and at a right angle. Kept in float32 and made orthonormal before use, as trimtab does, they are.
Kept in bfloat16 as they come, they are not quite, and every norm that is hooked adds to it.

    python examples/basis_drift.py                              # random planes
    python examples/basis_drift.py --steer formal.safetensors   # the plane of a steering
    python examples/basis_drift.py --width 2048 --hooks 64 --share 0.1

Three ways to keep a basis are compared: rounded to bfloat16; made orthonormal in bfloat16
arithmetic, from axes of any length, as code does that runs in the model's dtype (there the lengths
themselves are rounded); and trimtab's. The activations are random, with `share` of their length in
the plane; all other arithmetic is in float64, so that nothing else drifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter, run
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table
from torch import Tensor

import trimtab as tt
from trimtab.steering.operators import Rotate, Turn, orthonormal

#: Axes of this many lengths before they are divided by them: each rounds in its own way.
PLANES = 32
ACTIVATIONS = 64


def main(
    steer: Annotated[Path | None, Parameter(help="A steering made with sas, aas or ss.")] = None,
    width: Annotated[
        int, Parameter(validator=Number(gte=2), help="Units, for random planes.")
    ] = 576,
    hooks: Annotated[
        int | None, Parameter(validator=Number(gte=1), help="Norms that are hooked.")
    ] = None,
    theta: Annotated[float, Parameter(help="Angle in degrees.")] = 90.0,
    share: Annotated[
        float,
        Parameter(
            validator=Number(gte=0, lte=1), help="Share of an activation's length in the plane."
        ),
    ] = 1.0,
    seed: Annotated[int, Parameter(help="For planes and activations.")] = 0,
) -> None:
    """Print by how much lengths drift, per hook and over all hooks of a model, in per cent.

    Example: `python examples/basis_drift.py --steer formal.safetensors --share 0.3`
    """
    generator = torch.Generator().manual_seed(seed)
    if steer is None:
        planes = [orthonormal(torch.randn(2, width, generator=generator)) for _ in range(PLANES)]
        what, count = f"{PLANES} random planes of {width} units", hooks or 60
    else:
        basis, norms = plane_of(tt.Steering.load(steer))
        planes, count = [orthonormal(basis)] * PLANES, hooks or norms
        what = f"the plane of {steer.name}, {basis.shape[1]} units"
    table = Table(
        title=f"{what}; {count} hooks, {theta:g}°, {share:.0%} of the length in the plane"
    )
    for column in ("method", "basis", "|b| - 1", "b1·b2", "a hook, %", f"{count} hooks, %"):
        table.add_column(column, justify="left" if column in ("method", "basis") else "right")
    for method in ("SAS", "SS"):
        for name, keep in KEPT.items():
            kept = [keep(plane, 2 ** (i / PLANES)) for i, plane in enumerate(planes)]
            lengths = max(float((b.norm(dim=-1) - 1).abs().max()) for b in kept)
            angle = max(abs(float(b[0] @ b[1])) for b in kept)
            one, all_hooks = drift(method, planes, kept, theta, share, count, generator)
            numbers = (f"{lengths:.1e}", f"{angle:.1e}", f"{one:.2g}", f"{all_hooks:.2g}")
            table.add_row(method, name, *numbers)
    Console().print(table)


def plane_of(steering: tt.Steering) -> tuple[Tensor, int]:
    """The basis [2, units] of a steering, and how many norms it is hooked to."""
    operators = [intervention.operator for intervention in steering.interventions]
    planes = [op.basis for op in operators if isinstance(op, Rotate | Turn)]
    if not planes:
        raise tt.TrimtabError(f"{steering.label} has no plane: name one made with sas, aas or ss")
    return planes[0], len(planes)


def in_bfloat16(plane: Tensor, length: float) -> Tensor:
    """Gram-Schmidt in bfloat16, from a first axis of `length` and a second one that is not square.

    As in code that normalises what it has in the model's dtype.
    """
    first = (length * plane[0]).bfloat16()
    second = (length * (plane[1] + 0.5 * plane[0])).bfloat16()
    first = first / first.norm()
    second = second - (second @ first) * first
    return torch.stack((first, second / second.norm())).double()


KEPT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "bfloat16, orthonormal before rounding": lambda plane, length: plane.bfloat16().double(),
    "bfloat16, made in bfloat16": in_bfloat16,
    "float32, orthonormal in use (trimtab)": lambda plane, length: (
        orthonormal(plane).float().double()
    ),
}


def drift(
    method: str,
    planes: list[Tensor],
    kept: list[Tensor],
    theta: float,
    share: float,
    hooks: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Largest change of a length in per cent, after one hook and after all of them."""
    one = all_hooks = 0.0
    for plane, basis in zip(planes, kept, strict=True):
        h = activations(plane, share, generator)
        length = h.norm(dim=-1)
        for hook in range(hooks):
            h = steered(method, h, basis, math.radians(theta))
            change = 100 * float((h.norm(dim=-1) / length - 1).abs().max())
            one = max(one, change) if hook == 0 else one
        all_hooks = max(all_hooks, change)
    return one, all_hooks


def activations(plane: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random activations [rows, units] of length 1 with a share of it in the plane."""
    units = plane.shape[1]
    inside = torch.randn(ACTIVATIONS, 2, generator=generator).double() @ plane
    outside = torch.randn(ACTIVATIONS, units, generator=generator).double()
    outside = outside - (outside @ plane.T) @ plane
    inside, outside = (torch.nn.functional.normalize(part, dim=-1) for part in (inside, outside))
    return share * inside + math.sqrt(1 - share**2) * outside


def steered(method: str, h: Tensor, basis: Tensor, angle: float) -> Tensor:
    """SAS and SS as their formulas say, which take for granted that the basis is orthonormal."""
    inside = h @ basis.T  # [rows, 2]
    cos, sin = math.cos(angle), math.sin(angle)
    if method == "SAS":
        new = (inside @ basis).norm(dim=-1, keepdim=True) * torch.tensor(
            [[cos, sin]], dtype=torch.float64
        )
    else:
        new = inside @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    turned: Tensor = h - inside @ basis + new @ basis
    return turned


if __name__ == "__main__":
    run(main)
