"""What interventions do before anything is steered: to first order, and with what certainty.

Adding alpha v at a site moves m = log p(positive) - log p(negative) of a pair, for small alpha, by

    alpha e,    e = sum over tokens of <v, dm/dh>

A pass that keeps each pair's sum of gradients knows e and its standard error of every direction v,
also of those that are made from the same pass. In plain text it costs 1/2 alpha^2 c nats per token
with c = E[<v, u>^2], where u is the sum of the gradients of what the model itself would write (see
fitting/costs.py). Scaling whole heads or features works the same way.

What is chosen is what is most certain: the largest |e| in standard errors, of equal ones the larger
effect; and what lowers the log-odds is turned round.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import (
    Effect,
    Effects,
    Samples,
    Slope,
    Statistics,
    Want,
    predicted_kl,
    unit_costs,
)
from trimtab.methods.ranking import Scores
from trimtab.methods.words import percent
from trimtab.model import LanguageModel
from trimtab.steering import Intervention, Scale


def scaled_wants(sites: Sequence[str], effect: Effect, read: Any = None) -> list[Want]:
    """What a pass gathers for the effects of scaling what `read` makes of a site: they, and those
    at the first token."""
    tokens = (effect, replace(effect, counted="first"))
    return [Want(site, token, Effects, read=read) for site in sites for token in tokens]


def slope_wants(sites: Sequence[str], effect: Effect) -> list[Want]:
    """What a pass gathers for the effects of adding any vectors at the sites: of each pair the sum
    of its gradients, and that at the first token."""
    return [
        *scaled_wants(sites, effect, Slope()),
        *(Want(site, effect, Samples, read=Slope()) for site in sites),
    ]


def scaled_scores(
    statistics: Statistics,
    sites: Sequence[str],
    effect: Effect,
    costs: Sequence[Tensor],
    read: Any = None,
) -> Scores:
    """Everything that may be scaled at the sites, by the certainty of its effect; `costs` are those
    of each site's."""
    found = [statistics.of(site, effect, Effects, read=read) for site in sites]
    first = [
        statistics.of(site, replace(effect, counted="first"), Effects, read=read).mean
        for site in sites
    ]
    means, errors = [each.mean for each in found], [each.error for each in found]
    return _scores(sites, means, errors, costs, first)


def added_scores(
    language_model: LanguageModel,
    statistics: Statistics,
    effect: Effect,
    vectors: dict[str, Tensor],
) -> Scores:
    """Everything that may be added, by the certainty of its effect: at each site the rows of
    `vectors` [candidates, units]."""
    slopes = unit_costs(language_model, list(vectors), read=Slope())
    means: list[Tensor] = []
    errors: list[Tensor] = []
    costs: list[Tensor] = []
    firsts: list[Tensor] = []
    for (site, rows), cost in zip(vectors.items(), slopes, strict=True):
        rows = rows.double()
        first = statistics.of(site, replace(effect, counted="first"), Effects, read=Slope())
        means.append(rows @ statistics.of(site, effect, Effects, read=Slope()).mean)
        errors.append(_error_along(statistics.of(site, effect, Samples, read=Slope()), rows))
        costs.append((cost.samples.double() @ rows.T).square().mean(0))
        firsts.append(rows @ first.mean)
    return _scores(list(vectors), means, errors, costs, firsts)


def _error_along(slopes: Samples, rows: Tensor) -> Tensor:
    """The standard error of the mean effect of adding each row, [rows]; NaN where a side is one
    text."""
    gradients, positive, _ = slopes.texts()
    along = gradients.double() @ rows.T  # [texts, rows]
    variance = rows.new_zeros(len(rows))
    for side in (along[positive], along[~positive]):
        if len(side):
            spread = side.var(0, correction=0) / max(1, len(side) - 1)
            variance = variance + (spread if len(side) > 1 else torch.nan)
    return variance.sqrt()


def _scores(
    sites: Sequence[str],
    means: Sequence[Tensor],
    errors: Sequence[Tensor],
    costs: Sequence[Tensor],
    firsts: Sequence[Tensor],
) -> Scores:
    """Columns: `effect` in nats per pair at a dial of 1, `error` its standard error; `cost` c, so
    that it costs 1/2 c dial^2 nats on plain text; `first` the first token's share of the effect."""
    effect, error, cost, first = (torch.cat(list(x)) for x in (means, errors, costs, firsts))
    score = torch.where(effect == 0, 0.0, effect.abs() / error)
    share = first.abs() / (first.abs() + (effect - first).abs()).clamp(min=1e-300)
    columns = {"effect": effect, "error": error, "cost": cost, "first": share}
    return Scores(sites, score, columns, effect.abs())


def surest(name: str, what: str, found: Scores, k: int) -> Tensor:
    """Indices of the k whose effects are most certain, in rank order; what has no effect is left
    out, with a warning."""
    if found.columns["error"].isnan().all():
        raise TrimtabError(
            f"{name}: {what} by effect are chosen by their standard errors: give it 2 or more "
            "pairs, or 2 or more texts of each side"
        )
    best = found.ranked()[:k]
    best = best[found.score[best] > 0]
    if k and not len(best):
        raise TrimtabError(
            f"{name}: none of the {what} has any effect on the answers, so there is nothing to "
            "steer: give it other texts"
        )
    if len(best) < k:
        warnings.warn(
            f"{name}: k is {k}, but only {len(best)} {what} have an effect on the answers: the "
            "others are left alone",
            TrimtabWarning,
            stacklevel=2,
        )
    return best


def predicted(
    language_model: LanguageModel, interventions: Sequence[Intervention], gain: float
) -> dict[str, float]:
    """What is known of a steering that gains `gain` nats per pair at a dial of 1: that, and what it
    costs there in nats per token of plain text, to second order."""
    sites = [each.site for each in interventions]
    scales = all(isinstance(each.operator, Scale) for each in interventions)
    costs = unit_costs(language_model, sites, read=None if scales else Slope())
    moves = [_moved(each) for each in interventions]
    return {"gain": gain, "kl": predicted_kl(costs, moves)}


def _moved(intervention: Intervention) -> Tensor:
    """What is added at a dial of 1 to each unit of a site, or to its factor; [units]."""
    operator = intervention.operator
    if isinstance(operator, Scale):
        return operator.factors(1.0, torch.float64) - 1
    assert operator.added is not None
    return operator.added


# -- in words -------------------------------------------------------------------------------------


def effects_in_words(records: Sequence[dict[str, Any]], move: str) -> list[str]:
    """Why these were chosen; `move` says what is done to one, as in "adding one of these"."""
    sizes = sorted(abs(record["effect"]) for record in records)
    certain = sorted(abs(record["effect"]) / max(record["error"], 1e-30) for record in records)
    first = percent([record["first"] for record in records])
    turned = sum(record["effect"] < 0 for record in records)
    lines = [
        f"They were chosen because what {move} does is most certain ({certain[0]:.1f} to "
        f"{certain[-1]:.1f} standard errors): at a dial of 0.01 it moves a pair's log-odds by "
        f"{sizes[0] / 100:.2g} to {sizes[-1] / 100:.2g} nats; the first token has {first} of that."
    ]
    if turned:
        lines.append(f"{turned} of them lower the log-odds, and are turned round.")
    return lines
