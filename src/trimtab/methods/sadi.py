"""SADI: scale the heads, neurons or hidden units that differ most between the two sides.

"Semantics-Adaptive Activation Intervention for LLMs via Dynamic Steering Vectors" (Wang et al.,
ICLR 2025).

    D = mean(A^pos - A^neg) at the last token;  M = the K largest of D (with their sign: the
    elements that are larger on the positive side);  A <- A + delta (A * M)

Each text's own activation is scaled, so the change follows what the text says. Variants:

    head     whole attention heads, by the mean of D over a head's units      (site heads)
    neuron   single units between the FFN's two maps                          (site ffn_in);
             A is then what the FFN's activation function puts out, as in the authors' code: of a
             gated FFN act(gate), by which ffn_in = act(gate) * up is scaled as much
    hidden   single units of the FFN's output, which is what the authors' code
             calls hidden states                                              (site ffn_out)
    resid    single units of the block's output, which is what the name says  (site resid)

`locate="effect"` is ours: elements are ranked by what scaling them does to the answers, e against
its standard error (see first_order.py), and M is the sign of e.

The authors' code scales the last token of the prompt only and keeps all other heads at what they
were without steering; here the model runs on from what was changed, at all `positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import READ_ONLY, Anatomy, parse_site
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Count,
    Effect,
    HeadSums,
    Means,
    Method,
    Number,
    Statistics,
    Want,
    new_steering,
    unit_costs,
)
from trimtab.methods.effects import predicted_in_words
from trimtab.methods.first_order import (
    effects_in_words,
    scaled_prediction,
    scaled_scores,
    scaled_wants,
    surest,
)
from trimtab.methods.ranking import Scores, places
from trimtab.methods.words import counted
from trimtab.model import LanguageModel
from trimtab.steering import Dial, Intervention, Positions, Scale, Scope, Steering, chosen

#: Site kind of each variant.
VARIANTS = {"head": "heads", "neuron": "ffn_in", "hidden": "ffn_out", "resid": "resid"}
#: What D is measured of, where that is not the site itself.
MEASURED = {"neuron": READ_ONLY}


@dataclass(frozen=True)
class SADI(Method):
    """SADI: scale the heads, neurons or hidden units that differ most between the two sides.

        A <- A + delta (A * M),    M = the k largest of D = mean(A^pos - A^neg) at the last token

    "Semantics-Adaptive Activation Intervention for LLMs via Dynamic Steering Vectors" (Wang et al.,
    ICLR 2025).

        >>> steering = tt.SADI(variant="neuron", k=4).fit(lm, contrast)
        >>> with lm.steered(steering.at(2)):
        ...     texts = lm.generate(["Today I feel"])
    """

    variant: Literal["head", "neuron", "hidden", "resid"] = field(
        default="head", metadata={"help": "What to scale: head, neuron, hidden or resid."}
    )
    k: Count = field(default=8, metadata={"help": "How many heads or units (K)."})
    delta: Number | None = field(
        default=None,
        metadata={
            "help": "Strength, the dial's default: activations times 1 + delta (default: measured)."
        },
    )
    locate: Literal["difference", "effect"] = field(
        default="difference",
        metadata={
            "help": "Score of what is scaled: difference of the two sides, or effect (what scaling "
            "it does to the answers, against its standard error)."
        },
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "sadi"
    dial = "delta"
    unmeasured = 1.0
    columns = ("layer", "score")

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"k": (1, 2, 4, 6, 8, 10), "delta": (-1.0, -0.5, 0.5, 1.0, 2.0, 4.0, 9.0, 19.0)}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        anatomy = language_model.anatomy
        sites = anatomy.sites(VARIANTS[self.variant])
        heads = self.variant == "head"
        count = sum(anatomy.heads if heads else anatomy.width(site) for site in sites)
        if self.k > count:
            what = "heads" if heads else f"units of {VARIANTS[self.variant]}"
            raise TrimtabError(f"sadi: k is {self.k}, but {anatomy.name} has {count} {what} here")
        if self.locate == "effect":
            return scaled_wants(self._reads(anatomy), Effect(self.positions))
        return [self._want(site) for site in sites]

    def _want(self, site: str) -> Want:
        """The activations whose difference ranks the units of a site."""
        kind = VARIANTS[self.variant]
        measured = site.removesuffix(kind) + MEASURED.get(self.variant, kind)
        return Want(measured, "last", Means)

    def _reads(self, anatomy: Anatomy) -> dict[str, HeadSums | None]:
        """What is made of the effects of each site's units."""
        read = HeadSums(anatomy.heads) if self.variant == "head" else None
        return dict.fromkeys(anatomy.sites(VARIANTS[self.variant]), read)

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        anatomy = language_model.anatomy
        sites, heads = anatomy.sites(VARIANTS[self.variant]), self.variant == "head"
        if self.locate == "effect":
            found = self._by_effect(language_model, statistics)
            ranked = surest(self.name, "heads" if heads else "units", found, self.k)
        else:
            found = self._by_difference(anatomy, statistics, sites)
            ranked = found.ranked()[: self.k]
        counts = [anatomy.heads if heads else anatomy.width(site) for site in sites]
        site_of, element = places(counts, ranked)
        gain = found.columns.get("gain", torch.ones_like(found.score))[ranked]
        interventions = []
        for number, site in enumerate(sites):
            here = site_of == number
            if here.any():
                scale = self._scale(anatomy, site, element[here], gain[here].float())
                interventions.append(Intervention(site, scale, Scope.of(self.positions)))
        tables = {
            "layer": torch.tensor([anatomy.check(site)[0] for site in sites])[site_of],
            "head" if heads else "unit": element,
            "score": found.score[ranked].float(),
            **{name: column[ranked].float() for name, column in found.columns.items()},
        }
        findings, low = {}, -1.0
        if self.locate == "effect":
            low = -90.0  # either way some are scaled down
            if self.positions == "all":
                total = float(found.columns["effect"][ranked].abs().sum())
                findings["predicted"] = scaled_prediction(language_model, interventions, total)
        dial = Dial("delta", self.at_default, (low, 90.0))
        return new_steering(self, language_model, contrast, interventions, dial, tables, findings)

    def _by_difference(
        self, anatomy: Anatomy, statistics: Statistics, sites: Sequence[str]
    ) -> Scores:
        """D of everything that may be scaled."""
        differences = []
        for site in sites:
            difference = statistics[self._want(site)].difference
            if self.variant == "head":
                difference = difference.unflatten(-1, (anatomy.heads, -1)).mean(-1)
            differences.append(difference)
        score = torch.cat(differences)
        if self.k and not score.any():
            raise TrimtabError("sadi: the two sides do not differ, so there is nothing to steer")
        return Scores(sites, score, {})

    def _by_effect(self, language_model: LanguageModel, statistics: Statistics) -> Scores:
        """The certainty of the effect of everything that may be scaled, and its sign as its
        gain."""
        reads = self._reads(language_model.anatomy)
        costs = unit_costs(language_model, list(reads))  # those of heads are sums of their units'
        if self.variant == "head":
            heads = language_model.anatomy.heads
            costs = [
                replace(each, samples=each.samples.unflatten(-1, (heads, -1)).sum(-1))
                for each in costs
            ]
        return scaled_scores(statistics, reads, Effect(self.positions), costs)

    def _scale(self, anatomy: Anatomy, site: str, elements: Tensor, gains: Tensor) -> Scale:
        """What scales these units of a site, or all units of these heads."""
        width = anatomy.width(site)
        units, order = elements.sort()
        gains = gains[order]
        if self.variant == "head":
            size = width // anatomy.heads
            units = (units[:, None] * size + torch.arange(size)).flatten()
            gains = gains.repeat_interleave(size)
        return Scale(units, gains, width)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        ((kind, records),) = chosen(steering, cls.columns).items()
        if not records:
            return ["SADI with k = 0: nothing is changed."]
        what = "attention heads"
        if kind != "heads":
            what = f"single units of {parse_site(records[0]['site'])[1]}"
        dial = steering.dial.name
        follows = (
            "What is multiplied is each text's own activation, so the change follows the text."
        )
        if steering.hyperparameters.get("locate") == "effect":
            up = sum(record["effect"] > 0 for record in records)
            return [
                f"SADI multiplies {up} {what} by 1 + {dial} (now {1 + steering.setting:g}) and "
                f"{len(records) - up} by 1 - {dial} (now {1 - steering.setting:g}), in "
                f"{counted(records)}. {follows}",
                *effects_in_words(records, "scaling one of them"),
                *predicted_in_words(steering),
            ]
        return [
            f"SADI multiplies {len(records)} {what} by 1 + {dial} (now {1 + steering.setting:g}), "
            f"in {counted(records)}.",
            "They are the ones whose mean is higher in the positive texts than in the negative "
            f"ones by most. {follows}",
        ]
