"""What is done to rows of a pass apart from the bank: prompts are read, gates decide, and operators
change rows by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.engines.asking import ReadingOf
from trimtab.engines.loaded import Step
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


class Sum(NamedTuple):
    """A read of a prompt, and the rows that it takes here."""

    reading: Reading
    number: int
    rows: Tensor

    def act(self, x: Tensor, residual: Tensor | None) -> None:
        self.reading.add(self.number, stream(x, residual, self.rows))


class Told(NamedTuple):
    """A reading that hears of a gate: of its tokens from `first` up to `stop`, which are so many
    rows `ahead` among the gate's; and which token is the prompt's last one."""

    reading: Reading
    first: int
    stop: int
    ahead: int
    last: int


@dataclass(eq=False)
class Deciding:
    """A gate in a pass, for the rows of all requests that have it, [rows]: the scores of each of
    its conditions, and where it fires. `told` are the requests whose readings hear of it."""

    gate: Gate
    rows: Tensor
    rank: int
    told: list[Told]
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


class Score(NamedTuple):
    """A condition of a gate reads its site."""

    deciding: Deciding
    number: int

    def act(self, x: Tensor, residual: Tensor | None) -> None:
        condition = self.deciding.gate.conditions[self.number]
        read = stream(x, residual, self.deciding.rows)
        self.deciding.scores[self.number] = condition.scores(read)
        if len(self.deciding.scores) == len(self.deciding.gate.conditions):
            self.deciding.decided()


class Change(NamedTuple):
    """An operator, the rows that it changes [rows], and a dial for each, [rows]; and the gate that
    they have, with the places of these rows among the gate's, [rows]."""

    step: Step
    rows: Tensor
    dials: Tensor
    deciding: Deciding | None = None
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


def stream(x: Tensor, residual: Tensor | None, rows: Tensor) -> Tensor:
    """The activations of some rows."""
    return x[rows] if residual is None else x[rows] + residual[rows]
