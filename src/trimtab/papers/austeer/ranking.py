"""The units of a kind of site, ranked by how reliably they tell the sides of a contrast apart
(AUSteer, section 4.1) or by how certainly scaling them does something to the answers, and what
ranking would be by chance alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import SignCounts, Want, collect, fit, new_steering
from trimtab.methods import AUSteer, rank
from trimtab.model import LanguageModel
from trimtab.steering import Dial, Intervention, Scale, Steering

#: How units are ranked: as the paper does, or by one of the other scores of AUSteer.
Locate = Literal["momentum", "difference", "effect", "effect_per_nat"]
LOCATE_HELP = "How units are ranked: momentum (the paper's), difference, effect, effect_per_nat."


def located(locate: Locate, direction: Literal["paper", "signed"] = "paper") -> dict[str, Any]:
    """Options of AUSteer for units that are ranked so. By effect they have a direction of their
    own, beside which another is refused."""
    own = locate.startswith("effect") and direction == "paper"
    return {"locate": locate, "direction": None if own else direction}


@dataclass(frozen=True)
class Unit:
    """One unit: `gain` is AUSteer's gamma at alpha 1, `rank` its place among all units from 1. Of
    units that are ranked by effect `effect` is known, in nats per pair, and its standard error."""

    layer: int
    unit: int
    score: float
    r_pos: float
    r_neg: float
    rank: int
    effect: float | None = None
    error: float | None = None

    @property
    def gain(self) -> float:
        if self.effect is not None:
            return math.copysign(1.0, self.effect)
        return self.r_pos if self.r_pos > self.r_neg else -self.r_neg

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.unit}"

    def as_json(self) -> dict[str, Any]:
        """What is known of it."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Ranking:
    """All units of a kind of site, [layers, units] each; `pairs` were compared. Where they are
    ranked by effect, `effects` and their standard `errors` are known."""

    kind: str
    layers: tuple[int, ...]
    r_pos: Tensor
    r_neg: Tensor
    pairs: int
    effects: Tensor | None = None
    errors: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """s, or |z| by effect, [layers, units]."""
        if self.effects is None or self.errors is None:
            return torch.maximum(self.r_pos, self.r_neg)
        return torch.where(self.effects == 0, 0.0, self.effects.abs() / self.errors)

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.r_pos.numel()

    @property
    def order(self) -> Tensor:
        """Units as flat indices, from the highest score down; of those that are equal the larger
        effect goes first, then the lower layer and unit."""
        score = self.scores.flatten()
        if self.effects is None:
            return rank(score)
        by_size = rank(self.effects.abs().flatten())
        return by_size[rank(score[by_size])]

    def units(self, flat: Sequence[int]) -> list[Unit]:
        """Units by their flat indices."""
        place = torch.empty(self.size, dtype=torch.long)
        place[self.order] = torch.arange(self.size)
        width, scores = self.r_pos.shape[1], self.scores
        found = []
        for i in flat:
            at = row, unit = divmod(int(i), width)
            score, r_pos, r_neg = (float(x[at]) for x in (scores, self.r_pos, self.r_neg))
            effect, error = (None if x is None else float(x[at]) for x in self._by_effect)
            rank_of, layer = int(place[i]) + 1, self.layers[row]
            found.append(Unit(layer, unit, score, r_pos, r_neg, rank_of, effect, error))
        return found

    @property
    def _by_effect(self) -> tuple[Tensor | None, Tensor | None]:
        return self.effects, self.errors

    def top(self, k: int) -> list[Unit]:
        """The k units of the highest scores."""
        return self.units(self.order[:k].tolist())

    def chance_maximum(self, quantile: float = 0.5) -> float:
        """The largest score of so many units that know nothing of the contrast."""
        if self.effects is None:
            return chance_maximum(self.pairs, self.size, quantile)
        return chance_largest_z(self.pairs, self.size, quantile)


def rankings(
    language_model: LanguageModel,
    contrast: Contrast,
    kinds: Sequence[str],
    locate: Literal["momentum", "effect"] = "momentum",
) -> dict[str, Ranking]:
    """Of each kind of site, from one pass over the contrast's train rows."""
    anatomy = language_model.anatomy
    sites = {kind: anatomy.sites(kind) for kind in dict.fromkeys(kinds)}
    if locate == "effect":
        methods = [AUSteer(site=kind, k="all", alpha=1.0, locate="effect") for kind in sites]
        made = fit(methods, language_model, contrast, measure=False)
        pairs = len(contrast.train)
        return {
            kind: _by_effect(kind, [anatomy.width(site) for site in own], steering, pairs)
            for (kind, own), steering in zip(sites.items(), made, strict=True)
        }
    wants = [Want(site, "last", SignCounts) for each in sites.values() for site in each]
    found = collect(language_model, contrast.train, wants)
    return {
        kind: ranking_of(kind, {site: found.of(site, "last", SignCounts) for site in each})
        for kind, each in sites.items()
    }


def _by_effect(kind: str, widths: Sequence[int], steering: Steering, pairs: int) -> Ranking:
    """From a steering of all units; those that it leaves out have no effect."""
    tables = steering.tables
    _refuse_uneven(widths)
    layers = tuple(sorted(set(tables["layer"].tolist())))
    row = torch.tensor([layers.index(layer) for layer in tables["layer"].tolist()])
    columns = {}
    for name in ("r_pos", "r_neg", "effect", "error"):
        columns[name] = torch.zeros(len(layers), widths[0])
        columns[name][row, tables["unit"].long()] = tables[name]
    r_pos, r_neg, effect, error = (each.double() for each in columns.values())
    return Ranking(kind, layers, r_pos, r_neg, pairs, effect, error)


def _refuse_uneven(widths: Sequence[int]) -> None:
    if len(set(widths)) > 1:
        raise TrimtabError(
            "the blocks of this model have different numbers of units there: take a kind of site "
            "that is as wide everywhere, such as ffn_out or resid"
        )


def site_units(language_model: LanguageModel, kind: str) -> int:
    """How many units all sites of a kind have."""
    anatomy = language_model.anatomy
    return sum(anatomy.width(site) for site in anatomy.sites(kind))


def ranking_of(kind: str, counts: Mapping[str, SignCounts]) -> Ranking:
    """From the counts of each site."""
    rates = [one.rates() for one in counts.values()]
    layers = tuple(parse_site(site)[0] or 0 for site in counts)
    pairs = next(iter(counts.values())).pairs
    _refuse_uneven([len(positive) for positive, _ in rates])
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


def chance_largest_z(pairs: int, units: int, quantile: float = 0.5) -> float:
    """The largest |z| of so many units without an effect: each z is Student's t with pairs - 1
    degrees of freedom, of independent units."""
    one_of_them = quantile ** (1 / units)
    return float(stats.t.isf((1 - one_of_them) / 2, pairs - 1))


def chance_overlap(size: int, first: int, second: int, shared: int) -> tuple[float, float]:
    """Of two random choices among `size` units: how many are in both on average, and the
    probability of `shared` or more (hypergeometric)."""
    mean = first * second / size
    return mean, float(stats.hypergeom.sf(shared - 1, size, first, second))
