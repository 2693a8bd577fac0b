"""What curves over a dial say: peaks, the sweet spot, how cost begins and where it ends, a fit of
the concept's probability; as data and in words.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import expit
from torch import Tensor

from trimtab.dials import idle_dial
from trimtab.errors import TrimtabError
from trimtab.figures import weighted_interval
from trimtab.options import Bounds
from trimtab.strength.concept import ConceptCurve
from trimtab.strength.costs import CostCurve
from trimtab.strength.curves import Curve, TokenCurve, farthest

#: Cost is read as quadratic as far as it stays below this, in nats per token.
_QUADRATIC = 0.5
_FEWEST = 5


@dataclass(frozen=True)
class Peak:
    """Where a token is most probable: at `dial`, with `low` and `high` around it.

    Of a bump with runs on resampled contrasts these are the extremes of the runs' own peaks;
    otherwise they are how far around it the probability is within the curve's tolerance of the
    peak's; `interval` says which. Between the dials of the curve a cubic spline is read. `kind` is
    bump (the peak is inside the range), rises or falls (it is at the right or the left end), flat.
    """

    token: str
    id: int
    kind: Literal["bump", "rises", "falls", "flat"]
    dial: float
    low: float
    high: float
    delta_p: float
    interval: str = ""


@dataclass(frozen=True)
class SweetSpot:
    """The dials from `start` to `end` at which the tokens gain and nothing leaves its bounds.

    `best` is the end that is farther from the dial that does nothing: there the tokens' summed
    probability has risen by `gain`, and KL and entropy (nats) are as given. It goes no further
    because of `why`: kl, entropy, peak (the tokens gain no more) or range. Of kl and entropy
    `beyond` is the next dial of the curve, and `left` what it has there (nats).
    """

    start: float
    end: float
    best: float
    gain: float
    kl: float
    entropy: float
    why: Literal["kl", "entropy", "peak", "range"]
    beyond: float | None = None
    left: float | None = None


@dataclass(frozen=True)
class Sigmoid:
    """low + (high - low) / (1 + exp(-slope (dial - middle))), with 95 % intervals of middle and
    slope, and the share of variance that it explains."""

    low: float
    high: float
    middle: float
    middle_ci95: tuple[float, float]
    slope: float
    slope_ci95: tuple[float, float]
    r2: float

    def at(self, dials: Tensor) -> Tensor:
        """The fitted probability."""
        return self.low + (self.high - self.low) * torch.sigmoid(
            self.slope * (dials.double() - self.middle)
        )


@dataclass(frozen=True)
class Beginning:
    """Cost near the dial that does nothing: slope * dial + curvature / 2 * dial^2, each with its
    95 % bootstrap interval over blocks of text, read up to |dial| = `until`.

    In theory the slope is zero for a perfectly trained model; real models may have one.
    """

    slope: float
    slope_ci95: tuple[float, float]
    curvature: float
    curvature_ci95: tuple[float, float]
    until: float


@dataclass(frozen=True)
class Plateau:
    """Cost at one end of the dial beside what Proposition 4.1 foretells for infinity."""

    dial: float
    measured: float
    foretold: float


@dataclass(frozen=True, repr=False)
class Reading:
    """What the curves of one steering say."""

    method: str
    dial: str
    unit: str
    peaks: tuple[Peak, ...] = ()
    sweet_spot: SweetSpot | None = None
    bounds: Bounds | None = None
    concept: Sigmoid | None = None
    cost: Beginning | None = None
    plateaus: tuple[Plateau, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Reading of {self.method}: {'; '.join(self.lines())}>"

    def as_json(self) -> dict[str, Any]:
        """For `trimtab strength curve --json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """In words."""
        unit, said = self.unit, []
        if self.bounds is not None:
            said.append(self._sweet_spot_line())
        said += [_peak_line(peak, unit) for peak in self.peaks]
        if self.concept is not None:
            fit = self.concept
            first, last = (fit.low, fit.high) if fit.slope >= 0 else (fit.high, fit.low)
            said.append(
                f"the concept goes from {first:.0%} to {last:.0%}, half of it at "
                f"{fit.middle:.3g}{unit} [{fit.middle_ci95[0]:.3g}, {fit.middle_ci95[1]:.3g}] "
                f"(sigmoid, R2 {fit.r2:.2f})"
            )
        if self.cost is not None:
            cost = self.cost
            said.append(
                f"cost begins as {cost.slope:+.3g} dial {cost.curvature / 2:+.3g} dial^2 nats per "
                f"token (curvature [{cost.curvature_ci95[0]:.3g}, {cost.curvature_ci95[1]:.3g}], "
                f"read up to {cost.until:.3g}{unit})"
            )
        for plateau in self.plateaus:
            said.append(
                f"cost at {plateau.dial:g}{unit} is {plateau.measured:.2f} nats per token; without "
                f"end it goes to {plateau.foretold:.2f} (Proposition 4.1)"
            )
        return [*said, *self.notes]

    def _sweet_spot_line(self) -> str:
        assert self.bounds is not None
        allowed = (
            f"KL up to {self.bounds.max_kl:g} nats, entropy {self.bounds.min_entropy:g} to "
            f"{self.bounds.max_entropy:g} of the unsteered one"
        )
        spot = self.sweet_spot
        if spot is None:
            return f"no sweet spot: the tokens gain nowhere within the bounds ({allowed})"
        reasons = {"peak": "the tokens gain no more beyond it", "range": "the curve ends there"}
        if spot.beyond is None or spot.left is None:
            why = reasons[spot.why]
        else:
            name = "KL" if spot.why == "kl" else "entropy"
            beyond = f"{spot.beyond:.4g}{self.unit}"
            why = f"at the next dial of the curve, {beyond}, {name} is {spot.left:.3g}"
        return (
            f"sweet spot: {spot.start:.4g} to {spot.end:.4g}{self.unit}; at {spot.best:.4g} the "
            f"tokens have {spot.gain:+.3f} in probability, KL is {spot.kl:.3f}, entropy "
            f"{spot.entropy:.2f} nats; {why} ({allowed})"
        )


def _peak_line(peak: Peak, unit: str) -> str:
    name, gain = repr(peak.token), f"{peak.delta_p:+.3f} in probability"
    if peak.kind == "flat":
        return f"{name} stays as probable as it is"
    if peak.kind == "bump":
        ends = f"{peak.low:.4g} to {peak.high:.4g}"
        return f"{name} peaks at {peak.dial:.4g}{unit} ({ends}: {peak.interval}), {gain}"
    place = "is highest where the dial " + ("ends" if peak.kind == "rises" else "begins")
    far = peak.low if peak.kind == "rises" else peak.high
    level = "" if far == peak.dial else f" (no lower from {far:.4g} on)"
    return f"{name} {place}, {peak.dial:.4g}{unit}{level}, {gain}"


def read(
    curve: Curve | None = None,
    cost: CostCurve | None = None,
    concept: ConceptCurve | None = None,
    bounds: Bounds | None = None,
) -> Reading:
    """Read the curves of one steering; those that there are."""
    given = [one for one in (curve, cost, concept) if one is not None]
    if not given:
        raise TrimtabError("there is no curve to read")
    steering = given[0].steering
    notes = [] if curve is None else _token_notes(curve)
    fit = None
    if concept is not None:
        try:
            fit = fit_sigmoid(concept)
        except TrimtabError as error:
            notes.append(str(error))
    beginning = None
    if cost is not None:
        try:
            beginning = read_beginning(cost)
        except TrimtabError as error:
            notes.append(str(error))
        if cost.plateaus is None:
            notes.append(f"no foretold plateau: {cost.why}")
    idle = idle_dial(steering)
    if curve is not None and idle not in curve.dials.tolist():
        where = "no dial" if idle is None else f"{idle:g}, which is not in this range"
        notes.append(f"no sweet spot: it begins where the steering does nothing, at {where}")
        bounds = None
    elif curve is not None:
        bounds = bounds or Bounds()
    return Reading(
        steering.method,
        steering.dial.name,
        steering.dial.unit,
        () if curve is None else tuple(find_peak(curve, token) for token in curve.tokens),
        None if curve is None or bounds is None else find_sweet_spot(curve, bounds),
        None if curve is None else bounds,
        fit,
        beginning,
        () if cost is None else _plateaus(cost),
        tuple(notes),
    )


def _token_notes(curve: Curve) -> list[str]:
    """Which tokens are shown, where nobody named them, and what is a sequence of several."""
    said = [curve.chosen] if curve.chosen else []
    for token in curve.tokens:
        if len(token.pieces) > 1:
            pieces = ", ".join(map(repr, token.pieces))
            said.append(
                f"{token.token!r} is {len(token.pieces)} tokens, {pieces}: its probability is that "
                "of all of them in turn"
            )
    return said


def find_peak(curve: Curve, token: TokenCurve) -> Peak:
    """Where a token of the curve is most probable."""
    dials, p, tolerance = curve.dials, token.delta_p, max(curve.tolerance, 1e-9)
    first, last = _ends(dials)
    top = float(p.max())
    near = f"within {tolerance:g} of its probability there"
    if top - float(p.min()) <= tolerance:
        return Peak(token.token, token.id, "flat", float(dials[p.argmax()]), first, last, top, near)
    kind: Literal["bump", "rises", "falls"] = "bump"
    dial = _summit(dials, p)
    if top - float(p[-1]) <= tolerance:
        kind, dial = "rises", last
    elif top - float(p[0]) <= tolerance:
        kind, dial = "falls", first
    through = CubicSpline(dials.numpy(), p.numpy())
    value = float(through(dial))
    if token.runs is not None and kind == "bump":
        own = [dial, *(_summit(dials, run) for run in token.runs)]
        fits = f"peaks of {len(token.runs)} fits on resampled rows"
        return Peak(token.token, token.id, kind, dial, min(own), max(own), value, fits)
    crossed = through.solve(value - tolerance, extrapolate=False)
    low = max((float(x) for x in crossed if x <= dial), default=first)
    high = min((float(x) for x in crossed if x >= dial), default=last)
    return Peak(token.token, token.id, kind, dial, low, high, value, near)


def _ends(dials: Tensor) -> tuple[float, float]:
    return float(dials[0]), float(dials[-1])


def _summit(dials: Tensor, p: Tensor) -> float:
    """Where the spline through the largest value and its neighbours is highest."""
    top = int(p.argmax())
    around = dials[max(top - 1, 0) : top + 2].tolist()
    through = CubicSpline(dials.numpy(), p.numpy())
    flat = through.derivative().roots(extrapolate=False)
    between = [float(x) for x in flat if around[0] <= x <= around[-1]]
    return max([float(dials[top]), *between], key=lambda dial: float(through(dial)))


def find_sweet_spot(curve: Curve, bounds: Bounds) -> SweetSpot | None:
    """From the dial that does nothing outwards while KL and entropy stay within their bounds, to
    where the tokens' probability is highest; of the two sides the one that gains more. None where
    they gain nothing that the curve's tolerance does not explain."""
    idle = idle_dial(curve.steering)
    dials = curve.dials.tolist()
    if idle is None or idle not in dials:
        return None
    middle, share = dials.index(idle), curve.entropy / curve.base_entropy
    spots = []
    for step in (1, -1):
        last = farthest(curve.kl, share, bounds, middle, step)
        inside = range(middle, last + step, step)
        best = max(inside, key=lambda i: float(curve.target[i]))
        gain = float(curve.target[best] - curve.target[middle])
        if gain <= max(curve.tolerance, 1e-9):
            continue
        first = next(
            i
            for i in range(best, middle - step, -step)
            if i == middle or curve.target[i - step] <= curve.target[middle]
        )
        why: Literal["kl", "entropy", "peak", "range"] = "peak"
        beyond, left = last + step, None
        if best == last and not 0 <= beyond < len(dials):
            why = "range"
        elif best == last:
            why = "kl" if float(curve.kl[beyond]) > bounds.max_kl else "entropy"
            left = float((curve.kl if why == "kl" else curve.entropy)[beyond])
        start, end = sorted((dials[first], dials[best]))
        kl, entropy = float(curve.kl[best]), float(curve.entropy[best])
        following = None if left is None else dials[beyond]
        spots.append(SweetSpot(start, end, dials[best], gain, kl, entropy, why, following, left))
    return max(spots, key=lambda spot: spot.gain, default=None)


def fit_sigmoid(concept: ConceptCurve) -> Sigmoid:
    """A sigmoid through the concept's probability, each point weighted by its standard error."""
    x, y = concept.dials.double().numpy(), concept.probability.double().numpy()
    n = concept.n.double().numpy()
    if len(x) < _FEWEST:
        raise TrimtabError(f"no sigmoid: a fit of the concept needs {_FEWEST} dials or more")
    if np.ptp(y) == 0:
        raise TrimtabError("no sigmoid: the concept is as probable at every dial")
    smoothed = (y * n + 1) / (n + 2)  # so that a share of 0 or 1 has an error too
    error = np.sqrt(smoothed * (1 - smoothed) / n)
    rising = 1.0 if np.corrcoef(x, y)[0, 1] >= 0 else -1.0
    start = [y.min(), y.max(), x[np.abs(y - (y.min() + y.max()) / 2).argmin()]]
    start.append(rising * 4 / np.ptp(x))

    def shape(dial: Any, low: float, high: float, middle: float, slope: float) -> Any:
        return low + (high - low) * expit(slope * (dial - middle))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)  # of points that do not determine it
            found, covariance = curve_fit(
                shape,
                x,
                y,
                p0=start,
                sigma=error,
                absolute_sigma=True,
                bounds=([0, 0, x.min(), -np.inf], [1, 1, x.max(), np.inf]),
            )
    except (RuntimeError, ValueError, OptimizeWarning) as failure:
        raise TrimtabError(f"no sigmoid: the fit of the concept failed ({failure})") from failure
    half = 1.96 * np.sqrt(np.diag(covariance))
    if not np.isfinite(half).all():
        raise TrimtabError("no sigmoid: the concept's curve does not determine one")
    low, high, middle, slope = (float(value) for value in found)
    if low > high:
        low, high, slope = high, low, -slope  # the same curve
    explained = 1 - ((y - shape(x, *found)) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return Sigmoid(
        low,
        high,
        middle,
        (middle - float(half[2]), middle + float(half[2])),
        slope,
        (slope - float(half[3]), slope + float(half[3])),
        float(explained),
    )


def read_beginning(cost: CostCurve) -> Beginning:
    """Slope and curvature of the cost at the dial that does nothing, by least squares through it.

    Both are linear in the cost, so each block of text has its own and the interval is a bootstrap
    over blocks.
    """
    idle = idle_dial(cost.steering)
    if idle is None:
        raise TrimtabError("no curvature: this steering does nothing at no dial")
    x = cost.dials - idle
    cheap = cost.delta.abs() <= _QUADRATIC
    # Up to the first dial of each side that costs more.
    ends = [
        float(x[~cheap & side].abs().min()) if (~cheap & side).any() else math.inf
        for side in (x < 0, x > 0)
    ]
    near = ((x > -ends[0]) & (x < ends[1]) & (x != 0)).nonzero().flatten()
    if len(near) < _FEWEST or not (x[near].min() < 0 < x[near].max()):
        raise TrimtabError(
            f"no curvature: {_FEWEST} dials or more on both sides of {idle:g} are needed where "
            f"cost is below {_QUADRATIC:g} nats"
        )
    columns = torch.stack((x[near], x[near].square() / 2), 1)
    per_block = torch.linalg.lstsq(columns, cost.per_block[near]).solution  # [2, blocks]
    slope, curvature = (weighted_interval(row, cost.block_tokens) for row in per_block)
    return Beginning(
        slope.value,
        (slope.low, slope.high),
        curvature.value,
        (curvature.low, curvature.high),
        float(x[near].abs().max()),
    )


def _plateaus(cost: CostCurve) -> tuple[Plateau, ...]:
    if cost.plateaus is None:
        return ()
    ends: Sequence[tuple[int, float]] = ((0, cost.plateaus[0]), (-1, cost.plateaus[1]))
    found = []
    for place, foretold in ends:
        dial = float(cost.dials[place])
        if dial * (1 if place else -1) > 0:  # a dial that goes one way only has one end
            found.append(Plateau(dial, float(cost.delta[place]), foretold))
    return tuple(found)
