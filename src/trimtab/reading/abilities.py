"""Which clever ways of running a model are right for it: packed rows, parts, shared beginnings.

Each is right for softmax attention that builds its masks as most do, and wrong elsewhere: a state
(linear attention, state spaces, convolutions) leaks from one side of a packed row into the other,
ALiBi counts columns, layers share keys and values. So each model is asked, at the first use, by
numbers on two texts of a dozen tokens (see `model/questions.py`). Where the answer is no the plain
way is taken: each text is a row of its own, and all of it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.anatomy import is_hooked
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, alike, answered, hidden_alone, probe_texts
from trimtab.reading.packing import KINDS_OF_LAYERS, Packed, batch_of, run_packed
from trimtab.reading.streams import (
    blocks_before,
    blocks_below,
    run_lower,
    run_prefix,
    run_upper,
)
from trimtab.steering import Steering

#: How far attention reaches in short texts, so that they leave its window.
_REACH = 5
#: The names in a configuration of how far it reaches, which its body reads at each pass.
_REACHES = ("sliding_window", "attention_chunk_size")
#: What is in names of numbers that sound like one and are none.
_NO_REACH = ("pattern", "layers", "feed_forward")


def packs(language_model: LanguageModel) -> bool:
    """Whether the two sides of a pair may share a row."""
    lm = language_model

    def ask() -> bool:
        if not _knows_reach(lm.anatomy.config):
            return False
        first, second = probe_texts(lm.anatomy)
        rows = [
            Packed(0, (*first, *second[4:]), 4, (len(first) - 4, len(second) - 4), (4, 4)),
            Packed(1, (*second, *first[4:7]), 4, (len(second) - 4, 3), (4, 4)),
        ]
        with _short_reach(lm.anatomy.config):
            batch = batch_of(tuple(rows), packed=True)
            hidden = run_packed(batch, lm).last_hidden_state
            return all(
                alike(hidden[batch.place_of(i, side)], hidden_alone(lm.anatomy, text))
                for i, row in enumerate(rows)
                for side, text in enumerate(row.texts())
            )

    return answered(lm.anatomy, "packs", ask)


def packed(language_model: LanguageModel, rows: Sequence[Packed]) -> bool:
    """Whether rows are read packed: where they have two sides, and the model takes that."""
    return any(len(row.sides) > 1 for row in rows) and packs(language_model)


def runs_in_parts(language_model: LanguageModel, blocks: int) -> bool:
    """Whether the blocks from number `blocks` on may run on what those below put out before."""
    lm = language_model

    def ask() -> bool:
        texts = probe_texts(lm.anatomy)
        with _short_reach(lm.anatomy.config):
            streams = run_lower(lm, texts, blocks)
            hidden = run_upper(lm, texts, streams, blocks)
            return all(
                alike(row[: len(text)], hidden_alone(lm.anatomy, text))
                for row, text in zip(hidden, texts, strict=True)
            )

    return answered(lm.anatomy, ("parts", blocks), ask)


def shares_prefixes(language_model: LanguageModel, blocks: int = 0) -> bool:
    """Whether texts may run on from a cache of what they begin with, in the first `blocks` blocks
    and in those above apart."""
    lm = language_model

    def ask() -> bool:
        rests = probe_texts(lm.anatomy)
        # Longer than the reach, so that a cache has forgotten some of it.
        start = rests[0][:8]
        with _short_reach(lm.anatomy.config):
            streams, stream = [torch.empty(0)] * len(rests), torch.empty(0)
            if blocks:
                stream, cache = run_prefix(lm, start, stream, 0, blocks)
                streams = run_lower(lm, rests, blocks, cache=cache)
            _, cache = run_prefix(lm, start, stream, blocks, lm.anatomy.layers)
            hidden = run_upper(lm, rests, streams, blocks, cache)
            return all(
                alike(row[: len(rest)], hidden_alone(lm.anatomy, start + rest)[len(start) :])
                for row, rest in zip(hidden, rests, strict=True)
            )

    return answered(lm.anatomy, ("shares", blocks), ask)


def blocks_apart(
    language_model: LanguageModel,
    steerings: Iterable[Steering],
    shared: bool = False,
    sites: Iterable[str] = (),
) -> int:
    """How many blocks run apart from those above, because none of the steerings changes anything
    there, and nothing is changed at the sites; 0 where the model has to run whole. `shared` says
    that the texts run on from a cache."""
    anatomy = language_model.anatomy
    blocks = min(blocks_below(anatomy, steerings), blocks_before(anatomy, sites))
    able = blocks and runs_in_parts(language_model, blocks)
    if able and (not shared or shares_prefixes(language_model, blocks)):
        return blocks
    check_reads(language_model)
    return 0


def blocks_to_keep(
    language_model: LanguageModel, steerings: Iterable[Steering], shared: bool = False
) -> int:
    """As `blocks_apart`, for who keeps what these blocks put out: 0 where the model is steered
    already, since what it computes then is not for later."""
    if is_hooked(language_model.model):
        return 0
    return blocks_apart(language_model, steerings, shared)


def check_reads(language_model: LanguageModel) -> None:
    """Refuse a model of which not even rows of its own give what each text alone does."""
    lm = language_model

    def ask() -> bool:
        texts = probe_texts(lm.anatomy)
        hidden = run_upper(lm, texts, (), 0)
        return all(
            alike(row[: len(text)], hidden_alone(lm.anatomy, text))
            for row, text in zip(hidden, texts, strict=True)
        )

    if not answered(lm.anatomy, "reads", ask):
        raise TrimtabError(
            f"texts cannot be read with {lm.name}: its body ({type(lm.anatomy.body).__name__}), "
            "run on a batch of two padded texts, does not give what the model gives for each alone"
        )


def _knows_reach(config: Any) -> bool:
    """Whether all that a configuration says of windows is what packed rows heed."""
    if not set(getattr(config, "layer_types", None) or ()) <= set(KINDS_OF_LAYERS):
        return False
    return not any(
        any(part in name for part in ("window", "chunk", "local_att"))
        and isinstance(value, int)
        and not isinstance(value, bool)
        and not (name in _REACHES or any(part in name for part in _NO_REACH))
        for name, value in vars(config).items()
    )


@contextmanager
def _short_reach(config: Any) -> Iterator[None]:
    """Attention that reaches a few tokens only, where it does not reach all: a short text is then
    to it what a long one is."""
    before = {name: vars(config)[name] for name in _REACHES if vars(config).get(name) is not None}
    try:
        for name in before:
            setattr(config, name, _REACH)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
