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
import numbers
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.configuration_utils import BaseWatermarkingConfig

from trimtab.errors import TrimtabError, shown
from trimtab.model.streaming import Pieces

#: How tokens are drawn, and what makes it greedy from the whole distribution.
SAMPLING: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


class _Option(NamedTuple):
    """What leaves an option out, what it is (a whole number, a real one, tokens, or none of
    these), and what its value must be, in words and as a check; transformers takes some other
    values, and then does nothing."""

    default: Any
    kind: Literal["whole", "real", "tokens", ""] = ""
    words: str = ""
    holds: Callable[[Any], bool] = lambda value: True


_SHARE: tuple[Any, ...] = ("above 0 and at most 1", lambda share: 0 < share <= 1)
_CUTOFF: tuple[Any, ...] = ("0 or more and below 1", lambda p: 0 <= p < 1)
_SIZE: tuple[Any, ...] = ("0 or more", lambda size: size >= 0)
_OPTIONS = {
    "repetition_penalty": _Option(1.0, "real"),
    "encoder_repetition_penalty": _Option(1.0, "real"),
    "no_repeat_ngram_size": _Option(0, "whole", *_SIZE),
    "encoder_no_repeat_ngram_size": _Option(0, "whole", *_SIZE),
    "min_p": _Option(None, "real", "0 to 1", lambda p: 0 <= p <= 1),
    "top_h": _Option(None, "real", *_SHARE),
    "typical_p": _Option(1.0, "real", *_SHARE),
    "epsilon_cutoff": _Option(0.0, "real", *_CUTOFF),
    "eta_cutoff": _Option(0.0, "real", *_CUTOFF),
    "bad_words_ids": _Option(None, "tokens"),
    "sequence_bias": _Option(None, "tokens"),
    "suppress_tokens": _Option(None, "tokens"),
    "begin_suppress_tokens": _Option(None, "tokens"),
    "forced_eos_token_id": _Option(None, "tokens"),
    "exponential_decay_length_penalty": _Option(None),
    "renormalize_logits": _Option(False, "", "True or False", lambda x: isinstance(x, bool)),
    "watermarking_config": _Option(None),
    "max_time": _Option(None, "real", "above 0 (seconds)", lambda seconds: seconds > 0),
    "num_beams": _Option(1, "whole", "1 to 1000", lambda beams: 1 <= beams <= 1000),
    # A length to a higher power overflows.
    "length_penalty": _Option(1.0, "real", "-10 to 10", lambda power: -10 <= power <= 10),
    "early_stopping": _Option(
        False,
        "",
        "True, False or 'never'",
        lambda x: isinstance(x, bool) or (isinstance(x, str) and x == "never"),
    ),
}
#: What `generate` takes by transformers' names beside these, and what leaves it out.
OPTIONS: dict[str, Any] = {name: option.default for name, option in _OPTIONS.items()}
_NARROWS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
#: Lists of tokens (or one token); the other options of tokens are lists of such lists.
_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
_OF_BEAMS = ("length_penalty", "early_stopping")
_OWN = ("max_new_tokens", "min_new_tokens", *SAMPLING, "seed", "stop")
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
    "forced_bos_token_id": "it acts only on a text of one token, as an encoder-decoder begins",
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


def end_tokens(eos: Any) -> set[int]:
    """The tokens that end a text, as a generation configuration names them: one, several, none."""
    return set(eos if isinstance(eos, list) else [eos] if eos is not None else [])


