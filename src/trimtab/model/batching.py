"""Which texts share a batch, and whether a model may be read at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from trimtab.errors import TrimtabError

#: Padded tokens in one batch on a CPU: enough to keep matrix products busy, little to pad.
BATCH_TOKENS = 512
#: On a card, where larger products pay.
BATCH_TOKENS_GPU = 8192
BATCH_ROWS = 64


def batches_by_length(
    lengths: Sequence[int],
    tokens: int | None = None,
    rows: int = BATCH_ROWS,
    equal: bool = False,
    apart: Sequence[bool] = (),
) -> Iterator[list[int]]:
    """Indices of texts of similar length that run together, at most `rows` of them; with `equal`
    only texts of the same length do.

    Texts that are read have at most so many padded `tokens` together, or are alone; the longest
    come first, so that memory that does not suffice is missed at once. Without `tokens` the
    shortest come first. `apart` says which texts share no batch with the others, because the model
    is given more of them (images).
    """
    sign = 1 if tokens is None else -1
    order = sorted(range(len(lengths)), key=lambda i: sign * lengths[i])
    groups = [order]
    if apart:
        groups = [[i for i in order if apart[i] is kind] for kind in (False, True)]
    for waiting in groups:
        while waiting:
            count = rows
            if tokens is not None:
                count = max(1, min(rows, tokens // lengths[waiting[0]]))
            if equal:
                count = min(count, sum(lengths[i] == lengths[waiting[0]] for i in waiting))
            yield waiting[:count]
            waiting = waiting[count:]


def refuse_dropout(model: Any) -> None:
    """Refuse a model in training mode whose dropout would make every reading another one."""
    if not model.training:
        return
    drops = any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    if drops or getattr(model.config.get_text_config(), "attention_dropout", False):
        raise TrimtabError(
            "the model is in training mode, and its dropout would make every text and figure "
            "another: call lm.model.eval() first"
        )
