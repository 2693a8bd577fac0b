"""Linear maps that write or read a site, which is what baking needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class LinearMap:
    """A linear map's weights, seen as [..., out, in] whatever the module's own layout.

    Layouts: "linear" [out, in]; "conv1d" [in, out] (GPT-2); "embedding" [tokens, out], a map from
    a token's one-hot; "experts" [experts, out, in]; "joint_experts", the same weights seen as one
    [out, experts * in], the reader of `ffn_in`.
    """

    owner: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"
    layout: Literal["linear", "conv1d", "embedding", "experts", "joint_experts"] = "linear"

    def read(self) -> Tensor:
        weight: Tensor = getattr(self.owner, self.weight).detach()
        if self.layout in ("conv1d", "embedding"):
            return weight.T
        if self.layout == "joint_experts":
            return weight.permute(1, 0, 2).flatten(1)
        return weight

    def write(self, value: Tensor) -> None:
        old = getattr(self.owner, self.weight)
        if self.layout in ("conv1d", "embedding"):
            value = value.T
        elif self.layout == "joint_experts":
            value = value.unflatten(1, (old.shape[0], old.shape[2])).permute(1, 0, 2)
        new = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        setattr(self.owner, self.weight, new)


def linear_map(module: nn.Module) -> LinearMap:
    # GPT-2's Conv1D is a linear map with the transposed weight; it has nf and nx, no in_features.
    layout: Literal["linear", "conv1d"] = "conv1d" if hasattr(module, "nf") else "linear"
    return LinearMap(module, layout=layout)
