"""What the tests of contrasts by generation share: models with room for the whole request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from tiny import tiny_model, tiny_tokenizer

SHORT: dict[str, Any] = {"count": 5, "max_new_tokens": 6, "batch_size": 2}


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, and no proxy between a test and its service."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def roomy(name: str, seed: int = 0) -> tt.LanguageModel:
    """A tiny model that takes the whole request, and that would end its texts often."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    model = tiny_model(name, seed, max_position_embeddings=2048)
    return tt.wrap(model, tokenizer, f"{name}-{seed}")


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return roomy("llama")


@pytest.fixture(scope="module")
def other() -> tt.LanguageModel:
    return roomy("qwen2", seed=1)


def texts_of(contrast: tt.Contrast, label: str) -> list[Any]:
    return [row.text for row in contrast.texts if row.label == label]
