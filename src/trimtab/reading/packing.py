"""Turns texts into batches that a model runs without doing anything twice.

The two sides of a pair share their prompt. A packed row is

    common tokens | rest of the positive side | rest of the negative side

in which neither rest attends to the other and both count their positions on from the common part,
so that one forward pass gives exactly what two separate texts would. For a model of which that is
not true (see abilities.py), and for texts with images, each side is a line by itself. Rows are
sorted by length and padded on the right, where a causal model does not see it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from trimtab.anatomy import exclusively
from trimtab.contrasts import Contrast, Pair, Prompt
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.model import (
    BATCH_TOKENS,
    ImageText,
    LanguageModel,
    batches_by_length,
    caps_attention,
    refuse_dropout,
)

#: Attention that takes a mask for each pair of tokens. Flash attention does not, nor do kernels of
#: the hub, and of others nobody knows.
_MASKED_ATTENTION = ("eager", "sdpa")
#: Kinds of layers whose attention is known from positions alone.
KINDS_OF_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
#: The models of which it was said that they are read with another attention.
_told: WeakSet[Any] = WeakSet()


@dataclass(frozen=True)
class Packed:
    """One row: `common` tokens, then one stretch of tokens for each side (or none)."""

    index: int  # the row of the contrast that it came from
    tokens: tuple[int, ...]
    common: int
    sides: tuple[int, ...]  # how many tokens follow for each side
    answers: tuple[int, ...]  # where in each side's own text its answer begins
    #: Each side's own text where these have images.
    seen: tuple[ImageText, ...] = ()

    def texts(self) -> list[Sequence[int]]:
        """Each side's own token sequence."""
        if self.seen:
            return list(self.seen)
        common, rest, texts = list(self.tokens[: self.common]), self.common, list[Sequence[int]]()
        for length in self.sides:
            texts.append(common + list(self.tokens[rest : rest + length]))
            rest += length
        return texts


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: tokens [lines, length], and where each side of a row is in them.

    The token at position p of a side is in line lines[row, side], in the column
    place[row, side, p], which is -1 beyond its end. Packed rows are one line each, with the
    positions of their tokens and `visible` [lines, length, length], true where a token attends to
    another; otherwise each side is a line of its own, and both are None.
    """

    rows: tuple[Packed, ...]
    tokens: Tensor
    lines: Tensor
    place: Tensor
    positions: Tensor | None = None
    visible: Tensor | None = None

    def place_of(self, row: int, side: int) -> tuple[Tensor, Tensor]:
        """The line and the column of each token of one side of a row (by its place here)."""
        columns = self.place[row, side]
        columns = columns[columns >= 0]
        return self.lines[row, side].expand_as(columns), columns

    def owners(self) -> list[tuple[int, int]]:
        """Of each line the row (by its place here) and the first side that are in it."""
        found: dict[int, tuple[int, int]] = {}
        for row, lines in enumerate(self.lines.tolist()):
            for side, line in enumerate(lines):
                found.setdefault(line, (row, side))
        return [found[line] for line in range(len(self.tokens))]


def encode_contrast(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None
) -> list[Packed]:
    """Tokenise a contrast and pack each pair; a text without a partner is a row of its own."""
    limit = language_model.max_length if max_length is None else max_length
    if limit < 1:
        raise TrimtabError(f"the maximum length must be 1 token or more, not {limit}")
    limit = min(limit, language_model.max_length)
    if contrast.paired:
        rows = _pack_pairs(language_model, contrast.pairs)
    else:
        rows = encode_texts(language_model, [row.text for row in contrast.texts])
    packed = [
        _cut_left(row, limit, language_model.bos, f"{contrast.name}, row {row.index + 1}")
        for row in rows
    ]
    cut = sum(shortened is not row for shortened, row in zip(packed, rows, strict=True))
    if cut:
        warnings.warn(
            f"{contrast.name}: {cut} of {len(packed)} rows are longer than {limit} tokens; "
            "their prompts were cut on the left",
            TrimtabWarning,
            stacklevel=2,
        )
    _refuse_equal_sides(language_model, contrast, packed)
    return packed


def _refuse_equal_sides(
    language_model: LanguageModel, contrast: Contrast, rows: Sequence[Packed]
) -> None:
    """Refuse sides that the model cannot tell apart, though their texts differ: a template may drop
    what differs, a tokenizer normalise it, a maximum length cut it off."""
    if contrast.paired:
        equal = [row.index + 1 for row in rows if not any(row.sides)]
        if equal:
            others = f", as in {len(equal) - 1} other rows" if len(equal) > 1 else ""
            raise TrimtabError(
                f"{contrast.name}, row {equal[0]}: the two sides are the same tokens to "
                f"{language_model.name}{others}: change their texts, or take them out"
            )
        return
    sides: dict[str, Counter[Any]] = {"positive": Counter(), "negative": Counter()}
    for row, text in zip(rows, contrast.texts, strict=True):
        sides[text.label][row.seen or row.tokens] += 1
    shares = [
        {tokens: count / side.total() for tokens, count in side.items()} for side in sides.values()
    ]
    if shares[0] == shares[1]:
        raise TrimtabError(
            f"{contrast.name}: the two sides do not differ: positive and negative texts are the "
            f"same tokens to {language_model.name} (a chat template may leave out a message)"
        )


def _pack_pairs(language_model: LanguageModel, pairs: Sequence[Pair]) -> list[Packed]:
    """Each pair as one row: what its sides share, then the rest of each."""
    encode = language_model.encode
    prompts = [pair.prompt for pair in pairs]
    starts = encode(prompts)
    positives = encode(prompts, [pair.positive for pair in pairs])
    negatives = encode(prompts, [pair.negative for pair in pairs])
    rows = []
    for index, (start, *texts) in enumerate(zip(starts, positives, negatives, strict=True)):
        common = _common_length(*texts)
        rows.append(
            Packed(
                index,
                (*texts[0], *tuple(texts[1])[common:]),
                common,
                tuple(len(text) - common for text in texts),
                tuple(_common_length(start, text) for text in texts),
                _seen(texts),
            )
        )
    return rows


def _seen(texts: Sequence[Sequence[int]]) -> tuple[ImageText, ...]:
    """The texts that have images: all of a row, or none."""
    return tuple(text for text in texts if isinstance(text, ImageText))


def encode_texts(language_model: LanguageModel, texts: Sequence[Prompt]) -> list[Packed]:
    """Single texts as packed rows, none of them cut."""
    encoded = language_model.encode(list(texts))
    return [Packed(i, tuple(t), len(t), (0,), (len(t),), _seen([t])) for i, t in enumerate(encoded)]


def batches(
    rows: Sequence[Packed], max_tokens: int = BATCH_TOKENS, packed: bool = True
) -> Iterator[Batch]:
    """Batches of rows of similar length; no row depends on its neighbours. `packed` says whether
    the sides of a row share a line, where they have no images."""
    apart = [bool(row.seen) for row in rows]
    lengths = [
        len(row.tokens) if packed and not row.seen else max(map(len, row.texts())) * len(row.sides)
        for row in rows
    ]
    for indices in batches_by_length(lengths, max_tokens, apart=apart):
        chosen = tuple(rows[i] for i in indices)
        yield batch_of(chosen, packed and not chosen[0].seen)


def batch_of(rows: tuple[Packed, ...], packed: bool) -> Batch:
    """Some rows as one batch."""
    return _packed_batch(rows) if packed else _plain_batch(rows)


def _packed_batch(rows: tuple[Packed, ...]) -> Batch:
    length = max(len(row.tokens) for row in rows)
    sides = len(rows[0].sides)
    longest_side = max(row.common + max(row.sides) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    # Segment of each token: 0 common, 1 and 2 the sides, 3 padding (which only sees itself).
    segments = torch.full((len(rows), length), 3)
    place = torch.full((len(rows), sides, longest_side), -1)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        positions[i, : row.common] = torch.arange(row.common)
        segments[i, : row.common] = 0
        start = row.common
        for side, extra in enumerate(row.sides):
            positions[i, start : start + extra] = torch.arange(row.common, row.common + extra)
            segments[i, start : start + extra] = side + 1
            place[i, side, : row.common] = torch.arange(row.common)
            place[i, side, row.common : row.common + extra] = torch.arange(start, start + extra)
            start += extra
    past = torch.ones(length, length, dtype=torch.bool).tril()
    seen, seeing = segments[:, None, :], segments[:, :, None]
    visible = past & ((seen == seeing) | ((seen == 0) & (seeing != 3)))
    lines = torch.arange(len(rows))[:, None].expand(-1, sides)
    return Batch(rows, tokens, lines, place, positions, visible)


def _plain_batch(rows: tuple[Packed, ...]) -> Batch:
    texts = [text for row in rows for text in row.texts()]
    longest, sides = max(len(text) for text in texts), len(rows[0].sides)
    tokens = torch.zeros(len(texts), longest, dtype=torch.long)
    place = torch.full((len(texts), longest), -1)
    for i, text in enumerate(texts):
        tokens[i, : len(text)] = torch.tensor(tuple(text))
        place[i, : len(text)] = torch.arange(len(text))
    lines = torch.arange(len(texts)).view(len(rows), sides)
    return Batch(rows, tokens, lines, place.view(len(rows), sides, longest))


def run_packed(batch: Batch, language_model: LanguageModel) -> Any:
    """What the transformer body puts out for a batch."""
    refuse_dropout(language_model.model)
    body = language_model.anatomy.body
    if batch.rows[0].seen:
        with exclusively(body):
            return language_model.read_with_images([t for row in batch.rows for t in row.seen])
    language_model.refuse_bare([row.tokens for row in batch.rows])
    with exclusively(body):
        if batch.visible is None:
            return body(**plain_inputs(batch, language_model))
        with _masked_attention(language_model):
            return body(**model_inputs(batch, language_model))


@contextmanager
def _masked_attention(language_model: LanguageModel) -> Iterator[None]:
    """Attention that takes the masks of packed rows, while the block lasts."""
    model: Any = language_model.model
    config: Any = language_model.anatomy.body.config
    own = config._attn_implementation
    if own is None or own in _MASKED_ATTENTION:
        yield
        return
    supported = getattr(language_model.anatomy.body, "_supports_sdpa", False)
    instead = "sdpa" if supported and not caps_attention(model) else "eager"
    if model not in _told:
        _told.add(model)
        warnings.warn(
            f"{language_model.name} runs with {own}, which takes no masks of packed texts: texts "
            f"are read with {instead}",
            TrimtabWarning,
            stacklevel=3,
        )
    config._attn_implementation = instead
    try:
        yield
    finally:
        config._attn_implementation = own


def plain_inputs(batch: Batch, language_model: LanguageModel) -> dict[str, Any]:
    """The arguments of the transformer body for a batch without packed rows. Positions and masks
    are the architecture's own."""
    mask = torch.zeros_like(batch.tokens)
    lines, columns = batch.lines[..., None].expand_as(batch.place), batch.place
    mask[lines[columns >= 0], columns[columns >= 0]] = 1
    return {
        "input_ids": batch.tokens.to(language_model.device),
        "attention_mask": mask.to(language_model.device),
        "use_cache": False,
    }


