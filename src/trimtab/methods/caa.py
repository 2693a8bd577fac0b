"""CAA: add the mean difference of the two sides to the residual stream.

"Steering Llama 2 via Contrastive Activation Addition" (Rimsky et al., ACL 2024).

    v_l = mean(h_l^pos) - mean(h_l^neg)  at block l's output,      h_l <- h_l + alpha v_l

`token` says whose activation stands for a text: its last token's (as in the comparisons of
AUSteer's paper), the mean over all its tokens, or over its answer's. The vector is not normalised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trimtab.activations import Means, Statistics, Token, Want
from trimtab.contrasts import Contrast
from trimtab.fitting import check_choice, check_number, fit, new_steering
from trimtab.operators import Add
from trimtab.steering import POSITIONS, Dial, Intervention, Positions, Steering

TOKENS = ("last", "mean", "answer")


@dataclass(frozen=True)
class CAA:
    """CAA's hyperparameters."""

    layer: int | None = field(
        default=None,
        metadata={"help": "Block whose output is steered; negative from the end (default: 40%)."},
    )
    alpha: float = field(default=1.0, metadata={"help": "Strength; the dial's default."})
    token: Token = field(
        default="last", metadata={"help": "What stands for a text: last, mean or answer."}
    )
    positions: Positions = field(
        default="all", metadata={"help": "Tokens to steer: all, prompt, generated or last."}
    )

    name = "caa"

    def __post_init__(self) -> None:
        check_choice("caa: token", self.token, TOKENS)
        check_choice("caa: positions", self.positions, POSITIONS)
        check_number("caa: alpha", self.alpha)

    def fit(self, language_model: Any, contrast: Contrast) -> Steering:
        """Take the mean difference and make the steering."""
        return fit([self], language_model, contrast)[0]

    def site(self, anatomy: Any) -> str:
        # The paper's best layers lie around 13 of 32.
        layer = int(0.4 * anatomy.layers) if self.layer is None else self.layer
        site: str = anatomy.sites("resid", (layer,))[0]
        return site

    def wants(self, anatomy: Any) -> list[Want]:
        return [Want(self.site(anatomy), self.token, Means)]

    def build(self, language_model: Any, contrast: Contrast, statistics: Statistics) -> Steering:
        site = self.site(language_model.anatomy)
        difference = statistics.of(site, self.token, Means).difference.float()
        interventions = [Intervention(site, Add(difference), self.positions)]
        dial = Dial("alpha", self.alpha, (-20.0, 20.0))
        return new_steering(self, language_model, contrast, interventions, dial)
