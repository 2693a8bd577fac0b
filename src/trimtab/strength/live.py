"""The dial of a budget, found when a live model begins to read: `lm.steered(steering, kl=0.1)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.attach import Choose
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.steering import Steering
from trimtab.strength.budgets import dials_for


def chooser(
    language_model: LanguageModel, steering: Steering, kl: float, force: bool = False
) -> Choose:
    """What finds the dial of each row of a batch, from the arguments of the transformer body."""
    dials_for(language_model, steering, [], kl, force)  # says at once what is wrong

    def choose(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        rows = _texts(args, kwargs)
        distinct = sorted(set(rows))  # samples and beams of one prompt are equal rows
        found = dials_for(language_model, steering, distinct, kl, force)
        dials = dict(zip(distinct, found, strict=True))
        return torch.tensor([dials[row] for row in rows], dtype=torch.float64)

    return choose


def _texts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
    """The token ids that a pass reads, without padding."""
    tokens = args[0] if args else kwargs.get("input_ids")
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if tokens is None or (cache is not None and int(cache.get_seq_length())):
        raise TrimtabError(
            "a budget (kl) is kept on whole prompts of tokens: give the model input_ids, all of "
            "them in its first pass, or find the dial with trimtab.strength.budget"
        )
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return [tuple(row) for row in tokens.tolist()]
    kept = mask[:, -tokens.shape[1] :].bool()
    return [tuple(row[keep].tolist()) for row, keep in zip(tokens, kept, strict=True)]
