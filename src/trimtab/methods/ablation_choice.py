"""Which direction to ablate, measured on validation rows: how much lower each makes the behaviour's
score, how much it changes other text, and whether adding it causes the behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Prompt
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.reading import preference
from trimtab.steering import Steering

#: Keeps the score finite where P is 0 or 1.
_EPSILON = 1e-8


class Scored:
    """What is measured of a direction on validation rows."""

    def __init__(
        self, language_model: LanguageModel, validation: Contrast, targets: tuple[str, ...] | None
    ) -> None:
        self.language_model, self.validation, self.targets = language_model, validation, targets
        self.shown: list[Prompt]
        self.other: list[Prompt]
        if validation.paired:
            self.shown = self.other = [pair.prompt for pair in validation.pairs]
        else:
            self.shown = [row.text for row in validation.texts if row.label == "positive"]
            self.other = [row.text for row in validation.texts if row.label == "negative"]
        self.base = _log_p(language_model, self.other)
        self.unsteered = self.score(None)

    def score(self, steering: Steering | None) -> float:
        """The behaviour's score where it is shown."""
        if self.validation.paired:
            return preference(self.language_model, self.validation, steering)
        assert self.targets is not None  # wants() asks for them
        return float(scores(self.language_model, self.shown, self.targets, steering).mean())

    def induced(self, steering: Steering) -> float:
        """Its score where it is not shown; of pairs, how much it rises."""
        if self.validation.paired:
            return self.score(steering) - self.unsteered
        assert self.targets is not None
        return float(scores(self.language_model, self.other, self.targets, steering).mean())

    def kl(self, steering: Steering) -> float:
        """Mean KL(unsteered || steered) of the next token where the behaviour is not shown."""
        steered = _log_p(self.language_model, self.other, steering)
        return float((self.base.exp() * (self.base - steered)).sum(-1).mean())


def _log_p(
    language_model: LanguageModel, prompts: Sequence[Prompt], steering: Any = None
) -> Tensor:
    """Log-probabilities of the token after each prompt, [prompts, vocabulary]."""
    logits: Tensor = language_model.logits(prompts, steering=steering)
    return logits.log_softmax(-1)


def scores(
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    targets: Sequence[str],
    steering: Any = None,
) -> Tensor:
    """log P - log(1 - P) of the next token being the first one of a target, [prompts]."""
    ids = _first_tokens(language_model, targets)
    logits = language_model.logits(prompts, steering=steering)
    # Row by row in float64: rounded to float32, the sum of P may exceed 1.
    p = torch.stack([row.double().softmax(-1)[ids].sum() for row in logits]).clamp(max=1)
    return torch.log(p + _EPSILON) - torch.log(1 - p + _EPSILON)


def _first_tokens(language_model: LanguageModel, targets: Sequence[str]) -> list[int]:
    """The token that each target begins with, each once."""
    encoded = [language_model.tokenizer.encode(t, add_special_tokens=False) for t in targets]
    if not all(encoded):
        raise TrimtabError("ablation: a target is empty: name how the behaviour begins")
    return sorted({tokens[0] for tokens in encoded})


def after_text(language_model: LanguageModel, contrast: Contrast) -> tuple[int, ...]:
    """The tokens, from the end, that a chat template puts after what the user says; else the last.

    Found by rendering two messages: their last tokens are the same as far as the template goes.
    """
    row = contrast.rows[0]
    if contrast.paired or isinstance(getattr(row, "text", ""), str):
        return (-1,)
    one, two = language_model.encode([(("user", "one"),), (("user", "two"),)])
    same = 0
    for first, second in zip(reversed(one), reversed(two), strict=False):
        if first != second:
            break
        same += 1
    return tuple(range(-1, -same - 1, -1)) or (-1,)
