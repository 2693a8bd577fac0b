"""What work costs: tokens counted by hand, memory of a known size, time in turns."""

from __future__ import annotations

import sys

import pytest
import torch

import trimtab as tt
from helpers import language_model
from trimtab.contrasts import Pair
from trimtab.sweeps.metering import metered, overhead

PAIRS = tt.Contrast((Pair("I am", " glad", " sad"), Pair("It was", " good", " bad")), "moods")


def test_tokens_are_counted_as_they_run() -> None:
    lm = language_model("llama")
    with metered(lm) as used:
        lm.generate(["Hi there"], max_new_tokens=5, chat=False)
    # The prompt, and each new token but the last.
    assert used.tokens == len(lm.tokenizer("Hi there").input_ids) + 4
    assert used.seconds > 0


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    lm = language_model("llama")
    with pytest.raises(RuntimeError), metered(lm):
        raise RuntimeError
    assert not lm.anatomy.body._forward_pre_hooks


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux tells it")
def test_peak_memory_is_what_was_used_on_top() -> None:
    lm = language_model("llama")
    size = 200 << 20
    with metered(lm) as used:
        torch.ones(size, dtype=torch.uint8)
    assert used.peak_bytes is not None
    assert 0.9 * size < used.peak_bytes < 1.6 * size
    with metered(lm) as little:
        pass
    assert little.peak_bytes is not None
    assert little.peak_bytes < size / 10


def test_overhead_measures_both_in_turns() -> None:
    lm = language_model("llama")
    steering = tt.CAA(layer=1, token="last").fit(lm, PAIRS)
    found = overhead(lm, steering, ["Hi there", "You"], new_tokens=3, rounds=2)
    assert found.steered > 0
    assert found.unsteered > 0
    assert found.ratio > 0
