"""Texts that are to stay as they are, and how far a steering moves what the model says after them.

The unsteered model continues each text by some tokens, greedily; what it expects at each of these
tokens is kept. A steering is measured at the same tokens:

    KL = mean over tokens of sum_v p(v) (log p(v) - log p_steered(v))       in nats per token

so that not the first token alone counts, by which little is told of an answer. Words before the
texts are measured at the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.contrasts import Contrast, Prompt
from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached, asked_with, load_contrast, steering_of
from trimtab.files import json_digest, user_path
from trimtab.model import LanguageModel
from trimtab.reading import Reading, StreamCache, next_tokens, plain_texts

#: As many texts as are read, at most: what is kept of each is as large as the vocabulary.
_MOST = 64


class Neutral:
    """Measures how far steerings move the next tokens of some texts; `tokens` is how many each text
    is continued by."""

    def __init__(
        self,
        language_model: LanguageModel,
        texts: Sequence[Prompt],
        tokens: int,
        kept: StreamCache | None = None,
    ) -> None:
        if not texts:
            raise TrimtabError("there is no neutral text to measure KL on")
        self.language_model, self._kept = language_model, kept
        self.texts, self.tokens = tuple(texts[:_MOST]), tokens
        written = language_model.generate(list(self.texts), max_new_tokens=tokens, chat=False)
        self._written = [each.tokens for each in written]
        self._base = self._log_p(None)

    def describe(self) -> dict[str, object]:
        """For the configuration of a run."""
        return {
            "texts": len(self.texts),
            "digest": json_digest(list(self.texts)),
            "tokens": self.tokens,
        }

    @property
    def in_words(self) -> str:
        """Where KL is measured, for a sentence."""
        count = sum(map(len, self._written))
        return f"at {count} tokens that the unsteered model writes after {len(self.texts)} texts"

    def kl(self, attached: Attached) -> float:
        """Mean KL(unsteered || changed) of the next token, in nats."""
        total, count = 0.0, 0
        for base, changed in zip(self._base, self._log_p(attached), strict=True):
            before, after = base.double(), changed.double()
            total += float((before.exp() * (before - after)).sum())
            count += len(base)
        return total / count

    def _log_p(self, attached: Attached) -> list[Tensor]:
        """Log-probabilities at the tokens of each text, [tokens, vocabulary]."""
        lm = self.language_model
        asked = lm.fitting(asked_with(lm, attached, self.texts), self.tokens)
        readings = [_reading(*each) for each in zip(asked, self._written, strict=True)]
        found = [torch.empty(0)] * len(readings)
        read = next_tokens(lm, readings, steering_of(attached), kept=self._kept, whole=True)
        for batch, nexts in read:
            for row, each in zip(batch.rows, nexts, strict=True):
                assert each.every is not None
                found[row] = each.every
        return found


def _reading(prompt: Sequence[int], written: Sequence[int]) -> Reading:
    """Asks for each token that was written after a prompt."""
    last = len(prompt) - 1
    positions = tuple(range(last, last + len(written)))
    return Reading((*prompt, *written[:-1]), positions, len(prompt))


def neutral_texts(contrast: Contrast, source: str | None) -> list[Prompt]:
    """The texts that a source names: lines of a .txt, of a contrast of texts the negative ones, of
    pairs their prompts. None: the negative validation texts of what is fitted on, where these are
    texts, else plain text."""
    if source is not None and user_path(source).suffix.lower() == ".txt":
        try:
            lines = user_path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TrimtabError(f"cannot read {source}: {error}") from error
        return [line for line in lines if line.strip()]
    if source is not None:
        given = load_contrast(source)
        if given.paired:
            return list(dict.fromkeys(pair.prompt for pair in given.pairs))
        return [row.text for row in given.texts if row.label == "negative"]
    own = () if contrast.paired else contrast.texts
    held_out = [r.text for r in own if (r.label, r.part) == ("negative", "validation")]
    return held_out or list(plain_texts())
