"""What decides a row's dial when the model begins to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.model.passes import Beginning, Choose

#: The dial of each text (token ids); with no text it only says what would be wrong.
FindDials = Callable[[Sequence[Sequence[int]]], list[float]]


def chooser(find: FindDials) -> Choose:
    """What finds the dial of each row of a batch, from the arguments of the transformer body."""
    find([])  # says at once what is wrong

    def choose(beginning: Beginning) -> Tensor:
        rows = _texts(beginning)
        distinct = sorted(set(rows))  # samples and beams of one prompt are equal rows
        dials = dict(zip(distinct, find(distinct), strict=True))
        return torch.tensor([dials[row] for row in rows], dtype=torch.float64)

    return choose


def _texts(beginning: Beginning) -> list[tuple[int, ...]]:
    """The token ids that the model begins to read, without padding."""
    tokens, mask = beginning.tokens, beginning.mask
    if tokens is None or not beginning.whole:  # some ways to generate read a prompt in parts
        raise TrimtabError(
            "a budget (kl) is kept on whole prompts of tokens: give the model input_ids, all of "
            "them in its first pass, or find the dial with trimtab.strength.budget"
        )
    if mask is None:
        return [tuple(row) for row in tokens.tolist()]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise TrimtabError(
            "a budget (kl) needs to know which tokens are padding: give the model an "
            "attention_mask of one number for each token"
        )
    return [tuple(row[keep].tolist()) for row, keep in zip(tokens, mask.bool(), strict=True)]
