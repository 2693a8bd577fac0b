"""What a pass over a contrast may keep of a site.

A statistic is a class with `update(sides)`, which is handed the activations of some texts at a
time, and `needs_pairs`. It runs over the texts and forgets them; only `Samples` keeps every text's
activation, for classifiers that have to see them all, and keeps them in a file.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

#: Half precision reaches 65,504: each text is scaled by a power of two so that its largest number
#: lies just below this.
_HALF_RANGE = 32768.0
#: To which share of itself an effect is known.
_KNOWN = 1e-7


class Sides(NamedTuple):
    """Some texts of both sides; of a paired contrast, row by row the sides of the same pairs."""

    positive: Tensor  # [texts, units] float32
    negative: Tensor
    positive_rows: Tensor  # [texts], which row of the contrast each one is
    negative_rows: Tensor


class Statistic(Protocol):
    """What `collect` keeps of one site."""

    needs_pairs: bool

    def update(self, sides: Sides) -> None: ...


@dataclass
class SignCounts:
    """How often a unit is larger on the positive side, and how often on the negative."""

    needs_pairs = True
    pairs: int = 0
    larger: Tensor | int = 0  # [units], pairs with x_pos > x_neg
    smaller: Tensor | int = 0

    def update(self, sides: Sides) -> None:
        momentum = sides.positive - sides.negative
        self.pairs += len(momentum)
        self.larger = self.larger + (momentum > 0).sum(0)
        self.smaller = self.smaller + (momentum < 0).sum(0)

    def rates(self) -> tuple[Tensor, Tensor]:
        """r_pos and r_neg, [units] in float64; a pair with equal activations counts for neither."""
        larger, smaller = torch.as_tensor(self.larger), torch.as_tensor(self.smaller)
        return larger.double().cpu() / self.pairs, smaller.double().cpu() / self.pairs


@dataclass
class Means:
    """The mean activation of each side."""

    needs_pairs = False
    counts: list[int] = field(default_factory=lambda: [0, 0])
    sums: list[Any] = field(default_factory=lambda: [0.0, 0.0])  # [units] each

    def update(self, sides: Sides) -> None:
        for side, activations in enumerate((sides.positive, sides.negative)):
            self.counts[side] += len(activations)
            self.sums[side] = self.sums[side] + _wide(activations).sum(0)

    @property
    def positive(self) -> Tensor:
        return self._mean(0)

    @property
    def negative(self) -> Tensor:
        return self._mean(1)

    @property
    def difference(self) -> Tensor:
        """mean over positives - mean over negatives, [units] in float64."""
        return self.positive - self.negative

    def _mean(self, side: int) -> Tensor:
        return torch.as_tensor(self.sums[side]).double().cpu() / self.counts[side]


@dataclass
class Effects:
    """The mean of what was read as an effect, and its standard error: over pairs, each of which is
    one number on the positive side; without pairs the difference of the two sides' means."""

    needs_pairs = False
    counts: list[int] = field(default_factory=lambda: [0, 0])
    sums: list[Any] = field(default_factory=lambda: [0.0, 0.0])  # [units] each
    squares: list[Any] = field(default_factory=lambda: [0.0, 0.0])

    def update(self, sides: Sides) -> None:
        for side, effects in enumerate((sides.positive, sides.negative)):
            self.counts[side] += len(effects)
            self.sums[side] = self.sums[side] + _wide(effects).sum(0)
            self.squares[side] = self.squares[side] + _wide(effects).square().sum(0)

    @property
    def mean(self) -> Tensor:
        """[units] in float64."""
        means = [self._mean(side) for side in self._sides]
        return means[0] - means[1] if len(means) > 1 else means[0]

    @property
    def error(self) -> Tensor:
        """The standard error of the mean, [units] in float64; NaN where a side is one text."""
        variance = torch.zeros(())
        for side in self._sides:
            count = self.counts[side]
            squares = torch.as_tensor(self.squares[side]).double().cpu() / count
            spread = (squares - self._mean(side).square()).clamp(min=0)
            variance = variance + spread / (count - 1) if count > 1 else spread * math.nan
        # Effects are sums in float32: of pairs that are all alike the last digits are not known.
        return variance.sqrt().maximum(_KNOWN * self.mean.abs())

    @property
    def _sides(self) -> tuple[int, ...]:
        return (0, 1) if self.counts[1] else (0,)

    def _mean(self, side: int) -> Tensor:
        return torch.as_tensor(self.sums[side]).double().cpu() / self.counts[side]


