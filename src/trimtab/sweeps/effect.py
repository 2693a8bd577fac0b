"""What a steering gains on a contrast and costs on plain text, beside the unsteered model.

The unsteered model is measured once, whatever number of steerings is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.model import LanguageModel
from trimtab.reading import cross_entropy, log_odds
from trimtab.steering import Steering


@dataclass(frozen=True)
class Trial:
    """A steering at one dial: mean gain in nats per pair, cost in nats per token of plain text.

    The gain is None where the cost was above the limit: it was not measured.
    """

    steering: Steering
    cost: float
    gain: float | None


class Effect:
    """Measures steerings on the pairs of a contrast and on plain texts."""

    def __init__(
        self, language_model: LanguageModel, contrast: Contrast, plain: Sequence[str]
    ) -> None:
        self.language_model, self.contrast, self.plain = language_model, contrast, plain
        #: Log-odds of the positive side, unsteered, [pairs].
        self.base_odds = log_odds(language_model, contrast)
        self._base_nll, self._tokens = cross_entropy(language_model, plain)

    def gains(self, steering: Steering) -> Tensor:
        """How much each pair's log-odds rise, [pairs] in nats."""
        return log_odds(self.language_model, self.contrast, steering) - self.base_odds

    def costs(self, steering: Steering) -> Tensor:
        """How much harder each plain text is to predict, [texts] in nats per token."""
        nll, _ = cross_entropy(self.language_model, self.plain, steering)
        return nll - self._base_nll

    def cost(self, steering: Steering) -> float:
        """The mean cost over all tokens of the plain texts."""
        return float((self.costs(steering) * self._tokens).sum() / self._tokens.sum())

    def trials(self, steering: Steering, dials: Sequence[float], limit: float) -> Iterator[Trial]:
        """The steering at each dial; gains are measured where the cost is within the limit."""
        for dial in dials:
            turned = steering.at(dial)
            cost = self.cost(turned)
            gain = float(self.gains(turned).mean()) if cost <= limit else None
            yield Trial(turned, cost, gain)
