"""Texts that a method is to leave alone: where they come from, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trimtab.contrasts import Contrast, Pair, Prompt
from trimtab.errors import TrimtabError
from trimtab.files import json_digest, user_path
from trimtab.model import LanguageModel, read_prompts
from trimtab.steering import READS_LAST
from trimtab.terminal import progress


def last_tokens(
    language_model: LanguageModel, texts: Sequence[Prompt], sites: Sequence[str]
) -> dict[str, Tensor]:
    """Activations of the texts' last tokens at each site, [texts, units]."""
    lm = language_model
    with progress("reading protected texts", len(texts)) as advance:
        found: dict[str, Tensor] = read_prompts(
            lm.anatomy, lm.marks, sites, READS_LAST, lm.fitting(texts), advance
        )
    return found


def about_texts(source: str, texts: Sequence[Prompt]) -> dict[str, Any]:
    """What findings say of them."""
    return {"source": source, "texts": len(texts), "digest": json_digest(texts)}


def protected_texts(source: str) -> list[list[Prompt]]:
    """Protected texts, those that begin with one prompt together: lines of a .txt, or a contrast's
    two sides, whole. None is there twice."""
    kind, _, name = source.partition(":")
    path = user_path(source)
    if kind != "builtin" and path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TrimtabError(f"cannot read {source}: {error}") from error
        return [[line] for line in dict.fromkeys(lines) if line.strip()]
    contrast = Contrast.builtin(name) if kind == "builtin" else Contrast.from_file(source)
    by_prompt: dict[Prompt, dict[Prompt, None]] = {}
    for row in contrast.rows:
        if not isinstance(row, Pair):
            prompt, texts = row.text, [row.text]
        elif isinstance(row.prompt, str):
            prompt = row.prompt or row.positive  # without a prompt a pair is by itself
            texts = [row.prompt + row.positive, row.prompt + row.negative]
        else:  # a conversation is protected as it is before it is answered
            prompt, texts = row.prompt, [row.prompt]
        by_prompt.setdefault(prompt, {}).update(dict.fromkeys(texts))
    return [list(texts) for texts in by_prompt.values()]
