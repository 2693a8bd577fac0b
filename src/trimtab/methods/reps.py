"""RePS: a vector that steers by how much it is added, and suppresses where it is taken out.

"Improved Representation Steering for Language Models" (Wu et al., 2505.20809): reference-free
preference steering. For a winning answer w and a losing one l

    loss = - log sigmoid( beta / |w| * log p(w) - 1 / |l| * log p(l) ),
    beta = max( log p_0(l) - log p_0(w), 1 )

with |.| an answer's number of tokens and p_0 the model without steering. Each pair is asked twice:

    add    w positive, l negative    h <- h + alpha v, alpha drawn from `factors` for each answer
    sub    w negative, l positive    h <- h - ReLU(<h, v>) / |v|^2 v, which leaves <h, v> <= 0

beta does not depend on v; each answer is read without steering once. Where the model prefers the
losing answer by far, beta is as many nats large: then `add` is hardly more than the likelihood of
the positive answer, weighted by beta, until that is likely. `findings` have both margins, what is
in the brackets.

The code at hand (EasyEdit's, made from the authors') differs in this: its lengths are those of
prompt and answer together (`compat`), and it trains a bias beside the vector, which shifts the
factor and the ReLU and is left out when it steers; here there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from trimtab.fitting import Number, Says
from trimtab.methods.trained import SMALL, Presets, TrainedMethod, Vectors, training_in_words
from trimtab.model import LanguageModel
from trimtab.steering import Clamp, Intervention, Positions, Scope, Steering
from trimtab.training import Objective, Outcome, Run, Steered, Texts

#: The role of runs in which the vector is taken out.
_SUPPRESSED = "suppressed"
Factors = Annotated[tuple[Number, ...], Field(min_length=1), Says("must name one number or more")]


@dataclass(frozen=True)
class RePS(TrainedMethod):
    """RePS: a vector learnt so that adding some of it brings the positive answer of each pair, and
    taking out what lies along it the negative one.

        h <- h + alpha v,    or with use="suppress"    h <- h - alpha ReLU(<h, v>) / |v|^2 v

    Reference-free preference steering, "Improved Representation Steering for Language Models" (Wu
    et al., arXiv 2505.20809).

        >>> steering = tt.RePS(layer=1, steps=4).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(2))
    """

    factors: Factors = field(
        default=(2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0),
        metadata={"help": "Strengths that the training draws from."},
    )
    use: Literal["add", "suppress"] = field(
        default="add",
        metadata={"help": "Add the vector, or take out what lies along it (dial 1: all)."},
    )
    compat: bool = field(
        default=False,
        metadata={"help": "Count prompts as parts of answers' lengths, as the authors' code does."},
    )

    name = "reps"
    presets = Presets(
        {
            "small": {"rate": 0.01, "batch": 3, "steps": 60, **SMALL},
            "paper": {
                "learning_rate": 0.04,
                "batch": 6,
                "epochs": 18,
                "depth": 10 / 26,
                "positions": "all[1:]",
                "patience": 0,
            },
        }
    )

    @property
    def asks_for_dial(self) -> bool:
        """A share is 1 unless the user says otherwise."""
        return self.use == "add" and super().asks_for_dial

    @property
    def looks_beyond(self) -> bool:
        return self.use == "add"

    @property
    def dial_range(self) -> tuple[float, float]:
        return super().dial_range if self.use == "add" else (0.0, 1.0)

    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        return BothKinds(self.factors, self.compat, **self.where(language_model.anatomy))

    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        if self.use == "add":
            return self.adding(parameters)
        assert self.positions is not None
        scope = Scope.of(self.positions)
        return [
            Intervention(site, Clamp(vector / vector.norm(), high=0.0), scope)
            for site, vector in parameters.items()
        ]

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        what = "adds a vector"
        if steering.hyperparameters["use"] == "suppress":
            what = "takes out what lies along a vector"
        return [
            f"RePS {what} at {steering.where}, learnt so that adding it brings the positive answer "
            "of a pair, and taking it out the negative one.",
            *training_in_words(steering),
        ]


class BothKinds(Vectors):
    """The loss of the positive answer where the vector is added, and of the negative one where it
    is taken out."""

    refers = True

    def __init__(
        self,
        factors: Sequence[float],
        whole_lengths: bool,
        widths: Mapping[str, int],
        positions: Positions,
    ) -> None:
        super().__init__(widths, positions)
        self._factors, self._whole_lengths = factors, whole_lengths

    def start(self, generator: Generator) -> dict[str, Tensor]:
        """Uniform, as torch begins a linear layer."""
        return {
            site: (2 * torch.rand(width, generator=generator) - 1) / math.sqrt(width)
            for site, width in self.widths.items()
        }

    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        """Of each row winner and loser of `add`, and winner and loser of `sub`."""
        drawn = torch.randint(0, len(self._factors), (len(rows), 2), generator=generator)
        runs = []
        for (positive, negative), (first, second) in zip(rows, drawn.tolist(), strict=True):
            added = [Run(positive, self._factors[first]), Run(negative, self._factors[second])]
            taken = [Run(text, 1.0, _SUPPRESSED) for text in (negative, positive)]
            runs.append(added + taken)
        return runs

    def change(self, parameters: Mapping[str, Tensor], site: str, x: Tensor, at: Steered) -> Tensor:
        v = parameters[site].to(x)
        added = at.dials * v
        taken = -at.dials * (x @ v).relu()[..., None] / v.square().sum().clamp(min=1e-30) * v
        suppressed = at.has_role(_SUPPRESSED)[:, None, None]
        return x + torch.where(suppressed, taken, added)

    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        lengths = outcome.text_lengths if self._whole_lengths else outcome.lengths
        # [rows, add and sub, winner and loser]
        mean, known = (
            outcome.by_row(x).unflatten(1, (2, 2))
            for x in (outcome.log_p / lengths, outcome.reference)
        )
        beta = (known[..., 1] - known[..., 0]).clamp(min=1)
        margin = beta * mean[..., 0] - mean[..., 1]  # [rows, add and sub]
        return {
            "loss": -logsigmoid(margin).mean(1),
            "margin_add": margin[:, 0],
            "margin_sub": margin[:, 1],
        }

    def judged(self, text: int) -> Run:
        """At a factor in the middle of those that are drawn."""
        return Run(text, median(self._factors))
