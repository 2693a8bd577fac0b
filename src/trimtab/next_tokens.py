"""What a model expects next after many texts, with nothing computed twice.

Texts of similar length share a batch, beginnings that many texts share (instructions, examples,
the question of several options) are run once and kept as a KV cache, and the LM head runs only at
the positions that are asked for. Batches are planned before anything runs and depend on the texts
alone, so that a run which was interrupted goes on with the very batches that it would have had.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.model import LanguageModel, SteeringArgument
from trimtab.packing import BATCH_ROWS

#: A beginning is run by itself, once, where that saves at least this many tokens.
_WORTH_A_PASS = 64
#: Later than any token: a shared beginning is all prompt.
_FAR = 1 << 40


@dataclass(frozen=True)
class Reading:
    """One text, and the positions whose next token is asked for.

    `prompt` is how many of its tokens are prompt, for steerings that tell prompt from answer.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    prompt: int


def after(tokens: Sequence[int]) -> Reading:
    """What comes after a text that is all prompt."""
    return Reading(tuple(tokens), (len(tokens) - 1,), len(tokens))


@dataclass(frozen=True)
class Batch:
    """Readings (by their index) that run together; their first `shared` tokens are the same."""

    shared: int
    rows: tuple[int, ...]


def plan(readings: Sequence[Reading], batch_tokens: int) -> list[Batch]:
    """Batches of similar length, group by group of texts that share their beginning."""
    batches = []
    for shared, group in _groups(readings):
        waiting = sorted(group, key=lambda i: (-len(readings[i].tokens), i))
        while waiting:
            longest = len(readings[waiting[0]].tokens) - shared
            count = max(1, min(BATCH_ROWS, batch_tokens // longest))
            batches.append(Batch(shared, tuple(waiting[:count])))
            waiting = waiting[count:]
    return batches


@torch.inference_mode()
def next_logits(
    language_model: LanguageModel,
    readings: Sequence[Reading],
    batches: Sequence[Batch],
    steering: SteeringArgument = None,
    *,
    force: bool = False,
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Run planned batches in order; for each reading its logits [positions, vocabulary], float32.

    `steering` is one for all texts.
    """
    body = language_model.anatomy.body
    beginning: tuple[int, ...] = ()
    cache: Any = None
    with language_model.steered(steering, force=force) as sequences:
        for batch in batches:
            rows = [readings[i] for i in batch.rows]
            start = rows[0].tokens[: batch.shared]
            if start != beginning:
                beginning, cache = start, None
                if start:
                    sequences.given_ends = [_FAR]
                    cache = DynamicCache(config=language_model.anatomy.config)
                    ids = torch.tensor([start], device=language_model.device)
                    body(input_ids=ids, past_key_values=cache, use_cache=True)
            sequences.given_ends = [row.prompt for row in rows]
            hidden = body(**_inputs(rows, batch.shared, cache, language_model)).last_hidden_state
            yield batch, _logits_at(rows, hidden, batch.shared, language_model)


def _inputs(
    rows: Sequence[Reading], shared: int, cache: Any, language_model: LanguageModel
) -> dict[str, Any]:
    """The rest of each text, padded on the right, on top of what all of them share."""
    longest = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), longest - shared, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        rest = row.tokens[shared:]
        ids[i, : len(rest)] = torch.tensor(rest)
        mask[i, : len(row.tokens)] = 1
    device = language_model.device
    positions = torch.arange(shared, longest).expand(len(rows), -1)
    inputs: dict[str, Any] = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
        "use_cache": cache is not None,
    }
    if cache is not None:
        inputs["past_key_values"] = copy.deepcopy(cache)
        inputs["past_key_values"].batch_repeat_interleave(len(rows))
    return inputs


def _logits_at(
    rows: Sequence[Reading], hidden: Tensor, shared: int, language_model: LanguageModel
) -> list[Tensor]:
    """Unembeds only the positions that are asked for."""
    places = [(i, position - shared) for i, row in enumerate(rows) for position in row.positions]
    row_of, column = torch.tensor(places, device=hidden.device).T
    logits = language_model.unembed(hidden[row_of, column])
    return list(logits.split([len(row.positions) for row in rows]))


# -- which texts share their beginning ------------------------------------------------------------


def _groups(readings: Sequence[Reading]) -> list[tuple[int, list[int]]]:
    """Readings by shared beginning: (how many tokens they share, which they are).

    In sorted order neighbours share most. Neighbours that share at least half of their tokens stay
    together, if that saves enough; the others are one group, which shares what all of it shares.
    """
    if not readings:
        return []
    order = sorted(range(len(readings)), key=lambda i: readings[i].tokens)
    runs = [[order[0]]]
    for previous, current in pairwise(order):
        first, second = readings[previous].tokens, readings[current].tokens
        together = 2 * _common(first, second) >= min(len(first), len(second))
        runs[-1].append(current) if together else runs.append([current])
    by_all = _shared(readings, order)
    groups, others = [], []
    for run in runs:
        shared = _shared(readings, run)
        if (shared - by_all) * (len(run) - 1) >= _WORTH_A_PASS:
            groups.append((shared, run))
        else:
            others += run
    if others:
        shared = _shared(readings, others)
        groups.append((shared if shared * (len(others) - 1) >= _WORTH_A_PASS else 0, others))
    return groups


def _shared(readings: Sequence[Reading], group: Sequence[int]) -> int:
    """How many tokens all of a group begin with; a position that is read is not among them."""
    first, last = (choose(readings[i].tokens for i in group) for choose in (min, max))
    return min(_common(first, last), *(readings[i].positions[0] for i in group))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
