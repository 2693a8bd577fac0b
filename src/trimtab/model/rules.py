"""What decides a row's dial when the model begins to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.model.passes import Beginning, Choose, texts_begun

#: The dial of each text (token ids); with no text it only says what would be wrong.
FindDials = Callable[[Sequence[Sequence[int]]], list[float]]


def chooser(find: FindDials) -> Choose:
    """What finds the dial of each row of a batch, from the arguments of the transformer body."""
    find([])  # says at once what is wrong

    def choose(beginning: Beginning) -> Tensor:
        rows = texts_begun(beginning, "a budget (kl)")
        distinct = sorted(set(rows))  # samples and beams of one prompt are equal rows
        dials = dict(zip(distinct, find(distinct), strict=True))
        return torch.tensor([dials[row] for row in rows], dtype=torch.float64)

    return choose
