"""Units by effect: scores, costs and predictions that come from one backward pass.

The mean effect e_i of scaling a unit on log p(positive) - log p(negative), its standard error, and
what scaling costs on plain text (c_i, the diagonal of the Fisher information) say before anything
is steered what a steering gains and costs at a dial: with gamma = alpha g

    gain = alpha sum_i g_i e_i nats per pair,   cost = 1/2 alpha^2 E[(sum_i g_i u_i)^2] nats

to first and second order. The first token of a text, at which a few units are huge and which both
sides of a pair share, has its share of each effect measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.fitting import Effect, Effects, Statistics, Want, predicted_kl, unit_costs
from trimtab.methods.ranking import Scores
from trimtab.methods.words import percent
from trimtab.model import LanguageModel
from trimtab.steering import Intervention, Scale, Steering

#: What is added to each unit's cost, as a share of the mean cost: a small one is hardly known.
RIDGE = 0.1


def effect_wants(sites: Sequence[str], effect: Effect) -> list[Want]:
    """What a pass has to gather: the effects, and those at the first token."""
    first = replace(effect, counted="first")
    return [Want(site, token, Effects) for site in sites for token in (effect, first)]


def by_effect(
    language_model: LanguageModel,
    statistics: Statistics,
    sites: Sequence[str],
    effect: Effect,
    locate: str,
) -> Scores:
    """Every unit's score and gain, "effect" or "effect_per_nat", with the columns

    effect   nats per pair and unit of gamma; `error` its standard error
    cost     c_i: scaling the unit alone costs 1/2 c_i gamma^2 nats on plain text
    first    the share of the first token in the effect, by size
    """
    found = [statistics.of(site, effect, Effects) for site in sites]
    mean, error = (torch.cat([getattr(each, name) for each in found]) for name in ("mean", "error"))
    if error.isnan().all():
        raise TrimtabError(
            "austeer: units by effect are chosen by their standard errors: give it 2 or more "
            "pairs, or 2 or more texts of each side"
        )
    first = torch.cat(
        [statistics.of(site, replace(effect, counted="first"), Effects).mean for site in sites]
    )
    rest = mean if effect.counted == "rest" else mean - first
    known = unit_costs(language_model, sites)
    cost = torch.cat([each.mean for each in known])
    columns = {
        "effect": mean,
        "error": error,
        "cost": cost,
        "first": first.abs() / (first.abs() + rest.abs()).clamp(min=1e-300),
    }
    if locate == "effect":
        score = torch.where(mean == 0, 0.0, mean.abs() / error)
        columns = {"score": score, **columns, "gain": _graded(mean)}
        return Scores(sites, score, columns, mean.abs(), known)
    dear = cost + RIDGE * cost.mean()
    score = torch.where(mean == 0, 0.0, mean.square() / dear)
    columns = {"score": score, **columns, "gain": _graded(mean / dear)}
    return Scores(sites, score, columns, costs=known)


def _graded(gain: Tensor) -> Tensor:
    """The largest is 1."""
    gain = gain.nan_to_num(0.0)
    return gain / gain.abs().max().clamp(min=1e-300)


def predicted(
    found: Scores, picked: Tensor, interventions: Sequence[Intervention]
) -> dict[str, float]:
    """What the steering gains at a dial of 1, in nats per pair, and costs there, in nats per token
    of plain text: gains grow with the dial, costs with its square, while both are small."""
    gain, effect = found.columns["gain"][picked], found.columns["effect"][picked]
    costs_at = dict(zip(found.sites, found.costs, strict=True))
    known = [costs_at[each.site] for each in interventions]
    return {
        "gain": float((gain * effect).sum()),
        "kl": predicted_kl(known, [_factors(each) for each in interventions]),
        "kl_alone": float(0.5 * (gain.square() * found.columns["cost"][picked]).sum()),
    }


def _factors(intervention: Intervention) -> Tensor:
    """What is added to the factor of each unit of a site at a dial of 1, [units]."""
    operator = intervention.operator
    assert isinstance(operator, Scale)
    return operator.factors(1.0, torch.float64) - 1


# -- in words -------------------------------------------------------------------------------------


def effect_in_words(units: Sequence[dict[str, Any]], best: str) -> dict[str, str]:
    """Why units were chosen, by the score's name."""
    found = {}
    if all("effect" in unit and "error" in unit for unit in units):
        sizes = sorted(abs(unit["effect"]) for unit in units)
        first = percent([unit.get("first", 0.0) for unit in units])
        known = (
            f"scaling one of them by 1 % moves a pair's log-odds by {sizes[0] / 100:.2g} to "
            f"{sizes[-1] / 100:.2g} nats; the first token has {first} of that."
        )
        certain = sorted(abs(unit["effect"]) / max(unit["error"], 1e-30) for unit in units)
        found["effect"] = (
            f"They were chosen because what scaling them does is {best} certain ({certain[0]:.1f} "
            f"to {certain[-1]:.1f} standard errors): {known}"
        )
        found["effect_per_nat"] = (
            f"They were chosen because scaling them does {best} for what it costs on plain text: "
            f"{known}"
        )
    return found


def predicted_in_words(steering: Steering) -> list[str]:
    """What the steering was predicted to do at the dial where it stands."""
    known = steering.findings.get("predicted")
    if not isinstance(known, dict):
        return []
    dial = steering.setting
    return [
        f"Predicted at {dial:g} from its effects: {dial * known['gain']:+.2f} nats of log-odds per "
        f"pair, for {dial * dial * known['kl']:.3g} nats per token of plain text (true while both "
        "are small)."
    ]
