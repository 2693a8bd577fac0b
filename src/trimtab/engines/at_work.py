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

from trimtab.engines.asking import Read, ReadingOf, Wanted
from trimtab.engines.loaded import Step
from trimtab.engines.tokens import weights
from trimtab.steering import Gate


@dataclass(eq=False)
class Reading:
    """What is read of one prompt, as far as it has been: of each of its reads the sum over tokens,
    [units] in float64, and how many, or these tokens' activations, pass by pass, [tokens, units] in
    float32; and of gates that decide token by token, by their place in the stack, the tokens at
    which each fired, by number, and the scores at the prompt's last one, [conditions]."""

    of: ReadingOf
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    fired: dict[int, list[int]] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    #: Tokens that were read. Those of a prompt that is read again, because its blocks were given to
    #: others, count once.
    columns: int = 0

    def add(self, number: int, x: Tensor) -> None:
        """Some tokens' activations, [tokens, units]."""
        if self.of.reads[number].whole:
            self.rows.setdefault(number, []).append(x.float().cpu())
            return
        total = x.double().sum(0).cpu()
        self.sums[number] = self.sums[number] + total if number in self.sums else total
        self.counts[number] = self.counts.get(number, 0) + len(x)


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


class _Sum(NamedTuple):
    """A read of a prompt, and the rows that it takes here."""

    reading: Reading
    number: int
    rows: Tensor

    def act(self, x: Tensor, residual: Tensor | None) -> None:
        self.reading.add(self.number, _stream(x, residual, self.rows))


class _Told(NamedTuple):
    """A reading that hears of a gate: of its tokens from `first` up to `stop`, which are so many
    rows `ahead` among the gate's; and which token is the prompt's last one."""

    reading: Reading
    first: int
    stop: int
    ahead: int
    last: int


@dataclass(eq=False)
class _Deciding:
    """A gate in a pass, for the rows of all requests that have it, [rows]: the scores of each of
    its conditions, and where it fires. `told` are the requests whose readings hear of it."""

    gate: Gate
    rows: Tensor
    rank: int
    told: list[_Told]
    scores: dict[int, Tensor] = field(default_factory=dict)
    fires: Tensor | None = None

    def decided(self) -> Tensor:
        """Where it fires, [rows]; what conditions read comes before what they decide."""
        if self.fires is None:
            self.fires = self.gate.decide([self.scores[i] for i in range(len(self.scores))])
            for reading, first, stop, ahead, last in self.told:
                fired = self.fires[first + ahead : stop + ahead].nonzero()[:, 0] + first
                reading.fired.setdefault(self.rank, []).extend(fired.tolist())
                if first <= last < stop:
                    scores = [self.scores[i][last + ahead] for i in range(len(self.scores))]
                    reading.scores[self.rank] = torch.stack(scores).double().cpu()
        return self.fires


class _Score(NamedTuple):
    """A condition of a gate reads its site."""

    deciding: _Deciding
    number: int

    def act(self, x: Tensor, residual: Tensor | None) -> None:
        condition = self.deciding.gate.conditions[self.number]
        read = _stream(x, residual, self.deciding.rows)
        self.deciding.scores[self.number] = condition.scores(read)
        if len(self.deciding.scores) == len(self.deciding.gate.conditions):
            self.deciding.decided()


class _Change(NamedTuple):
    """An operator, the rows that it changes [rows], and a dial for each, [rows]; and the gate that
    they have, with the places of these rows among the gate's, [rows]."""

    step: Step
    rows: Tensor
    dials: Tensor
    deciding: _Deciding | None = None
    places: Tensor | None = None

    def act(self, x: Tensor, residual: Tensor | None) -> None:
        rows, dials = self.rows, self.dials
        if self.deciding is not None:
            fires = self.deciding.decided()[self.places]
            rows, dials = rows[fires], dials[fires]
            if not len(rows):
                return
        old = x[rows]
        if residual is None:
            x[rows] = self.step.operator.bind(dials, x.device)(old)
            return
        whole = old + residual[rows]
        change = self.step.operator.bind(dials, x.device)(whole).float() - whole.float()
        x[rows] = (old.float() + change).to(x.dtype)


def _stream(x: Tensor, residual: Tensor | None, rows: Tensor) -> Tensor:
    """The activations of some rows."""
    return x[rows] if residual is None else x[rows] + residual[rows]


