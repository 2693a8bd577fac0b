"""What a model expects after some texts at any dial of a steering, and how that changes with it.

The blocks below the steering's lowest site run once; each question (a text, a dial) is one row of
a batch that runs the blocks above it and unembeds the text's last token only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.errors import TrimtabError
from trimtab.model import (
    LanguageModel,
    batches_by_length,
    check_model,
    finds_dials,
    turned,
    with_images,
)
from trimtab.reading import (
    Next,
    blocks_apart,
    last_logits,
    read_columns,
    run_lower,
    run_upper,
)
from trimtab.steering import Steering


class Turning:
    """Some texts (token ids) under one steering at any dial.

    Of each text the first `given` tokens are the prompt (default: all of them), and the others are
    read as if the model had written them.

    `base` is the unsteered log-distribution of each text's next token, [texts, vocabulary] in
    float32 on the model's device.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        steering: Steering,
        texts: Sequence[Sequence[int]],
        *,
        force: bool = False,
        given: Sequence[int] | None = None,
    ) -> None:
        check_turns(language_model, steering, force)
        self.language_model, self.steering = language_model, steering
        self.texts = texts
        self.given = [len(text) for text in texts] if given is None else given
        self.blocks = blocks_apart(language_model, [steering])
        self._streams = run_lower(language_model, texts, self.blocks)
        #: Rows that have run, and the tokens in them: what all of this costs.
        self.rows = 0
        self.base = self._base()

    @torch.no_grad()
    def _base(self) -> Tensor:
        lengths = [len(text) for text in self.texts]
        base: list[Tensor] = [torch.empty(0)] * len(lengths)
        most, apart = self.language_model.batch_tokens, with_images(self.texts)
        for rows in batches_by_length(lengths, most, apart=apart):
            for i, logits in zip(rows, self._logits(rows), strict=True):
                base[i] = logits.log_softmax(-1)
        return torch.stack(base)

    @torch.no_grad()
    def log_p(
        self, texts: Sequence[int], dials: Sequence[float]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The next token's log-distribution of each text (by its index) at its dial: for some of
        the questions at a time their places, and their rows [places, vocabulary]."""
        for places, chosen, turns in self._grouped(texts, dials):
            yield places, self._turned_logits(chosen, turns).log_softmax(-1)

    @torch.no_grad()
    def derivative(
        self, texts: Sequence[int], dials: Sequence[float]
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """As `log_p`, with the logits themselves and their derivative with respect to the dial."""
        for places, chosen, turns in self._grouped(texts, dials):
            with _differentiable(self.language_model.model):
                both: Any = torch.func.jvp(
                    partial(self._turned_logits, chosen), (turns,), (torch.ones_like(turns),)
                )
            yield places, *both

    def _grouped(
        self, texts: Sequence[int], dials: Sequence[float]
    ) -> Iterator[tuple[list[int], list[int], Tensor]]:
        lengths = [len(self.texts[text]) for text in texts]
        turns = torch.tensor(dials, dtype=torch.float64)
        most, apart = self.language_model.batch_tokens, with_images([self.texts[i] for i in texts])
        for places in batches_by_length(lengths, most, apart=apart):
            yield places, [texts[place] for place in places], turns[places]

    def _turned_logits(self, texts: Sequence[int], dials: Tensor) -> Tensor:
        lm = self.language_model
        with turned(lm.anatomy, self.steering, lm.marks, dials) as sequences:
            sequences.given_ends = [self.given[text] for text in texts]
            return self._logits(texts)

    def _logits(self, texts: Sequence[int]) -> Tensor:
        """Of the token after each text, [texts, vocabulary] in float32 or wider."""
        lm, chosen = self.language_model, [self.texts[text] for text in texts]
        self.rows += len(chosen)
        streams = [self._streams[text] for text in texts]
        return last_logits(lm, chosen, streams, self.blocks)


def read_at_dial(
    language_model: LanguageModel,
    steering: Steering,
    texts: Sequence[Sequence[int]],
    streams: Sequence[Tensor],
    dial: float | None,
    ends: Sequence[int],
) -> list[Next]:
    """What follows each token of texts (token ids) at a dial (None: unsteered), from their streams
    below the steering on; `ends` are where each text's prompt ends."""
    lm, below = language_model, blocks_apart(language_model, [steering])
    if dial is None:
        hidden = run_upper(lm, texts, streams, below)
    else:
        turns = torch.full((len(texts),), dial, dtype=torch.float64)
        with turned(lm.anatomy, steering, lm.marks, turns) as sequences:
            sequences.given_ends = list(ends)
            hidden = run_upper(lm, texts, streams, below)
    columns, targets = [range(len(t) - 1) for t in texts], [list(t[1:]) for t in texts]
    return read_columns(lm, hidden, columns, targets)


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Kernels that have a forward derivative: the fused ones of attention and experts have none."""
    experts = getattr(model.config, "_experts_implementation", None) or "eager"
    try:
        if experts != "eager":
            model.set_experts_implementation("eager")
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if experts != "eager":
            model.set_experts_implementation(experts)


def check_turns(language_model: LanguageModel, steering: Steering, force: bool = False) -> None:
    """Refuse what has no dial to turn on texts that are only read."""
    check_model(language_model)
    if not isinstance(steering, Steering):
        raise TrimtabError("strength turns one dial: give one steering, not several")
    if finds_dials(language_model.anatomy):
        raise TrimtabError(
            "the model is inside a block that keeps to a budget (kl), which finds dials whenever "
            "it runs: find this one before that block"
        )
    with language_model.steered(steering, force=force):
        pass  # says what does not fit
    refuse_generated(steering)


def refuse_generated(steering: Steering) -> None:
    """Refuse what acts on generated tokens only, and changes nothing of a text that is read."""
    for intervention in steering.interventions:
        if intervention.scope.only_generated:
            raise TrimtabError(
                f"this {steering.method} steering acts on generated tokens only, at "
                f"{intervention.site} (scope '{intervention.scope}'): it cannot change what comes "
                "after a text"
            )


def idle_dial(steering: Steering) -> float | None:
    """The dial at which a steering does nothing, None where there is none."""
    idle = {
        None if each.operator.identity is None else each.operator.identity / each.weight + 0.0
        for each in steering.interventions
        if each.weight or each.operator.identity is None
    }
    return idle.pop() if len(idle) == 1 else None


def dial_limits(steering: Steering, times: float = 1.0) -> tuple[float, float]:
    """The dial's range, or so many times as far; of a rotation at most half a turn either way,
    after which it comes back."""
    low, high = (times * end for end in steering.dial.range)
    ends = [
        each.operator.farthest / abs(each.weight) for each in steering.interventions if each.weight
    ]
    farthest = max(ends, default=math.inf)
    return max(low, -farthest), min(high, farthest)


def divergence(base: Tensor, steered: Tensor) -> Tensor:
    """KL(unsteered || steered) of log-distributions [..., vocabulary], in nats (float64)."""
    base, steered = base.double(), steered.double()
    return (base.exp() * (base - steered)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of log-distributions [..., vocabulary], in nats (float64)."""
    log_p = log_p.double()
    return -(log_p.exp() * log_p).sum(-1)
