"""How new tokens are chosen: as the call asks and by nothing else; where a text stops; and a watch
over the logits.

A checkpoint may bring settings of its own (generation_config.json: a repetition penalty, words that
it must not write, another temperature). transformers fills whatever a call leaves open from there,
so that the same call means one thing with one model and another with the next. Here only the
special tokens come from the checkpoint.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from trimtab.errors import TrimtabError

#: What `generate` takes by transformers' names beside its own arguments, and what leaves it out.
OPTIONS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "renormalize_logits": False,
    "watermarking_config": None,
    "max_time": None,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
}
_WHOLE = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_beams")
_NARROWS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_REAL = (
    *_NARROWS,
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "max_time",
)
_OF_BEAMS = ("length_penalty", "early_stopping")
_OWN = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
_DOWNLOADED = "transformers runs it by code that it downloads"
_TEXTS_ONLY = "generate returns texts and their tokens; lm.logits returns logits"
#: Settings of transformers that `generate` has in another way, or cannot have.
_REFUSED = {
    "do_sample": "temperature decides: 0 is greedy, more samples",
    "max_length": "give max_new_tokens",
    "min_length": "give min_new_tokens",
    "stop_strings": "give stop, a regular expression",
    "num_return_sequences": "give each prompt as often as texts of it are wanted",
    "return_dict_in_generate": _TEXTS_ONLY,
    "output_scores": _TEXTS_ONLY,
    "output_logits": _TEXTS_ONLY,
    "output_attentions": _TEXTS_ONLY,
    "output_hidden_states": _TEXTS_ONLY,
    "guidance_scale": "it runs the model on a second text, which would be steered as the first is",
    "token_healing": "it changes the prompt",
    "remove_invalid_values": "it hides logits that are not finite, which are an error",
    "penalty_alpha": _DOWNLOADED,
    "low_memory": _DOWNLOADED,
    "dola_layers": _DOWNLOADED,
    "num_beam_groups": _DOWNLOADED,
    "diversity_penalty": _DOWNLOADED,
    "constraints": _DOWNLOADED,
    "force_words_ids": _DOWNLOADED,
}
#: Below, logits divided by it overflow in float32; above, all tokens have been equal long since.
_COLDEST, _HOTTEST = 1e-6, 1e6
#: Seconds that a stop pattern may take to search one text.
_PATIENCE = 1.0


class _AsAsked(GenerationConfig):
    """Settings that the checkpoint's own do not fill in."""

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any
    ) -> dict[str, Any]:
        if defaults_only and allow_custom_entries:  # the checkpoint's own
            return {}
        unused: dict[str, Any] = super().update(  # type: ignore[no-untyped-call]
            defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **values
        )
        return unused


def configuration(model: Any, asked: Mapping[str, Any], **lengths: int) -> GenerationConfig:
    """Settings for one call of a model's `generate`: what was asked, and its special tokens."""
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id")}
    if asked.get("exponential_decay_length_penalty") and tokens["eos_token_id"] is None:
        raise TrimtabError(
            "exponential_decay_length_penalty favours the end of the text, and this model has no "
            "token for it"
        )
    return _AsAsked(**tokens, **asked, **lengths)  # type: ignore[no-untyped-call]


