"""Texts that are written a token at a time, of which some are left on the way: each is what
`generate` writes of it alone."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, language_model, steer_at, token_ids
from tiny import TINY, tiny_tokenizer
from tiny_curated import CURATED, curated_model
from trimtab.model import Writing

NEW = 6


def model_of(name: str) -> tt.LanguageModel:
    return language_model(name) if name in TINY else tt.wrap(curated_model(name), tiny_tokenizer())


def written(writing: Writing, rows: int, leaves: dict[int, list[int]]) -> list[list[int]]:
    """Greedy texts; `leaves` says after which token which of the texts are left over."""
    texts: list[list[int]] = [[] for _ in range(rows)]
    alive = list(range(rows))
    for step in range(NEW):
        tokens: Tensor = writing.logits().argmax(-1)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            texts[row].append(token)
        writing.put(tokens)
        if step in leaves:
            writing.keep(leaves[step])
            alive = [alive[i] for i in leaves[step]]
    return texts


@pytest.mark.parametrize("name", [*TINY, *CURATED])
def test_each_text_is_what_generate_writes_of_it_alone(name: str) -> None:
    lm = model_of(name)
    base = steer_at(lm, "resid", seed=2)
    rows: list[Any] = [
        (base.at(4.0),),
        (),
        (base.at(-3.0).scoped("generated[1:4]"), base.at(2.0).scoped("prompt")),
    ]
    prompts = PROMPTS if lm.pads("generate") else [PROMPTS[0]] * 3
    texts = [token_ids(prompt) for prompt in prompts]
    found = written(Writing(lm, texts, rows), 3, {1: [2, 0], 3: [1]})
    for row, (prompt, steerings) in enumerate(zip(prompts, rows, strict=True)):
        (alone,) = lm.generate([prompt], chat=False, steering=[list(steerings)], max_new_tokens=NEW)
        shared = min(len(alone.tokens), len(found[row]))  # one may have ended by itself
        assert found[row][:shared] == list(alone.tokens)[:shared]
    assert [len(text) for text in found] == [6, 2, 4]
