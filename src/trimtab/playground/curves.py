"""What a turn of the dial does: the next token over the dial, and what plain text costs."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.figures import weighted_interval
from trimtab.model import LanguageModel
from trimtab.reading import cross_entropy, plain_texts
from trimtab.steering import Steering
from trimtab.strength import curve, read

#: Paragraphs of plain text on which the cost is measured, and how many tokens of each.
_PARAGRAPHS, _TOKENS = 8, 64


def over_the_dial(
    language_model: LanguageModel,
    steering: Steering,
    prompt: Any,
    tokens: list[str],
    points: int,
) -> dict[str, Any]:
    """The curve of the next token after a prompt, and what it says: the sweet spot, in words."""
    found = curve(
        language_model,
        steering,
        [prompt],
        tokens=tokens or 6,
        points=points,
        chat=language_model.chats,
    )
    says = read(found)
    return {
        "curve": found.as_json(),
        "summary": found.summary,
        "sweet_spot": says.as_json()["sweet_spot"],
        "lines": says.lines(),
        "setting": steering.setting,
    }


def cost(language_model: LanguageModel, steerings: tuple[Steering, ...]) -> dict[str, Any]:
    """How many nats per token steerings add to the cross-entropy of plain text, with the 95 %
    interval over its paragraphs. Scopes that ask for an answer do not act on such text."""
    texts = _plain(language_model)
    base, count = cross_entropy(language_model, texts)
    if not steerings:
        nll = base
    else:
        nll, _ = cross_entropy(language_model, texts, [list(steerings)] * len(texts))
    estimate = weighted_interval(nll - base, count.double())
    return {
        "value": estimate.value,
        "ci95": list(estimate.ci95),
        "tokens": int(torch.as_tensor(count).sum()),
    }


def _plain(language_model: LanguageModel) -> list[str]:
    tokenizer: Any = language_model.tokenizer
    short = (tokenizer(text, add_special_tokens=False)["input_ids"][:_TOKENS]
             for text in plain_texts()[:_PARAGRAPHS])  # fmt: skip
    return [tokenizer.decode(ids) for ids in short]
