"""AUSteer's units, gammas and changes from the paper's formulas, without trimtab."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

import trimtab as tt
from helpers import read_last, side_texts
from tiny import tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.steering.operators import Scale

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")
# Two pairs give many ties: each score is 0, a half or one.
TWO = Contrast.from_pairs(PAIRS[:2])


@functools.cache
def tiny_lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


# -- activations, scores and changes without trimtab -------------------------------------------


def last_of(
    model: Any, kind: str, pairs: list[tuple[str, str, str]] = PAIRS
) -> tuple[Tensor, Tensor]:
    """Last-token activations of both sides, [pairs, layers, units]."""
    positive, negative = (read_last(model, kind, texts) for texts in side_texts(pairs))
    return positive, negative


def gammas_of(steering: tt.Steering) -> dict[tuple[int, int], float]:
    """(layer, unit) -> gamma at the steering's dial, from its interventions."""
    gammas = {}
    for intervention in steering.interventions:
        operator: Any = intervention.operator
        assert isinstance(operator, Scale)
        layer = int(intervention.site.split(".")[1])
        for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
            assert (layer, unit) not in gammas
            gammas[layer, unit] = steering.setting * gain
    return gammas


def ranked(steering: tt.Steering) -> list[tuple[int, int]]:
    tables = steering.tables
    return list(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True))


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"alpha": 1.5},
    "clamped": {"alpha": 1.5, "clamp_sign": True},
    "signed": {"alpha": 1.5, "direction": "signed"},
    "signed, clamped": {"alpha": 1.5, "direction": "signed", "clamp_sign": True},
    "by difference": {"alpha": 1.5, "locate": "difference"},
    "at random": {"alpha": 1.5, "locate": "random", "seed": 3},
    "absolute": {"alpha": 1.5, "change": "absolute"},
    "absolute, fixed": {"alpha": 0.7, "change": "absolute", "strength": "fixed"},
    "vector": {"alpha": 1.5, "change": "vector"},
    "vector by difference": {"alpha": -1.5, "change": "vector", "locate": "difference"},
    "vector at random": {"alpha": 1.5, "change": "vector", "locate": "random"},
    "fixed": {"alpha": 1.5, "strength": "fixed"},
    "fixed, signed": {"alpha": 0.7, "strength": "fixed", "direction": "signed"},
    "fixed by difference": {"alpha": 0.7, "strength": "fixed", "locate": "difference"},
    "least": {"alpha": 0.75, "choose": "least"},
    "least by difference": {"alpha": 1.0, "choose": "least", "locate": "difference"},
    "least at random": {"alpha": 1.0, "choose": "least", "locate": "random"},
    "all": {"alpha": 0.3, "k": "all"},
    "all by difference": {"alpha": 0.3, "k": "all", "locate": "difference"},
    "all of least": {"alpha": 0.3, "k": "all", "choose": "least"},
}
