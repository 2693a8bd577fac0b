"""What single units do when they are scaled for real, beside what was predicted of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from trimtab.figures import mean_interval, rate_interval
from trimtab.papers.austeer.effect.rankings import RANKINGS, Fitted
from trimtab.papers.austeer.ranking import Unit
from trimtab.reading import ScaledUnit
from trimtab.reports import Run
from trimtab.sweeps import FINE, TaskRows
from trimtab.terminal import progress

#: A unit: its layer and its number.
Place = tuple[int, int]


@dataclass(frozen=True)
class Alone:
    """One unit that was scaled by 1 + gamma and by 1 - gamma: what each did to the log-odds of the
    validation rows, [rows], and what its effect predicted of the first, in nats."""

    unit: Unit
    rankings: Mapping[str, float]  # those among whose first it is, with the gain it has there
    predicted: float
    up: Tensor = field(repr=False)
    down: Tensor = field(repr=False)

    @property
    def odd(self) -> float:
        """The part of what it did that turns round with gamma, as the prediction does."""
        return float((self.up - self.down).nanmean() / 2)

    def as_ranked(self, ranking: str) -> Tensor:
        """What it did when it was scaled the way in which a ranking scales it, [rows]."""
        return self.up if self.rankings[ranking] > 0 else self.down

    def as_json(self) -> dict[str, Any]:
        return {
            "layer": self.unit.layer,
            "unit": self.unit.unit,
            "rankings": list(self.rankings),
            "predicted": self.predicted,
            "up": float(self.up.nanmean()),
            "down": float(self.down.nanmean()),
            "real": self.odd,
        }


def steered_alone(rows: TaskRows, found: Fitted, count: int, gamma: float, run: Run) -> list[Alone]:
    """The first units of each ranking (of random ones those of the first draw), each by itself; a
    layer's units are rows of a batch."""
    among: dict[Place, dict[str, float]] = {}
    units: dict[Place, Unit] = {}
    for name in RANKINGS:
        first = found.of(name)[0]
        for unit, gain in zip(first.units[:count], first.gains, strict=False):
            place = unit.layer, unit.unit
            units.setdefault(place, unit)
            among.setdefault(place, {})[name] = gain
    base = rows.values(None)[FINE]
    done = []
    for place, values in _scaled(rows, found, sorted(units), gamma, run).items():
        up, down = (torch.tensor(own, dtype=torch.float64) - base for own in values)
        unit = units[place]
        done.append(Alone(unit, among[place], gamma * found.effects.of(unit), up, down))
    return done


def _scaled(
    rows: TaskRows, found: Fitted, places: Sequence[Place], gamma: float, run: Run
) -> dict[Place, list[list[float]]]:
    """The log-odds of the rows with each unit scaled up, and with it scaled down; what a run
    directory has of them is not computed again."""
    lm, kind = rows.language_model, found.rankings[0].site
    values: dict[Place, list[list[float]]] = {}
    missing: dict[int, list[Place]] = {}
    for place in places:
        kept = run.kept(_file(place))
        if kept is None:
            missing.setdefault(place[0], []).append(place)
        else:
            values[place] = [row["values"] for row in kept]
    with progress("steering single units", sum(map(len, missing.values()))) as advance:
        for layer, some in missing.items():
            site = lm.anatomy.sites(kind, (layer,))[0]
            gains = (gamma, -gamma)
            units = [ScaledUnit(site, unit, gain) for _, unit in some for gain in gains]
            both = rows.scaled(units).view(len(some), len(gains), -1)
            for place, own in zip(some, both.tolist(), strict=True):
                named = {"task": rows.task, "steering": _file(place)}
                kept = [
                    {**named, "id": f"{gain:g}", "gain": gain, "values": each}
                    for gain, each in zip(gains, own, strict=True)
                ]
                run.keep(_file(place), kept)
                values[place] = own
            advance(len(some))
    return {place: values[place] for place in places}


def _file(place: Place) -> str:
    layer, unit = place
    return f"alone-{layer}-{unit}"


def alone_as_json(alone: Sequence[Alone], gamma: float) -> dict[str, Any] | None:
    """How well real gains follow predicted ones, and what the units of each ranking do on average
    when they are scaled its way."""
    if not alone:
        return None
    predicted, real = [one.predicted for one in alone], [one.odd for one in alone]
    same = torch.tensor([a * b > 0 for a, b in zip(predicted, real, strict=True)])
    signs = rate_interval(same)
    return {
        "gamma": gamma,
        "units": [one.as_json() for one in alone],
        **_line(predicted, real),
        "same_sign": {"value": signs.value, "ci95": list(signs.ci95), "n": signs.n},
        "rankings": [_ranking(name, alone) for name in RANKINGS],
    }


def _line(predicted: Sequence[float], real: Sequence[float]) -> dict[str, Any]:
    """Correlations, and the slope of real over predicted gains with its 95 % interval (t)."""
    if len(predicted) < 3 or len(set(predicted)) < 2 or len(set(real)) < 2:
        return {"pearson": None, "spearman": None, "slope": None}
    line = stats.linregress(predicted, real)
    reach = float(stats.t.ppf(0.975, len(predicted) - 2)) * float(line.stderr)
    slope = float(line.slope)
    return {
        "pearson": float(line.rvalue),
        "spearman": float(stats.spearmanr(predicted, real).statistic),
        "slope": {
            "value": slope,
            "ci95": [slope - reach, slope + reach],
            "n": len(predicted),
            "intercept": float(line.intercept),
        },
    }


def _ranking(name: str, alone: Sequence[Alone]) -> dict[str, Any]:
    """Means over a ranking's units, in the direction in which it scales them; the interval is over
    the rows."""
    own = [one for one in alone if name in one.rankings]
    gains = torch.stack([one.as_ranked(name) for one in own]).mean(0)
    clear = mean_interval(gains[~gains.isnan()])
    signed = [one.predicted * (1 if one.rankings[name] > 0 else -1) for one in own]
    toward = rate_interval(torch.tensor([float(one.as_ranked(name).nanmean()) > 0 for one in own]))
    return {
        "name": name,
        "units": len(own),
        "predicted": sum(signed) / len(own),
        "real": {"value": clear.value, "ci95": list(clear.ci95), "n": clear.n},
        "raise": {"value": toward.value, "ci95": list(toward.ci95), "n": toward.n},
    }
