"""The effect of scaling a unit is the slope that plain passes of the model have, on every
architecture and at every site of units."""

from __future__ import annotations

import pytest
import torch

from effects_by_hand import (
    PAIRS,
    all_sites,
    check_slopes,
    fresh,
    in_float64,
    kinds_of,
    known,
    means,
    slopes_by_hand,
    telling_units,
)
from helpers import few_quick
from tiny import TINY
from tiny_curated import CURATED
from trimtab.fitting.differentiable import differentiates

#: Of those with known answers, one each with: experts, a wrapper, a state, ALiBi, shared keys.
QUICK = (*TINY, "gpt_oss", "gemma3_wrapper", "qwen3_next", "bloom", "gemma4")


@pytest.mark.parametrize("name", few_quick((*TINY, *CURATED), *QUICK))
def test_effects_are_slopes(name: str) -> None:
    lm = known(name)
    with in_float64():
        found = means(lm, PAIRS, all_sites(lm))
        units = telling_units(found)
        by_hand = slopes_by_hand(lm, PAIRS, units)
    assert all(float(mean.abs().max()) > 0 for mean in found.values())
    check_slopes(found, by_hand, units, 1e-6)


@pytest.mark.parametrize("name", few_quick((*TINY, *CURATED), "llama", "qwen3_moe", "lfm2"))
def test_each_model_can_be_differentiated(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lm = fresh(name, dtype)
        for kind in kinds_of(lm):
            assert differentiates(lm, kind), (dtype, kind)
