"""What one worker of an engine knows: which steerings are loaded, and which rows of the pass at
hand are steered how. One torch operation for all sites changes activations in place by it.

The operation never fails and never waits: what it cannot do was refused before. It is opaque to
compilers, so that it runs the same whether the engine is compiled or not. Operators are those of
`steering`, on the rows that are to be changed, so that what comes out is what attached hooks make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        # Rows that are steered alike but for their dials go together: by the place in their stack,
        # the steering, which of its interventions have which scope, and the scope.
        together: dict[tuple[int, str, tuple[int, ...], int], tuple[list[Any], list[Any]]] = {}
        for request in requests:
            for rank, one in enumerate(request.wanted):
                if one.digest not in self.loaded:
                    self.missed += request.stop - request.first
                    continue
                for number, (rows, dials) in _shares(request, one):
                    of = together.setdefault((rank, one.digest, one.of, number), ([], []))
                    of[0].append(rows)
                    of[1].append(dials)
        ordered: dict[int, list[tuple[int, int, _Change]]] = {}
        for (rank, digest, scopes, number), (rows, dials) in together.items():
            where = torch.from_numpy(np.concatenate(rows)).to(device)
            dial = torch.from_numpy(np.concatenate(dials))
            for step in self.loaded[digest]:
                own = scopes[step.number] if step.number < len(scopes) else 0
                if own == number:
                    change = _Change(step, where, (dial * step.weight).float().to(device))
                    site = self.sites.index(step.site)
                    ordered.setdefault(site, []).append((rank, step.number, change))
        self.plan = {
            site: [change for _, _, change in sorted(changes, key=lambda each: each[:2])]
            for site, changes in ordered.items()
        }

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


def _shares(request: Rows, one: Wanted) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """By the number of a scope the rows that it takes, and their dials, where it takes any."""
    prompt = request.prompt if one.prompt is None else one.prompt
    for number, acts in enumerate(one.scopes):
        stop = request.position + request.stop - request.first
        share = weights(acts, request.ids, prompt, request.position, stop)
        rows = np.flatnonzero(share)
        if len(rows):
            yield number, (rows + request.first, one.dial * share[rows])


AT_WORK = AtWork()


@torch.library.custom_op("trimtab::steer", mutates_args=("x",))
def steer(x: Tensor, residual: Tensor | None, site: int) -> None:
    """Change the activations of a site in place by the plan of the pass."""
    AT_WORK.change(x, residual, site)
