"""What one worker of an engine knows: which steerings are loaded, and which rows of the pass at
hand are steered how. One torch operation for all sites changes activations in place by it.

The operation never fails and never waits: what it cannot do was refused before. It is opaque to
compilers, so that it runs the same whether the engine is compiled or not. Operators are those of
`steering`, on the rows that are to be changed, so that what comes out is what attached hooks make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.engines.asking import Wanted
from trimtab.engines.loaded import Step
from trimtab.engines.tokens import weights


class Rows(NamedTuple):
    """A request in a pass: what is wanted of it, its text as far as it is known, where its prompt
    ends, which token is its first one here, and from which row on up to which one it is."""

    wanted: tuple[Wanted, ...]
    ids: Sequence[int]
    prompt: int
    position: int
    first: int
    stop: int


class _Change(NamedTuple):
    """An operator, the rows that it changes [rows], and a dial for each, [rows]."""

    step: Step
    rows: Tensor
    dials: Tensor


@dataclass
class AtWork:
    """Steerings by digest, sites by number, and the plan of the pass at hand."""

    sites: list[str] = field(default_factory=list)
    loaded: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    #: By the number of a site what is done there, in order.
    plan: dict[int, list[_Change]] = field(default_factory=dict)
    #: How often each site was passed.
    calls: list[int] = field(default_factory=list)
    #: Where activations are watched: by the number of a site its last row, before it is changed.
    seen: dict[int, Tensor] | None = None
    #: Rows that were to be changed by a steering that is not loaded, which nothing should let come.
    missed: int = 0

    def at(self, sites: Sequence[str]) -> None:
        """Begin anew, at some sites."""
        self.sites, self.calls = list(sites), [0] * len(sites)
        self.loaded, self.plan = {}, {}

    def begin(self, requests: Sequence[Rows], device: torch.device | str = "cpu") -> None:
        """Make the plan of a pass."""
        together: dict[tuple[int, str, int], tuple[list[Any], list[Any]]] = {}
        for request in requests:
            for rank, one in enumerate(request.wanted):
                for number, (rows, dials) in self._shares(request, one).items():
                    of = together.setdefault((rank, one.digest, number), ([], []))
                    of[0].append(rows)
                    of[1].append(dials)
        self.plan = {}
        for (_, digest, number), (rows, dials) in sorted(together.items(), key=lambda i: i[0][0]):
            step = self.loaded[digest][number]
            change = _Change(
                step,
                torch.from_numpy(np.concatenate(rows)).to(device),
                torch.from_numpy(np.concatenate(dials)).float().to(device),
            )
            self.plan.setdefault(self.sites.index(step.site), []).append(change)

    def _shares(self, request: Rows, one: Wanted) -> Mapping[int, tuple[Any, Any]]:
        """By the number of a step of a steering the rows that it changes, and their dials."""
        if one.digest not in self.loaded:
            self.missed += request.stop - request.first
            return {}
        count = request.stop - request.first
        by_scope = [
            weights(acts, request.ids, request.prompt, request.position, request.position + count)
            for acts in one.scopes
        ]
        found: dict[int, tuple[Any, Any]] = {}
        for number, step in enumerate(self.loaded[one.digest]):
            share = by_scope[one.of[step.number] if step.number < len(one.of) else 0]
            dial = one.dial * step.weight
            rows = np.flatnonzero(share)
            if len(rows) and dial != step.operator.identity:
                found[number] = (rows + request.first, dial * share[rows])
        return found

    def change(self, x: Tensor, residual: Tensor | None, site: int) -> None:
        """Do what the plan says at a site to activations x [rows, units], in place. With a residual
        the activation is the sum of both, and x takes the change."""
        self.calls[site] += 1
        x = x.view(-1, x.shape[-1])  # the Transformers backend keeps a batch dimension
        residual = None if residual is None else residual.view(-1, x.shape[-1])
        if self.seen is not None:
            last = x[-1] if residual is None else x[-1] + residual[-1]
            self.seen[site] = last.float().clone()
        for step, rows, dials in self.plan.get(site, ()):
            old = x[rows]
            if residual is None:
                x[rows] = step.operator.bind(dials, x.device)(old)
                continue
            whole = old + residual[rows]
            change = step.operator.bind(dials, x.device)(whole).float() - whole.float()
            x[rows] = (old.float() + change).to(x.dtype)


AT_WORK = AtWork()


@torch.library.custom_op("trimtab::steer", mutates_args=("x",))
def steer(x: Tensor, residual: Tensor | None, site: int) -> None:
    """Change the activations of a site in place by the plan of the pass."""
    AT_WORK.change(x, residual, site)