@dataclass
class AtWork:
    """Steerings by digest, sites by number, and the plan of the pass at hand."""

    sites: list[str] = field(default_factory=list)
    loaded: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    #: By the number of a site what is done there, in order.
    plan: dict[int, list[_Sum | _Score | _Change]] = field(default_factory=dict)
    #: How often each site was passed.
    calls: list[int] = field(default_factory=list)
    #: Where activations are watched: by the number of a site its last row, before it is changed.
    seen: dict[int, Tensor] | None = None
    #: What is read of prompts, by name, until it is asked for.
    readings: dict[str, Reading] = field(default_factory=dict)
    #: Rows that were to be changed by a steering that is not loaded, which nothing should let come.
    missed: int = 0

    def at(self, sites: Sequence[str]) -> None:
        """Begin anew, at some sites."""
        self.sites, self.calls = list(sites), [0] * len(sites)
        self.loaded, self.plan = {}, {}

    def begin(self, requests: Sequence[Rows], device: torch.device | str = "cpu") -> None:
        """Make the plan of a pass."""
        ordered: dict[int, list[tuple[int, int, _Sum | _Score | _Change]]] = {}
        for site, order, act in (*self._sums(requests, device), *self._steps(requests, device)):
            ordered.setdefault(self.sites.index(site), []).append((*order, act))
        self.plan = {
            site: [act for _, _, act in sorted(acts, key=lambda each: each[:2])]
            for site, acts in ordered.items()
        }
        for request in requests:
            if request.reading is not None:
                stop = request.position + request.stop - request.first
                request.reading.columns = max(request.reading.columns, stop)

    def _sums(
        self, requests: Sequence[Rows], device: torch.device | str
    ) -> Iterator[tuple[str, tuple[int, int], _Sum]]:
        """What is read of prompts, before anything is changed."""
        for request in requests:
            reading = request.reading
            for number, read in enumerate(reading.of.reads if reading is not None else ()):
                assert reading is not None
                rows = _read_rows(request, reading, read)
                if len(rows):
                    where = torch.from_numpy(rows).to(device)
                    yield read.site, (-1, number), _Sum(reading, number, where)

    def _steps(
        self, requests: Sequence[Rows], device: torch.device | str
    ) -> Iterator[tuple[str, tuple[int, int], _Score | _Change]]:
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
                for number, (rows, dials) in _shares(request, one):
                    of = together.setdefault((rank, one.digest, one.of, number), ([], []))
                    of[0].append(rows)
                    of[1].append(dials)
        deciding = {}
        for key, whose in gated.items():
            gate = self.loaded[key[1]][0].gate
            assert gate is not None  # which all steps of a steering have
            deciding[key] = _deciding(gate, key[0], whose, device)
            for number, condition in enumerate(gate.conditions):
                yield condition.site, (key[0], -1), _Score(deciding[key], number)
        for (rank, digest, scopes, number), (rows, dials) in together.items():
            where = torch.from_numpy(np.concatenate(rows)).to(device)
            dial = torch.from_numpy(np.concatenate(dials))
            gate_here = deciding.get((rank, digest))
            places = None if gate_here is None else torch.searchsorted(gate_here.rows, where)
            for step in self.loaded[digest]:
                own = scopes[step.number] if step.number < len(scopes) else 0
                if own == number:
                    turned = (dial * step.weight).float().to(device)
                    change = _Change(step, where, turned, gate_here, places)
                    yield step.site, (rank, step.number), change

    def change(self, x: Tensor, residual: Tensor | None, site: int) -> None:
        """Do what the plan says at a site to activations x [rows, units], in place. With a residual
        the activation is the sum of both, and x takes the change."""
        self.calls[site] += 1
        x = x.view(-1, x.shape[-1])  # the Transformers backend keeps a batch dimension
        residual = None if residual is None else residual.view(-1, x.shape[-1])
        if self.seen is not None:
            last = x[-1] if residual is None else x[-1] + residual[-1]
            self.seen[site] = last.float().clone()
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
) -> _Deciding:
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
                told.append(_Told(reading, first, stop, ahead, prompt - 1))
        length += request.stop - request.first
    where = torch.from_numpy(np.concatenate(rows)).to(device)
    return _Deciding(gate, where, rank, told)


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
