"""Runs a model from any block on: what the blocks below compute is computed once and kept.

A steering changes nothing below its lowest site. Whoever runs the same texts at many dials, or
under many steerings, runs the blocks below once (`run_lower`) and those above each time
(`run_upper`). Tokens that many texts begin with run once for all of them (`run_prefix`), and the
rest of each text runs on top of their KV cache. The transformer body itself runs in all cases,
with the other blocks handing on what they are given, so that masks and positions are the
architecture's own. Of which models that is right says `abilities.py`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from trimtab.anatomy import (
    Anatomy,
    eager,
    exclusively,
    find_input,
    first_tensor,
    parse_site,
    probe_ids,
    with_first,
)
from trimtab.model import (
    LanguageModel,
    asking,
    batches_by_length,
    cache_argument,
    unsteered,
    with_images,
)
from trimtab.steering import Steering


def blocks_below(anatomy: Anatomy, steerings: Iterable[Steering]) -> int:
    """How many blocks run before any of the steerings reads or changes anything."""
    return blocks_before(anatomy, [site for steering in steerings for site in steering.sites])


def blocks_before(anatomy: Anatomy, sites: Iterable[str]) -> int:
    """How many blocks run before any of the sites."""
    below = anatomy.layers
    for site in sites:
        layer, kind = parse_site(site)
        if layer is not None:  # a block's own output is changed after the block
            below = min(below, layer + 1 if kind == "resid" else layer)
        elif kind == "embed":
            below = 0
    return below


@torch.no_grad()
def run_lower(
    language_model: LanguageModel,
    texts: Sequence[Sequence[int]],
    blocks: int,
    streams: Sequence[Tensor] = (),
    done: int = 0,
    cache: DynamicCache | None = None,
) -> list[Tensor]:
    """The residual stream after the first `blocks` blocks, [tokens, units] of each text.

    With 0 blocks there is nothing to keep, and the tensors are empty. `streams` are those after
    the first `done` blocks, where these have run already. `cache` is what `run_prefix` made of the
    tokens before these texts.
    """
    if blocks == 0:
        return [torch.empty(0) for _ in texts]
    if blocks == done:
        return list(streams)
    anatomy, after = language_model.anatomy, [torch.empty(0)] * len(texts)
    lengths, most = [len(text) for text in texts], language_model.batch_tokens
    for rows in batches_by_length(lengths, most, apart=with_images(texts)):
        given = _padded([streams[i] for i in rows]) if done else None
        with (
            _instead(anatomy, anatomy.blocks[:done], given),
            _instead(anatomy, anatomy.blocks[blocks:], None),
            _watched(anatomy.blocks[blocks - 1]) as seen,
        ):
            _run([texts[i] for i in rows], language_model, cache)
        for i, stream in zip(rows, seen[0], strict=True):
            after[i] = stream[: len(texts[i])].clone()
    return after


@torch.no_grad()
def run_prefix(
    language_model: LanguageModel, text: Sequence[int], stream: Tensor, done: int, blocks: int
) -> tuple[Tensor, DynamicCache]:
    """What texts begin with, through the blocks from `done` to `blocks`: the stream after them,
    [tokens, units], and the cache on which the rest of each text runs through the same blocks."""
    anatomy = language_model.anatomy
    cache = DynamicCache(config=anatomy.config)
    with (
        _instead(anatomy, anatomy.blocks[:done], stream[None] if done else None),
        _instead(anatomy, anatomy.blocks[blocks:], None),
        _watched(anatomy.blocks[blocks - 1]) as seen,
    ):
        ids = torch.tensor([text], device=language_model.device)
        anatomy.body(input_ids=ids, use_cache=True, **{cache_argument(anatomy.body): cache})
    # transformers takes masks and positions from the length of the cache at its first layers.
    # Blocks that were left out here, below or above, have put nothing there. Those that attend get
    # blank entries of the right length, which nothing attends to, because they stay left out.
    blank = seen[0].new_zeros(1, 1, len(text), 1)
    for layer in (*range(done), *range(blocks, anatomy.layers)):
        if layer >= len(cache.layers) or hasattr(cache.layers[layer], "update"):
            cache.update(blank, blank, layer)
    return seen[0][0], cache


class StreamCache:
    """The residual streams of texts after the blocks at which steerings began, for later ones.

    What is asked for is computed from the highest block below that is there. Beyond `limit` bytes
    the streams that were not used for longest are dropped; they are computed again when needed.
    The model's weights must stay as they are.
    """

    def __init__(self, language_model: LanguageModel, limit: int = 4 << 30) -> None:
        self.language_model, self.limit = language_model, limit
        #: By (blocks, shared, text), those that were used last at the end.
        self._streams: OrderedDict[tuple[int, int, tuple[int, ...]], Tensor] = OrderedDict()
        self._bytes = 0
        #: The cache of what the last texts began with, by (tokens, done, blocks).
        self._begun: tuple[tuple[tuple[int, ...], int, int], DynamicCache] | None = None

    def run_lower(
        self, texts: Sequence[tuple[int, ...]], blocks: int, shared: int = 0
    ) -> list[Tensor]:
        """As the function `run_lower`; a text is a tuple of token ids. All begin with the same
        `shared` tokens, and the streams are those of the others."""
        streams: dict[tuple[int, ...], Tensor] = {}
        # What is missing, by how many blocks ran already, with what these put out: held here,
        # because keeping what is computed first may drop it.
        missing: dict[int, dict[tuple[int, ...], Tensor]] = {}
        for text in dict.fromkeys(texts):
            done, stream = self._highest(text, blocks, shared)
            if done == blocks:
                streams[text] = stream
            else:
                missing.setdefault(done, {})[text] = stream
        for done, known in missing.items():
            rests, before = [text[shared:] for text in known], list(known.values())
            start = next(iter(known))[:shared]
            cache = self._shared(start, done, blocks) if shared and blocks else None
            computed = run_lower(self.language_model, rests, blocks, before, done, cache)
            for text, stream in zip(known, computed, strict=True):
                streams[text] = stream
                self._keep(text, blocks, shared, stream)
        return [streams[text] for text in texts]

    def _shared(self, start: tuple[int, ...], done: int, blocks: int) -> DynamicCache:
        """The KV cache of what texts begin with, in the blocks from `done` to `blocks`.

        Batches of texts that begin alike come one after another, so that the last cache is enough.
        The stream after these blocks is kept as that of a text without shared tokens, because the
        blocks above will be asked to run the beginning on from there. The cache itself is copied
        by whoever runs on it, and stays as it is.
        """
        key = (start, done, blocks)
        if self._begun is None or self._begun[0] != key:
            stream = self.run_lower([start], done)[0]
            after, cache = run_prefix(self.language_model, start, stream, done, blocks)
            if (blocks, 0, start) not in self._streams:
                self._keep(start, blocks, 0, after.clone())
            self._begun = key, cache
        return self._begun[1]

    def _highest(self, text: tuple[int, ...], blocks: int, shared: int) -> tuple[int, Tensor]:
        """The most of the first `blocks` blocks after which the stream is there, and the stream."""
        for done in range(blocks, 0, -1):
            key = (done, shared, text)
            if key in self._streams:
                self._streams.move_to_end(key)
                return done, self._streams[key]
        return 0, torch.empty(0)

    def _keep(self, text: tuple[int, ...], blocks: int, shared: int, stream: Tensor) -> None:
        self._streams[blocks, shared, text] = stream
        self._bytes += stream.nbytes
        while self._bytes > self.limit:
            self._bytes -= self._streams.popitem(last=False)[1].nbytes


def run_upper(
    language_model: LanguageModel,
    texts: Sequence[Sequence[int]],
    streams: Sequence[Tensor],
    blocks: int,
    cache: DynamicCache | None = None,
) -> Tensor:
    """What the final norm puts out for texts whose first `blocks` blocks have run already,
    [texts, longest, units]; padding on the right. `cache` is as in `run_lower`."""
    anatomy = language_model.anatomy
    given = _padded(streams) if blocks else None
    with _instead(anatomy, anatomy.blocks[:blocks], given):
        hidden: Tensor = _run(texts, language_model, cache).last_hidden_state
    return hidden


def _run(
    texts: Sequence[Sequence[int]], language_model: LanguageModel, cache: DynamicCache | None
) -> Any:
    """What the body puts out for texts that all have images, or none of which has; padded on the
    right."""
    if any(with_images(texts)):
        return language_model.read_with_images(texts)
    language_model.refuse_bare(texts)
    return language_model.anatomy.body(**_inputs(texts, language_model, cache))


def _padded(streams: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(streams), batch_first=True)


def _inputs(
    texts: Sequence[Sequence[int]], language_model: LanguageModel, cache: DynamicCache | None
) -> dict[str, Any]:
    """Arguments of the body; padded on the right, where a causal model does not see it. Positions
    are counted by the body itself, from the length of the cache on."""
    device = language_model.device
    shared = 0 if cache is None else cache.get_seq_length()
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    ones = [torch.ones(shared + len(text), dtype=torch.long) for text in texts]
    inputs: dict[str, Any] = {
        "input_ids": ids.to(device),
        "attention_mask": pad_sequence(ones, batch_first=True).to(device),
        "use_cache": cache is not None,
    }
    if cache is not None:  # a copy, because the pass adds to it
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(len(texts))
        inputs[cache_argument(language_model.anatomy.body)] = copied
    return inputs


@contextmanager
def _instead(anatomy: Anatomy, blocks: Sequence[nn.Module], given: Tensor | None) -> Iterator[None]:
    """These blocks hand on `given`, or what they are given, and compute nothing."""

    forms = _forms(anatomy) if blocks else {}

    def forward(form: Any, *args: Any, **kwargs: Any) -> Any:
        place = find_input(args, kwargs)
        assert place is not None
        x: Tensor = args[place] if isinstance(place, int) else kwargs[place]
        return with_first(form, x if given is None else given.to(x.device))

    with exclusively(anatomy.body), eager():
        before = [vars(block).get("forward") for block in blocks]
        try:
            for block in blocks:
                object.__setattr__(block, "forward", partial(forward, forms[block]))
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                if own is not None:
                    object.__setattr__(block, "forward", own)
                elif "forward" in vars(block):
                    object.__delattr__(block, "forward")


#: What the blocks of a model return, by its transformer body.
_FORMS: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, Any]] = WeakKeyDictionary()


def _forms(anatomy: Anatomy) -> WeakKeyDictionary[nn.Module, Any]:
    """What each block returns, a tensor or a tuple whose first entry is the stream, without what
    is in it; seen once, on a short text."""
    if anatomy.body not in _FORMS:
        forms: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

        def see(module: nn.Module, args: Any, output: Any) -> None:
            forms[module] = (None,) * len(output) if isinstance(output, tuple) else None

        handles = [block.register_forward_hook(see, prepend=True) for block in anatomy.blocks]
        try:
            with eager(), unsteered(anatomy), torch.no_grad(), asking():
                anatomy.body(input_ids=probe_ids(anatomy.model)[:1], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        _FORMS[anatomy.body] = forms
    return _FORMS[anatomy.body]


@contextmanager
def _watched(block: nn.Module) -> Iterator[list[Tensor]]:
    """What a block puts out, each time that it runs, before hooks that others have put there:
    those change it when it is handed on."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        stream = first_tensor(output)
        assert stream is not None
        seen.append(stream)

    handle = block.register_forward_hook(see, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()
