"""ReFT-r1: one direction that detects a behaviour and brings it about.

"AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders" (Wu et al., ICML
2025, 2501.17148). With w of length 1, the latent of a token h is z = max(0, <h, w>). In training
each text is steered by what it says of the behaviour itself, the mean of its 8 largest latents:

    h <- h + mean(top 8 of z) w

and w minimises, on positive and on negative answers alike,

    - log p(answer | prompt) per token  +  penalty (step / steps) mean(z of the other tokens)

so that latents are large where the behaviour is, and nowhere else. To steer, the largest latent of
the positive texts stands in for the text's own:

    h <- h + alpha max(z) w

Against the authors' code: the first token of a text has no latent (theirs leaves out the chat
template's beginning, and does not steer it in training either); each answer counts alike, where
theirs weighs answers by their length within a batch; and w has length 1 at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import normalize

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import Says, Statistics
from trimtab.methods.tokens import token_activations
from trimtab.methods.trained import (
    SMALL,
    OneOrMore,
    Presets,
    TrainedMethod,
    Vectors,
    training_in_words,
)
from trimtab.model import LanguageModel, frozen, scope_weights
from trimtab.reading import encode_contrast
from trimtab.steering import Intervention, Positions, Scope, Steering
from trimtab.training import (
    Objective,
    Outcome,
    Run,
    Steered,
    Text,
    Texts,
    Trained,
    numbered,
    positive_texts,
    texts_of,
)

NotNegative = Annotated[float, Field(ge=0), Says("must be 0 or more, not {value}")]


@dataclass(frozen=True)
class ReFT(TrainedMethod):
    """ReFT-r1: one direction that detects a behaviour and brings it about.

        h <- h + alpha max(z) w,    z = max(0, <h, w>) at the tokens of the positive texts

    "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders" (Wu et al., arXiv
    2501.17148). w is kept as `reader` beside the vector that is added.

        >>> steering = tt.ReFT(layer=1, steps=4).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    top: OneOrMore = field(
        default=8, metadata={"help": "How many latents of a text steer it in training."}
    )
    penalty: NotNegative = field(
        default=0.005, metadata={"help": "Of the other latents, at the end of the training."}
    )

    name = "reft"
    presets = Presets(
        {
            "small": {"learning_rate": 0.01, "batch": 3, "steps": 60, **SMALL},
            "paper": {
                "learning_rate": 0.01,
                "batch": 3,
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
        if contrast.paired:
            return texts_of(language_model, contrast, max_length)
        known = positive_texts(language_model, contrast, max_length)
        held_out = [[known.texts[number] for number in row] for row in known.held_out]
        encoded = encode_contrast(language_model, contrast.train, max_length)
        rows = [[Text(frozen(row.texts()[0]), 1)] for row in encoded]
        short = [number for number, (text,) in enumerate(rows) if len(text) < 2]
        if short:
            raise TrimtabError(
                f"{contrast.name}, row {short[0] + 1}: the text has no token to train on"
            )
        return numbered(rows, held_out)

    def settled(self, language_model: LanguageModel, texts: Texts) -> Self:
        """A preset's batch counts pairs, which are two texts; a row of unpaired texts is one."""
        own = self
        if self.batch is None and all(len(row) == 1 for row in texts.rows):
            own = replace(self, batch=2 * self.presets[self.preset]["batch"])
        return TrainedMethod.settled(own, language_model, texts)

    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        return Detecting(self.top, self.penalty, **self.where(language_model.anatomy))

    def _learn(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> tuple[Self, Trained]:
        own, made = super()._learn(language_model, contrast, statistics)
        texts = self.texts(language_model, contrast, statistics.max_length)
        return own, own._read(language_model, contrast, texts, made)

    def _read(
        self, language_model: LanguageModel, contrast: Contrast, texts: Texts, made: Trained
    ) -> _Learnt:
        """What the directions find in the texts of either side: the largest latent says how much
        of them is added."""
        assert self.positions is not None
        readers = {site: normalize(w, dim=0) for site, w in made.parameters.items()}
        found = latents_of(language_model, texts.texts, readers, self.positions)
        sides = _sides(contrast, texts)
        writers, told = {}, {}
        for site, latents in found.items():
            scores = torch.stack([detected(z, self.top) for z in latents])
            positive, negative = (scores[list(side)] for side in sides)
            largest = float(max(latents[number].max() for number in sides[0]))
            if not largest > 0:
                raise TrimtabError(
                    f"reft: the direction at {site} fires at no token of the positive texts, so "
                    "that there is nothing to add: train longer, or take another site"
                )
            writers[site] = largest * readers[site]
            told[site] = {
                "largest": largest,
                "positive": float(positive.mean()),
                "negative": float(negative.mean()),
                "auroc": _auroc(positive, negative),
            }
        return _Learnt(writers, made.findings, readers, told)

    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        return self.adding(parameters)

    def tables(self, made: Trained) -> dict[str, Tensor]:
        assert isinstance(made, _Learnt)
        return {
            **{f"reader.{site}": w for site, w in made.readers.items()},
            **{f"bias.{site}": torch.zeros(1) for site in made.readers},
            **{f"writer.{site}": vector for site, vector in made.parameters.items()},
        }

    def further_findings(self, made: Trained) -> dict[str, Any]:
        assert isinstance(made, _Learnt)
        return {"latents": made.latents}

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        lines = [
            f"ReFT-r1 adds a vector at {steering.where}: one direction that was learnt to find the "
            "behaviour in a text, and to bring it about, as long as it is at most in the positive "
            f"texts ({steering.dial.name} 1)."
        ]
        for site, found in steering.findings["latents"].items():
            lines.append(
                f"At {site} it finds {found['positive']:.3g} in positive texts and "
                f"{found['negative']:.3g} in negative ones (AUROC {found['auroc']:.2f} on those "
                f"that it was trained on), {found['largest']:.3g} at most."
            )
        return [*lines, *training_in_words(steering)]


@dataclass(frozen=True)
class _Learnt(Trained):
    """`parameters` are what is added at a dial of 1; beside them the directions, and what they find
    in the texts: JSON."""

    readers: dict[str, Tensor]
    latents: dict[str, Any]


class Detecting(Vectors):
    """Likelihood of both sides' answers, each text steered by its own latents, which are to be
    small where they are not the largest; a direction w at each site, named as the site."""

    def __init__(self, top: int, penalty: float, **where: Any) -> None:
        super().__init__(**where)
        self._top, self._penalty = top, penalty

    def start(self, generator: Generator) -> dict[str, Tensor]:
        return {site: normalize(torch.ones(width), dim=0) for site, width in self.widths.items()}

    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        return [[Run(text) for text in row] for row in rows]

    def change(self, parameters: Mapping[str, Tensor], site: str, x: Tensor, at: Steered) -> Tensor:
        # Divided by its length, so that no gradient goes along it.
        w = normalize(parameters[site], dim=0).to(x)
        read = _read_at(at, x.shape[1])
        z = (x @ w).relu() * read  # [runs, tokens]
        largest, which = z.topk(min(self._top, z.shape[1]), dim=-1)
        counted = read.sum(-1).clamp(1, self._top)  # a short text has fewer
        others = z.scatter(-1, which, 0.0).sum(-1) / read.sum(-1).clamp(min=1)
        at.notes[site] = others
        return x + at.dials * (largest.sum(-1) / counted)[:, None, None] * w

    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        nll = -outcome.by_row(outcome.log_p / outcome.lengths).mean(-1)
        notes = [outcome.at.notes[site].to(outcome.log_p) for site in self.sites]
        others = outcome.by_row(torch.stack(notes).mean(0)).mean(-1)
        loss = nll + self._penalty * outcome.at.progress * others
        return {"loss": loss, "nll": nll, "other_latents": others}

    def tidy(self, parameters: Mapping[str, Tensor]) -> None:
        for w in parameters.values():
            w.copy_(normalize(w, dim=0))


def _read_at(at: Steered, tokens: int) -> Tensor:
    """Which of the last so many tokens have a latent: those that are steered, but for each text's
    first, whose activation is of another size, [runs, tokens]."""
    length = max(map(len, at.texts))
    return at.steered & (torch.arange(length - tokens, length, device=at.weights.device) > 0)


def latents_of(
    language_model: LanguageModel,
    texts: Sequence[Text],
    readers: Mapping[str, Tensor],
    positions: Positions,
) -> dict[str, list[Tensor]]:
    """Of each site the latents of each text's tokens when nothing is steered, [tokens] in float32:
    those that a scope has, but for the first."""
    scope = Scope.of(positions)
    found: dict[str, list[Tensor]] = {site: [torch.empty(0)] * len(texts) for site in readers}
    for number, activations in token_activations(language_model, texts, list(readers)):
        text = texts[number]
        weights = scope_weights(language_model.marks, scope, text.tokens, text.start)
        read = torch.tensor(weights) != 0
        read[0] = False
        for site, x in activations.items():
            found[site][number] = (x.float().cpu() @ readers[site]).relu() * read
    return found


def detected(z: Tensor, top: int) -> Tensor:
    """What is found in a text: the mean of its largest latents."""
    return z.topk(min(top, len(z))).values.mean()


def _sides(contrast: Contrast, texts: Texts) -> tuple[list[int], list[int]]:
    """The numbers of the positive texts that are trained on, and of the negative ones."""
    if contrast.paired:
        return [row[0] for row in texts.rows], [row[1] for row in texts.rows]
    rows = list(zip(contrast.train.texts, texts.rows, strict=True))
    positive, negative = (
        [number for text, (number,) in rows if text.label == label]
        for label in ("positive", "negative")
    )
    return positive, negative


def _auroc(positive: Tensor, negative: Tensor) -> float:
    """How often a positive text has more than a negative one; ties count half."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())