@dataclass
class Active:
    """In how many texts of each side a unit is above zero."""

    needs_pairs = False
    counts: list[Any] = field(default_factory=lambda: [0, 0])  # [units] each

    def update(self, sides: Sides) -> None:
        for side, activations in enumerate((sides.positive, sides.negative)):
            self.counts[side] = self.counts[side] + (activations > 0).sum(0)

    @property
    def difference(self) -> Tensor:
        """#positives above zero - #negatives above zero, [units]."""
        positive, negative = (torch.as_tensor(count).cpu() for count in self.counts)
        return positive - negative


@dataclass
class Largest:
    """The largest activation of each unit over the texts of both sides."""

    needs_pairs = False
    value: Any = -math.inf  # [units]

    def update(self, sides: Sides) -> None:
        for activations in (sides.positive, sides.negative):
            if len(activations):
                largest = activations.amax(0).double().cpu()
                self.value = torch.maximum(largest, torch.as_tensor(self.value).double())


@dataclass
class Correlation:
    """Pearson's r of each unit with an outcome, from sums that forget the texts. Of a contrast the
    positive side has outcome 1 and the negative one 0.

    Sums are of what lies beyond the first text, so that a unit which is the same at every text has
    exactly no variance; its r is 0.
    """

    needs_pairs = False
    count: int = 0
    _first: Any = None  # the first text's activations [units] and outcome
    _sums: list[Any] = field(default_factory=lambda: [0.0] * 5)  # of x, x^2, x y, y, y^2

    def update(self, sides: Sides) -> None:
        self.add(sides.positive, torch.ones(len(sides.positive)))
        self.add(sides.negative, torch.zeros(len(sides.negative)))

    def add(self, activations: Tensor, outcomes: Tensor) -> None:
        """Take in texts: activations [texts, units], outcomes [texts]."""
        if not len(activations):
            return
        x, y = activations.double().cpu(), outcomes.double()
        if self._first is None:
            self._first = (x[0].clone(), y[0].clone())
        x, y = x - self._first[0], y - self._first[1]
        self.count += len(x)
        found = (x.sum(0), x.square().sum(0), y @ x, y.sum(), y.square().sum())
        self._sums = [old + new for old, new in zip(self._sums, found, strict=True)]

    @property
    def r(self) -> Tensor:
        """[units] in float64."""
        x, xx, xy, y, yy = (each / self.count for each in self._sums)
        spread = ((xx - x.square()).clamp(min=0) * (yy - y.square()).clamp(min=0)).sqrt()
        covariance = xy - x * y
        return torch.where(spread > 0, covariance / spread.clamp(min=1e-300), 0.0).clamp(-1, 1)


