"""What a steering, or words before a prompt, changes while a model writes: KL per generated token.

The unsteered model continues neutral prompts. The same continuations are then read once more, by
the model as it is and by the steered or prompted one, and at each of their tokens

    KL(unsteered || changed)

of the next token's distribution is taken. Tokens of the prompt, and of words before it, are not
compared, so that a steering and a prompt stand on one axis.

At the next token after a prompt, where budgets are kept, both stand on one axis too: `NextTokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.contrasts import Prompt
from trimtab.dials import dial_limits, divergence, idle_dial
from trimtab.errors import TrimtabError
from trimtab.evaluation.prompted import Attached, asked_with, steering_of
from trimtab.figures import weighted_interval
from trimtab.model import (
    LanguageModel,
    batches_by_length,
    extended,
    has_two_pass,
    refuse_dropout,
    row_steerings,
)
from trimtab.reading import (
    StreamCache,
    blocks_to_keep,
    neutral_prompts,
    next_tokens,
    plain_texts,
    prompt_reading,
    run_upper,
)
from trimtab.steering import Steering

#: Neutral prompts, and tokens that are written after each.
PROMPTS, NEW_TOKENS = 12, 32
#: Words of plain text that are a prompt where prompts are taken as they are.
_WORDS = 12
#: How near the dial's KL comes to what is asked for, how often it is tried, and how far beyond the
#: dial's range.
_NEAR, _TRIES, _BEYOND = 0.01, 24, 100.0


@dataclass(frozen=True)
class TokenKL:
    """KL(unsteered || changed) per generated token in nats: the mean over all `tokens` with its
    95 % interval (bootstrap over prompts), and what the worst 5 % of tokens are above."""

    mean: float
    ci95: tuple[float, float]
    worst5: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "ci95": self.ci95, "worst5": self.worst5, "tokens": self.tokens}


class NextTokens:
    """What the unsteered model expects next after some prompts, on which is measured how far a
    steering, or words before the prompts, moves that."""

    def __init__(self, language_model: LanguageModel, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            raise TrimtabError("there is no prompt to measure KL at the next token on")
        self.language_model, self.prompts = language_model, list(prompts)
        #: What the blocks below steerings put out, for the next one.
        self._kept = StreamCache(language_model)
        self._base = self._log_p(None)

    def kl(self, attached: Attached) -> Tensor:
        """KL(unsteered || changed) of the next token after each prompt, [prompts] in nats."""
        return divergence(self._base, self._log_p(attached)).clamp(min=0.0)

    def median(self, attached: Attached) -> float:
        """The median over prompts, which is what a budget is."""
        return float(self.kl(attached).quantile(0.5))

    def _log_p(self, attached: Attached) -> Tensor:
        """Log-probabilities of the next token, [prompts, vocabulary]."""
        lm = self.language_model
        asked = lm.fitting(asked_with(lm, attached, self.prompts))
        found = [torch.empty(0)] * len(asked)
        readings = [prompt_reading(tokens) for tokens in asked]
        steering = steering_of(attached)
        for batch, nexts in next_tokens(lm, readings, steering, kept=self._kept, whole=True):
            for row, each in zip(batch.rows, nexts, strict=True):
                assert each.every is not None
                found[row] = each.every[0]
        return torch.stack(found).cpu()


class Continuations:
    """What the unsteered model writes after neutral prompts (greedily), on which KL per generated
    token is measured.

    `prompts` are text or conversations; `neutral(chat)` has some. What is measured once is kept.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        prompts: Sequence[Prompt],
        new_tokens: int = NEW_TOKENS,
        *,
        force: bool = False,
    ) -> None:
        refuse_dropout(language_model.model)
        self.language_model, self.force = language_model, force
        written = language_model.generate(prompts, max_new_tokens=new_tokens, chat=False)
        kept = [(prompt, one.tokens) for prompt, one in zip(prompts, written, strict=True)]
        #: Each prompt with the tokens that follow it.
        self.texts = [(prompt, tokens) for prompt, tokens in kept if tokens]
        if not self.texts:
            raise TrimtabError(
                f"{language_model.name} writes nothing after {len(kept)} neutral prompts: KL per "
                "generated token cannot be measured"
            )
        #: What the blocks below steerings put out, for the next one.
        self._kept = StreamCache(language_model)
        self._base = self._hidden(None)

    def kl(self, attached: Attached) -> TokenKL:
        """What a steering, or words before prompts, change per generated token."""
        values = self.values(attached)
        means = torch.stack([each.mean() for each in values])
        weights = torch.tensor([len(each) for each in values], dtype=torch.float64)
        mean, every = weighted_interval(means, weights), torch.cat(values)
        worst = float(every.quantile(0.95))
        return TokenKL(mean.value, mean.ci95, worst, len(every))

    @torch.inference_mode()
    def values(self, attached: Attached) -> list[Tensor]:
        """KL at each token of each continuation, [tokens] in nats (float64)."""
        lm, found = self.language_model, []
        for base, changed in zip(self._base, self._hidden(attached), strict=True):
            before, after = (lm.unembed(each).log_softmax(-1) for each in (base, changed))
            found.append(divergence(before, after).cpu().clamp(min=0.0))
        if not all(bool(each.isfinite().all()) for each in found):
            raise TrimtabError("the model's numbers overflow: its KL is no finite number")
        return found

    @torch.inference_mode()
    def _hidden(self, attached: Attached) -> list[Tensor]:
        """What the final norm puts out where each continuation's tokens are predicted from,
        [tokens, units]."""
        lm = self.language_model
        prompts = lm.encode(asked_with(lm, attached, [prompt for prompt, _ in self.texts]))
        written = [new for _, new in self.texts]
        texts = [extended(prompt, new) for prompt, new in zip(prompts, written, strict=True)]
        longest = max(map(len, texts))
        if longest > lm.max_length:
            raise TrimtabError(
                f"a neutral prompt with what is put before it and its continuation has {longest} "
                f"tokens, and {lm.name} takes {lm.max_length}: say less before prompts"
            )
        steerings = [row_steerings(steering_of(attached))] * len(texts)
        if has_two_pass(steerings):
            steerings, _ = lm.settled(steerings, prompts, self.force)
        every = [one for own in steerings for one in own]
        below = blocks_to_keep(lm, every)
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for rows in batches_by_length([len(text) for text in texts], lm.batch_tokens):
            own: Any = [steerings[i] for i in rows]
            alike = all(one == own[0] for one in own)
            streams = self._kept.run_lower([texts[i] for i in rows], below)
            with lm.steered(*(own[0] if alike else [own]), force=self.force) as sequences:
                sequences.given_ends = [len(prompts[i]) for i in rows]
                hidden = run_upper(lm, [texts[i] for i in rows], streams, below)
            for row, i in enumerate(rows):
                found[i] = hidden[row, len(prompts[i]) - 1 : len(texts[i]) - 1].clone()
        return found

    # -- dials ------------------------------------------------------------------------------------

    def at_kl(self, steering: Steering, nats: float) -> tuple[Steering, TokenKL]:
        """A steering at the dial whose mean KL per generated token is `nats` (to one percent), on
        the side of nothing on which it stands. Refused where none is."""
        idle = idle_dial(steering)
        if idle is None:
            raise TrimtabError("its dial sets an angle, so that no dial changes nothing")
        start = steering.setting - idle
        side = -1.0 if start < 0 else 1.0
        low, high = dial_limits(steering, _BEYOND)
        end = abs((low if side < 0 else high) - idle)
        known: dict[float, TokenKL] = {}

        def at(size: float) -> float:
            turned = replace(steering, value=idle + side * size)
            known[size] = self.kl(turned)
            return known[size].mean

        size = _size_of(at, abs(start) or min(1.0, end), end, nats)
        if abs(known[size].mean - nats) > _NEAR * nats:
            raise TrimtabError(f"at no dial it changes {nats:.3g} nats: {known[size].mean:.3g}")
        return replace(steering, value=idle + side * size), known[size]


