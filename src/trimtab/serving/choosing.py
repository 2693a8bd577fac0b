"""Which token one text goes on with: its own temperature, penalties and seed, whatever its batch
has beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimtab.errors import TrimtabError

#: What logits are divided by, at least: by less they are soon no numbers any more.
_LEAST_TEMPERATURE, _LEAST_PENALTY = 1e-3, 1e-2


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen and where the text ends. `temperature` 0 is greedy, `top_k` 0 takes
    all; penalties are those of OpenAI's API, in logits; `bias` adds to the logits of tokens."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    #: Of how many tokens beside the chosen one the log-probability is told; None tells none.
    logprobs: int | None = None

    def check(self, vocabulary: int) -> None:
        """Refuse what cannot be carried out with logits of so many tokens."""
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise TrimtabError(
                f"temperature is 0, which is greedy, or at least {_LEAST_TEMPERATURE:g}, not "
                f"{self.temperature:g}"
            )
        if self.repetition_penalty < _LEAST_PENALTY:
            raise TrimtabError(
                f"repetition_penalty is at least {_LEAST_PENALTY:g}, not "
                f"{self.repetition_penalty:g}"
            )
        beyond = [token for token in self.bias if token >= vocabulary]
        if beyond:
            raise TrimtabError(
                f"token ids go from 0 to {vocabulary - 1}, and logit_bias has {beyond[0]}"
            )


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability among all tokens before anything was changed, and those of the
    likeliest."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, settings: Settings, prompt: list[int]) -> None:
        self._settings, self._prompt = settings, prompt
        self._written: list[int] = []
        self._draws: torch.Generator | None = None
        if settings.temperature:
            self._draws = torch.Generator()
            self._draws.manual_seed(settings.seed) if settings.seed is not None else (
                self._draws.seed()
            )
        self._warpers = _warpers(settings)

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest, and nothing else is asked of its logits."""
        asked = self._settings
        return self._draws is None and asked.logprobs is None and not self._changes

    @property
    def _changes(self) -> bool:
        asked = self._settings
        penalties = asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty - 1
        return bool(any(penalties) or asked.bias)

    def choose(self, logits: Tensor) -> Chosen:
        """The next token, from logits [vocabulary] in float32."""
        logits = logits.float().cpu()
        changed = self._changed(logits) if self._changes else logits
        if self._draws is None:
            token = int(changed.argmax())
        else:
            ids = torch.tensor([[*self._prompt, *self._written]])
            warped = self._warpers(ids, changed[None].clone())[0]  # type: ignore[arg-type]
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=self._draws))
        return self._told(token, logits)

    def note(self, token: int) -> None:
        """The text goes on with a token."""
        self._written.append(token)

    def _changed(self, logits: Tensor) -> Tensor:
        asked, logits = self._settings, logits.clone()
        if asked.repetition_penalty != 1:
            ids = torch.tensor([[*self._prompt, *self._written]])
            logits = RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)(ids, logits[None])[
                0
            ]
        if self._written and (asked.presence_penalty or asked.frequency_penalty):
            tokens, counts = torch.tensor(self._written).unique(return_counts=True)
            logits[tokens] -= asked.presence_penalty + asked.frequency_penalty * counts
        for token, more in asked.bias.items():
            logits[token] += more
        return logits

    def _told(self, token: int, logits: Tensor) -> Chosen:
        count = self._settings.logprobs
        if count is None:
            return Chosen(token)
        told = logits.log_softmax(-1)
        values, tokens = told.topk(count) if count else (torch.empty(0), torch.empty(0))
        top = tuple(zip(map(int, tokens.tolist()), values.tolist(), strict=True))
        return Chosen(token, float(told[token]), top)


def _warpers(settings: Settings) -> LogitsProcessorList:
    """What narrows a distribution, in the order of transformers."""
    found = LogitsProcessorList()
    if settings.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        found.append(MinPLogitsWarper(settings.min_p))
    return found
