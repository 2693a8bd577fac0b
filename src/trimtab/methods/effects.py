"""Units by effect: scores, costs and predictions that come from one backward pass.

The mean effect e_i of scaling a unit on log p(positive) - log p(negative), its standard error, and
what scaling costs on plain text (c_i, the diagonal of the Fisher information) say before anything
is steered what a steering gains and costs at a dial: with gamma = alpha g

    gain = alpha sum_i g_i e_i nats per pair,   cost = 1/2 alpha^2 E[(sum_i g_i u_i)^2] nats

to first and second order. The first token of a text, at which a few units are huge and which both
sides of a pair share, has its share of each effect measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.fitting import (
    Costs,
    Effect,
    Effects,
    Samples,
    Sides,
    Statistics,
    Want,
    kl_samples,
    unit_costs,
)
from trimtab.methods.ranking import Scores
from trimtab.model import LanguageModel
from trimtab.steering import STRENGTHS, Intervention, Scale, Steering

#: What is added to each unit's cost, as a share of the mean cost: a small one is hardly known.
RIDGE = 0.1
#: Where a steering by effect stands unmeasured, and at which strength units are looked at again: so
#: many nats per token of plain text are predicted there.
BUDGET = STRENGTHS["strong"]
#: Nats per token of plain text up to which predictions are told in words.
_SMALL = 0.3
#: Effects in half precision that are kept for the standard error of what is predicted: 256 MB.
_KEPT = 1 << 27


@dataclass(frozen=True)
class Scoring:
    """How units are ranked by effect ("effect" or "effect_per_nat"), and whether all gammas are of
    one size or each goes with what its unit does: then what `scale` says is 1, or the largest."""

    locate: str
    fixed: bool
    scale: float | None = None

    def __call__(
        self, sites: Sequence[str], columns: Mapping[str, Tensor], costs: Sequence[Costs]
    ) -> Scores:
        """Scores from the columns effect, error and cost."""
        effect = columns["effect"]
        if self.locate == "effect":
            score, size = effect.abs() / columns["error"], effect.abs()
        else:
            score, size = effect.square() / dear(columns["cost"]), None
        score = torch.where(effect == 0, 0.0, score)
        raw = self.raw(columns)
        gain = raw.sign() if self.fixed else raw / (self.scale or _largest(raw))
        return Scores(sites, score, {"score": score, **columns, "gain": gain}, size, costs)

    def raw(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Gains before they are scaled, [units]."""
        effect = columns["effect"].nan_to_num(0.0)
        return effect if self.locate == "effect" else effect / dear(columns["cost"])

    def as_in(self, found: Scores) -> Scoring:
        """The same, whose gains are scaled as those of scores that it gave."""
        return replace(self, scale=_largest(self.raw(found.columns)))


def _largest(raw: Tensor) -> float:
    return float(raw.abs().max().clamp(min=1e-300))


def dear(cost: Tensor) -> Tensor:
    """Each unit's cost with the ridge."""
    return cost + RIDGE * cost.mean()


def effect_wants(sites: Sequence[str], effect: Effect, rows: int, units: int) -> list[Want]:
    """What a pass over so many rows has to gather: the effects, those at the first token, and,
    where they are few, those of each row."""
    first = replace(effect, counted="first")
    wants = [Want(site, token, Effects) for site in sites for token in (effect, first)]
    return wants + (
        [Want(site, effect, Samples) for site in sites] if rows * units <= _KEPT else []
    )


def by_effect(
    language_model: LanguageModel,
    statistics: Statistics,
    sites: Sequence[str],
    effect: Effect,
    scoring: Scoring,
) -> Scores:
    """Every unit's score and gain, with the columns

    effect   nats per pair and unit of gamma; `error` its standard error
    cost     c_i: scaling the unit alone costs 1/2 c_i gamma^2 nats on plain text
    first    the share of the first token in the effect, by size
    """
    mean, error = effects_and_errors(statistics, sites, effect)
    refuse_unsure("austeer", "units", error)
    first, _ = effects_and_errors(statistics, sites, replace(effect, counted="first"))
    rest = mean if effect.counted == "rest" else mean - first
    # Samples come from the disk, and what is there is found by a digest of all weights.
    costs = statistics.once(("costs", *sites), lambda: unit_costs(language_model, sites))
    cost = torch.cat([each.mean for each in costs])
    return scoring(sites, effect_columns(mean, error, cost, first, rest), costs)


def refuse_unsure(name: str, what: str, error: Tensor) -> None:
    """Refuse a choice by standard errors where there are none."""
    if error.isnan().all():
        raise TrimtabError(
            f"{name}: {what} by effect are chosen by their standard errors: give it 2 or more "
            "pairs, or 2 or more texts of each side"
        )


def effect_columns(
    effect: Tensor, error: Tensor, cost: Tensor, first: Tensor, rest: Tensor
) -> dict[str, Tensor]:
    """What is known of candidates, with the share of the first token in its effect and that of the
    rest, by size; [candidates] each."""
    share = first.abs() / (first.abs() + rest.abs()).clamp(min=1e-300)
    return {"effect": effect, "error": error, "cost": cost, "first": share}


def effects_and_errors(
    statistics: Statistics, sites: Sequence[str], effect: Effect
) -> tuple[Tensor, Tensor]:
    """The mean effect of every unit and its standard error, [units of all sites] each."""
    found = [statistics.of(site, effect, Effects) for site in sites]
    return torch.cat([each.mean for each in found]), torch.cat([each.error for each in found])


