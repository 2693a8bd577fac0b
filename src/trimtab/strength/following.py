"""One prompt over a whole grid of dials, with the model run at few of them.

The grid is refined where a cubic spline through the dials so far misses the probability of any
token of the vocabulary, and read off the spline elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from trimtab.dials import Turning, divergence, entropy, idle_dial
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, extended
from trimtab.steering import Steering
from trimtab.terminal import progress

#: KL and entropy may be off by this many nats, or this share of their size.
_NATS, _SHARE = 0.01, 0.01
#: Dials of the coarse grid that a curve begins with; shorter curves are measured everywhere.
_COARSE = 33
#: Tokens count that are ever more probable than this share of the tolerance, and than this.
_LIVE, _NEVER = 0.25, 1e-6


@dataclass(frozen=True)
class Followed:
    """One prompt over the grid: probabilities [dials, live] of the tokens that are ever probable
    (or asked for), and what is computed from whole distributions."""

    live: Tensor
    p: Tensor
    base_p: Tensor  # [vocabulary]
    kl: Tensor
    entropy: Tensor
    base_entropy: Tensor
    measured: Tensor

    def of(self, tokens: Sequence[int]) -> Tensor:
        """[dials, tokens]; a token that is never probable stays at its unsteered probability."""
        place = {token: i for i, token in enumerate(self.live.tolist())}
        columns = self.base_p[list(tokens)].double().repeat(len(self.p), 1)
        for i, token in enumerate(tokens):
            if token in place:
                columns[:, i] = self.p[:, place[token]]
        return columns


@dataclass(frozen=True)
class Read:
    """One prompt over the grid, and what follows the first pieces of the sequences, by these."""

    after: dict[tuple[int, ...], Followed]

    @classmethod
    def of(
        cls,
        language_model: LanguageModel,
        text: Sequence[int],
        steering: Steering,
        dials: Sequence[float],
        shown: Sequence[tuple[int, ...]],
        tolerance: float,
        force: bool,
    ) -> Read:
        """Pieces are read as if the model had written them."""
        after = {}
        for prefix, asked in prefixes(shown).items():
            whole = extended(text, prefix)
            turning = Turning(language_model, steering, [whole], force=force, given=[len(text)])
            after[prefix] = _follow(turning, dials, asked, tolerance)
        return cls(after)

    @property
    def next_token(self) -> Followed:
        """What comes right after the prompt."""
        return self.after[()]

    def p(self, shown: Sequence[tuple[int, ...]]) -> Tensor:
        """Probabilities [dials, shown] in float64."""
        return torch.stack(
            [
                torch.stack([one.of([token])[:, 0] for one, token in self._steps(ids)]).prod(0)
                for ids in shown
            ],
            1,
        )

    def base(self, shown: Sequence[tuple[int, ...]]) -> Tensor:
        """The same without steering, [shown]."""
        return torch.stack(
            [
                torch.stack([one.base_p[token].double() for one, token in self._steps(ids)]).prod(0)
                for ids in shown
            ]
        )

    def _steps(self, ids: tuple[int, ...]) -> list[tuple[Followed, int]]:
        return [(self.after[ids[:place]], token) for place, token in enumerate(ids)]


def prefixes(shown: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """What is read on from, and which tokens are asked for there."""
    found: dict[tuple[int, ...], list[int]] = {(): []}
    for ids in shown:
        for place, token in enumerate(ids):
            found.setdefault(ids[:place], []).append(token)
    return found


def _follow(
    turning: Turning, dials: Sequence[float], asked: Sequence[int], tolerance: float
) -> Followed:
    nodes = _Nodes(turning, dials, asked, tolerance)
    everywhere = list(range(len(dials)))
    if tolerance == 0 or len(dials) <= 2 * _COARSE:
        nodes.measure(everywhere)
    else:
        nodes.measure(np.linspace(0, len(dials) - 1, _COARSE).round().astype(int).tolist())
        nodes.refine()
    values = nodes.at(everywhere)
    measured = torch.zeros(len(dials), dtype=torch.bool)
    measured[nodes.known] = True
    return Followed(
        nodes.live,
        values[:, 2:],
        turning.base[0].float().exp().cpu(),
        values[:, 0],
        values[:, 1],
        entropy(turning.base[0]).cpu(),
        measured,
    )


class _Nodes:
    """The dials of a grid (by their index) at which the model ran, and a spline through them.

    Columns of what is read off it: KL, entropy, and the probabilities of the live tokens.
    """

    def __init__(
        self, turning: Turning, dials: Sequence[float], asked: Sequence[int], tolerance: float
    ) -> None:
        self.turning, self.dials, self.tolerance = turning, dials, tolerance
        self._rows: dict[int, Tensor] = {}  # probabilities, [vocabulary] in float32
        self._nats: dict[int, Tensor] = {}  # KL and entropy
        base = turning.base[0]
        self._largest = base.float().exp().cpu()
        self._asked = torch.tensor(list(asked), dtype=torch.long)
        idle = idle_dial(turning.steering)
        if idle is not None and idle in dials:  # has run already, as the unsteered model
            place = dials.index(idle)
            self._rows[place] = self._largest
            self._nats[place] = torch.stack(
                (base.new_zeros((), dtype=torch.float64), entropy(base))
            ).cpu()

    @property
    def known(self) -> list[int]:
        return sorted(self._rows)

    @property
    def live(self) -> Tensor:
        """Tokens that are more probable somewhere than the error that is tolerated."""
        ever = self._largest > max(self.tolerance * _LIVE, _NEVER)
        ever[self._asked] = True
        return ever.nonzero().flatten()

    def measure(self, indices: Sequence[int]) -> None:
        """Run the model at these dials, where it has not."""
        indices = [i for i in indices if i not in self._rows]
        with progress("running dials", len(indices)) as advance:
            self._measure(indices, advance)

    def _measure(self, indices: Sequence[int], advance: Callable[[int], object]) -> None:
        base = self.turning.base
        for places, log_p in self.turning.log_p(
            [0] * len(indices), [self.dials[i] for i in indices]
        ):
            advance(len(places))
            nats = torch.stack((divergence(base, log_p), entropy(log_p)), 1).cpu()
            p = log_p.float().exp().cpu()
            if not torch.isfinite(nats).all():
                raise TrimtabError(
                    f"the model's numbers overflow at dials like {self.dials[indices[places[0]]]:g}"
                    ": try --dtype float32, or a smaller range"
                )
            self._largest = torch.maximum(self._largest, p.amax(0))
            for place, row, pair in zip(places, p, nats, strict=True):
                self._rows[indices[place]], self._nats[indices[place]] = row, pair

    def refine(self) -> None:
        """Halve intervals until the spline foretells what is measured in the middle of each.

        The middles then join the spline, which makes it about sixteen times as exact there.
        """
        intervals = list(zip(self.known, self.known[1:], strict=False))
        while intervals := [(i, j) for i, j in intervals if j - i > 1]:
            middles = [(i + j) // 2 for i, j in intervals]
            before = self.known
            self.measure(middles)
            live = self.live  # of all that is known now
            foretold = self._spline(before, live, middles)
            found = self._columns(middles, live)
            off = (foretold - found).abs()
            bad = off[:, 2:].amax(1) > self.tolerance
            allowed = torch.maximum(torch.tensor(_NATS), _SHARE * found[:, :2].abs())
            bad |= (off[:, :2] > allowed).any(1)
            intervals = [
                half
                for (i, j), middle, is_bad in zip(intervals, middles, bad.tolist(), strict=True)
                if is_bad
                for half in ((i, middle), (middle, j))
            ]

    def at(self, indices: Sequence[int]) -> Tensor:
        """What was measured, or what the spline says: [indices, 2 + live] in float64."""
        live, known = self.live, self.known
        values = self._spline(known, live, indices)
        place = {index: i for i, index in enumerate(indices)}
        values[[place[index] for index in known]] = self._columns(known, live)
        values[:, 2:].clamp_(0, 1)
        values[:, :2].clamp_(min=0)
        return values

    def _spline(self, known: Sequence[int], live: Tensor, indices: Sequence[int]) -> Tensor:
        at = np.array(self.dials)
        through = CubicSpline(at[list(known)], self._columns(known, live).numpy(), axis=0)
        return torch.from_numpy(through(at[list(indices)]))

    def _columns(self, indices: Sequence[int], live: Tensor) -> Tensor:
        rows = [torch.cat((self._nats[i], self._rows[i][live].double())) for i in indices]
        return torch.stack(rows)
