"""Pull: draw an FFN's output toward its mean over the positive texts.

m = mean(x^pos)  at layers.N.ffn_out, last token,       x <- x + amount (m - x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Means,
    Method,
    Number,
    Statistics,
    Want,
    new_steering,
)
from trimtab.steering import Dial, Intervention, LinearDefaults, Positions, Scope, Steering


@dataclass(frozen=True, eq=False)
class Pull(LinearDefaults):
    """x <- (1 - dial) x + dial * target; target [units] float32."""

    target: Tensor

    linear = True
    identity = 0.0

    @property
    def width(self) -> int:
        return len(self.target)

    @property
    def size(self) -> int:
        return self.width

    def bind(self, dial: Any, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        share = torch.as_tensor(dial, dtype=torch.float32, device=device).unsqueeze(-1)
        target = self.target.to(device)
        return lambda x: (x + share * (target - x)).to(x.dtype)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return (1 - dial) * x

    def offset(self, dial: float) -> Tensor:
        return dial * self.target.double()

    def check(self) -> None:
        if self.target.dim() != 1 or self.target.dtype != torch.float32:
            raise TrimtabError("Pull needs a target [units] of type torch.float32")


@dataclass(frozen=True)
class PullToMean(Method):
    """Pull: draw an FFN's output toward its mean over the positive texts."""

    layer: int = field(default=-1, metadata={"help": "Block; negative from the end."})
    amount: Number = field(default=0.5, metadata={"help": "Share of the way; the dial's default."})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "pull"
    dial = "amount"

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "amount": (0.25, 0.5)}

    def wants(self, language_model: Any, contrast: Contrast) -> list[Want]:
        (site,) = language_model.anatomy.sites("ffn_out", (self.layer,))
        return [Want(site, "last", Means)]

    def build(self, language_model: Any, contrast: Contrast, statistics: Statistics) -> Steering:
        (want,) = self.wants(language_model, contrast)
        pull = Pull(statistics[want].positive.float())
        interventions = [Intervention(want.site, pull, Scope.of(self.positions))]
        dial = Dial("amount", self.amount, (0.0, 1.0))
        return new_steering(self, language_model, contrast, interventions, dial)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        site = steering.interventions[0].site
        return [
            f"Pull draws {site} toward its mean over the positive texts: at {steering.dial.name} 0 "
            "nothing happens, at 1 nothing else is left."
        ]