def model_inputs(batch: Batch, language_model: LanguageModel) -> dict[str, Any]:
    """The arguments of the transformer body for a batch of packed rows, on the model's device.

    Masks are additive, [rows, 1, length, length], one per kind of attention layer where the
    architecture has several; a sliding window counts positions, not columns.
    """
    assert batch.visible is not None
    assert batch.positions is not None
    config, device = language_model.anatomy.config, language_model.device
    dtype = language_model.dtype
    visible = batch.visible.to(device)
    positions = batch.positions.to(device)
    lowest = torch.finfo(dtype).min

    def additive(allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        return mask.masked_fill(~allowed, lowest)[:, None]

    window = getattr(config, "sliding_window", None)
    in_window = visible
    if window is not None:
        distance = positions[:, :, None] - positions[:, None, :]
        in_window = visible & (distance < window)
    kinds = getattr(config, "layer_types", None)
    mask: Any
    if kinds:
        by_kind = {"full_attention": visible, "sliding_attention": in_window}
        chunk = getattr(config, "attention_chunk_size", None)
        if chunk is not None:
            chunks = positions // chunk
            same = chunks[:, :, None] == chunks[:, None, :]
            by_kind["chunked_attention"] = visible & same
        mask = {kind: additive(by_kind[kind]) for kind in sorted(set(kinds))}
    else:
        mask = additive(in_window)
    return {
        "input_ids": batch.tokens.to(device),
        "position_ids": positions,
        "attention_mask": mask,
        "use_cache": False,
    }


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _cut_left(row: Packed, limit: int, bos: int | None, where: str) -> Packed:
    """Drop tokens from the left of the common part, but not a BOS, until every side fits."""
    if not row.common and not all(row.sides):
        raise TrimtabError(f"{where}: a text has no tokens, so there is no activation to read")
    excess = row.common + max(row.sides) - limit
    if excess <= 0:
        return row
    kept = 1 if row.tokens[0] == bos else 0
    if row.seen:
        raise TrimtabError(
            f"{where}: its text and images have {row.common + max(row.sides)} tokens, and "
            f"{limit} are the most: take smaller images, or raise the maximum length"
        )
    # What may go: the prompt only, and at least one token before the answer stays.
    free = min(row.common, *row.answers) - kept
    if excess >= free:
        raise TrimtabError(
            f"{where}: the answer alone does not fit in {limit} tokens: shorten it, "
            "or raise the maximum length"
        )
    return Packed(
        row.index,
        row.tokens[:kept] + row.tokens[kept + excess :],
        row.common - excess,
        row.sides,
        tuple(max(0, answer - excess) for answer in row.answers),
    )
