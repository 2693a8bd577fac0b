"""What a single module does, found by running it: no names of classes are asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, normalize

from trimtab.anatomy.numbers import epsilon, flat, near

if TYPE_CHECKING:
    from trimtab.anatomy.tracing import Call


#: Names of the argument that holds the activations, where it is not the first one.
_ACTIVATIONS = ("hidden_states", "x", "input", "inputs_embeds")


def find_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where a module's activations are among its arguments: a place, a name, or nowhere."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    names = [*(name for name in _ACTIVATIONS if name in kwargs), *kwargs]
    for name in names:
        if isinstance(kwargs[name], Tensor) and kwargs[name].is_floating_point():
            return name
    return None


def first_tensor(output: Any) -> Tensor | None:
    """The activations among what a module returns."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def with_first(output: Any, x: Tensor) -> Any:
    """What a module returns, with other activations."""
    if isinstance(output, Mapping):
        kind: Any = type(output)
        return kind({**output, next(iter(output)): x})
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(x, *output[1:])
    return type(output)([x, *output[1:]]) if isinstance(output, tuple | list) else x


def is_linear(module: Any) -> bool:
    """Whether a module is a linear map by what it says of itself: a Linear, GPT-2's Conv1D, a
    quantised one, or one of these with an adapter of peft around it."""
    base = getattr(module, "base_layer", None)
    if base is not None:
        return is_linear(base)
    return isinstance(module, nn.Linear) or _sizes(module) is not None


def _sizes(module: Any) -> tuple[int, int] | None:
    """How many units a linear map takes and returns, as it says itself."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            weight = getattr(module, "weight", None)
            # Fused experts have such sizes, too, and a weight for each of them.
            return None if isinstance(weight, Tensor) and weight.dim() > 2 else sizes  # type: ignore[return-value]
    return None


def in_width(module: Any) -> int:
    """How many units a linear map takes."""
    sizes = _sizes(getattr(module, "base_layer", module))
    assert sizes is not None
    return sizes[0]


def plain_weight(module: Any) -> Tensor | None:
    """The weight [out, in] of a linear map that is nothing but its weight and bias."""
    weight: Any = getattr(module, "weight", None)
    if hasattr(module, "base_layer") or type(weight) not in (nn.Parameter, Tensor):
        return None
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        return None
    # Float8, and weights beside which the input is rounded as well (compressed-tensors).
    if weight.element_size() == 1 or getattr(module, "quantization_scheme", None) is not None:
        return None
    plain: Tensor = weight.detach()
    return plain.T if hasattr(module, "nf") else plain


def computes_its_map(call: Call) -> bool:
    """Whether a linear map returned what its weight and bias say."""
    module: Any = call.module
    untouched = "forward" not in vars(module) and not _has_other_hooks(module)
    weight = plain_weight(module)
    if weight is None or (type(module) is nn.Linear and untouched):
        return True  # a quantised or adapted one is known by its name only
    if call.x is None or call.y is None:
        return False
    expected = linear(call.x, weight, module.bias if hasattr(module, "bias") else None)
    return near(flat(expected), flat(call.y), 32 * epsilon(call.y.dtype))


def _has_other_hooks(module: nn.Module) -> bool:
    return len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1


def is_norm(call: Call) -> bool:
    """Whether what a module returns does not change with the length of what it takes."""
    x, y, module = call.x, call.y, call.module
    if x is None or y is None or x.shape != y.shape or is_linear(module):
        return False
    if sum(1 for _ in module.modules()) > 4 or not torch.isfinite(x).all():
        return False
    # Beside a token of length one the norm's own epsilon is nothing, and no dtype overflows.
    size = x.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    scaled = (x / size.to(x.dtype)).to(x.dtype)
    try:
        once, more = (first_tensor(call.again(scaled * factor)) for factor in (1, 4))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False
    if once is None or more is None or once.shape != y.shape or not once.any():
        return False
    return near(flat(more), flat(once), 2e-2)


#: The token that is changed when it is asked whether others see it.
_CHANGED = 2


def mixes_tokens(call: Call, rows: int) -> bool:
    """Whether changing one token of what a module takes changes what it returns for others."""
    assert call.x is not None
    tokens = call.x.reshape(rows, -1, call.x.shape[-1]).clone()
    after = first_tensor(call.again(_with_one_changed(tokens).reshape(call.x.shape)))
    return _differs_elsewhere(call, after, rows, range(rows))


def mixes_and_averages(call: Call, writer: nn.Module, heads: int, rows: int) -> tuple[bool, bool]:
    """Whether a module mixes tokens, and whether it does so as softmax attention: where all tokens
    are one token, each head says the same at all of them, because it averages what they say. With
    attention sinks, up to a factor. `writer` is the map that the heads go through.

    The module runs once: its first row has one token all over, in its last row one is changed.
    """
    assert call.x is not None
    tokens = call.x.reshape(rows, -1, call.x.shape[-1]).clone()
    tokens[:1] = tokens[:1, :1].clone()
    tokens[-1:] = _with_one_changed(tokens[-1:])
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())

    handle = writer.register_forward_pre_hook(see)
    try:
        after = first_tensor(call.again(tokens.reshape(call.x.shape)))
    finally:
        handle.remove()
    mixes = _differs_elsewhere(call, after, rows, [rows - 1])
    if len(seen) != 1 or seen[0].shape[-1] % heads:
        return mixes, False
    inner = seen[0].reshape(rows, -1, heads, seen[0].shape[-1] // heads)[:1]
    return mixes, _same_at_all_tokens(inner, call.module)


def _same_at_all_tokens(inner: Tensor, module: nn.Module) -> bool:
    """Whether heads [rows, tokens, heads, units] are those of the first token everywhere."""
    eps = epsilon(inner.dtype)
    tolerance = 100 * eps if eps < 1e-5 else 8 * eps
    first_tokens = inner[:, :1].expand_as(inner)
    if near(flat(inner), flat(first_tokens), tolerance):
        return True
    sinks = any("sink" in name for name, _ in module.named_parameters())
    directions = [flat(normalize(each.double(), dim=-1)) for each in (inner, first_tokens)]
    return sinks and near(directions[0], directions[1], tolerance)


def _with_one_changed(tokens: Tensor) -> Tensor:
    """Rows [rows, tokens, units] with another token at one place."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(tokens.shape[-1], generator=generator).to(tokens)
    changed = tokens.clone()
    changed[:, _CHANGED] += tokens.float().std().to(tokens) * noise
    return changed