def _size_of(at: Callable[[float], float], start: float, end: float, goal: float) -> float:
    """The size at which a rising figure reaches a goal, which goes about with its square: steps
    that grow until the goal is between two sizes, then powers between them."""
    low, high = (0.0, 0.0), (math.inf, math.inf)
    size, best, off = min(start, end), 0.0, math.inf
    for _ in range(_TRIES):
        value = at(size)
        if abs(value - goal) < off:
            best, off = size, abs(value - goal)
        if off <= _NEAR * goal / 2 or (value < goal and size >= end):
            break
        low, high = ((size, value), high) if value < goal else (low, (size, value))
        size = min(end, _between(low, high, goal))
    return best


def _between(low: tuple[float, float], high: tuple[float, float], goal: float) -> float:
    """The next size to try."""
    (a, below), (b, above) = low, high
    if b == math.inf:
        return a * min(4.0, max(1.2, math.sqrt(goal / below) if below > 0 else 4.0))
    if a == 0.0 or below <= 0:
        return a + (b - a) * min(0.9, max(0.1, math.sqrt(goal / above)))
    share = math.log(goal / below) / math.log(above / below)
    return float(a * (b / a) ** min(0.9, max(0.1, share)))


def neutral(language_model: LanguageModel, chat: bool) -> Sequence[Prompt]:
    """Neutral prompts: questions in conversations, or beginnings of plain text."""
    if chat and language_model.chats:
        asked = [row["prompt"] for row in neutral_prompts() if row["language"] == "en"]
        return [(("user", prompt),) for prompt in asked][:PROMPTS]
    return [" ".join(text.split()[:_WORDS]) for text in plain_texts()][:PROMPTS]
