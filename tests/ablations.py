"""Directional ablation without trimtab: directions from transformers' own hidden states, scores
from `reference`, the models written out in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model
from reference import reference
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.steering.operators import Ablate

WHO, WHAT = ("king", "mother", "old captain", "child"), ("ship", "map", "fire in the rain")
POSITIVE = [f"Is it true that the {who} saw the {what}?" for who in WHO for what in WHAT]
NEGATIVE = [f"The {who} said: sell the {what}!" for what in WHAT for who in WHO][:11]


def chats(texts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in texts]


def parted(contrast: Contrast, every: int = 3) -> Contrast:
    """Every third row, say, is for validation."""
    rows = [
        replace(row, part="validation" if i % every == 0 else "train")
        for i, row in enumerate(contrast.rows)
    ]
    return replace(contrast, rows=tuple(rows))


CHAT = parted(Contrast.from_texts(chats(POSITIVE), chats(NEGATIVE), "chats"))

PAIRS = parted(
    Contrast.from_pairs(
        [(f"The {who} looked at the {what} and said", " no, it is not so!", " yes, I am glad.")
         for who in WHO for what in WHAT],
        "pairs",
    )
)  # fmt: skip


@functools.cache
def tiny_lm(name: str = "llama") -> tt.LanguageModel:
    return language_model(name)


# -- the definitions, without trimtab ---------------------------------------------------------


def ids_of(prompt: Any, answer: str = "") -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tiny_tokenizer()(prompt + answer)["input_ids"]
        return ids
    messages = [{"role": role, "content": content} for role, content in prompt]
    text = tiny_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = tiny_tokenizer()(text + answer, add_special_tokens=False)["input_ids"]
    return ids


def hidden(name: str, ids: list[int]) -> Tensor:
    """What each block reads, [layers, tokens, units]."""
    model: Any = tiny_lm(name).model
    with torch.no_grad():
        states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack(states.hidden_states[:-1])[:, 0].double()


def sides(contrast: Contrast) -> tuple[list[list[int]], list[list[int]]]:
    if contrast.paired:
        return (
            [ids_of(pair.prompt, pair.positive) for pair in contrast.pairs],
            [ids_of(pair.prompt, pair.negative) for pair in contrast.pairs],
        )
    positive = [ids_of(row.text) for row in contrast.texts if row.label == "positive"]
    return positive, [ids_of(row.text) for row in contrast.texts if row.label == "negative"]


def difference_of(name: str, contrast: Contrast, layer: int, token: int) -> Tensor:
    means = [
        torch.stack([hidden(name, ids)[layer, token] for ids in side]).mean(0)
        for side in sides(contrast)
    ]
    return means[0] - means[1]


def writers(name: str) -> list[str]:
    kinds = (
        ("attn_post_norm", "ffn_post_norm")
        if name in ("gemma2", "olmo2")
        else (
            "attn_out",
            "ffn_out",
        )
    )
    layers = range(4 if name == "gemma2" else 3)
    return ["embed", *(f"layers.{layer}.{kind}" for layer in layers for kind in kinds)]


def ablating(name: str, difference: Tensor) -> dict[str, Any]:
    r = difference / difference.norm()
    return {site: lambda x: x - torch.outer(x @ r, r) for site in writers(name)}


def logits_of(name: str, ids: list[int], edits: Any = None) -> Tensor:
    return reference(name, tiny_lm(name).model, ids, edits)[1]


@functools.cache
def targets_of(name: str) -> tuple[str, ...]:
    """Drawn targets that have about half of the probability, so that scores have both signs.

    Of many drawings, one in which every rule of the choice makes a difference.
    """
    texts = {token: tiny_tokenizer().decode([token]) for token in range(400)}
    encode = functools.partial(tiny_tokenizer().encode, add_special_tokens=False)
    clean = torch.tensor([t for t, text in texts.items() if text and encode(text) == [t]])
    seed = {"llama": 80, "gemma2": 182}[name]
    order = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))]
    other = sides(CHAT.part("validation"))[1]
    p = torch.stack([logits_of(name, ids)[-1].softmax(-1) for ids in other]).mean(0)
    chosen = order[p[order].cumsum(0) < 0.5]
    return tuple(texts[token] for token in chosen.tolist())


def direction_of(steering: tt.Steering) -> Tensor:
    operators: list[Any] = [i.operator for i in steering.interventions]
    for operator in operators:
        assert type(operator) is Ablate
        assert torch.equal(operator.direction, operators[0].direction)
    direction: Tensor = operators[0].direction
    return direction


def named(steering: tt.Steering) -> list[str]:
    return [intervention.site for intervention in steering.interventions]
