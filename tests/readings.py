"""Readings of next tokens that share beginnings of any length, and plain hooks to check them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import trimtab as tt
from helpers import by_hand
from trimtab.reading.reader import Next, PlannedBatch, Reading, plan, run_batches
from trimtab.reading.streams import StreamCache
from trimtab.steering import Positions

#: Heads wider than the model; a sliding window of 8; learnt positions; experts; norms after.
MODELS = ("llama", "gemma3", "gpt2", "qwen3_moe", "olmo2")

BOS = 1
#: How many tokens of the readings below are the same: none but BOS, fewer than the sliding window
#: of 8 and more, and more than the window of a window.
BEGINNINGS = {"apart": 0, "short": 5, "long": 30}


def some_readings(beginning: int, count: int = 14, seed: int = 0) -> list[Reading]:
    """Random texts of different lengths; each asks for all positions from its prompt's end on."""
    chance = random.Random(seed)

    def words(length: int) -> list[int]:
        return [chance.randrange(10, 400) for _ in range(length)]

    start = [BOS, *words(beginning)]
    readings = []
    for _ in range(count):
        tokens = (*start, *words(chance.randrange(3, 20)))
        prompt = chance.randrange(len(start) + 1, len(tokens))
        positions = tuple(range(prompt - 1, len(tokens)))
        readings.append(Reading(tokens, positions, prompt, tuple(words(len(positions)))))
    return readings


def found_by(
    lm: tt.LanguageModel,
    readings: Sequence[Reading],
    steering: Any = None,
    batches: Sequence[PlannedBatch] | None = None,
    batch_tokens: int = 60,
    kept: StreamCache | None = None,
) -> dict[int, Next]:
    if batches is None:
        batches = plan(readings, batch_tokens)
    return {
        i: each
        for batch, rows in run_batches(lm, readings, batches, steering, kept=kept)
        for i, each in zip(batch.rows, rows, strict=True)
    }


@contextmanager
def hand_hooked(
    model: Any,
    op: Any,
    positions: Positions = "all",
    prompt: int = 10**6,
    dial: float = 1.0,
) -> Iterator[None]:
    """The operator at block 1's output on some tokens of a single text, by a plain hook.

    `prompt` is how many tokens of the text are its prompt.
    """
    change = by_hand(op, dial)
    first = {"all": 0, "prompt": 0, "generated": prompt, "last": prompt - 1}[positions]
    stop = prompt if positions == "prompt" else 10**6

    def hook(module: Any, args: Any, x: Tensor) -> Tensor:
        return torch.cat((x[:, :first], change(x[:, first:stop]), x[:, stop:]), dim=1)

    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handle = blocks[1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def agrees(found: Next, reading: Reading, logits: Tensor, tolerance: float) -> None:
    """What was found is what these logits [tokens, vocabulary] of the whole text say."""
    asked = logits[list(reading.positions)].double()
    best = asked.gather(-1, found.best[:, None]).squeeze(-1)
    # The best one, or one that rounding cannot tell from it.
    assert (asked.amax(-1) - best).max() <= tolerance
    log_p = asked.log_softmax(-1)
    wanted = log_p.gather(-1, torch.tensor(reading.targets)[:, None]).squeeze(-1)
    torch.testing.assert_close(found.log_p, wanted, rtol=0, atol=tolerance)
