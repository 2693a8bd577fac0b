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

Units by effect are ours. The score above knows nothing of size, of whether anything reads a unit,
or of which way scaling moves it. With m = log p(positive) - log p(negative) of a pair,

    locate="effect"          e_i = d E[m] / d gamma_i at 0; s_i = |e_i| / its standard error (of
                             equal ones the larger effect first), gamma_i = alpha sign(e_i)
    locate="effect_per_nat"  s_i = e_i^2 / c_i, where scaling the unit costs 1/2 c_i gamma_i^2 nats
                             on plain text, and gamma_i = alpha (e_i / c_i) / max |e / c|

with one backward pass for all units (see fitting/gradients.py). c_i is the unit's Fisher
information plus a tenth of the mean over all units, because a small one is hardly known.
`strength="fixed"` and `"graded"` choose between the two forms of gamma. `verify`, `average` and
`interaction` look at units again with some of them scaled (see choosing.py and verifying.py).

`basis="svd"` takes the singular directions of the weight matrix at a site in place of its units,
and scales what lies along the chosen ones (see directions.py).

Two more options are ours. A promoted unit whose activation is mostly negative moves away from the
positive side when it is scaled up. `direction="signed"` multiplies gamma by the sign of the unit's
mean activation over both sides, which is still a scaling and always toward the positive side.
`change="absolute"` adds gamma |x| instead of gamma x, which goes the same way at every token and is
not linear, so it cannot be baked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
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
    Effect,
    Means,
    Method,
    Number,
    Says,
    SignCounts,
    Statistics,
    Want,
    new_steering,
)
from trimtab.methods.austeer_words import austeer_in_words
from trimtab.methods.choosing import BLOCK, Choice, Trials, Ways, choose
from trimtab.methods.directions import along_directions, direction_wants
from trimtab.methods.effects import (
    Scoring,
    by_effect,
    dial_for,
    effect_wants,
    gain_error,
    predicted,
)
from trimtab.methods.ranking import Scores, places, rank
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
)

