"""BiPO: a vector that makes one answer of each pair more probable when it is added, and the other
one when it is taken away.

"Personalized Steering of Large Language Models: Versatile Steering Vectors Through Bi-directional
Preference Optimization" (Cao et al., NeurIPS 2024, 2406.00045).

    loss = - log sigmoid( d beta [ (l_d(y+) - l_0(y+)) - (l_d(y-) - l_0(y-)) ] )

with l_d the log-probability of an answer where h <- h + d v, summed over its tokens, and d drawn
from {-1, 1} for each step. v starts at 0, where the loss is log 2 and its gradient -(beta/2) times
that of the margin, whatever d is: the first step goes along the effect that adding to each unit has
on log p(y+) - log p(y-), which `locate="effect"` of other methods reads in one backward pass.

The authors' code runs the unsteered model beside the steered one at each step; its answers do not
change, so that here each is read once. It ends every answer with an end-of-text token, and a weight
decay that it defines reaches no optimizer: here there is neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from trimtab.methods.trained import (
    SMALL,
    AboveZero,
    Presets,
    TrainedMethod,
    Vectors,
    training_in_words,
)
from trimtab.model import LanguageModel
from trimtab.steering import Intervention, Positions, Steering
from trimtab.training import Objective, Outcome, Run, Texts


@dataclass(frozen=True)
class BiPO(TrainedMethod):
    """BiPO: a vector learnt so that adding it makes the positive answer of each pair more probable
    than the negative one, and taking it away the other way round.

        h <- h + alpha v,    v minimises - log sigmoid(d beta (margin_d - margin_0)),  d = -1 or 1

    "Personalized Steering of Large Language Models: Versatile Steering Vectors Through
    Bi-directional Preference Optimization" (Cao et al., NeurIPS 2024).

        >>> steering = tt.BiPO(layer=1, steps=4).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(-1))
    """

    beta: AboveZero = field(
        default=0.1, metadata={"help": "How soon a margin is large enough, in 1/nats."}
    )

    name = "bipo"
    presets = Presets(
        {
            "small": {"rate": 0.02, "batch": 4, "steps": 60, **SMALL},
            "paper": {
                "learning_rate": 5e-4,
                "batch": 4,
                "epochs": 20,
                "schedule": "cosine",
                "horizon_epochs": 100,  # also where the vector of an earlier epoch is used
                "warmup": 100,
                "depth": 15 / 32,
                "positions": "all",
                "patience": 0,
            },
        }
    )

    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        return BothWays(self.beta, **self.where(language_model.anatomy))

    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        return self.adding(parameters)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        return [
            f"BiPO adds a vector at {steering.where}, learnt so that {steering.dial.name} 1 makes "
            "the positive answer of a pair more probable than the negative one, and "
            f"{steering.dial.name} -1 the other way round.",
            *training_in_words(steering),
        ]


class BothWays(Vectors):
    """The loss of a preference for the positive answer at dial 1, and for the other one at -1."""

    refers = True

    def __init__(self, beta: float, widths: Mapping[str, int], positions: Positions) -> None:
        super().__init__(widths, positions)
        self._beta = beta

    def start(self, generator: Generator) -> dict[str, Tensor]:
        return {site: torch.zeros(width) for site, width in self.widths.items()}

    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        dial = 2.0 * int(torch.randint(0, 2, (), generator=generator)) - 1.0
        return [[Run(text, dial) for text in row] for row in rows]

    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        gained = outcome.by_row(outcome.log_p - outcome.reference)  # [rows, positive and negative]
        margin = outcome.at.runs[0].dial * (gained[:, 0] - gained[:, 1])
        return {"loss": -logsigmoid(self._beta * margin), "margin": margin}