def left_aside(model: Any, used: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint asks for in choosing tokens and the call, which uses `used`, does not."""
    neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, **OPTIONS}
    own = {name: getattr(model.generation_config, name, None) for name in neutral}
    return {
        name: value
        for name, value in own.items()
        if value not in (None, neutral[name], used.get(name))
    }


def sampling(
    temperature: float, top_k: int, top_p: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of transformers that say how tokens are chosen, after every check."""
    warmth = _real("temperature", temperature)
    if warmth != 0 and not _COLDEST <= warmth <= _HOTTEST:
        raise TrimtabError(
            f"temperature must be 0 or more, not {temperature!r}: 0 is greedy, and others are "
            f"{_COLDEST:g} to {_HOTTEST:g}"
        )
    top_k, top_p = _whole("top_k", top_k), _real("top_p", top_p)
    if top_k < 0 or not 0 < top_p <= 1:
        raise TrimtabError("top_k must be 0 or more, top_p above 0 and at most 1")
    given = {name: _option(name, value) for name, value in options.items()}
    _refuse_without_effect(given, warmth)
    if warmth == 0:
        return {"do_sample": False, **given}
    drawn = {"do_sample": True, "temperature": warmth, "top_k": top_k, "top_p": top_p}
    return {**drawn, **given}


def _option(name: str, value: Any) -> Any:
    """The value of an option, in the type that transformers insists on."""
    if name in _REFUSED:
        raise TrimtabError(f"generate does not take {name}: {_REFUSED[name]}")
    if name not in OPTIONS:
        if name in vars(GenerationConfig()):
            raise TrimtabError(
                f"generate does not take {name}, which does not change how tokens are chosen: "
                "give it to lm.model.generate(...) inside `with lm.steered(...)`"
            )
        known = [*_OWN, *OPTIONS]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise TrimtabError(f"generate has no option {name!r}: {hint}")
    if value is None:
        return OPTIONS[name]
    if name in _WHOLE:
        return _whole(name, value)
    return _real(name, value) if name in _REAL else value


def _refuse_without_effect(options: Mapping[str, Any], temperature: float) -> None:
    """Refuse options that would do nothing."""
    asked = [name for name, value in options.items() if value != OPTIONS[name]]
    idle = [name for name in asked if name in _NARROWS]
    if idle and temperature == 0:
        raise TrimtabError(f"{idle[0]} narrows sampling: give a temperature above 0")
    idle = [name for name in asked if name in _OF_BEAMS]
    if idle and options.get("num_beams", 1) < 2:
        raise TrimtabError(f"{idle[0]} compares beams: give num_beams of 2 or more")


def _real(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        at_least = " must be 0 or more, not" if name == "temperature" else " must be a number, not"
        raise TrimtabError(f"{name}{at_least} {value!r}")
    return number


def _whole(name: str, value: Any) -> int:
    number = _real(name, value)
    if number != int(number):
        raise TrimtabError(f"{name} must be a whole number, not {value!r}")
    return int(number)


class StopsAt(StoppingCriteria):
    """Ends each row of a batch with the token that completes a match of a pattern."""

    def __init__(self, pattern: Any, tokenizer: Any, width: int, rows: int) -> None:
        self.pattern, self.tokenizer, self.width = pattern, tokenizer, width
        #: How many new tokens each row has when it ends; None where it goes on.
        self.ended: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        new = input_ids[:, self.width :].tolist()
        for i, row in enumerate(new):
            if self.ended[i] is None and self._matches(self.tokenizer.decode(row)):
                self.ended[i] = len(row)
        ended = [end is not None for end in self.ended]
        return torch.tensor(ended, device=input_ids.device)

    def _matches(self, text: str) -> bool:
        try:
            return bool(self.pattern.search(text, timeout=_PATIENCE))
        except TimeoutError as error:
            raise TrimtabError(
                f"the stop pattern {self.pattern.pattern!r} takes more than {_PATIENCE:g} s to "
                f"search {len(text)} characters: write it without repeats inside repeats"
            ) from error

    def ends(self, longest: int) -> list[int]:
        return [longest if end is None else end for end in self.ended]


def stop_pattern(stop: str) -> Any:
    """A stop pattern, compiled by a library whose searches can be given up."""
    try:
        return regex.compile(stop)
    except (regex.error, TypeError, OverflowError, RecursionError) as error:
        raise TrimtabError(f"stop must be a regular expression, not {stop!r}: {error}") from error


class SoundLogits(LogitsProcessor):
    """Counts for each prompt how many tokens were chosen from logits that can choose one.

    Logits cannot where they are NaN or infinite (minus infinity at some tokens only bars them), or
    all equal, which a norm makes of activations that overflowed. Nothing is read from the device
    before the end.
    """

    def __init__(self, rows: int, sampled: bool) -> None:
        self.rows, self.sampled = rows, sampled
        self.sound: Tensor | None = None
        self.count: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        every = scores.reshape(self.rows, -1)  # a prompt's beams are neighbours
        sound = are_sound(every)
        self.sound = sound if self.sound is None else self.sound & sound
        self.count = self.sound.long() if self.count is None else self.count + self.sound
        if not self.sampled:
            return scores
        # Drawing from NaN fails without a word on which text; on a GPU it breaks the process.
        return every.masked_fill(~sound[:, None], 0.0).reshape_as(scores)

    def counts(self) -> list[int]:
        """Tokens of each prompt up to the first that was chosen from other logits."""
        return [] if self.count is None else [int(count) for count in self.count.tolist()]


def are_sound(logits: Tensor) -> Tensor:
    """Whether logits [..., vocabulary] can choose a token."""
    lowest, highest = logits.aminmax(dim=-1)
    return highest.isfinite() & (lowest < highest)


def unsound(text: str, labels: Sequence[str], dtype: torch.dtype) -> TrimtabError:
    """The error of a text ("prompt 2") whose logits cannot choose a token."""
    name = str(dtype).removeprefix("torch.")
    wide = dtype in (torch.float32, torch.float64)
    if labels:
        who = f"with {' and '.join(labels)}"
        remedy = f"turn the dial towards 0{'' if wide else ', or load the model in float32'}"
    else:
        who = "without a steering of its own"
        remedy = "look at the model's weights" if wide else "load the model in float32"
    return TrimtabError(
        f"the logits of {text} are not finite, or all equal, in {name} {who}: {remedy}"
    )
