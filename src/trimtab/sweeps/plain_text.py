"""What a steering costs where nothing is asked of it: how much harder plain text is to predict.

The texts come with trimtab and are encoded once. What the blocks below a steering compute of them
is kept for the next steering, and the unsteered model reads them once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.evaluation import Attached, steering_of, with_words
from trimtab.figures import Estimate, weighted_interval
from trimtab.model import LanguageModel
from trimtab.reading import (
    Engine,
    Reading,
    StreamCache,
    next_tokens,
    plain_texts,
    whole_reading,
)
from trimtab.steering import Steering
from trimtab.sweeps.ahead import gathered


class PlainText:
    """Plain texts as a model reads them, or an engine in its place; costs are in nats.

    `kept` holds what blocks compute of all of them, None to run every block for each steering.
    """

    def __init__(
        self, language_model: LanguageModel, kept: StreamCache | None, engine: Engine | None
    ) -> None:
        self.language_model, self.engine = language_model, engine
        self._kept = kept
        self._kept_of_some: dict[int, StreamCache] = {}
        #: Each with its steering, so that no other takes its place.
        self._ahead: dict[int, tuple[Steering, Tensor | TrimtabError]] = {}

    def costs(self, steering: Attached, texts: int | None = None) -> Tensor:
        """How many nats each text gets harder to predict, [texts]: all, or the first `texts`, for
        who looks for a dial."""
        base = self._base[:texts]  # first, so that it is the same whatever is steered
        return self._nll(steering, texts) - base

    def tokens(self, texts: int | None = None) -> Tensor:
        """How many tokens of each text are predicted, [texts] in float64."""
        tokens = [len(reading.positions) for reading in self._readings[:texts]]
        return torch.tensor(tokens, dtype=torch.float64)

    def cost(self, steering: Attached, texts: int | None = None) -> float:
        """How much harder text is to predict, in nats per token: all of it, or the first `texts`,
        for who looks for a dial."""
        return float(self.costs(steering, texts).sum() / self.tokens(texts).sum())

    def perplexity(self, cost: float) -> float:
        """Perplexity of the text at so many nats more per token."""
        return math.exp(float(self._base.sum() / self.tokens().sum()) + cost)

    def ask_ahead(self, steerings: Sequence[Steering]) -> None:
        """Of an engine: what all of some steerings cost, in one continuous batch, for who asks
        about each of them next; one about which nothing can be said has the reason. What was asked
        before is forgotten."""
        self._ahead = {}
        if not steerings:
            return
        _ = self._base  # what the unsteered model makes of it
        found = gathered({id(one): self._work(one) for one in steerings}, "plain text")
        for one in steerings:
            got = found[id(one)]
            nll = got if isinstance(got, TrimtabError) else self._summed(got, None)
            self._ahead[id(one)] = one, nll

    @cached_property
    def _readings(self) -> list[Reading]:
        lm = self.language_model
        # A model may take shorter texts than there are.
        return [whole_reading(tokens[: lm.max_length]) for tokens in lm.encode(plain_texts())]

    @cached_property
    def _base(self) -> Tensor:
        return self._nll(None)

    def _kept_of(self, count: int | None) -> StreamCache | None:
        """What is kept of the first `count` texts: of so many by themselves, since what runs
        together is rounded together, and is to be the same whatever was asked before."""
        if count is None or self._kept is None:
            return self._kept
        if count not in self._kept_of_some:
            self._kept_of_some[count] = StreamCache(self.language_model)
        return self._kept_of_some[count]

    def _nll(self, steering: Attached, count: int | None = None) -> Tensor:
        """Summed negative log-likelihood of each text, [texts] in nats; of words before it none is
        scored."""
        known = self._ahead.get(id(steering)) if count is None else None
        if known is not None and known[0] is steering:
            if isinstance(known[1], TrimtabError):
                raise known[1]
            return known[1]
        if self.engine is not None:
            return self._summed(
                [one for some in self._work(steering, count) for one in some], count
            )
        lm = self.language_model
        readings = with_words(lm, steering, self._readings[:count])
        kept = self._kept_of(count)
        found = torch.zeros(len(readings), dtype=torch.float64)
        for batch, some in next_tokens(lm, readings, steering_of(steering), kept=kept):
            found[list(batch.rows)] = torch.stack([-each.log_p.sum() for each in some])
        return found

    def _work(
        self, steering: Attached, count: int | None = None
    ) -> Generator[list[tuple[int, float]]]:
        """Of an engine: the same, some texts at a time, by their place."""
        assert self.engine is not None
        readings = with_words(self.language_model, steering, self._readings[:count])
        for batch, some in self.engine.next_tokens(readings, steering_of(steering), in_turns=True):
            sums = [float(-each.log_p.sum()) for each in some]
            yield list(zip(batch.rows, sums, strict=True))

    def _summed(self, sums: Sequence[tuple[int, float]], count: int | None) -> Tensor:
        found = torch.zeros(len(self._readings[:count]), dtype=torch.float64)
        for place, value in sums:
            found[place] = value
        return found


def cost_interval(costs: Tensor, tokens: Tensor) -> Estimate:
    """Nats per token of plain texts, [texts] each, with the 95 % interval."""
    return weighted_interval(costs / tokens, tokens)
