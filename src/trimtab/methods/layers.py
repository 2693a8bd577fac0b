"""Which block's vector to add, and which way round: by what adding it does to the answers.

Of every block's vector one pass knows the effect, its standard error and the cost (see
first_order.py). The block whose effect is most certain is taken. The one that would gain most at
equal cost, by |e| / sqrt(c), is often a later one: what it costs on plain text says too little
of what it costs at the next token of a prompt.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.fitting import Effect, Statistics
from trimtab.methods.first_order import added_prediction, added_scores, surest
from trimtab.model import LanguageModel
from trimtab.steering import Add, Intervention, Scope, Steering


def layer_by_effect(
    name: str,
    language_model: LanguageModel,
    statistics: Statistics,
    vectors: dict[str, Tensor],
    effect: Effect,
) -> tuple[Intervention, dict[str, Any]]:
    """Add the vector of the most certain effect, and what was found out: `effect`, `error` and
    `cost` by site. `name` is the method's."""
    rows = {site: vector[None] for site, vector in vectors.items()}
    found = added_scores(language_model, statistics, effect, rows)
    best = int(surest(name, "blocks", found, 1))
    site, sign = found.sites[best], found.columns["gain"][best]
    turned = Add((sign * vectors[site]).float())
    intervention = Intervention(site, turned, Scope.of(effect.positions))
    findings: dict[str, Any] = {"site": site}
    for column in ("effect", "error", "cost"):
        values = found.columns[column].tolist()
        findings[column] = dict(zip(found.sites, values, strict=True))
    if effect.positions == "all":
        findings["predicted"] = added_prediction(language_model, statistics, effect, [intervention])
    return intervention, findings


def layer_in_words(steering: Steering) -> list[str]:
    """Why the block was chosen."""
    found = steering.findings
    if not isinstance(found.get("effect"), dict):
        return []
    effect, error = found["effect"][found["site"]], found["error"][found["site"]]
    turned = ", which lowers it: the vector is turned round" if effect < 0 else ""
    return [
        f"The block was chosen among {len(found['effect'])} because what its vector does is most "
        f"certain ({abs(effect) / max(error, 1e-30):.1f} standard errors): at a dial of 0.01 it "
        f"moves a pair's log-odds by {effect / 100:+.2g} nats{turned}."
    ]
