"""From wishes to steerings on a real model: they hold on pairs that nothing was chosen on, and cost
no more than was allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from trimtab.reading import plain_texts

pytestmark = pytest.mark.slow

#: Wishes that a model of this size heeds when it is told, so that it can write their contrast.
WISHES: dict[str, dict[str, Any]] = {
    "answers in one short sentence": {},
    "talks like a pirate": {"opposite": "talks like a lawyer"},
    "tells a story": {"opposite": "explains facts"},
}


def holds(lm: tt.LanguageModel, made: tt.Made, room: Path) -> None:
    """The gain leaves zero, and the cost, measured once more text by text, is within the limit."""
    assert made.chosen is not None, made.why
    found = made.as_json()["chosen"]
    assert found["gain"] > 0
    assert found["gain_ci95"][0] > 0
    steering = tt.Steering.load(room / "steering.safetensors")
    assert steering.setting == found["dial"]
    before, tokens = tt.cross_entropy(lm, plain_texts())
    after, _ = tt.cross_entropy(lm, plain_texts(), steering)
    cost = float(((after - before) * tokens).sum() / tokens.sum())
    assert cost == pytest.approx(found["cost"], abs=1e-3)
    assert cost <= 0.1 + 1e-3
    assert made.baseline is not None
    assert made.baseline.verdict


@pytest.mark.parametrize("wish", WISHES)
def test_a_wish(smollm2: tt.LanguageModel, tmp_path: Path, wish: str) -> None:
    made = tt.make(smollm2, wish, output=tmp_path / "made", **WISHES[wish])
    holds(smollm2, made, tmp_path / "made")


def test_a_contrast_that_is_built_in(smollm2: tt.LanguageModel, tmp_path: Path) -> None:
    made = tt.make(smollm2, contrast="builtin:formality", output=tmp_path / "made")
    holds(smollm2, made, tmp_path / "made")


def test_a_wish_that_it_cannot_fulfil(smollm2: tt.LanguageModel, tmp_path: Path) -> None:
    """Its answers are the same, told or not: nothing is left to fit on, or nothing that holds."""
    made = tt.make(
        smollm2,
        "knows what the asker had for breakfast",
        output=tmp_path / "made",
        max_new_tokens=24,
    )
    assert made.chosen is None
    assert made.why
    assert made.advice
