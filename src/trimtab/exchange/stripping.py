"""A known steering taken out of a checkpoint.

Where what it changed is what it alone makes of BASE (with other known steerings beside it), BASE's
own tensors are put back, to the bit. Where something else changed them too, the steering's inverse
is baked in, if it has one, and the result is exact to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.audited import ROUNDING
from trimtab.exchange.auditing import agreement, baked_into, distance, flattened
from trimtab.exchange.inverse import inverse
from trimtab.exchange.tensor_names import names_of
from trimtab.exchange.weights import Source, Weights, both, config_changes, of_model, side_by_side
from trimtab.model import LanguageModel, bake, plain_copy
from trimtab.steering import Steering, Steerings
from trimtab.terminal import status


@dataclass(frozen=True)
class Stripped:
    """A model without a steering: `how` says "restored" or "inverse", `exact` whether the tensors
    are BASE's to the bit, `tensors` which ones were changed."""

    model: LanguageModel
    how: str
    exact: bool
    tensors: tuple[str, ...]

    @property
    def summary(self) -> str:
        """What was done, in a sentence."""
        count = len(self.tensors)
        what = f"{count} tensor{'' if count == 1 else 's'}"
        if self.how == "restored":
            how = "to the bit" if self.exact else "which were it but for rounding"
            return f"{what} put back from BASE, {how}"
        return (
            f"its inverse was baked into {what}, which undoes it to rounding where nothing was "
            "baked in after it"
        )


def strip(
    base: Source,
    other: Source,
    steering: Steering,
    *,
    among: Sequence[Steering | Steerings] = (),
    force: bool = False,
) -> Stripped:
    """OTHER without a steering that was baked into it, at the dial where it stands.

    `base` is the model that it was baked into; `among` are all steerings that are known to be in
    OTHER, in the order in which they were baked, this one with them (else it came last): the others
    stay. Raises TrimtabError where OTHER does not hold the steering, and where what it did cannot
    be undone.
    """
    known = flattened(among)
    known = known if steering in known else (*known, steering)
    kept = tuple(one for one in known if one is not steering)
    first, second = both(base, other, loaded=True)
    without = baked_into(first, kept, force) if kept else first
    with_it = baked_into(first, known, force)
    names = names_of(without, with_it)
    touched = [name for name in names if not torch.equal(*side_by_side(name, without, with_it))]
    if not touched:
        raise TrimtabError(
            f"{shown(steering.label)} changes no number of {shown(first.name)}: at this dial there "
            "is nothing to take out"
        )
    odd, exact = _odd(touched, second, without, with_it)
    if odd:
        return _inverted(second, steering, touched, odd, without)
    values = {name: _value(name, without, second) for name in touched}
    # Where nothing but baking made OTHER's configuration, BASE's may take its place.
    skeleton = first if not config_changes(with_it, second) else second
    model = _restored(skeleton, second, values, steering)
    return Stripped(model, "restored", exact, tuple(touched))


def _odd(
    touched: Sequence[str], other: Weights, without: Weights, with_it: Weights
) -> tuple[list[str], bool]:
    """The tensors that are not what the steering makes of them, and whether the others are so to
    the bit."""
    odd, exact = [], True
    for name in touched:
        was, awaited, now = side_by_side(name, without, with_it, other)
        how = agreement(distance(was, now), now, distance(awaited, now))
        odd += [] if how else [name]
        exact &= how != ROUNDING
    return odd, exact


def _value(name: str, weights: Weights, other: Weights) -> Tensor:
    """A tensor of a checkpoint in the type of OTHER's."""
    return side_by_side(name, weights, other)[0]


# -- put back -------------------------------------------------------------------------------------


def _restored(
    skeleton: Weights, other: Weights, values: dict[str, Tensor], steering: Steering
) -> LanguageModel:
    """OTHER with some tensors replaced: in the architecture of a skeleton, where that has no biases
    or tied tables that the result has not, else in OTHER's own."""
    result = {name: values[name] if name in values else other.read(name) for name in other.shapes}
    changed = {
        name: tensor
        for name, tensor in result.items()
        if name in skeleton.shapes and not torch.equal(_value(name, skeleton, other), tensor)
    }
    fits = all(name in skeleton.shapes or not tensor.any() for name, tensor in result.items())
    fits = fits and not any(_is_table(skeleton, name) for name in changed)
    assert skeleton.model is not None
    assert other.model is not None
    if fits and skeleton.model.dtype == other.model.dtype:
        return _replaced(skeleton.model, changed, other.model, steering)
    return _replaced(other.model, values, other.model, steering)


def _is_table(weights: Weights, name: str) -> bool:
    """Whether a tensor has two names in a model."""
    whole = weights.read(name).data_ptr()
    return any(weights.read(other).data_ptr() == whole for other in weights.tied)


def _replaced(
    skeleton: LanguageModel,
    values: dict[str, Tensor],
    other: LanguageModel,
    steering: Steering,
) -> LanguageModel:
    """A model with some of its tensors replaced; it reads and chats as OTHER."""
    model: Any = plain_copy(skeleton.model, skeleton.name)
    for name, value in values.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if own in dict(module.named_buffers(recurse=False)):
            setattr(module, own, value)
        else:
            setattr(module, own, nn.Parameter(value.to(model.device)))
    model.generation_config = copy.deepcopy(other.model.generation_config)
    name = f"{other.name} without {steering.label}"
    stripped = LanguageModel(model.eval(), other.tokenizer, name, other.chat_form)
    stripped.baked = _records_without(other, steering)
    stripped.processor, stripped.no_processor = other.processor, other.no_processor
    return stripped


def _records_without(other: LanguageModel, steering: Steering) -> tuple[dict[str, Any], ...]:
    """What is said to be baked into a model, less the steering that was taken out."""
    records = list(other.baked)
    for place, record in reversed(list(enumerate(records))):
        if record["digest"] == steering.digest:
            del records[place]
            break
    return tuple(records)


# -- the inverse ----------------------------------------------------------------------------------


def _inverted(
    other: Weights,
    steering: Steering,
    touched: Sequence[str],
    odd: Sequence[str],
    without: Weights,
) -> Stripped:
    """OTHER with the steering's inverse baked in."""
    assert other.model is not None
    more = (
        f"; and {len(odd)} of the {len(touched)} tensors that it changes are not what it makes of "
        f"BASE ({shown(odd[0])} first), so that BASE's cannot be put back: name what else was "
        "baked in with --steer"
    )
    try:
        # The architecture may have become another by baking, and the weights have.
        undone = replace(inverse(steering), model=other.model.identity)
    except TrimtabError as error:
        raise TrimtabError(f"{error}{more}") from error
    with status("baking the inverse"):
        baked = bake(other.model, undone, force=True)
    before, after = (_apart(weights, without, touched) for weights in (other, of_model(baked)))
    if after >= before:
        raise TrimtabError(
            f"{shown(other.name)} does not hold {shown(steering.label)}: without it, it would be "
            f"farther from BASE ({after:.3g}) than it is ({before:.3g})"
        )
    baked.name = f"{other.model.name} without {steering.label}"
    baked.baked = _records_without(other.model, steering)
    return Stripped(baked, "inverse", False, tuple(touched))


def _apart(weights: Weights, base: Weights, names: Sequence[str]) -> float:
    """The norm of what lies between some tensors of two checkpoints."""
    held = [name for name in names if name in base.shapes or name in weights.shapes]
    squares = (distance(*side_by_side(name, base, weights)) ** 2 for name in held)
    return float(sum(squares) ** 0.5)
