"""What a contrast says of a curve: error bars from resampled contrasts, and tokens' log-odds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import Method
from trimtab.methods import METHODS
from trimtab.model import LanguageModel, batches_by_length, extended, with_images
from trimtab.reading import last_logits
from trimtab.steering import Steering
from trimtab.strength.following import prefixes
from trimtab.terminal import progress


def method_of(steering: Steering) -> Method:
    """The method that a steering was fitted with, with its hyperparameters."""
    if steering.method not in METHODS:
        raise TrimtabError(f"no method {steering.method!r}: known are {', '.join(METHODS)}")
    try:
        return METHODS[steering.method](**steering.hyperparameters)
    except TypeError as error:
        raise TrimtabError(
            f"this {steering.method} steering has hyperparameters that the method does not: {error}"
        ) from error


def resampled(
    language_model: LanguageModel,
    method: Method,
    contrast: Contrast,
    times: int = 5,
    seed: int = 0,
) -> list[Steering]:
    """The method fitted again on contrasts whose train rows are drawn with replacement."""
    if times < 2:
        raise TrimtabError(f"error bars need 2 resamples or more, not {times}")
    seeds = range(seed * times, (seed + 1) * times)  # another seed shares none of them
    return [method.fit(language_model, contrast.resample(own), measure=False) for own in seeds]


@torch.no_grad()
def token_log_odds(
    language_model: LanguageModel,
    contrast: Contrast,
    max_length: int = 100,
    after: Sequence[int] = (),
) -> Tensor:
    """Of every token: its mean log-probability after the positive texts of a contrast minus that
    after the negative ones, [vocabulary] in float64 nats (the measured counterpart of Def. 3.2 of
    "Towards Understanding Steering Strength"). Texts count up to `max_length` tokens, and the
    tokens `after` follow each of them.
    """
    train = contrast.train
    if train.paired:
        prompts = [pair.prompt for pair in train.pairs]
        sides = [
            language_model.encode(prompts, [pair.positive for pair in train.pairs]),
            language_model.encode(prompts, [pair.negative for pair in train.pairs]),
        ]
    else:
        sides = [
            language_model.encode([row.text for row in train.texts if row.label == label])
            for label in ("positive", "negative")
        ]
    means = []
    with progress("reading log-odds", sum(map(len, sides))) as advance:
        for side in sides:
            texts = [extended(text[:max_length], after) for text in side]
            lengths, total = [len(text) for text in texts], torch.zeros(())
            most, apart = language_model.batch_tokens, with_images(texts)
            for rows in batches_by_length(lengths, most, apart=apart):
                logits = last_logits(language_model, [texts[i] for i in rows])
                total = total + logits.double().log_softmax(-1).sum(0).cpu()
                advance(len(rows))
            means.append(total / len(texts))
    return means[0] - means[1]


def sequence_log_odds(
    language_model: LanguageModel, contrast: Contrast, shown: Sequence[tuple[int, ...]]
) -> list[float]:
    """Log-odds of tokens; those of a sequence are the sum over its pieces."""
    after = {
        prefix: token_log_odds(language_model, contrast, after=prefix) for prefix in prefixes(shown)
    }
    return [
        sum(float(after[ids[:place]][token]) for place, token in enumerate(ids)) for ids in shown
    ]


def at_layers(steering: Steering, layers: int, count: int) -> list[Method]:
    """The steering's method at `count` blocks from the first to the last, int(linspace(0, L - 1))
    of the model's `layers`."""
    method = method_of(steering)
    if count < 1:
        raise TrimtabError(f"curves over layers need 1 layer or more, not {count}")
    if "layer" not in steering.hyperparameters:
        raise TrimtabError(
            f"{steering.method} has no layer: curves over layers need a method that has"
        )
    places = np.linspace(0, layers - 1, count).astype(int).tolist()
    return [replace(method, layer=layer) for layer in dict.fromkeys(places)]  # type: ignore[type-var]