def left_aside(model: Any, used: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint asks for in choosing tokens and the call, which uses `used`, does not."""
    neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, **OPTIONS}
    own = {name: getattr(model.generation_config, name, None) for name in neutral}
    return {
        name: value
        for name, value in own.items()
        if value not in (None, neutral[name], used.get(name))
    }


def changed(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options among settings that are not as if they had been left out."""
    given = {name: asked[name] for name in OPTIONS if name in asked}
    return {
        name: value
        for name, value in given.items()
        # Only options that are None when left out may be objects that do not compare plainly.
        if value is not None and (OPTIONS[name] is None or value != OPTIONS[name])
    }


def not_taken(asked: Mapping[str, Any], error: Exception) -> TrimtabError:
    """The error of options that transformers fails at."""
    named = ", ".join(f"{name}={shown(repr(value))}" for name, value in changed(asked).items())
    said = shown(" ".join(str(error).split()), 300) or type(error).__name__
    return TrimtabError(f"transformers does not take {named}: {said}")


def sampling(options: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The settings of transformers that say how tokens are chosen, after every check."""
    others = {**SAMPLING, **options}
    temperature, top_k, top_p = (others.pop(name) for name in SAMPLING)
    warmth = _real("temperature", temperature)
    if warmth != 0 and not _COLDEST <= warmth <= _HOTTEST:
        raise TrimtabError(
            f"temperature must be 0 or more, not {temperature!r}: 0 is greedy, and others are "
            f"{_COLDEST:g} to {_HOTTEST:g}"
        )
    top_k, top_p = whole("top_k", top_k), _real("top_p", top_p)
    if top_k < 0 or not 0 < top_p <= 1:
        raise TrimtabError("top_k must be 0 or more, top_p above 0 and at most 1")
    given = {name: _option(name, value, vocabulary) for name, value in others.items()}
    if warmth == 0 and (top_k, top_p) != (0, 1):
        idle = "top_k" if top_k else "top_p"
        raise TrimtabError(f"{idle} narrows sampling: give a temperature above 0")
    _refuse_without_effect(given, warmth)
    if warmth == 0:
        return {"do_sample": False, **given}
    drawn = {"do_sample": True, "temperature": warmth, "top_k": top_k, "top_p": top_p}
    return {**drawn, **given}


def _option(name: str, value: Any, vocabulary: int) -> Any:
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
    option = _OPTIONS[name]
    if value is None:
        return option.default
    if option.kind == "whole":
        value = whole(name, value)
    elif option.kind == "real":
        value = _real(name, value)
    elif option.kind == "tokens":
        _refuse_no_tokens(name, value, vocabulary)
    elif name == "watermarking_config":
        _refuse_no_watermark(value)
    elif name == "exponential_decay_length_penalty":
        _refuse_no_decay(value)
    if not option.holds(value):
        raise TrimtabError(f"{name} must be {option.words}, not {value!r}")
    return value


def _refuse_no_tokens(name: str, value: Any, vocabulary: int) -> None:
    """Refuse lists without a token, and tokens that the model does not have.

    A value of another form is left to transformers, which fails at it.
    """
    if name in _OF_TOKENS:
        words = [value if isinstance(value, list | tuple) else [value]]
    elif isinstance(value, list | tuple | Mapping) and len(value):
        words = list(_words(name, value))
    else:
        words = []
    if any(isinstance(word, list | tuple) and not word for word in words):
        raise TrimtabError(f"{name} must name tokens, which {shown(repr(value))} does not")
    for token in (token for word in words if isinstance(word, list | tuple) for token in word):
        known = isinstance(token, numbers.Integral) and 0 <= int(token) < vocabulary
        if not known or isinstance(token, bool):
            raise TrimtabError(
                f"{name} must be token ids 0 to {vocabulary - 1}, not {shown(repr(token))}"
            )


def _words(name: str, value: Any) -> Iterator[Any]:
    """The lists of tokens in bad_words_ids ([tokens, ...]) and sequence_bias ([[tokens, bias],
    ...] or {tokens: bias})."""
    for item in value:
        if name == "bad_words_ids" or isinstance(value, Mapping):
            yield item
        elif isinstance(item, list | tuple) and len(item) == 2:
            yield item[0]


def _refuse_no_watermark(value: Any) -> None:
    if isinstance(value, BaseWatermarkingConfig):
        return
    if not isinstance(value, Mapping):
        raise TrimtabError(
            f"watermarking_config must be settings by their names ({{'bias': 2.0}}), not {value!r}"
        )
    for read, names in (
        (_real, ("greenlist_ratio", "bias")),
        (whole, ("context_width", "hashing_key")),
    ):
        for name in names:
            if name in value:
                read(f"{name} of watermarking_config", value[name])


def _refuse_no_decay(value: Any) -> None:
    name = "exponential_decay_length_penalty"
    if not (isinstance(value, list | tuple) and len(value) == 2):
        raise TrimtabError(f"{name} must be two numbers, [first token, factor], not {value!r}")
    if whole(f"the first token of {name}", value[0]) < 0:
        raise TrimtabError(f"the first token of {name} must be 0 or more, not {value[0]!r}")
    _real(f"the factor of {name}", value[1])


def _refuse_without_effect(options: Mapping[str, Any], temperature: float) -> None:
    """Refuse options that would do nothing."""
    asked = list(changed(options))
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


def whole(name: str, value: Any) -> int:
    """A whole number, also where it is of a type like float (2.0)."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # exact, however large
    except TypeError:
        pass
    try:
        number = _real(name, value)
    except TrimtabError:
        number = math.nan
    if not number.is_integer():
        raise TrimtabError(f"{name} must be a whole number, not {shown(repr(value))}")
    return int(number)


def seed_number(seed: Any) -> int:
    """A seed that torch takes."""
    number = whole("seed", seed)
    if not -(2**63) <= number < 2**64:
        raise TrimtabError(f"seed must be -2**63 to 2**64 - 1, not {shown(number)}")
    return number


@torch.inference_mode()
def written(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    asked: Mapping[str, Any],
    stop: Any,
    lengths: tuple[int, int],
    pieces: Pieces | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """One batch: the new tokens of each row up to and without its end-of-text token, and whether
    all of them were chosen from sound logits.

    `asked` is what `sampling` made, `stop` a pattern or None, `lengths` the fewest and the most new
    tokens, `pieces` what hands on the text as it is written.
    """
    rows, width = inputs["input_ids"].shape
    fewest, most = (width + length for length in lengths)
    watch = None if stop is None else StopsAt(stop, tokenizer, width, rows)
    sound = SoundLogits(rows, sampled=asked["do_sample"])
    try:
        settings = configuration(model, asked, min_length=fewest, max_length=most)
        eos, pad = settings.eos_token_id, tokenizer.pad_token_id
        stops = end_tokens(eos)
        settings.pad_token_id = pad if pad is not None else next(iter(stops), 0)
        if pieces is not None:
            pieces.begin(stops, lambda row: watch is not None and watch.ended[row] is not None)
        output = model.generate(
            **inputs,
            generation_config=settings,
            logits_processor=[sound],
            stopping_criteria=None if watch is None else [watch],
            streamer=pieces,
        )
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if not changed(asked) or (pieces is not None and pieces.raised is error):
            raise
        raise not_taken(asked, error) from error
    new: list[list[int]] = output[:, width:].tolist()
    ends = [len(row) for row in new] if watch is None else watch.ends(len(new[0]))
    texts = [
        row[: next((i for i, token in enumerate(row[:end]) if token in stops), end)]
        for row, end in zip(new, ends, strict=True)
    ]
    # A row that ended before its end was ended by one token more, which it was chosen to be.
    chosen = [len(text) + (len(text) < end) for text, end in zip(texts, ends, strict=True)]
    sound_until = zip(sound.counts(), chosen, strict=True)
    return texts, [count >= used for count, used in sound_until]


def stops_in(pattern: Any, text: str) -> bool:
    """Whether a stop pattern has a match in a text."""
    try:
        return bool(pattern.search(text, timeout=_PATIENCE))
    except TimeoutError as error:
        raise TrimtabError(
            f"the stop pattern {pattern.pattern!r} takes more than {_PATIENCE:g} s to search "
            f"{len(text)} characters: write it without repeats inside repeats"
        ) from error


class StopsAt(StoppingCriteria):
    """Ends each row of a batch with the token that completes a match of a pattern."""

    def __init__(self, pattern: Any, tokenizer: Any, width: int, rows: int) -> None:
        self.pattern, self.tokenizer, self.width = pattern, tokenizer, width
        #: How many new tokens each row has when it ends; None where it goes on.
        self.ended: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        new = input_ids[:, self.width :].tolist()
        for i, row in enumerate(new):
            if self.ended[i] is None and stops_in(self.pattern, self.tokenizer.decode(row)):
                self.ended[i] = len(row)
        ended = [end is not None for end in self.ended]
        return torch.tensor(ended, device=input_ids.device)

    def ends(self, longest: int) -> list[int]:
        return [longest if end is None else end for end in self.ended]


def stop_pattern(stop: str) -> Any:
    """A stop pattern, compiled by a library whose searches can be given up."""
    try:
        return regex.compile(stop)
    except (regex.error, TypeError, OverflowError, RecursionError) as error:
        raise TrimtabError(f"stop must be a regular expression, not {stop!r}: {error}") from error


class UnsoundError(TrimtabError):
    """The logits of a text cannot choose a token."""


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


def unsound(
    text: str, labels: Sequence[str], dtype: torch.dtype, options: Sequence[str] = ()
) -> UnsoundError:
    """The error of a text ("prompt 2") whose logits cannot choose a token; `options` are the names
    of those that changed them."""
    name = str(dtype).removeprefix("torch.")
    wide = dtype in (torch.float32, torch.float64)
    if labels:
        who = f"with {' and '.join(labels)}"
        remedy = f"turn the dial towards 0{'' if wide else ', or load the model in float32'}"
    else:
        who = "without a steering of its own"
        remedy = "look at the model's weights" if wide else "load the model in float32"
    if options:
        remedy += f"; or look at what {', '.join(options)} makes of the logits"
    return UnsoundError(
        f"the logits of {text} are not finite, or all equal, in {name} {who}: {remedy}"
    )
