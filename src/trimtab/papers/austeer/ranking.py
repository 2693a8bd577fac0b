"""The units of a kind of site, ranked by how reliably they tell the sides of a contrast apart, and
what ranking would be by chance alone (AUSteer, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import SignCounts, Want, collect, new_steering
from trimtab.methods import AUSteer, rank
from trimtab.model import LanguageModel
from trimtab.steering import Dial, Intervention, Scale, Steering


@dataclass(frozen=True)
class Unit:
    """One unit: `gain` is AUSteer's gamma at alpha 1, `rank` its place among all units from 1."""

    layer: int
    unit: int
    score: float
    r_pos: float
    r_neg: float
    rank: int

    @property
    def gain(self) -> float:
        return self.r_pos if self.r_pos > self.r_neg else -self.r_neg

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.unit}"


@dataclass(frozen=True)
class Ranking:
    """All units of a kind of site, [layers, units] each; `pairs` were compared."""

    kind: str
    layers: tuple[int, ...]
    r_pos: Tensor
    r_neg: Tensor
    pairs: int

    @property
    def scores(self) -> Tensor:
        """s, [layers, units]."""
        return torch.maximum(self.r_pos, self.r_neg)

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.r_pos.numel()

    @property
    def order(self) -> Tensor:
        """Units as flat indices, from the highest score down; the lower layer and unit goes first
        of those that are equal."""
        return rank(self.scores.flatten())

    def units(self, flat: Sequence[int]) -> list[Unit]:
        """Units by their flat indices."""
        place = torch.empty(self.size, dtype=torch.long)
        place[self.order] = torch.arange(self.size)
        width = self.r_pos.shape[1]
        found = []
        for i in flat:
            row, unit = divmod(int(i), width)
            r_pos, r_neg = float(self.r_pos[row, unit]), float(self.r_neg[row, unit])
            score = max(r_pos, r_neg)
            rank_of = int(place[i]) + 1
            found.append(Unit(self.layers[row], unit, score, r_pos, r_neg, rank_of))
        return found

    def top(self, k: int) -> list[Unit]:
        """The k units of the highest scores."""
        return self.units(self.order[:k].tolist())


def rankings(
    language_model: LanguageModel, contrast: Contrast, kinds: Sequence[str]
) -> dict[str, Ranking]:
    """Of each kind of site, from one pass over the contrast's train rows."""
    anatomy = language_model.anatomy
    sites = {kind: anatomy.sites(kind) for kind in dict.fromkeys(kinds)}
    wants = [Want(site, "last", SignCounts) for each in sites.values() for site in each]
    found = collect(language_model, contrast.train, wants)
    return {
        kind: ranking_of(kind, {site: found.of(site, "last", SignCounts) for site in each})
        for kind, each in sites.items()
    }


def site_units(language_model: LanguageModel, kind: str) -> int:
    """How many units all sites of a kind have."""
    anatomy = language_model.anatomy
    return sum(anatomy.width(site) for site in anatomy.sites(kind))


def ranking_of(kind: str, counts: Mapping[str, SignCounts]) -> Ranking:
    """From the counts of each site."""
    rates = [one.rates() for one in counts.values()]
    layers = tuple(parse_site(site)[0] or 0 for site in counts)
    pairs = next(iter(counts.values())).pairs
    if len({len(positive) for positive, _ in rates}) > 1:
        raise TrimtabError(
            f"the blocks of this model have different numbers of units at {kind}: take a kind of "
            "site that is as wide everywhere, such as ffn_out or resid"
        )
    r_pos, r_neg = (torch.stack(each) for each in zip(*rates, strict=True))
    return Ranking(kind, layers, r_pos, r_neg, pairs)


def scaling(
    language_model: LanguageModel,
    contrast: Contrast,
    kind: str,
    units: Sequence[Unit],
    alpha: float,
    gains: Sequence[float] | None = None,
) -> Steering:
    """A steering that scales these units by 1 + alpha gain: AUSteer's gain, or what is given."""
    anatomy = language_model.anatomy
    own = [unit.gain for unit in units] if gains is None else list(gains)
    interventions = []
    for layer in sorted({unit.layer for unit in units}):
        here = sorted(
            (unit.unit, gain) for unit, gain in zip(units, own, strict=True) if unit.layer == layer
        )
        site = anatomy.sites(kind, (layer,))[0]
        places, factors = (list(each) for each in zip(*here, strict=True))
        operator = Scale(torch.tensor(places), torch.tensor(factors).float(), anatomy.width(site))
        interventions.append(Intervention(site, operator))
    method = AUSteer(site=kind, k=len(units), alpha=alpha, direction="paper")
    dial = Dial("alpha", alpha, (0.0, 100.0))
    tables: dict[str, Any] = {
        "layer": torch.tensor([unit.layer for unit in units]),
        "unit": torch.tensor([unit.unit for unit in units]),
        "score": torch.tensor([unit.score for unit in units]),
        "r_pos": torch.tensor([unit.r_pos for unit in units]),
        "r_neg": torch.tensor([unit.r_neg for unit in units]),
        "gain": torch.tensor(own).float(),
    }
    return new_steering(method, language_model, contrast, interventions, dial, tables)


# -- chance ---------------------------------------------------------------------------------------


def chance_maximum(pairs: int, units: int, quantile: float = 0.5) -> float:
    """The largest score of so many units that know nothing of the contrast.

    Each pair then falls to either side like a coin, so N s is max(K, N - K) with K binomial, and
    the largest of independent units stays at m / N or below with probability (1 - 2 P(K > m)) to
    the power of their number. The smallest m for which that reaches the quantile, over N.
    """
    for count in range(-(-pairs // 2), pairs):
        above = 2 * float(stats.binom.sf(count, pairs, 0.5))
        if units * math.log1p(-above) >= math.log(quantile):
            return count / pairs
    return 1.0


def chance_overlap(size: int, first: int, second: int, shared: int) -> tuple[float, float]:
    """Of two random choices among `size` units: how many are in both on average, and the
    probability of `shared` or more (hypergeometric)."""
    mean = first * second / size
    return mean, float(stats.hypergeom.sf(shared - 1, size, first, second))
