"""Forcing a router to choose some experts, and never others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operators.base import (
    WIDEST,
    Dial,
    OperatorDefaults,
    as_dtype_of,
    widened,
)

#: By how many nats an expert is put above or below others, at least.
_MARGIN = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class Force(OperatorDefaults):
    """At a router: at dial 1 every token goes to the experts `on`, and none to those `off`.

    on and off [n] int64, numbers of experts out of `width`; x the router's logits. The logits of
    `on` are lifted together, by as much as the least of them needs to be .01 above the best of the
    others, so that among themselves they keep the router's own preference; those of `off` go to .01
    below the least of the others. A dial from 0 to 1 is a share of that, below 0 nothing happens,
    and beyond 1 no more. A router that chooses by other scores than its logits (with a bias, in
    groups) has them follow at dial 1, with the weights that it makes of the logits.
    SteerMoE (2509.09660) puts all of `on` at the largest log-probability + .01, where they tie, and
    all of `off` at the least - .01.
    """

    on: Tensor
    off: Tensor
    width: int

    linear = False
    identity = 0.0
    farthest = 1.0  # beyond it nothing more happens
    description = "Force, which chooses experts,"

    @property
    def size(self) -> int:
        return len(self.on) + len(self.off)

    @property
    def acts(self) -> bool:
        return self.size > 0

    @property
    def details(self) -> dict[str, Any]:
        return {"on": self.on.tolist(), "off": self.off.tolist()}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        shares = torch.as_tensor(dial, dtype=torch.float32, device=device).unsqueeze(-1)
        shares = shares.clamp(0, 1)
        on, off = self._marked(device)

        def force(x: Tensor) -> Tensor:
            wide = widened(x)
            # More than what rounding takes away in x's own dtype.
            largest = wide.abs().amax(-1, keepdim=True)
            margin = (4 * torch.finfo(x.dtype).eps * (1 + largest)).clamp(min=_MARGIN)
            best = wide.masked_fill(on | off, -torch.inf).amax(-1, keepdim=True)
            least = wide.masked_fill(~on, torch.inf).amin(-1, keepdim=True)
            lift = torch.where(best.isfinite(), best + margin - least, 0.0).clamp(min=0)
            lifted = torch.where(on, wide + shares * lift, wide)
            lowest = wide.masked_fill(off, torch.inf).amin(-1, keepdim=True)
            drop = (wide - lowest + margin).clamp(min=0)
            return as_dtype_of(torch.where(off, lifted - shares * drop, lifted), x)

        return force

    @property
    def choice(self) -> ForcedChoice:
        """The same on the scores by which a router chooses."""
        return ForcedChoice(self)

    def _marked(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """For each expert whether it is on, and whether it is off, [width]."""
        nothing = torch.zeros(self.width, dtype=torch.bool)
        on, off = (nothing.index_fill(0, which, True) for which in (self.on, self.off))
        return on.to(device), off.to(device)

    def check(self) -> None:
        if not 1 <= self.width <= WIDEST:
            raise TrimtabError(f"Force has a width of {self.width:g} experts, not 1 to {WIDEST:g}")
        for which in (self.on, self.off):
            if which.dim() != 1 or which.dtype != torch.int64:
                raise TrimtabError(
                    f"Force has experts of shape {list(which.shape)} and type {which.dtype}, not "
                    "[n] of torch.int64"
                )
        both = torch.cat((self.on, self.off))
        inside = not len(both) or (int(both.min()) >= 0 and int(both.max()) < self.width)
        if not inside or len(both.unique()) < len(both):
            raise TrimtabError(
                f"Force names an expert twice (on or off), or one outside 0 to {self.width - 1}"
            )

    def check_chosen(self, site: str, chosen: int, dial: float) -> None:
        """Refuse what a router that chooses so many experts for a token cannot do."""
        free = self.width - len(self.off)
        if len(self.on) > chosen or free < chosen:
            raise TrimtabError(
                f"the router of {site} chooses {chosen} of {self.width} experts: {len(self.on)} "
                f"cannot be forced on and {len(self.off)} off; force at most {chosen} on and "
                f"{self.width - chosen} off"
            )
        if dial < 0:
            raise TrimtabError(
                f"Force at {site} does nothing at a dial below 0: exchange the experts that are on "
                "and off to do the opposite"
            )


@dataclass(frozen=True, eq=False, repr=False)
class ForcedChoice(OperatorDefaults):
    """What Force does to the scores by which a router chooses, where its dial is 1 or more: those
    that are on come before all others, and those that are off after all, even those ruled out."""

    force: Force

    linear = False
    identity = 0.0

    @property
    def width(self) -> int:
        return self.force.width

    @property
    def size(self) -> int:
        return self.force.size

    def check(self) -> None:
        self.force.check()

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        whole = (torch.as_tensor(dial, device=device) > 1 - 1e-6).unsqueeze(-1)
        on, off = self.force._marked(device)

        def choose(x: Tensor) -> Tensor:
            infinite = torch.full_like(x, torch.inf)
            ruled_in = x.clamp(min=torch.finfo(x.dtype).min)
            forced = torch.where(on, infinite, torch.where(off, -infinite, ruled_in))
            return torch.where(whole, forced, x)

        return choose
