"""What texts are along a direction, token by token: one pass that is not steered and ends at the
direction's site; of each batch nothing is kept but one number a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import not_finite
from trimtab.model import LanguageModel, batches_by_length, refuse_dropout, score_pass
from trimtab.steering import Condition, Gate
from trimtab.terminal import progress


def projections(
    language_model: LanguageModel, condition: Condition, texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The condition's score of every token of texts (token ids), [tokens] in float64 each."""
    lm, gate = language_model, Gate((condition,), "token")
    gate.check_sizes(lm.anatomy, lm.name)
    refuse_dropout(lm.model)
    found = [torch.empty(0)] * len(texts)
    with progress("reading chats", len(texts)) as advance:
        for rows in batches_by_length(list(map(len, texts)), lm.batch_tokens):
            own = [texts[i] for i in rows]
            scores = score_pass(lm.anatomy, lm.marks, gate, own, list(map(len, own))).scores[0]
            for row, i in zip(scores.double().cpu(), rows, strict=True):
                found[i] = row[: len(texts[i])]
            advance(len(rows))
    for i, scores in enumerate(found):
        if not bool(scores.isfinite().all()):
            raise not_finite(
                f"text {i + 1}: the activation at {condition.site} is not finite", lm.dtype
            )
    return found
