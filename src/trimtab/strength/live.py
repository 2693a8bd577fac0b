"""The dial of a budget, found when a live model begins to read: `lm.steered(steering, kl=0.1)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.attach import Choose, Sequences
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.steering import Steering
from trimtab.strength.budgets import dials_for


def chooser(
    language_model: LanguageModel, steering: Steering, kl: float, force: bool = False
) -> Choose:
    """What finds the dial of each row of a batch, from the arguments of the transformer body."""
    dials_for(language_model, steering, [], kl, force)  # says at once what is wrong

    def choose(sequences: Sequences, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        rows = _texts(sequences, args, kwargs)
        distinct = sorted(set(rows))  # samples and beams of one prompt are equal rows
        found = dials_for(language_model, steering, distinct, kl, force)
        dials = dict(zip(distinct, found, strict=True))
        return torch.tensor([dials[row] for row in rows], dtype=torch.float64)

    return choose


def _texts(
    sequences: Sequences, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[int, ...]]:
    """The token ids that a pass reads, without padding."""
    tokens = args[0] if args else kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    # Some ways to generate read a prompt in parts, or guess what comes after it.
    whole = sequences.start == 0 and sequences.prompt_width in (0, sequences.length)
    if tokens is None or not whole:
        raise TrimtabError(
            "a budget (kl) is kept on whole prompts of tokens: give the model input_ids, all of "
            "them and no more in its first pass, or find the dial with trimtab.strength.budget"
        )
    if mask is None:
        return [tuple(row) for row in tokens.tolist()]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise TrimtabError(
            "a budget (kl) needs to know which tokens are padding: give the model an "
            "attention_mask of one number for each token"
        )
    kept = mask[:, : tokens.shape[1]].bool()
    return [tuple(row[keep].tolist()) for row, keep in zip(tokens, kept, strict=True)]
