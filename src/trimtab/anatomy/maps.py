"""Linear maps and norms that write or read a site, which is what baking needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.anatomy.experts import layout_of
from trimtab.anatomy.numbers import near


@dataclass(frozen=True)
class LinearMap:
    """A linear map's weights, seen as [..., out, in] whatever the module's own layout.

    `weight` is a parameter's path from its owner. It may be stored transposed, [..., in, out]
    (GPT-2's layers; embedding tables, which map a token's one-hot), and the maps of several
    experts may be stored one below the other. A joint map is that of all experts seen as one,
    [out, experts * in]: the reader of `ffn_in`.
    """

    owner: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False
    #: How many experts stand one below the other in a weight of two dimensions; 0 where none do.
    stacked: int = 0
    joint: bool = False
    #: Whether a constant that is added to the bias is added to what the map writes. It is not
    #: where each expert has a bias, which the router weighs with the rest.
    constant: bool = True

    def read(self) -> Tensor:
        weight = self._stored.detach()
        if self.stacked:
            weight = weight.unflatten(0, (self.stacked, -1))
        if self.transposed:
            weight = weight.mT
        if self.joint:
            weight = weight.permute(1, 0, 2).flatten(1)
        return weight

    def write(self, value: Tensor) -> None:
        old = self._stored
        if self.joint:
            count = self.stacked or len(old)
            value = value.unflatten(1, (count, -1)).permute(1, 0, 2)
        if self.transposed:
            value = value.mT
        if self.stacked:
            value = value.flatten(0, 1)
        new = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        path, _, name = self.weight.rpartition(".")
        setattr(self.owner.get_submodule(path), name, new)

    @property
    def _stored(self) -> Tensor:
        path, _, name = self.weight.rpartition(".")
        weight: Tensor = getattr(self.owner.get_submodule(path), name)
        return weight


def linear_map(module: nn.Module) -> LinearMap:
    # GPT-2's Conv1D is a linear map with the transposed weight; it has nf and nx, no in_features.
    return LinearMap(module, transposed=hasattr(module, "nf"))


@dataclass(frozen=True)
class Gain:
    """A norm that returns what it normed times (added + its weight), unit by unit, and then adds
    its bias, where it has one."""

    owner: nn.Module
    #: 0, or 1 where the weight is what the gain is beyond one (Gemma).
    added: float
    biased: bool


@torch.no_grad()
def gain_of(norm: nn.Module) -> Gain | None:
    """How a norm's weight multiplies what it returns, found by running it with other weights; None
    where it has no such weight."""
    own = dict(norm.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or not own.keys() <= {"weight", "bias"} or weight.dim() != 1:
        return None
    if weight.is_meta or (bias is not None and bias.shape != weight.shape):
        return None
    given = {name: value.float() for name, value in own.items()}
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(3)).to(weight.device)

    def at(value: Tensor) -> Tensor:
        output: Tensor = functional_call(norm, {**given, "weight": value}, (x,))
        return output

    constant = torch.zeros_like(x) if bias is None else bias.float().expand_as(x)
    normed = at(torch.ones(len(weight), device=x.device)) - at(torch.zeros_like(x[0]))
    for added in (0.0, 1.0):
        expected = normed * (added + given["weight"]) + constant
        if near(at(given["weight"]), expected, 1e-4):
            return Gain(norm, added, bias is not None)
    return None


# -- fused experts ----------------------------------------------------------------------------


def experts_writer(experts: nn.Module) -> LinearMap | None:
    """The down projections, whose weighted sum is what fused experts return: a linear map of the
    sum is the same map of each expert's output. None where that is not so (a norm after each
    expert, experts that return their input).

    A constant takes a bias of the sum: one of each expert would be weighed by the router, and the
    weights need not add up to one.
    """
    layout = layout_of(experts)
    if layout is None or layout.post_norm is not None or layout.identities:
        return None
    return LinearMap(
        experts,
        weight=layout.down,
        bias=layout.sum_bias or layout.down_bias,
        transposed=layout.down_transposed,
        stacked=layout.stacked,
        constant=layout.down_bias is None,
    )


def experts_readers(experts: nn.Module) -> list[LinearMap]:
    """The maps by which fused experts read their input, and their own router's where it is inside;
    none where something else reads it as well (experts that return their input)."""
    layout = layout_of(experts)
    if layout is None or layout.identities:
        return []
    maps = [
        LinearMap(
            experts,
            weight=name,
            bias=layout.up_bias,
            transposed=layout.up_transposed,
            stacked=layout.stacked,
        )
        for name in layout.up
    ]
    if layout.router is not None:
        maps.insert(0, linear_map(experts.get_submodule(layout.router)))
    return maps


def experts_joint_reader(experts: nn.Module) -> LinearMap | None:
    """The map that reads the inner activations of all experts, side by side."""
    layout = layout_of(experts)
    if layout is None:
        return None
    return LinearMap(
        experts,
        weight=layout.down,
        bias=None,
        transposed=layout.down_transposed,
        stacked=layout.stacked,
        joint=True,
    )
