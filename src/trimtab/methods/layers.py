"""Which block's vector to add, and which way round: by what adding it does at equal cost.

At a cost of b nats the vector of block l gains |e_l| sqrt(2 b / c_l) nats of log-odds, to first
order (see first_order.py), so that the block of the largest |e_l| / sqrt(c_l) does most at any
cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.fitting import Effect, Statistics
from trimtab.methods.first_order import added_prediction, added_scores
from trimtab.methods.ranking import rank
from trimtab.model import LanguageModel
from trimtab.steering import Add, Intervention, Scope, Steering


def layer_by_effect(
    language_model: LanguageModel,
    statistics: Statistics,
    vectors: dict[str, Tensor],
    effect: Effect,
) -> tuple[Intervention, dict[str, Any]]:
    """Add the vector that does most at equal cost, and what was found out: `effect`, `error` and
    `cost` by site."""
    rows = {site: vector[None] for site, vector in vectors.items()}
    found = added_scores(language_model, statistics, effect, rows)
    effects, cost = found.columns["effect"], found.columns["cost"]
    worth = torch.where(effects == 0, 0.0, effects.abs() / cost.sqrt())
    best = int(rank(worth)[0])
    if not worth[best] > 0:
        raise TrimtabError(
            "no block's vector has any effect on the answers, so there is no best one: name a layer"
        )
    site, sign = found.sites[best], effects[best].sign()
    turned = Add((sign * vectors[site]).float())
    intervention = Intervention(site, turned, Scope.of(effect.positions))
    findings: dict[str, Any] = {"site": site}
    for name in ("effect", "error", "cost"):
        values = found.columns[name].tolist()
        findings[name] = {
            own: None if value != value else value
            for own, value in zip(found.sites, values, strict=True)
        }
    if effect.positions == "all":
        findings["predicted"] = added_prediction(language_model, statistics, effect, [intervention])
    return intervention, findings


def layer_in_words(steering: Steering) -> list[str]:
    """Why the block was chosen."""
    found = steering.findings
    if not isinstance(found.get("effect"), dict):
        return []
    effect, error = found["effect"][found["site"]], found["error"][found["site"]]
    certain = "" if error is None else f" (standard error {abs(error):.2g})"
    round_about = ", and lowers it as it is: it is turned round" if effect < 0 else ""
    return [
        f"The block was chosen among {len(found['effect'])} by what its vector does at equal cost: "
        f"{effect:+.3g} nats of log-odds per pair and unit of {steering.dial.name}{certain}"
        f"{round_about}."
    ]
