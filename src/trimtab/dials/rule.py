"""Budgets as rules: `lm.generate(prompts, steering=within(steering, kl=0.1))`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.dials.budgets import dials_for
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.steering import Steering


@dataclass(frozen=True)
class Within:
    """The rule that `within` makes."""

    steering: Steering
    kl: float

    def dials(
        self, language_model: LanguageModel, texts: Sequence[Sequence[int]], force: bool
    ) -> list[float]:
        """The dial of each text (token ids), on the side on which the steering stands."""
        return dials_for(language_model, self.steering, texts, self.kl, force)


def within(steering: Steering, *, kl: float) -> Within:
    """The steering at the dial, other for each row, at which the row's next token is `kl` nats (KL)
    from the unsteered model's, on the side of the dial on which the steering stands.

    For `generate(steering=)` and `steered()`; the dial is found whenever the model begins to read.
    """
    if not isinstance(steering, Steering):
        raise TrimtabError(f"a budget (kl) turns the dial of one steering, not of {steering!r:.80}")
    return Within(steering, kl)
