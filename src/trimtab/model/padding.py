"""Batches that are padded on the left, and whether a model gives each row what it gives it alone.

Recurrent layers have to leave padding out of their state, and positions have to be counted from
each row's own first token: some architectures do both, some take an argument for it, some do
neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trimtab.model.decoding import configuration, sampling
from trimtab.model.questions import alike


def input_device(model: Any) -> torch.device:
    """Where inputs go: the device of the embedding table."""
    table = model.get_input_embeddings()
    device = torch.device(table.weight.device)
    # A table that accelerate keeps on disk says where it is brought to.
    return torch.device(table._hf_hook.execution_device) if device.type == "meta" else device


def left_padded(texts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids and mask of texts, [rows, longest]."""
    longest = max(len(row) for row in texts)
    # Any token will do where nothing attends to it; one that the row has anyway is not taken
    # for another one by what counts the tokens of a text (a repetition penalty).
    ids = torch.tensor([[row[0]] * (longest - len(row)) + list(row) for row in texts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in texts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def plain_logits(
    model: Any, inputs: Mapping[str, Tensor], last: bool, count: bool = True
) -> Tensor:
    """Logits of a left-padded batch, [rows, tokens, vocabulary], of the last token or of all;
    without `count` the model itself counts positions."""
    taken = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {}
    # Without it an architecture counts by the mask itself, or does not count.
    if count and "position_ids" in taken:
        more["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if last and "logits_to_keep" in taken:
        more["logits_to_keep"] = 1
    logits: Tensor = model(**inputs, use_cache=False, **more).logits
    return logits[:, -1:] if last else logits


def pads_logits(model: Any, longer: Sequence[int], shorter: Sequence[int]) -> bool:
    """Whether a text has the logits that it has alone in a batch with a longer one."""
    device = model.get_input_embeddings().weight.device
    both, alone = (
        plain_logits(model, left_padded(texts, device), last=False)[-1, -len(shorter) :]
        for texts in ([longer, shorter], [shorter])
    )
    return alike(both, alone, model.dtype)


class _Forced(LogitsProcessor):
    """Has a token chosen, whatever the logits say."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


def pads_generate(model: Any, longer: Sequence[int], shorter: Sequence[int]) -> bool:
    """Whether a text goes on in a batch with a longer one as it does alone: the logits of two
    tokens after it, of which the second runs on what the first pass kept."""
    device = model.get_input_embeddings().weight.device
    asked = sampling({}, model.config.get_text_config().vocab_size)
    logits = []
    for texts in ([longer, shorter], [shorter]):
        settings = configuration(model, asked, max_length=len(texts[0]) + 2)
        settings.eos_token_id, settings.pad_token_id = None, shorter[0]
        settings.output_logits = settings.return_dict_in_generate = True
        inputs = left_padded(texts, device)
        forced = [_Forced(shorter[-1])]
        written = model.generate(**inputs, generation_config=settings, logits_processor=forced)
        logits.append(torch.stack(written.logits)[:, -1])
    both, alone = logits
    return alike(both, alone, model.dtype)