#: The numbers of units and the strengths that the paper's grids are made of.
AUSTEER_GRID = (1, 2, 4, 8, 10, 15, 16, 20, 32, 50, 64, 80, 100)
#: Options that are for units by effect only.
_BY_EFFECT = ("per_token", "first_token", "verify", "average", "interaction", "block", "basis")
#: How gamma is made where nothing else is said.
_STRENGTHS: dict[str, Literal["fixed", "graded"]] = {
    "effect": "fixed",
    "effect_per_nat": "graded",
}
SiteKind = Annotated[
    str,
    Field(pattern="^(heads|attn_out|ffn_in|ffn_out|resid)$"),
    Says("is {value!r}: known are heads, attn_out, ffn_in, ffn_out, resid"),
]
AtLeastOne = Annotated[int, Field(ge=1), Says("must be 1 or more, not {value}")]
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
        default="heads", metadata={"help": "Site kind: heads, attn_out, ffn_in, ffn_out or resid."}
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
    locate: Literal["momentum", "difference", "random", "effect", "effect_per_nat"] = field(
        default="momentum",
        metadata={
            "help": "Score of a unit: momentum, difference, random, effect (what scaling does to "
            "the answers, against its standard error) or effect_per_nat (against what it costs)."
        },
    )
    choose: Literal["most", "least"] = field(
        default="most", metadata={"help": "Steer the most important units, or suppress the least."}
    )
    change: Literal["scale", "absolute", "vector"] = field(
        default="scale",
        metadata={"help": "Add gamma x (scale), gamma |x| (absolute), or a fixed vector."},
    )
    strength: Literal["adaptive", "fixed", "graded"] | None = field(
        default=None,
        metadata={
            "help": "gamma from each unit's rate (adaptive), the same for all (fixed), or from its "
            "effect (graded; default: adaptive, of effect fixed, of effect_per_nat graded)."
        },
    )
    per_token: bool = field(
        default=False,
        metadata={"help": "Effects on an answer's mean per token, not on its sum."},
    )
    first_token: bool = field(
        default=True,
        metadata={
            "help": "Whether effects count a text's first token, where a few units are huge."
        },
    )
    verify: Count = field(
        default=0,
        metadata={
            "help": "Scale the 4k best units by effect for real, on so many pairs and at alpha or "
            "where 1 nat is predicted, and keep those that gain most (0: none)."
        },
    )
    average: bool = field(
        default=False,
        metadata={"help": "Average effects over none, half and all of that strength."},
    )
    interaction: Literal["none", "blocks", "fisher"] = field(
        default="none",
        metadata={
            "help": "What units do together: none, blocks (choose some at a time, with those "
            "chosen before scaled) or fisher (gamma by the units' full Fisher information)."
        },
    )
    block: AtLeastOne | None = field(
        default=None,
        metadata={"help": f"How many units interaction blocks chooses at a time ({BLOCK})."},
    )
    basis: Literal["units", "svd"] = field(
        default="units",
        metadata={
            "help": "What is scaled: single units, or singular directions of the weights at the "
            "site (svd; by effect)."
        },
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
    columns = ("layer", "unit", "score", "gain")

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
        self._check_effects()
        if self.direction == "signed" and self.change != "scale":
            raise TrimtabError(
                f"austeer: direction signed is for scaling; change {self.change} goes toward the "
                "positive side as it is"
            )
        if self.clamp_sign and self.change != "scale":
            raise TrimtabError(f"austeer: clamp_sign is for scaling, not for change {self.change}")
        if self.strength == "fixed" and self.change == "vector":
            raise TrimtabError("austeer: strength fixed is for gamma, not for change vector")

    def _check_effects(self) -> None:
        """Refuse what does not go with units by effect, and what goes with nothing else."""
        if not self.by_effect:
            if self.strength == "graded":
                raise TrimtabError(
                    "austeer: strength graded is by effect: take locate effect or effect_per_nat"
                )
            for each in fields(self):
                if each.name in _BY_EFFECT and getattr(self, each.name) != each.default:
                    raise TrimtabError(
                        f"austeer: {each.name} is for units by effect: take locate effect or "
                        "effect_per_nat, or leave it out"
                    )
            return
        for option, default in {"direction": None, "change": "scale"}.items():
            if getattr(self, option) != default:
                raise TrimtabError(
                    f"austeer: locate {self.locate} scales each unit the way that its effect says: "
                    f"leave {option} out"
                )
        if self.strength == "adaptive":
            raise TrimtabError(
                f"austeer: strength adaptive is by rates, and locate {self.locate} by effect: take "
                "fixed or graded"
            )
        if self.strength == "fixed" and self.interaction == "fisher":
            raise TrimtabError("austeer: interaction fisher grades gamma: leave strength out")
        if self.block is not None and self.interaction != "blocks":
            raise TrimtabError("austeer: block is for interaction blocks: leave it out")
        self._ways.check(self.alpha, self.k, self.choose, self.positions)
        self._check_basis()

    def _check_basis(self) -> None:
        """Refuse what is not made for singular directions."""
        units_only = {
            "site resid": self.site == "resid",
            "choose least": self.choose == "least",
            "clamp_sign": self.clamp_sign,
            "choosing again (verify, average, interaction)": not self._ways.simplest,
        }
        for name, asked in units_only.items():
            if self.basis == "svd" and asked:
                raise TrimtabError(f"austeer: {name} is for single units, not for basis svd")

    @property
    def by_effect(self) -> bool:
        """Whether units are chosen by what scaling them does."""
        return self.locate in ("effect", "effect_per_nat")

    @property
    def chooses_by_dial(self) -> bool:
        return not self._ways.simplest

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
        if self.basis == "svd":
            return direction_wants(language_model.anatomy, sites, self._effect)
        units = sum(language_model.anatomy.width(site) for site in sites)
        if self.k != "all" and self.k > units:
            raise TrimtabError(f"austeer: k is {self.k}, but {self.site} has {units} units here")
        wants: list[Want] = []
        if self.by_effect:
            rows = len(contrast.train)
            wants += effect_wants(sites, self._effect, rows, units)
        if contrast.paired or not self.by_effect:
            wants += [Want(site, "last", SignCounts) for site in sites]
        if self._needs_means:
            wants += [Want(site, "last", Means) for site in sites]
        return wants

    @property
    def _ways(self) -> Ways:
        return Ways(self.verify, self.average, self.interaction, self.block)

    @property
    def _effect(self) -> Effect:
        return Effect(self.positions, self.per_token, "all" if self.first_token else "rest")

    @property
    def _signed(self) -> bool:
        """Whether gamma has the sign of the unit's mean: as told, or where it can have."""
        if self.direction is None:
            return self.change == "scale" and self.choose == "most" and not self.by_effect
        return self.direction == "signed"

    @property
    def _needs_means(self) -> bool:
        return self._signed or self.locate == "difference" or self.change == "vector"

    def _settled(self) -> AUSteer:
        """The same with what was left open as it is taken."""
        direction, strength = self.direction, self.strength
        if direction is None and not self.by_effect:
            direction = "signed" if self._signed else "paper"
        if strength is None:
            strength = _STRENGTHS.get(self.locate, "adaptive")
            strength = "graded" if self.interaction == "fisher" else strength
        block = self.block or (BLOCK if self.interaction == "blocks" else None)
        return replace(self, direction=direction, strength=strength, block=block)

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        settled = self._settled()
        if settled.basis == "svd":
            return settled._along_directions(language_model, contrast, statistics)
        if settled.by_effect:
            choice = settled._by_effect(language_model, contrast, statistics)
        else:
            found = settled._found(language_model, statistics)
            choice = Choice(found, settled._chosen(found), {})
        found, picked = choice.found, choice.picked  # flat over (layer, unit)
        interventions = settled._interventions(language_model, found, picked)
        widths = [language_model.anatomy.width(site) for site in found.sites]
        layers = [language_model.anatomy.check(site)[0] for site in found.sites]
        site_of, unit_of = places(widths, picked)
        tables = {
            "layer": torch.tensor(layers)[site_of],
            "unit": unit_of,
            **{name: column[picked].float() for name, column in found.columns.items()},
        }
        default = settled._stands_at(choice.findings.get("predicted", {}))
        high = 1.0 if settled.choose == "least" else max(100.0, default)
        dial = Dial("alpha", default, (-high if settled.by_effect else 0.0, high))
        return new_steering(
            settled, language_model, contrast, interventions, dial, tables, choice.findings
        )

    def _interventions(
        self, language_model: LanguageModel, found: Scores, picked: Tensor
    ) -> list[Intervention]:
        """What scales the units that were picked."""
        widths = [language_model.anatomy.width(site) for site in found.sites]
        site_of, unit_of = places(widths, picked)
        gain, interventions = found.columns["gain"][picked], []
        for number, site in enumerate(found.sites):
            here = site_of == number
            if here.any():
                units, order = unit_of[here].sort()
                operator = self._operator(units, gain[here][order].float(), widths[number])
                interventions.append(Intervention(site, operator, Scope.of(self.positions)))
        return interventions

    def _stands_at(self, known: Mapping[str, float]) -> float:
        """Where the dial stands unmeasured, if so much is `known` of a dial of 1: as given, where a
        budget is predicted to be used up, or at the method's own number."""
        predicted = dial_for(known) if self.alpha is None else None
        return self.at_default if predicted is None else float(f"{predicted:.3g}")

    # -- by effect ----------------------------------------------------------------------------

    def _by_effect(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Choice:
        """The units that are chosen by what scaling them does, and what is predicted of them."""
        sites, effect = self.sites(language_model.anatomy), self._effect
        scoring = Scoring(self.locate, self.strength == "fixed")
        first = by_effect(language_model, statistics, sites, effect, scoring)
        if contrast.paired:
            r_pos, r_neg = _rates(statistics, sites)
            first = first.with_columns(r_pos=r_pos, r_neg=r_neg)
        if self.choose == "least":
            first = first.with_columns(gain=-torch.ones_like(first.score))
            return Choice(first, self._chosen(first), {})
        interventions = partial(self._interventions, language_model)

        def known(found: Scores, picked: Tensor) -> dict[str, float]:
            """Costs are those of scaling at every token."""
            acting = interventions(found, picked)
            everywhere = Scope.of(self.positions).everywhere
            return predicted(found, picked, acting) if everywhere else {}

        choice = Choice(first, self._chosen(first), {})
        if not self._ways.simplest and self.k:
            trials = Trials(
                language_model,
                contrast.train,
                effect,
                scoring.as_in(first),
                interventions,
                self.clamp_sign,
                self._stands_at(known(first, choice.picked)),
                statistics.max_length,
            )
            choice = choose(trials, first, choice.picked, int(self.k), self._ways)
        foreseen = known(choice.found, choice.picked)
        if not foreseen:
            return choice
        if self.interaction != "blocks" and not self.average:
            error = gain_error(statistics, effect, interventions(choice.found, choice.picked))
            foreseen |= {} if error is None else {"gain_error": error}
        return replace(choice, findings={**choice.findings, "predicted": foreseen})

    def _along_directions(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        """The same of singular directions."""
        sites = self.sites(language_model.anatomy)
        scoring = Scoring(self.locate, self.strength == "fixed")
        along = along_directions(language_model, statistics, sites, self._effect, scoring)
        picked = self._chosen(along.found)
        findings = {"predicted": along.predicted(picked)} if self.positions == "all" else {}
        default = self._stands_at(findings.get("predicted", {}))
        high = max(100.0, default)
        return new_steering(
            self,
            language_model,
            contrast,
            along.interventions(picked, self.positions),
            Dial("alpha", default, (-high, high)),
            along.tables(language_model.anatomy, picked),
            findings,
        )

    # -- by rates, differences or chance ------------------------------------------------------

    def _found(self, language_model: LanguageModel, statistics: Statistics) -> Scores:
        """Score and gamma of every unit, and what else is known of it."""
        sites = self.sites(language_model.anatomy)
        r_pos, r_neg = _rates(statistics, sites)
        difference, sign = torch.zeros_like(r_pos), torch.ones_like(r_pos)
        if self._needs_means:
            means = [statistics.of(site, "last", Means) for site in sites]
            difference = torch.cat([mean.difference for mean in means])
            if self._signed:
                sign = torch.cat([(mean.positive + mean.negative).sign() for mean in means])
        score = self._score(r_pos, r_neg, difference)
        gain = self._gain(r_pos, r_neg, difference) * sign
        columns = {"score": score, "r_pos": r_pos, "r_neg": r_neg, "gain": gain}
        return Scores(sites, score, columns)

    def _score(self, r_pos: Tensor, r_neg: Tensor, difference: Tensor) -> Tensor:
        """How important each unit is, [units of all sites]."""
        if self.locate == "momentum":
            return torch.maximum(r_pos, r_neg)
        if self.locate == "difference":
            return difference.abs()
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(r_pos), generator=generator, dtype=torch.float64)

    def _chosen(self, found: Scores) -> Tensor:
        """Indices of the units to steer, in rank order."""
        score = found.score
        k = len(score) if self.k == "all" else self.k
        if self.choose == "least":
            return rank(-score)[:k]
        chosen = found.best(k)
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

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        return austeer_in_words(steering, cls.columns)


def _rates(statistics: Statistics, sites: Sequence[str]) -> tuple[Tensor, Tensor]:
    """r_pos and r_neg of every unit, [units of all sites] each."""
    rates = [statistics.of(site, "last", SignCounts).rates() for site in sites]
    return torch.cat([r_pos for r_pos, _ in rates]), torch.cat([r_neg for _, r_neg in rates])
