"""What one worker of an engine knows: which steerings are loaded, and which rows of the pass at
hand are steered how. One torch operation for all sites changes activations in place by it.

The operation never fails and never waits: what it cannot do was refused before. It is opaque to
compilers, so that it runs the same whether the engine is compiled or not. Requests whose steerings
the bank carries go by it, one tensor operation for all rows of a form; those of others, as under a
gate, by the operators of `steering`. Where whole passes are captured in CUDA graphs the operation
is the bank's kernel, and nothing else is carried. What comes out is what attached hooks make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.engines.acting import Change, Deciding, Reading, Score, Sum, Told
from trimtab.engines.asking import Read, Wanted
from trimtab.engines.bank import Bank, Group, change_group, forget, groups_at, leave, slots_of, take
from trimtab.engines.kernel import (
    ROOM,
    Fixed,
    fixed_for,
    launch,
    write_nothing,
    write_pass,
)
from trimtab.engines.loaded import IN_GRAPHS, MOST_AT_A_SITE, Step
from trimtab.engines.tokens import Acts, stretch, weights
from trimtab.errors import TrimtabError
from trimtab.steering import Gate


class Rows(NamedTuple):
    """A request in a pass: what is wanted of it, its text as far as it is known, where its prompt
    ends, which token is its first one here, from which row on up to which one it is, and what is
    read of it."""

    wanted: tuple[Wanted, ...]
    ids: Sequence[int]
    prompt: int
    position: int
    first: int
    stop: int
    reading: Reading | None = None


class _Share(NamedTuple):
    """Rows of a request, and a dial for all of them or for each, [rows] float64."""

    rows: Any
    dials: Any

    @property
    def stop(self) -> int:
        return int(self.rows.stop if isinstance(self.rows, slice) else self.rows[-1] + 1)


#: So many slots of the bank are kept for requests that may come again.
_KEPT = 1024


@dataclass
class AtWork:
    """Steerings by digest, sites by number, and the plan of the pass at hand."""

    sites: list[str] = field(default_factory=list)
    loaded: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    bank: Bank = field(default_factory=lambda: Bank([]))
    #: By the number of a site what is read of prompts there, before anything is changed.
    reads: dict[int, list[Sum]] = field(default_factory=dict)
    #: By the number of a site what is done there, in order, of requests that the bank does not
    #: carry.
    plan: dict[int, list[Score | Change]] = field(default_factory=dict)
    #: Of the others the slot of each row, 0 for none, and its dial, [lanes, rows]; by the number of
    #: a site what comes of it there, once it was asked for. They are kept for a next pass that is
    #: the same.
    slots: Any = None
    dials: Any = None
    groups: dict[int, list[Group]] = field(default_factory=dict)
    #: Whether the pass at hand has such rows.
    banked: bool = False
    #: Where the operation is captured in graphs: what its kernel reads.
    fixed: Fixed | None = None
    #: The last row of the pass at hand that is somebody's.
    last: int = -1
    #: How often each site was passed.
    calls: list[int] = field(default_factory=list)
    #: Where activations are watched: by the number of a site its last row, before it is changed.
    seen: dict[int, Tensor] | None = None
    #: What is read of prompts, by name, until it is asked for.
    readings: dict[str, Reading] = field(default_factory=dict)
    #: Rows that were to be changed by a steering that is not loaded, which nothing should let come.
    missed: int = 0

    def at(self, sites: Sequence[str], rows: int = 0, device: torch.device | str = "cpu") -> None:
        """Begin anew, at some sites. With so many rows in a pass at most it can be captured, and
        does what the bank carries and nothing else."""
        self.sites, self.calls = list(sites), [0] * len(sites)
        self.loaded, self.fixed = {}, None
        self.bank = Bank(self.sites, device=device, room=ROOM if rows else None)
        if rows:
            self.fixed = fixed_for(self.bank, rows, device)
        self.end()
        self.slots = None

    def load(self, digest: str, steps: tuple[Step, ...]) -> None:
        """Hold a steering. Refuses what there is no room for, and what cannot be captured."""
        try:
            take(self.bank, digest, steps)
            if self.fixed is not None:
                slots = slots_of(self.bank, digest, ())
                if slots is None or len(slots[0]) > MOST_AT_A_SITE:
                    raise TrimtabError(f"something of {digest[:12]}: {IN_GRAPHS}")
        except TrimtabError:
            leave(self.bank, digest)
            raise
        self.loaded[digest], self.slots = steps, None

    def unload(self, digest: str) -> None:
        """Leave a steering, whose last request has ended."""
        leave(self.bank, digest)
        self.slots = None
        self.loaded.pop(digest, None)

    def begin(
        self,
        requests: Sequence[Rows],
        device: torch.device | str = "cpu",
        rows: int = 0,
    ) -> None:
        """Make the plan of a pass, in which so many rows are somebody's (0: all that there are)."""
        self.end()
        self.last = rows - 1
        if self.fixed is None and len(self.bank.slots) > _KEPT:
            forget(self.bank, list(self.bank.slots))
            self.slots = None
        others = []
        filled: list[tuple[int, int, _Share]] = []
        for request in requests:
            lanes = self._lanes(request)
            if lanes is None:
                others.append(request)
            else:
                filled += lanes
        self._fill(filled)
        if self.fixed is not None:
            noted = self.last if self.seen is not None else -1
            slots = self.slots if self.banked else np.zeros((0, 0), np.int64)
            write_pass(self.fixed, self.bank, slots, self.dials, noted)
            self.missed += sum(each.stop - each.first for each in others)
            return
        for site, read in self._sums(requests, device):
            self.reads.setdefault(self.sites.index(site), []).append(read)
        ordered: dict[int, list[tuple[int, int, Score | Change]]] = {}
        for site, order, act in self._steps(others, device):
            ordered.setdefault(self.sites.index(site), []).append((*order, act))
        self.plan = {
            site: [act for _, _, act in sorted(acts, key=lambda each: each[:2])]
            for site, acts in ordered.items()
        }
        for request in requests:
            if request.reading is not None:
                stop = request.position + request.stop - request.first
                request.reading.columns = max(request.reading.columns, stop)

    def end(self) -> None:
        """The pass is over: what comes next without a plan is left as it is."""
        self.reads, self.plan, self.banked = {}, {}, False
        if self.fixed is not None:
            write_nothing(self.fixed)

    def _lanes(self, request: Rows) -> list[tuple[int, int, _Share]] | None:
        """By lane the slots of a request and the rows that have them; None where the bank does not
        carry all of its steerings."""
        lanes: list[tuple[int, int, _Share]] = []
        for one in request.wanted:
            if self.fixed is None:
                slots = slots_of(self.bank, one.digest, one.of)
            else:
                slots = self.bank.slots.get((one.digest, one.of))
            if slots is None:
                return None
            for acts, own in zip(one.scopes, slots, strict=False):
                share = _share(request, one, acts)
                if share is not None:
                    lanes += [(len(lanes) + i, slot, share) for i, slot in enumerate(own)]
        return lanes

    def _fill(self, filled: Sequence[tuple[int, int, _Share]]) -> None:
        """Write lanes down; what is known of a last pass stays where it was the same."""
        if not filled:
            return
        self.banked = True
        shape = 1 + max(lane for lane, _, _ in filled), max(share.stop for _, _, share in filled)
        slots, dials = np.zeros(shape, np.int64), np.zeros(shape)
        for lane, slot, share in filled:
            slots[lane, share.rows] = slot
            dials[lane, share.rows] = share.dials
        if np.array_equal(slots, self.slots) and np.array_equal(dials, self.dials):
            return
        self.slots, self.dials, self.groups = slots, dials, {}

    def _sums(
        self, requests: Sequence[Rows], device: torch.device | str
    ) -> Iterator[tuple[str, Sum]]:
        """What is read of prompts, by site."""
        for request in requests:
            reading = request.reading
            for number, read in enumerate(reading.of.reads if reading is not None else ()):
                assert reading is not None
                rows = _read_rows(request, reading, read)
                if len(rows):
                    where = torch.from_numpy(rows).to(device)
                    yield read.site, Sum(reading, number, where)

    def _steps(
        self, requests: Sequence[Rows], device: torch.device | str
    ) -> Iterator[tuple[str, tuple[int, int], Score | Change]]:
        """What conditions of gates read, and what steerings change: by site, the place in its stack
        and the intervention's number."""
        # Rows that are steered alike but for their dials go together: by the place in their stack,
        # the steering, which of its interventions have which scope, and the scope.
        together: dict[tuple[int, str, tuple[int, ...], int], tuple[list[Any], list[Any]]] = {}
        gated: dict[tuple[int, str], list[Rows]] = {}
        for request in requests:
            for rank, one in enumerate(request.wanted):
                if one.digest not in self.loaded:
                    self.missed += request.stop - request.first
                    continue
                if any(step.gate is not None for step in self.loaded[one.digest]):
                    gated.setdefault((rank, one.digest), []).append(request)
                for number, acts in enumerate(one.scopes):
                    share = _share(request, one, acts)
                    if share is not None:
                        of = together.setdefault((rank, one.digest, one.of, number), ([], []))
                        rows = np.r_[share.rows]
                        of[0].append(rows)
                        of[1].append(np.broadcast_to(share.dials, len(rows)))
        deciding = {}
        for key, whose in gated.items():
            gate = self.loaded[key[1]][0].gate
            assert gate is not None  # which all steps of a steering have
            deciding[key] = _deciding(gate, key[0], whose, device)
            for number, condition in enumerate(gate.conditions):
                yield condition.site, (key[0], -1), Score(deciding[key], number)
        for (rank, digest, scopes, number), (rows, dials) in together.items():
            where = torch.from_numpy(np.concatenate(rows)).to(device)
            dial = torch.from_numpy(np.concatenate(dials))
            gate_here = deciding.get((rank, digest))
            places = None if gate_here is None else torch.searchsorted(gate_here.rows, where)
            for step in self.loaded[digest]:
                own = scopes[step.number] if step.number < len(scopes) else 0
                if own == number:
                    turned = (dial * step.weight).float().to(device)
                    change = Change(step, where, turned, gate_here, places)
                    yield step.site, (rank, step.number), change

    def watch(self) -> None:
        """Begin to note each site's activation at the last row of each pass."""
        self.seen = {}
        if self.fixed is not None:
            for noted in self.fixed.noted.values():
                noted.fill_(torch.nan)

    def watched(self) -> dict[str, Tensor]:
        """What was noted since, by site; and note no more."""
        seen, self.seen = self.seen or {}, None
        if self.fixed is not None:
            seen = {n: x for n, x in self.fixed.noted.items() if not x.isnan().all()}
        return {self.sites[site]: x.cpu().contiguous() for site, x in seen.items()}

    def change(self, x: Tensor, residual: Tensor | None, site: int) -> None:
        """Do what the plan says at a site to activations x [rows, units], in place. With a residual
        the activation is the sum of both, and x takes the change."""
        self.calls[site] += 1
        x = x.view(-1, x.shape[-1])  # the Transformers backend keeps a batch dimension
        residual = None if residual is None else residual.view(-1, x.shape[-1])
        if self.fixed is not None:
            launch(self.fixed, self.bank, x, residual, site)
            return
        if self.seen is not None:
            row = self.last  # what comes after it fills a graph up
            last = x[row] if residual is None else x[row] + residual[row]
            self.seen[site] = last.float().clone()
        for read in self.reads.get(site, ()):
            read.act(x, residual)
        if self.banked:
            groups = self.groups.get(site)
            if groups is None:
                groups = groups_at(self.bank, site, self.slots, self.dials, x.device)
                self.groups[site] = groups
            for group in groups:
                change_group(self.bank, site, group, x, residual)
        for act in self.plan.get(site, ()):
            act.act(x, residual)


