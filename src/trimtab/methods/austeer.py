"""AUSteer: scale the few units that tell the two sides of a contrast apart most reliably.

"Fine-grained Activation Steering: Steering Less, Achieving More" (arXiv 2602.04428).

For unit i and pair j the activation momentum is m_i^j = x_i^pos - x_i^neg at the last token.
    r_i^pos = share of pairs with m > 0,   r_i^neg = share with m < 0        (equation 2)
    s_i = max(r_i^pos, r_i^neg)                                    the discriminative score
The k units with the largest s_i over all layers are steered at every token:
    x_i <- (1 + gamma_i) x_i,   gamma_i = alpha r_i^pos  if r_i^pos > r_i^neg, else -alpha r_i^neg

Scores are multiples of 1/N, so ties are the rule: the lower layer, then the lower unit goes first.

The paper's comparisons are one option each:

    locate="difference"    s_i = |mean m_i|, as SADI does                                (table 3)
    locate="random"        units drawn at random                                         (table 3)
    change="vector"        x_i <- x_i + alpha mean m_i, as ITI does                      (table 3)
    strength="fixed"       gamma_i = +alpha or -alpha, whatever r_i is                   (table 3)
    k="all"                as many units as there are                                    (table 12)
    choose="least"         suppress the k units of the smallest s_i: x_i <- (1 - alpha) x_i, with
                           alpha from 0 to 1                                             (table 13)

The paper says that scaling preserves an activation's sign. That holds for promoted units only: for
a suppressed one gamma < -1 as soon as alpha r^neg > 1, which is so at every strength that the
paper uses, and the activation is flipped and amplified. `clamp_sign` stops at zero instead.

Two options are ours. A promoted unit whose activation is mostly negative moves away from the
positive side when it is scaled up. `direction="signed"` multiplies gamma by the sign of the unit's
mean activation over both sides, which is still a scaling and always toward the positive side.
`change="absolute"` adds gamma |x| instead of gamma x, which goes the same way at every token and is
not linear, so it cannot be baked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Anatomy, site_order
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import (
    POSITIONS_HELP,
    Count,
    Means,
    Method,
    Number,
    Says,
    SignCounts,
    Statistics,
    Want,
    new_steering,
)
from trimtab.methods.words import counted, percent
from trimtab.model import LanguageModel
from trimtab.steering import (
    Add,
    Dial,
    Intervention,
    Operator,
    Positions,
    Scale,
    Scope,
    Steering,
    chosen,
)

#: The numbers of units and the strengths that the paper's grids are made of.
AUSTEER_GRID = (1, 2, 4, 8, 10, 15, 16, 20, 32, 50, 64, 80, 100)
SiteKind = Annotated[
    str,
    Field(pattern="^(heads|ffn_out|ffn_in|resid)$"),
    Says("is {value!r}: known are heads, ffn_out, ffn_in, resid"),
]
CountOrAll = Annotated[Count | Literal["all"], Says("must be 0 or more, or all, not {value}")]


@dataclass(frozen=True)
class AUSteer(Method):
    """AUSteer: scale the few units that tell the two sides apart most reliably. It needs a paired
    contrast.

        x_i <- (1 + gamma_i) x_i,    gamma_i = alpha r_i^pos  if r_i^pos > r_i^neg, else
                                     -alpha r_i^neg

    at the k units of the largest max(r_i^pos, r_i^neg), which are the shares of pairs in which the
    unit is larger on the positive and on the negative side. "Fine-grained Activation Steering:
    Steering Less, Achieving More" (arXiv 2602.04428).

        >>> steering = tt.AUSteer(k=8, alpha=2).fit(lm, contrast)
        >>> axes = steering.plot()
    """

    site: SiteKind = field(
        default="heads", metadata={"help": "Site kind: heads, ffn_out, ffn_in or resid."}
    )
    k: CountOrAll = field(default=96, metadata={"help": "How many units to steer, or all."})
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    direction: Literal["paper", "signed"] | None = field(
        default=None,
        metadata={
            "help": "Sign of gamma: paper, or signed by the unit's mean (default: signed, where "
            "units are scaled)."
        },
    )
    locate: Literal["momentum", "difference", "random"] = field(
        default="momentum", metadata={"help": "Score of a unit: momentum, difference or random."}
    )
    choose: Literal["most", "least"] = field(
        default="most", metadata={"help": "Steer the most important units, or suppress the least."}
    )
    change: Literal["scale", "absolute", "vector"] = field(
        default="scale",
        metadata={"help": "Add gamma x (scale), gamma |x| (absolute), or a fixed vector."},
    )
    strength: Literal["adaptive", "fixed"] = field(
        default="adaptive", metadata={"help": "gamma from each unit's rate, or the same for all."}
    )
    clamp_sign: bool = field(
        default=False, metadata={"help": "Stop a suppressed unit at zero instead of flipping it."}
    )
    layers: tuple[int, ...] | None = field(
        default=None, metadata={"help": "Layers to choose units from (default: all)."}
    )
    seed: int = field(default=0, metadata={"help": "For locate random."})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "austeer"
    unmeasured = 8.0
    columns = ("layer", "unit", "score", "r_pos", "r_neg", "gain")

    def check(self) -> None:
        if self.layers is not None and not self.layers:
            raise TrimtabError("austeer: layers is empty: name some, or leave it out for all")
        if self.choose == "least":
            defaults = {"change": "scale", "strength": "adaptive", "direction": "paper"}
            for option, default in defaults.items():
                if getattr(self, option) not in (default, None):
                    raise TrimtabError(
                        "austeer: choose least shrinks units by one factor, 1 - alpha: leave "
                        f"{option} out"
                    )
            if not 0 <= self.at_default <= 1:
                raise TrimtabError(
                    "austeer: choose least multiplies by 1 - alpha: alpha must be 0 to 1, not "
                    f"{self.alpha:g}"
                )
        if self.direction == "signed" and self.change != "scale":
            raise TrimtabError(
                f"austeer: direction signed is for scaling; change {self.change} goes toward the "
                "positive side as it is"
            )
        if self.clamp_sign and self.change != "scale":
            raise TrimtabError(f"austeer: clamp_sign is for scaling, not for change {self.change}")
        if self.strength == "fixed" and self.change == "vector":
            raise TrimtabError("austeer: strength fixed is for gamma, not for change vector")

    @property
    def at_default(self) -> float:
        return 1.0 if self.choose == "least" and self.alpha is None else super().at_default

    @property
    def asks_for_dial(self) -> bool:
        """Suppressed units have a dial of their own, the share that is taken away."""
        return self.choose == "most" and super().asks_for_dial

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"k": AUSTEER_GRID, "alpha": tuple(map(float, AUSTEER_GRID))}

    def sites(self, anatomy: Anatomy) -> list[str]:
        """Where units are chosen from, each site once and from the lowest layer up."""
        return sorted(set(anatomy.sites(self.site, self.layers)), key=site_order)

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        sites = self.sites(language_model.anatomy)
        units = sum(language_model.anatomy.width(site) for site in sites)
        if self.k != "all" and self.k > units:
            raise TrimtabError(f"austeer: k is {self.k}, but {self.site} has {units} units here")
        wants = [Want(site, "last", SignCounts) for site in sites]
        if self._needs_means:
            wants += [Want(site, "last", Means) for site in sites]
        return wants

    @property
    def _signed(self) -> bool:
        """Whether gamma has the sign of the unit's mean: as told, or where it can have."""
        if self.direction is None:
            return self.change == "scale" and self.choose == "most"
        return self.direction == "signed"

    @property
    def _needs_means(self) -> bool:
        return self._signed or self.locate == "difference" or self.change == "vector"

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        if self.direction is None:
            made = replace(self, direction="signed" if self._signed else "paper")
            return made.build(language_model, contrast, statistics)
        anatomy = language_model.anatomy
        sites = self.sites(anatomy)
        widths = [anatomy.width(site) for site in sites]
        rates = [statistics.of(site, "last", SignCounts).rates() for site in sites]
        r_pos = torch.cat([positive for positive, _ in rates])
        r_neg = torch.cat([negative for _, negative in rates])
        difference, sign = torch.zeros_like(r_pos), torch.ones_like(r_pos)
        if self._needs_means:
            means = [statistics.of(site, "last", Means) for site in sites]
            difference = torch.cat([mean.difference for mean in means])
            if self._signed:
                sign = torch.cat([(mean.positive + mean.negative).sign() for mean in means])
        score = self._score(r_pos, r_neg, difference)
        chosen = self._chosen(score)  # flat over (layer, unit)
        gain = self._gain(r_pos, r_neg, difference) * sign
        site_of = torch.arange(len(sites)).repeat_interleave(torch.tensor(widths))[chosen]
        unit_of = torch.cat([torch.arange(width) for width in widths])[chosen]
        interventions = []
        for number, site in enumerate(sites):
            here = site_of == number
            if here.any():
                units, order = unit_of[here].sort()
                gains = gain[chosen][here][order].float()
                operator = self._operator(units, gains, widths[number])
                interventions.append(Intervention(site, operator, Scope.of(self.positions)))
        layers = torch.tensor([anatomy.check(site)[0] for site in sites])
        tables = {
            "layer": layers[site_of],
            "unit": unit_of,
            "score": score[chosen].float(),
            "r_pos": r_pos[chosen].float(),
            "r_neg": r_neg[chosen].float(),
            "gain": gain[chosen].float(),
        }
        high = 1.0 if self.choose == "least" else 100.0
        dial = Dial("alpha", self.at_default, (0.0, high))
        return new_steering(self, language_model, contrast, interventions, dial, tables)

    def _score(self, r_pos: Tensor, r_neg: Tensor, difference: Tensor) -> Tensor:
        """How important each unit is, [units of all sites]."""
        if self.locate == "momentum":
            return torch.maximum(r_pos, r_neg)
        if self.locate == "difference":
            return difference.abs()
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(r_pos), generator=generator, dtype=torch.float64)

    def _chosen(self, score: Tensor) -> Tensor:
        """Indices of the units to steer, in rank order."""
        k = len(score) if self.k == "all" else self.k
        if self.choose == "least":
            return rank(-score)[:k]
        chosen = rank(score)[:k]
        chosen = chosen[score[chosen] > 0]
        if k and not len(chosen):
            raise TrimtabError(
                f"austeer: no unit of {self.site} differs between the two sides, so there is "
                "nothing to steer: give it other texts, or another site"
            )
        if len(chosen) < k and self.k != "all":
            warnings.warn(
                f"austeer: k is {k}, but only {len(chosen)} units differ between the two "
                "sides: the others are left alone",
                TrimtabWarning,
                stacklevel=2,
            )
        return chosen

    def _gain(self, r_pos: Tensor, r_neg: Tensor, difference: Tensor) -> Tensor:
        """gamma of every unit at alpha 1."""
        if self.choose == "least":
            return -torch.ones_like(r_pos)
        if self.change == "vector":
            return difference
        gain = torch.where(r_pos > r_neg, r_pos, -r_neg)
        return gain.sign() if self.strength == "fixed" else gain

    def _operator(self, units: Tensor, gains: Tensor, width: int) -> Operator:
        if self.change == "vector":
            return Add(torch.zeros(width).index_copy(0, units, gains))
        return Scale(units, gains, width, self.clamp_sign, absolute=self.change == "absolute")

    # -- in words -----------------------------------------------------------------------------

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        units = chosen(steering, cls.columns).get("units", [])
        if not units:
            return ["AUSteer with k = 0: no unit is changed."]
        options, dial = steering.hyperparameters, steering.dial.name
        least = options.get("choose") == "least"
        change = str(options.get("change", "scale"))
        formula = {
            "scale": "each activation x becomes (1 + gamma) x",
            "absolute": "each activation x becomes x + gamma |x|",
            "vector": f"to each {dial} times the mean difference of the two sides is added",
        }[change]
        if least:
            formula = f"each activation x becomes (1 - {dial}) x"
        best = "least" if least else "most"
        reason = {
            "momentum": f"They were chosen because they tell the two sides apart {best} reliably: "
            f"in the same direction on {percent([unit['score'] for unit in units])} of the pairs.",
            "difference": f"They were chosen because their mean differs {best} between the two "
            "sides.",
            "random": "They were drawn at random, for comparison.",
        }[options.get("locate", "momentum")]
        lines = [
            f"AUSteer {'shrinks' if least else 'changes'} {len(units)} single units of "
            f"{options.get('site')}, in {counted(units)}: {formula}.",
            reason,
        ]
        if least:
            return lines
        up, down = (sum(sign * unit["gamma"] > 0 for unit in units) for sign in (1, -1))
        verbs = ("scaled up", "down") if change == "scale" else ("raised", "lowered")
        lines.append(f"{up} are {verbs[0]}, {down} {verbs[1]}.")
        flipped = sum(unit["gamma"] < -1 for unit in units)
        if change == "scale" and flipped and not options.get("clamp_sign", False):
            lines.append(
                f"{flipped} have a gamma below -1, which turns an activation's sign around: that "
                "is how the method is defined."
            )
        return lines


def rank(score: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; of equal ones the lower index first."""
    return score.sort(descending=True, stable=True).indices
