"""Linear maps that write or read a site, which is what baking needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.anatomy.experts import layout_of


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