# -- what is predicted ----------------------------------------------------------------------------


def predicted(
    found: Scores, picked: Tensor, interventions: Sequence[Intervention]
) -> dict[str, float]:
    """What the steering gains at a dial of 1, in nats per pair, and costs there, in nats per token
    of plain text: gains grow with the dial, costs with its square, while both are small. `kl_alone`
    leaves out what units do together."""
    gain, effect = found.columns["gain"][picked], found.columns["effect"][picked]
    costs_at = dict(zip(found.sites, found.costs, strict=True))
    known = [costs_at[each.site] for each in interventions]
    return {
        "gain": float((gain * effect).sum()),
        "kl_error": 0.0,
        **predicted_cost(known, [moved(each) for each in interventions]),
        "kl_alone": float(0.5 * (gain.square() * found.columns["cost"][picked]).sum()),
    }


def predicted_cost(costs: Sequence[Costs], moves: Sequence[Tensor]) -> dict[str, float]:
    """Nats per token of plain text that moves [units] at the sites of these costs take together,
    with the standard error."""
    if not costs:
        return {"kl": 0.0}
    sampled = kl_samples(costs, moves)
    error = float(sampled.std(correction=0)) / math.sqrt(max(1, len(sampled) - 1))
    return {"kl": float(sampled.mean()), "kl_error": error}


def gain_error(
    statistics: Statistics, effect: Effect, interventions: Sequence[Intervention]
) -> float | None:
    """The standard error of the predicted gain over rows, for these units; None where effects were
    not kept row by row."""
    found = []
    for each in interventions:
        wanted = Want(each.site, effect, Samples)
        if wanted not in statistics:
            return None
        effects, positive, _ = statistics[wanted].texts()
        found.append(effects.double() @ moved(each))
    if not found:
        return None
    return float(over_texts(torch.stack(found).sum(0)[:, None], positive).error)


def over_texts(effects: Tensor, positive: Tensor) -> Effects:
    """Mean and standard error of effects [texts, numbers]."""
    found, rows = Effects(), torch.arange(len(effects))
    found.update(Sides(effects[positive], effects[~positive], rows[positive], rows[~positive]))
    return found


def dial_for(known: Mapping[str, float], nats: float = BUDGET) -> float | None:
    """The dial at which so many nats are predicted; None where none are at any."""
    return math.sqrt(nats / known["kl"]) if known.get("kl", 0.0) > 0 else None


def predicted_at(steering: Steering, dial: float) -> dict[str, float] | None:
    """What a steering by effect was predicted to gain and to cost at a dial, with the standard
    errors that are known; None of any other."""
    known = steering.findings.get("predicted")
    if not (isinstance(known, dict) and {"gain", "kl"} <= known.keys()):
        return None
    power = {"gain": dial, "gain_error": abs(dial), "kl": dial * dial, "kl_error": dial * dial}
    return {name: factor * known[name] for name, factor in power.items() if name in known}


def predicted_at_strengths(steering: Steering) -> list[dict[str, Any]]:
    """The same at the dials of the strengths that have names, with the KL that was measured there
    at the next token of the contrast's prompts."""
    known = steering.calibration
    if known is None:
        return []
    dials = dict(zip(known.kl, known.positive, strict=False))
    found = []
    for name, kl in STRENGTHS.items():
        dial = dials.get(kl)
        foreseen = None if dial is None else predicted_at(steering, dial)
        if foreseen is not None:
            found.append({"name": name, "dial": dial, **foreseen, "measured_kl": kl})
    return found


def moved(intervention: Intervention) -> Tensor:
    """What is added at a dial of 1 to each unit of a site, or to its factor; [units]."""
    operator = intervention.operator
    if isinstance(operator, Scale):
        return operator.factors(1.0, torch.float64) - 1
    assert operator.added is not None
    return operator.added


# -- in words -------------------------------------------------------------------------------------


def predicted_in_words(steering: Steering) -> list[str]:
    """What the steering was predicted to do at the dial where it stands, and at the strengths that
    its calibration names."""
    dial = steering.setting
    foreseen = predicted_at(steering, dial)
    if foreseen is None:
        return []
    if foreseen["kl"] > _SMALL:  # what is predicted of large dials is more than comes out
        dial = float(f"{dial * math.sqrt(_SMALL / foreseen['kl']):.3g}")
        foreseen = predicted_at(steering, dial)
        assert foreseen is not None
    lines = [
        f"Predicted at {dial:g} from its effects: {_in_nats(foreseen)} (true while both are small)."
    ]
    strengths = [
        f"{one['name']} {_in_nats(one)} ({one['measured_kl']:g} measured at next tokens)"
        for one in predicted_at_strengths(steering)
        if one["kl"] <= _SMALL
    ]
    return lines + ([f"Predicted at its strengths: {'; '.join(strengths)}."] if strengths else [])


def _in_nats(foreseen: Mapping[str, Any]) -> str:
    gain, kl = foreseen["gain"], foreseen["kl"]
    errors = [
        f" ± {foreseen[name]:.{digits}}" if name in foreseen else ""
        for name, digits in (("gain_error", "2f"), ("kl_error", "1g"))
    ]
    return (
        f"{gain:+.2f}{errors[0]} nats of log-odds per pair for {kl:.3g}{errors[1]} nats per token "
        "of plain text"
    )
