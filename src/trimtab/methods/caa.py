"""CAA: add the mean difference of the two sides to the residual stream.

"Steering Llama 2 via Contrastive Activation Addition" (Rimsky et al., ACL 2024).

    v_l = mean(h_l^pos) - mean(h_l^neg)  at block l's output,      h_l <- h_l + alpha v_l

`token` says whose activation stands for a text: the mean over its answer's tokens (the default,
which gains most here), its last token's (as in the comparisons of AUSteer's paper), the mean over
all its tokens, or a token counted from the end (-2 is the answer's letter in the authors'
prompts).

`variant="pca"` keeps the length of v and takes as its direction the first principal component of
the pairs' differences. They are not centred, because their mean is what is looked for; the sign is
the one that agrees with v.

`variant="random"` keeps the length of v and takes a direction by chance: what a method does beyond
that comes of its direction, and not of a push of that size.

`layer="effect"` is ours: of every block's vector it knows from one pass what adding it does to the
answers, and takes the block whose effect is most certain (see layers.py). A vector of negative
effect is turned round.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Effect,
    Means,
    Method,
    Number,
    SecondMoment,
    Statistics,
    Token,
    Want,
    new_steering,
    validation_part,
)
from trimtab.methods.effects import predicted_in_words
from trimtab.methods.first_order import slope_wants
from trimtab.methods.layers import layer_by_effect, layer_in_words
from trimtab.methods.words import adds_vectors, difference_read_at, read_at
from trimtab.model import LanguageModel
from trimtab.reading import preference
from trimtab.steering import Add, Dial, Intervention, Positions, Scope, Situation, Steering


@dataclass(frozen=True)
class CAA(Method):
    """CAA: add the mean difference of the two sides to the residual stream.

        h_l <- h_l + alpha v_l,    v_l = mean(h_l^pos) - mean(h_l^neg)  at the output of block l

    "Steering Llama 2 via Contrastive Activation Addition" (Rimsky et al., ACL 2024).

        >>> steering = tt.CAA(alpha=2, token="answer").fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    layer: int | tuple[int, ...] | Literal["validation", "effect"] | None = field(
        default=None,
        metadata={
            "help": "Blocks whose output is steered, as in 12 or 10-14, negative from the end; or "
            "validation: the one that does most on validation rows at alpha; or effect: the one "
            "that most certainly does something to the answers (default: 40%)."
        },
    )
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    token: Token | None = field(
        default=None,
        metadata={
            "help": "What stands for a text: last, mean, answer, or -2 and so on (default: answer; "
            "of unpaired texts, which have none, last)."
        },
    )
    variant: Literal["mean", "pca", "random"] = field(
        default="mean",
        metadata={
            "help": "Direction: mean difference; pca of the differences; or random, by chance, of "
            "the mean difference's length, to compare with."
        },
    )
    draw: int = field(
        default=0, metadata={"help": "Which of the directions by chance, for variant random."}
    )
    unit_norm: bool = field(
        default=False, metadata={"help": "Make the vector's length 1 instead of the difference's."}
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "caa"
    unmeasured = 1.0

    def check(self) -> None:
        if self.layer == ():
            raise TrimtabError("caa: layer is empty: name some, or leave it out")
        if self.layer == "effect" and self.variant == "random":
            raise TrimtabError(
                "caa: layer effect chooses the block and the sign, and a direction by chance is "
                "chosen by nothing: name a block"
            )
        if self.layer == "validation" and self.alpha == 0:
            raise TrimtabError("caa: alpha is 0, at which layer validation has no effect to see")

    @property
    def chooses_by_dial(self) -> bool:
        return self.layer == "validation"

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "alpha": (0.5, 1.0, 2.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The sites to steer, or those to choose from."""
        if self.layer in ("validation", "effect"):
            every: list[str] = anatomy.sites("resid")
            return every
        return residual_sites(anatomy, self.layer)

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        if self.layer == "validation":
            validation_part(self.name, contrast)
            if not contrast.paired and Scope.of(self.positions).holds(Situation("prompt")) is False:
                raise TrimtabError(
                    f"caa: layer validation reads unpaired texts as they are, and positions "
                    f"{self.positions} changes nothing there: use all, or a paired contrast"
                )
        sites, token = self.sites(language_model.anatomy), self._for(contrast).token
        assert token is not None
        wants = [Want(site, token, Means) for site in sites]
        if self.variant == "pca":
            wants += [Want(site, token, SecondMoment) for site in sites]
        if self.layer == "effect":
            wants += slope_wants(sites, Effect(self.positions))
        return wants

    def _for(self, contrast: Contrast) -> CAA:
        """The method with what it takes of this contrast's texts, if it was not told."""
        default: Token = "answer" if contrast.paired else "last"
        return self if self.token is not None else replace(self, token=default)

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        if self.token is None:
            return self._for(contrast).build(language_model, contrast, statistics)
        dial = Dial("alpha", self.at_default, (-20.0, 20.0))
        vectors = {
            site: self._vector(statistics, site) for site in self.sites(language_model.anatomy)
        }
        if self.layer == "effect":
            best, findings = layer_by_effect(
                self.name, language_model, statistics, vectors, Effect(self.positions)
            )
            return new_steering(self, language_model, contrast, [best], dial, findings=findings)
        interventions = [
            Intervention(site, Add(vector), Scope.of(self.positions))
            for site, vector in vectors.items()
        ]
        if self.layer != "validation":
            return new_steering(self, language_model, contrast, interventions, dial)
        validation = validation_part(self.name, contrast)
        base = preference(language_model, validation)
        gains = {}
        for intervention in interventions:
            steering = new_steering(self, language_model, contrast, [intervention], dial)
            gain = preference(language_model, validation, steering) - base
            gains[intervention.site] = gain
        # A negative alpha is meant to lower the preference; of equal layers the lower one.
        best = max(
            interventions, key=lambda each: math.copysign(1, self.at_default) * gains[each.site]
        )
        findings = {"site": best.site, "validation_gain": gains}
        return new_steering(self, language_model, contrast, [best], dial, findings=findings)

    def _vector(self, statistics: Statistics, site: str) -> Tensor:
        assert self.token is not None
        vector = statistics.of(site, self.token, Means).difference
        length = vector.norm()
        if self.variant == "pca":
            moment = statistics.of(site, self.token, SecondMoment).sum
            vector = length * _first_component(moment, vector)
        elif self.variant == "random":
            vector = length * _by_chance(site, len(vector), self.draw)
        return (vector / length if self.unit_norm and length > 0 else vector).float()

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        options = steering.hyperparameters
        what = difference_read_at(options["token"])
        if options.get("variant") == "pca":
            read = read_at(options["token"])
            what = f"the direction in which the pairs differ most (PCA), {read}"
        elif options.get("variant") == "random":
            read = read_at(options["token"])
            what = f"a direction by chance, as long as the mean difference, {read}"
        lines = adds_vectors("CAA", steering, what)
        gains = steering.findings.get("validation_gain")
        if gains:
            lines.append(
                f"The block was chosen among {len(gains)} on validation rows: there it moves the "
                f"model most toward the positive side, by {max(gains.values()):.2f} nats."
            )
        return lines + layer_in_words(steering) + predicted_in_words(steering)


def residual_sites(anatomy: Anatomy, layer: Any) -> list[str]:
    """Outputs of one block or of several; without a number, of the one at 40 % of the depth."""
    if layer is None:
        layer = int(0.4 * anatomy.layers)  # CAA's best layers lie around 13 of 32
    layers = (layer,) if isinstance(layer, int) else layer
    sites: list[str] = list(dict.fromkeys(anatomy.sites("resid", layers)))
    return sites


def _by_chance(site: str, units: int, draw: int) -> Tensor:
    """A direction of length 1 by chance, [units]: the same at a site, whatever others there are."""
    drawn = torch.Generator().manual_seed(zlib.crc32(f"{draw} {site}".encode()))
    vector: Tensor = torch.randn(units, generator=drawn, dtype=torch.float64)
    return torch.nn.functional.normalize(vector, dim=0)


def _first_component(moment: Tensor, toward: Tensor) -> Tensor:
    """The eigenvector of the largest eigenvalue, [units], pointing the way `toward` does."""
    from scipy.sparse.linalg import eigsh

    if not moment.any():
        raise TrimtabError("caa: the two sides of every pair have equal activations")
    start = toward.numpy() if toward.any() else None  # the same start, the same result
    _, vectors = eigsh(moment.double().cpu().numpy(), k=1, v0=start)
    vector = torch.from_numpy(vectors[:, 0].copy())
    agreement = vector @ toward
    if agreement.abs() <= 1e-9 * toward.norm():  # neither way: the largest entry is positive
        agreement = vector[vector.abs().argmax()]
    return -vector if agreement < 0 else vector