@dataclass
class Aurocs:
    """How well each unit tells the sides apart: the probability that it is larger at a positive
    text than at a negative one, plus half that it is equal. Of texts only what is not 0 is kept,
    which of features is little."""

    needs_pairs = False
    counts: list[int] = field(default_factory=lambda: [0, 0])
    _units: int = 0
    #: Of each batch and side: units, values, and whether they are of the positive side.
    _kept: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def update(self, sides: Sides) -> None:
        for side, activations in enumerate((sides.positive, sides.negative)):
            self.counts[side] += len(activations)
            self._units = activations.shape[-1]
            text, unit = activations.nonzero(as_tuple=True)
            of_positive = torch.full((len(unit),), side == 0)
            kept = (unit.to("cpu", torch.int32), activations[text, unit].cpu(), of_positive)
            self._kept.append(kept)

    @property
    def auroc(self) -> Tensor:
        """[units] in float64."""
        unit, value, positive = (torch.cat(each).numpy() for each in zip(*self._kept, strict=True))
        order = np.lexsort((value, unit))
        unit, value, positive = unit[order], value[order], positive[order]
        active = np.bincount(unit, minlength=self._units)
        ones, zeros = self.counts
        below = np.bincount(unit[value < 0], minlength=self._units)
        # Places from 1 on among all texts: the silent ones share the mean of theirs.
        silent = ones + zeros - active
        start = np.concatenate(([0], np.cumsum(active)[:-1]))
        place = np.arange(len(unit)) - start[unit] + silent[unit] * (value > 0) + 1.0
        new = np.diff(unit, prepend=-1).astype(bool) | (np.diff(value, prepend=0.0) != 0)
        run = np.cumsum(new) - 1  # of equal values of one unit
        shared = (np.bincount(run, place) / np.maximum(np.bincount(run), 1))[run]
        above = np.bincount(unit, shared * positive, self._units)
        silent_ones = ones - np.bincount(unit, positive, self._units)
        ranks = above + silent_ones * (below + (silent + 1) / 2)
        return torch.from_numpy((ranks - ones * (ones + 1) / 2) / (ones * zeros))


@dataclass
class Totals:
    """What was read of each side, summed over its texts."""

    needs_pairs = False
    sums: list[Any] = field(default_factory=lambda: [0.0, 0.0])  # [units] each

    def update(self, sides: Sides) -> None:
        for side, activations in enumerate((sides.positive, sides.negative)):
            self.sums[side] = self.sums[side] + _wide(activations).sum(0)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Of the positive side and of the negative one, [units] in float64."""
        positive, negative = (torch.as_tensor(each).double().cpu() for each in self.sums)
        return positive, negative


@dataclass
class SecondMoment:
    """Of the differences m between the sides of a pair: the sum of m m', [units, units]."""

    needs_pairs = True
    sum: Any = 0.0

    def update(self, sides: Sides) -> None:
        momentum = _wide(sides.positive - sides.negative)
        self.sum = self.sum + momentum.T @ momentum


class Samples:
    """Every text's activation, in half precision in a memory-mapped file that nobody else sees."""

    needs_pairs = False

    def __init__(self) -> None:
        self._file: Any = None
        self._units = 0
        #: Of each stored activation: its side, its row of the contrast, and what undoes its scale.
        self._stored: list[tuple[int, int, float]] = []

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def update(self, sides: Sides) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as this object
            self._units = sides.positive.shape[-1]
        pairs = ((sides.positive, sides.positive_rows), (sides.negative, sides.negative_rows))
        for side, (activations, rows) in enumerate(pairs):
            own = activations.cpu()
            largest = own.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
            # A power of two, so that scaling itself rounds nothing.
            scale = torch.exp2(torch.floor(torch.log2(_HALF_RANGE / largest)).clamp(-126, 126))
            self._file.write((own * scale[:, None]).half().numpy().tobytes())
            factors = (1 / scale).tolist()
            self._stored += zip([side] * len(rows), rows.tolist(), factors, strict=True)

    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All activations [texts, units] in float32, their labels (true: positive) and their rows.

        In the order of the contrast's rows, of a pair the positive side first.
        """
        self._file.flush()
        shape = (len(self._stored), self._units)
        stored = np.memmap(self._file, dtype=np.float16, mode="r", shape=shape)
        order = sorted(
            range(len(self._stored)), key=lambda i: (self._stored[i][1], self._stored[i][0])
        )
        side, row, factor = zip(*(self._stored[i] for i in order), strict=True)
        activations = torch.from_numpy(stored[order].astype(np.float32))
        activations = activations * torch.tensor(factor, dtype=torch.float32)[:, None]
        return activations, torch.tensor(side) == 0, torch.tensor(row)


def _wide(activations: Tensor) -> Tensor:
    # MPS has no float64; the few thousand additions of float32 there are exact enough.
    return activations if activations.device.type == "mps" else activations.double()
