"""SSV: a vector under which the positive answers are most probable.

The supervised steering vector of "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse
Autoencoders" (Wu et al., ICML 2025, arXiv 2501.17148).

    h <- h + v        v minimises  - log p(positive answer | prompt; v)  per token

Negative texts take no part: unpaired positive texts are enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from trimtab.contrasts import Contrast
from trimtab.methods.trained import SMALL, Presets, TrainedMethod, Vectors, training_in_words
from trimtab.model import LanguageModel
from trimtab.steering import Intervention, Steering
from trimtab.training import Objective, Outcome, Run, Texts, positive_texts


@dataclass(frozen=True)
class SSV(TrainedMethod):
    """SSV: a vector under which the positive answers are most probable.

        h <- h + alpha v,    v minimises - log p(positive | prompt) at alpha 1

    The supervised steering vector of "AxBench: Steering LLMs? Even Simple Baselines Outperform
    Sparse Autoencoders" (Wu et al., arXiv 2501.17148).

        >>> steering = tt.SSV(layer=1, steps=4).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    name = "ssv"
    presets = Presets(
        {
            "small": {"rate": 0.02, "batch": 6, "steps": 60, **SMALL},
            "paper": {
                "learning_rate": 0.01,
                "batch": 6,
                "epochs": 3,
                "depth": 10 / 26,
                "positions": "all[1:]",
                "patience": 0,
            },
        }
    )

    def texts(
        self, language_model: LanguageModel, contrast: Contrast, max_length: int | None
    ) -> Texts:
        return positive_texts(language_model, contrast, max_length)

    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        return Likelihood(**self.where(language_model.anatomy))

    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        return self.adding(parameters)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        return [
            f"SSV adds a vector at {steering.where}, learnt so that the model finds the positive "
            f"answers as probable as can be at {steering.dial.name} 1.",
            *training_in_words(steering),
        ]


class Likelihood(Vectors):
    """The mean negative log-likelihood per token of each positive answer."""

    def start(self, generator: Generator) -> dict[str, Tensor]:
        return {site: torch.full((width,), 0.01) for site, width in self.widths.items()}

    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        return [[Run(row[0])] for row in rows]

    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        return {"loss": -(outcome.log_p / outcome.lengths)}
