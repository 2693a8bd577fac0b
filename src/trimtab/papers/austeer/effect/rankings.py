"""Ways of ranking units, side by side: how often a sign agrees, how large a difference is, what
scaling does to the answers, by its size, by its standard error and per nat, and by chance; and the
methods that steer with whole directions, beside which they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import Method, fit, kl_samples, unit_costs
from trimtab.methods import CAA, ITI, SADI, AUSteer
from trimtab.model import LanguageModel
from trimtab.papers.austeer.ranking import Unit, scaling
from trimtab.steering import Scale, Steering

#: Rankings by name, as options of AUSteer; the size of the effect is another order of the same fit.
RANKINGS: dict[str, dict[str, Any]] = {
    "momentum": {"direction": "paper"},
    "signed momentum": {"direction": "signed"},
    "mean difference": {"locate": "difference", "direction": "signed"},
    "effect size": {"locate": "effect"},
    "effect z": {"locate": "effect"},
    "effect per nat": {"locate": "effect_per_nat"},
    "random": {"locate": "random", "direction": "signed"},
}
#: What the others are held against.
USUAL = "signed momentum"
RANDOM = "random"


@dataclass(frozen=True)
class Units:
    """The first units of a ranking, in its order, and each one's gain: x becomes
    (1 + dial gain) x. `draw` is the number of a random choice."""

    name: str
    site: str
    units: Sequence[Unit]
    gains: Sequence[float]
    draw: int | None = None

    def top(self, language_model: LanguageModel, contrast: Contrast, k: int) -> Steering:
        """A steering of the first k, at a dial of 1."""
        some, gains = self.units[:k], self.gains[:k]
        return scaling(language_model, contrast, self.site, some, 1.0, gains)

    def places(self, k: int) -> set[tuple[int, int]]:
        """Layer and number of the first k."""
        return {(unit.layer, unit.unit) for unit in self.units[:k]}


@dataclass(frozen=True)
class Effects:
    """What scaling each unit of a kind of site does to the log-odds of a pair, in nats per unit of
    gamma, with its standard error; by (layer, unit). What has none is left out."""

    known: Mapping[tuple[int, int], tuple[float, float]]

    def of(self, unit: Unit) -> float:
        return self.known.get((unit.layer, unit.unit), (0.0, 0.0))[0]

    def error(self, unit: Unit) -> float:
        return self.known.get((unit.layer, unit.unit), (0.0, 0.0))[1]

    def gain(self, units: Sequence[Unit], gains: Sequence[float]) -> float:
        """What a steering of these is predicted to gain at a dial of 1, in nats per pair."""
        return sum(gain * self.of(unit) for unit, gain in zip(units, gains, strict=True))


@dataclass(frozen=True)
class Fitted:
    """Everything that one pass over the train pairs gave."""

    rankings: Sequence[Units]
    effects: Effects
    references: Sequence[tuple[str, dict[str, Any], Steering]]

    def of(self, name: str) -> list[Units]:
        """A ranking: one, or of random ones each draw."""
        return [one for one in self.rankings if one.name == name]


def fitted(
    language_model: LanguageModel,
    contrast: Contrast,
    site: str,
    most: int,
    seeds: Sequence[int],
    effect: Mapping[str, Any],
) -> Fitted:
    """All rankings with their first `most` units, and the references, from one pass; `effect` are
    options of AUSteer for units by effect."""
    draws: list[tuple[str, dict[str, Any]]] = []
    for name, options in RANKINGS.items():
        seeded = [{"seed": seed} for seed in seeds] if name == RANDOM else [{}]
        draws += [(name, {**options, **more}) for more in seeded]
    methods: list[Method] = []
    for name, options in draws:
        by_effect = effect if "effect" in options.get("locate", "") else {}
        own = {"k": "all" if name == "effect size" else most, **options, **by_effect}
        methods.append(AUSteer(site=site, alpha=1.0, **own))
    beside = _references(language_model, contrast)
    made = fit(methods + [one for _, one in beside], language_model, contrast, measure=False)
    rankings, effects = [], Effects({})
    number = {name: 0 for name, _ in draws}
    for (name, _), steering in zip(draws, made, strict=False):
        order = torch.arange(len(steering.tables["unit"]))
        if name == "effect size":
            effects = _effects(steering.tables)
            order = _by_size(steering.tables)
        draw = number[name] if name == RANDOM else None
        number[name] += 1
        rankings.append(_units(name, site, steering.tables, order[:most], draw))
    references = [
        (method.name, params, steering)
        for (params, method), steering in zip(beside, made[len(draws) :], strict=True)
    ]
    return Fitted(rankings, effects, references)


def _references(
    language_model: LanguageModel, contrast: Contrast
) -> list[tuple[dict[str, Any], Method]]:
    """CAA, ITI and SADI, each with a few settings to choose from; without those that cannot be had
    on this model."""
    anatomy = language_model.anatomy
    heads = len(anatomy.sites("heads")) * anatomy.heads
    layers = dict.fromkeys(int(share * anatomy.layers) for share in (0.3, 0.4, 0.5, 0.6))
    every: list[tuple[dict[str, Any], Method]] = []
    every += [({"layer": layer}, CAA(layer=layer, alpha=1.0)) for layer in layers]
    every += [({"k": k}, ITI(k=k, alpha=1.0)) for k in _up_to(heads, (16, 48, 96))]
    variants: tuple[tuple[Literal["head", "hidden", "neuron"], int], ...]
    variants = (("head", min(4, heads)), ("hidden", 16), ("neuron", 64))
    every += [({"variant": v, "k": k}, SADI(variant=v, k=k, delta=1.0)) for v, k in variants]
    found = []
    for params, method in every:
        with suppress(TrimtabError):
            method.wants(language_model, contrast)
            found.append((params, method))
    return found


def _up_to(most: int, counts: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(min(count, most) for count in counts))


def _effects(tables: Mapping[str, Tensor]) -> Effects:
    columns = (tables[name].tolist() for name in ("layer", "unit", "effect", "error"))
    return Effects({(layer, unit): own for layer, unit, *own in zip(*columns, strict=True)})  # type: ignore[misc]


def _by_size(tables: Mapping[str, Tensor]) -> Tensor:
    """Rows of the tables from the largest effect down; of equal ones the lower layer and unit
    first."""
    width = int(tables["unit"].max()) + 1
    order = (tables["layer"].long() * width + tables["unit"]).argsort()
    return order[tables["effect"].abs()[order].sort(descending=True, stable=True).indices]


def _units(
    name: str, site: str, tables: Mapping[str, Tensor], rows: Tensor, draw: int | None
) -> Units:
    columns = (tables[key][rows].tolist() for key in ("layer", "unit", "score", "r_pos", "r_neg"))
    units = [
        Unit(layer, unit, score, r_pos, r_neg, place)
        for place, (layer, unit, score, r_pos, r_neg) in enumerate(zip(*columns, strict=True), 1)
    ]
    return Units(name, site, units, tables["gain"][rows].tolist(), draw)


# -- what a steering is predicted to cost ---------------------------------------------------------


class Costs:
    """What scaling units costs on plain text, from samples that are drawn once for a model."""

    def __init__(self, language_model: LanguageModel, site: str) -> None:
        sites = language_model.anatomy.sites(site)
        self._known = dict(zip(sites, unit_costs(language_model, sites), strict=True))

    def kl(self, steering: Steering) -> float:
        """Nats per token at a dial of 1, to second order: it grows with the dial's square."""
        factors = []
        for one in steering.interventions:
            assert isinstance(one.operator, Scale)
            factors.append(one.operator.factors(1.0, torch.float64) - 1)
        known = [self._known[one.site] for one in steering.interventions]
        return float(kl_samples(known, factors).mean())
