"""Two checkpoints compared: which tensors differ, by how much, which kind of edit each difference
looks like, and how much of it known steerings explain.

What a steering explains is found by baking it into BASE: what then differs from OTHER is left over,
a number, or nothing to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.audited import EXACT, ROUNDING, Audit, Change
from trimtab.exchange.edits import edit_of, rounding
from trimtab.exchange.tensor_names import block_of, is_turned, names_of, site_of
from trimtab.exchange.weights import Source, Weights, both, config_changes, of_model, side_by_side
from trimtab.model import bake
from trimtab.steering import Steering, Steerings, together
from trimtab.terminal import progress, status


def audit(
    base: Source,
    other: Source,
    *steerings: Steering | Steerings,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Audit:
    """Compare two checkpoints of one architecture, tensor by tensor, and with `steerings` say how
    much of what differs they explain, baked into BASE in the order given.

    Each is a pack, a directory, a .gguf file, a hub id, or a model that is loaded. Without
    steerings directories are read from their files, one tensor at a time. BASE's numbers are taken
    in the type of OTHER's. `force` allows steerings that were made for another model; Python code
    that comes with a model runs only if `trust_remote_code` says so. Raises TrimtabError in one
    line where the two are no checkpoints of one architecture, or where a steering cannot be baked.
    """
    given = flattened(steerings)
    first, second = both(base, other, bool(given), trust_remote_code)
    expected = baked_into(first, given, force) if given else None
    names = names_of(first, second, *([] if expected is None else [expected]))
    changes = []
    with progress("comparing tensors", len(names)) as advance:
        for name in names:
            change = _compared(name, first, second, expected)
            changes += [] if change is None else [change]
            advance(1)
    return Audit(
        shown(first.name, 200),
        shown(second.name, 200),
        len(names),
        tuple(changes),
        config_changes(first, second),
        tuple(steering.label for steering in given),
        tuple(_notes(first, second)),
    )


def flattened(steerings: Sequence[Steering | Steerings]) -> tuple[Steering, ...]:
    """Single steerings in their order."""
    return tuple(one for each in steerings for one in together(each))


def baked_into(base: Weights, steerings: Sequence[Steering], force: bool) -> Weights:
    """The tensors of BASE with steerings baked in."""
    assert base.model is not None
    with status("baking the steerings into BASE"):
        return of_model(bake(base.model, *steerings, force=force))


# -- tensor by tensor -----------------------------------------------------------------------------


def _compared(name: str, base: Weights, other: Weights, expected: Weights | None) -> Change | None:
    if expected is None:
        (was, now), awaited = side_by_side(name, base, other), None
    else:
        was, awaited, now = side_by_side(name, base, expected, other)
    _refuse_nan(name, was, base)
    _refuse_nan(name, now, other)
    differs = not torch.equal(was, now)
    if not differs and (awaited is None or torch.equal(awaited, now)):
        return None
    norm = distance(was, now)
    size = float(was.double().norm())
    edit = None
    if differs:
        turned = is_turned(name, base) and was.dim() == 2
        pair = (was.T, now.T) if turned else (was, now)
        edit = edit_of(*pair, added=name not in base.shapes)
    change = Change(
        name,
        block_of(name),
        site_of(name, edit),
        tuple(now.shape),
        norm,
        norm / size if size else None,
        edit,
    )
    return change if awaited is None else _explained(change, now, awaited)


def _refuse_nan(name: str, tensor: Tensor, whose: Weights) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise TrimtabError(f"{shown(name)} of {shown(whose.name, 150)} holds NaN or infinity")


def distance(one: Tensor, two: Tensor) -> float:
    """The Frobenius norm of the difference."""
    return float((two.double() - one.double()).norm())


def _explained(change: Change, now: Tensor, awaited: Tensor) -> Change:
    """The same with what the steerings leave over."""
    left = distance(awaited, now)
    share = None if change.norm == 0 else 1 - (left / change.norm) ** 2
    how = agreement(change.norm, now, left)
    return replace(change, explained=share, left=left, how=how)


def agreement(norm: float, now: Tensor, left: float) -> str:
    """Whether what is left over of a change of this norm is nothing, or no more than rounding:
    where that is clearly less than the change itself."""
    if left == 0:
        return EXACT
    bound = rounding(now) * float(now.double().norm())
    return ROUNDING if left <= bound and left < norm / 4 else ""


def _notes(base: Weights, other: Weights) -> Iterator[str]:
    if base.kind != other.kind:
        yield f"BASE is a {shown(base.kind)} model, OTHER a {shown(other.kind)} model"
    for one, two, names in (
        ("OTHER", "BASE", other.shapes.keys() - base.shapes.keys()),
        ("BASE", "OTHER", base.shapes.keys() - other.shapes.keys()),
    ):
        if names:
            yield f"{one} has {len(names)} biases that {two} lacks: they are compared with zeros"
    for name, (was, now) in config_changes(base, other).items():
        yield f"config.json: {shown(name)} is {shown(was, 60)} in BASE, {shown(now, 60)} in OTHER"
