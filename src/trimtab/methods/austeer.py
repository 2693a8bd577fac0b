"""AUSteer: scale the few units that tell the two sides of a contrast apart most reliably.

"Fine-grained Activation Steering: Steering Less, Achieving More" (arXiv 2602.04428).

For unit i and pair j the activation momentum is m_i^j = x_i^pos - x_i^neg at the last token.
    r_i^pos = share of pairs with m > 0,   r_i^neg = share with m < 0        (equation 2)
    s_i = max(r_i^pos, r_i^neg)                                    the discriminative score
The k units with the largest s_i over all layers are steered at every token:
    x_i <- (1 + gamma_i) x_i,   gamma_i = alpha r_i^pos  if r_i^pos > r_i^neg, else -alpha r_i^neg

Scores are multiples of 1/N, so ties are the rule: the lower layer, then the lower unit goes first.

The paper says that scaling preserves an activation's sign. That holds for promoted units only: for
a suppressed one gamma < -1 as soon as alpha r^neg > 1, which is so at every strength that the
paper uses, and the activation is flipped and amplified. `clamp_sign` stops at zero instead.

`direction="signed"` is ours: a promoted unit whose activation is mostly negative moves away from
the positive side when it is scaled up. Signed multiplies gamma by the sign of the unit's mean
activation over both sides, which is still a scaling and always toward the positive side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.activations import Means, SignCounts, Statistics, Want
from trimtab.anatomy import site_order
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import check_choice, check_number, fit, new_steering
from trimtab.operators import Scale
from trimtab.steering import POSITIONS, Dial, Intervention, Positions, Steering

SITE_KINDS = ("heads", "ffn_out", "ffn_in", "resid")
DIRECTIONS = ("paper", "signed")


@dataclass(frozen=True)
class AUSteer:
    """AUSteer's hyperparameters; `fit` needs a paired contrast."""

    site: str = field(
        default="ffn_out", metadata={"help": "Site kind: heads, ffn_out, ffn_in or resid."}
    )
    k: int = field(default=16, metadata={"help": "How many units to steer."})
    alpha: float = field(default=8.0, metadata={"help": "Strength; the dial's default."})
    direction: Literal["paper", "signed"] = field(
        default="paper", metadata={"help": "Sign of gamma: paper, or signed by the unit's mean."}
    )
    clamp_sign: bool = field(
        default=False, metadata={"help": "Stop a suppressed unit at zero instead of flipping it."}
    )
    layers: tuple[int, ...] | None = field(
        default=None, metadata={"help": "Layers to choose units from (default: all)."}
    )
    positions: Positions = field(
        default="all", metadata={"help": "Tokens to steer: all, prompt, generated or last."}
    )

    name = "austeer"

    def __post_init__(self) -> None:
        check_choice("austeer: site", self.site, SITE_KINDS)
        check_choice("austeer: direction", self.direction, DIRECTIONS)
        check_choice("austeer: positions", self.positions, POSITIONS)
        check_number("austeer: alpha", self.alpha)
        if self.k < 0:
            raise TrimtabError(f"austeer: k must be 0 or more, not {self.k}")
        if self.layers is not None and not self.layers:
            raise TrimtabError("austeer: layers is empty: name some, or leave it out for all")

    def fit(self, language_model: Any, contrast: Contrast) -> Steering:
        """Find the units and make the steering. Raises TrimtabError if k exceeds the units."""
        return fit([self], language_model, contrast)[0]

    def sites(self, anatomy: Any) -> list[str]:
        """Where units are chosen from, each site once and from the lowest layer up."""
        return sorted(set(anatomy.sites(self.site, self.layers)), key=site_order)

    def wants(self, anatomy: Any) -> list[Want]:
        sites = self.sites(anatomy)
        units = sum(anatomy.width(site) for site in sites)
        if self.k > units:
            raise TrimtabError(f"austeer: k is {self.k}, but {self.site} has {units} units here")
        wants = [Want(site, "last", SignCounts) for site in sites]
        if self.direction == "signed":
            wants += [Want(site, "last", Means) for site in sites]
        return wants

    def build(self, language_model: Any, contrast: Contrast, statistics: Statistics) -> Steering:
        anatomy = language_model.anatomy
        sites = self.sites(anatomy)
        rates = [statistics.of(site, "last", SignCounts).rates() for site in sites]
        r_pos = torch.cat([positive for positive, _ in rates])
        r_neg = torch.cat([negative for _, negative in rates])
        gain = torch.where(r_pos > r_neg, r_pos, -r_neg)
        if self.direction == "signed":
            means = [statistics.of(site, "last", Means) for site in sites]
            gain = gain * torch.cat([(mean.positive + mean.negative).sign() for mean in means])
        score = torch.maximum(r_pos, r_neg)
        chosen = rank(score)[: self.k]  # flat over (layer, unit)
        chosen = chosen[score[chosen] > 0]
        if len(chosen) < self.k:
            warnings.warn(
                f"austeer: k is {self.k}, but only {len(chosen)} units differ between the two "
                "sides: the others are left alone",
                TrimtabWarning,
                stacklevel=2,
            )
        widths = [anatomy.width(site) for site in sites]
        site_of = torch.arange(len(sites)).repeat_interleave(torch.tensor(widths))[chosen]
        unit_of = torch.cat([torch.arange(width) for width in widths])[chosen]
        interventions = []
        for number, site in enumerate(sites):
            here = site_of == number
            if here.any():
                units, order = unit_of[here].sort()
                gains = gain[chosen][here][order].float()
                scale = Scale(units, gains, widths[number], self.clamp_sign)
                interventions.append(Intervention(site, scale, self.positions))
        layers = torch.tensor([anatomy.check(site)[0] for site in sites])
        tables = {
            "layer": layers[site_of],
            "unit": unit_of,
            "score": score[chosen].float(),
            "r_pos": r_pos[chosen].float(),
            "r_neg": r_neg[chosen].float(),
            "gain": gain[chosen].float(),
        }
        dial = Dial("alpha", self.alpha, (0.0, 100.0))
        return new_steering(self, language_model, contrast, interventions, dial, tables)


def rank(score: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; of equal ones the lower index first."""
    return score.sort(descending=True, stable=True).indices