def _read_rows(request: Rows, reading: Reading, read: Read) -> Any:
    """The rows of a pass that a read takes: tokens of the prompt that were not read before."""
    stop = min(request.position + request.stop - request.first, request.prompt)
    first, acts = max(request.position, reading.columns), read.acts
    if read.tokens is not None:
        first, stop = max(first, read.tokens[0]), min(stop, read.tokens[1])
    elif acts is None:
        first = max(first, request.prompt - 1)
    if first >= stop:
        return np.empty(0, dtype=np.int64)
    taken = np.ones(stop - first, dtype=bool)
    if acts is not None:
        taken = weights(acts, request.ids, request.prompt, first, stop) != 0
    return np.flatnonzero(taken) + request.first + first - request.position


def _deciding(
    gate: Gate, rank: int, requests: Sequence[Rows], device: torch.device | str
) -> Deciding:
    """A gate for all rows of some requests, in their order."""
    told, rows, length = [], [], 0
    for request in sorted(requests, key=lambda each: each.first):
        rows.append(np.arange(request.first, request.stop))
        reading = request.reading
        if reading is not None:
            own = request.wanted[rank].prompt
            prompt = request.prompt if own is None else own
            stop = request.position + request.stop - request.first
            if not reading.of.written:
                stop = min(stop, prompt)
            first = max(request.position, reading.columns)
            if first < stop:
                ahead = length - request.position
                told.append(Told(reading, first, stop, ahead, prompt - 1))
        length += request.stop - request.first
    where = torch.from_numpy(np.concatenate(rows)).to(device)
    return Deciding(gate, where, rank, told)


def _share(request: Rows, one: Wanted, acts: Acts) -> _Share | None:
    """The rows that a scope takes, and their dials; None where it takes none."""
    prompt = request.prompt if one.prompt is None else one.prompt
    stop = request.position + request.stop - request.first
    ahead = request.first - request.position
    inside = stretch(acts, prompt)
    if inside is not None:
        first, stop = max(inside[0], request.position), min(inside[1], stop)
        return _Share(slice(first + ahead, stop + ahead), one.dial) if first < stop else None
    share = weights(acts, request.ids, prompt, request.position, stop)
    rows = np.flatnonzero(share)
    return _Share(rows + request.first, one.dial * share[rows]) if len(rows) else None


AT_WORK = AtWork()
#: What engines call the operation.
OPERATION = "trimtab::steer"


@torch.library.custom_op(OPERATION, mutates_args=("x",))
def steer(x: Tensor, residual: Tensor | None, site: int) -> None:
    """Change the activations of a site in place by the plan of the pass."""
    AT_WORK.change(x, residual, site)
