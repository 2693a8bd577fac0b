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

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import (
    Costs,
    Effect,
    Effects,
    Samples,
    Slope,
    Statistics,
    Want,
    unit_costs,
)
from trimtab.methods.effects import (
    Scoring,
    effect_columns,
    moved,
    over_texts,
    predicted_cost,
    refuse_unsure,
)
from trimtab.methods.ranking import Scores
from trimtab.methods.words import percent
from trimtab.model import LanguageModel
from trimtab.steering import Intervention

#: The most certain first, and each the way that raises the log-odds.
CERTAIN = Scoring("effect", fixed=True)


def scaled_wants(reads: Mapping[str, Any], effect: Effect) -> list[Want]:
    """What a pass gathers for the effects of scaling what is read at each site (None: its units):
    they, and those at the first token."""
    tokens = (effect, replace(effect, counted="first"))
    return [
        Want(site, token, Effects, read=read) for site, read in reads.items() for token in tokens
    ]


def slope_wants(sites: Sequence[str], effect: Effect) -> list[Want]:
    """What a pass gathers for the effects of adding any vectors at the sites: of each pair the sum
    of its gradients, and that at the first token."""
    slope = Slope()
    return [
        *scaled_wants(dict.fromkeys(sites, slope), effect),
        *(Want(site, effect, Samples, read=slope) for site in sites),
    ]


def scaled_scores(
    statistics: Statistics,
    reads: Mapping[str, Any],
    effect: Effect,
    costs: Sequence[Costs],
    scoring: Scoring = CERTAIN,
) -> Scores:
    """Scores of everything that is read at the sites, by what scaling it does; `costs` are those of
    each site's. See `_columns` for what is known of each."""
    found = [statistics.of(site, effect, Effects, read=read) for site, read in reads.items()]
    first = replace(effect, counted="first")
    columns = _columns(
        [each.mean for each in found],
        [each.error for each in found],
        [each.mean for each in costs],
        [statistics.of(site, first, Effects, read=read).mean for site, read in reads.items()],
    )
    return scoring(list(reads), columns, costs)


def added_scores(
    language_model: LanguageModel,
    statistics: Statistics,
    effect: Effect,
    vectors: Mapping[str, Tensor],
) -> Scores:
    """Scores of everything that may be added, by its effect: at each site the rows of `vectors`
    [candidates, units]. See `_columns` for what is known of each."""
    slope, first = Slope(), replace(effect, counted="first")
    means, errors, costs, firsts = [], [], [], []
    known = unit_costs(language_model, list(vectors), reads=dict.fromkeys(vectors, slope))
    for (site, vector), cost in zip(vectors.items(), known, strict=True):
        rows = vector.double()
        means.append(rows @ statistics.of(site, effect, Effects, read=slope).mean)
        along, positive = _along(statistics, site, effect, rows)
        errors.append(over_texts(along, positive).error)
        costs.append((cost.samples.double() @ rows.T).square().mean(0))
        firsts.append(rows @ statistics.of(site, first, Effects, read=slope).mean)
    return CERTAIN(list(vectors), _columns(means, errors, costs, firsts), ())


def _along(
    statistics: Statistics, site: str, effect: Effect, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """What adding each row does to each pair or text, [texts, rows], and which texts are
    positive."""
    slopes, positive, _ = statistics.of(site, effect, Samples, read=Slope()).texts()
    return slopes.double() @ rows.double().T, positive


def _columns(
    means: Sequence[Tensor],
    errors: Sequence[Tensor],
    costs: Sequence[Tensor],
    firsts: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Of every candidate, one site's after another's: `effect` in nats per pair at a dial of 1 and
    `error`, its standard error; `cost` c, so that it costs 1/2 c dial^2 nats on plain text; and
    `first`, the first token's share of the effect."""
    effect, error, cost, first = (torch.cat(list(x)) for x in (means, errors, costs, firsts))
    return effect_columns(effect, error, cost, first, effect - first)


def surest(name: str, what: str, found: Scores, k: int) -> Tensor:
    """Indices of the k whose effects are most certain, in rank order; what has no effect is left
    out, with a warning."""
    refuse_unsure(name, what, found.columns["error"])
    best = found.best(k)
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


def scaled_prediction(
    language_model: LanguageModel, interventions: Sequence[Intervention], gain: float
) -> dict[str, float]:
    """What is known of a steering that scales, and gains `gain` nats per pair at a dial of 1: that,
    and its cost there in nats per token of plain text, with its standard error."""
    costs = unit_costs(language_model, [each.site for each in interventions])
    return {"gain": gain, **predicted_cost(costs, [moved(each) for each in interventions])}


def added_prediction(
    language_model: LanguageModel,
    statistics: Statistics,
    effect: Effect,
    interventions: Sequence[Intervention],
) -> dict[str, float]:
    """What a steering that adds gains at a dial of 1 in nats per pair, and costs there in nats per
    token of plain text, with the standard errors of both."""
    if not interventions:
        return {"gain": 0.0, "kl": 0.0}
    sites = [each.site for each in interventions]
    costs = unit_costs(language_model, sites, reads=dict.fromkeys(sites, Slope()))
    moves = [moved(each) for each in interventions]
    gain = sum(
        float(statistics.of(site, effect, Effects, read=Slope()).mean @ move.double())
        for site, move in zip(sites, moves, strict=True)
    )
    along = [
        _along(statistics, site, effect, move[None])
        for site, move in zip(sites, moves, strict=True)
    ]
    together = torch.stack([effects for effects, _ in along]).sum(0)
    error = float(over_texts(together, along[0][1]).error)
    known = {} if math.isnan(error) else {"gain_error": error}
    return {"gain": gain, **known, **predicted_cost(costs, moves)}


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