def _differs_elsewhere(call: Call, after: Tensor | None, rows: int, where: Iterable[int]) -> bool:
    """Whether rows that a module returns differ at other tokens than the changed one."""
    assert call.y is not None
    if after is None or after.shape != call.y.shape:
        return True
    shape = (rows, -1, call.y.shape[-1])
    before, after = call.y.reshape(shape)[list(where)], after.reshape(shape)[list(where)]
    others = [i for i in range(before.shape[1]) if i != _CHANGED]
    room = 4 * epsilon(before.dtype) * before[:, others].float().abs().amax(-1)
    return bool(((after - before)[:, others].float().abs().amax(-1) > room).any())


def reads_by_weight(call: Call) -> bool:
    """Whether a module that is no plain linear map, such as a router, reads what it takes through
    its weight [out, in] alone: scaling units does what scaling the weight's columns does."""
    weight = getattr(call.module, "weight", None)
    if call.x is None or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return False
    if weight.shape[-1] != call.x.shape[-1]:
        return False
    generator = torch.Generator().manual_seed(2)
    # Powers of two, which no dtype rounds: a router's choice hangs on the last bit.
    powers = torch.randint(-1, 2, (weight.shape[-1],), generator=generator)
    factors = (2.0**powers).to(weight)
    args, kwargs = call.arguments(call.x)
    try:
        scaled = _tensors(call.again(call.x * factors.to(call.x.dtype)))
        folded = _tensors(functional_call(call.module, {"weight": weight * factors}, args, kwargs))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if not scaled or len(scaled) != len(folded):
        return False
    return all(
        a.shape == b.shape and near(flat(a), flat(b), 64 * epsilon(weight.dtype))
        for a, b in zip(scaled, folded, strict=True)
    )


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return [v.float() for v in values if isinstance(v, Tensor) and v.dim() > 0]
