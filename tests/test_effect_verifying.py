"""Units by effect, verified: what one scaled alone gains, against steerings of one unit each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from austeer_by_hand import CONTRAST, PAIRS, ranked, tiny_lm
from tiny import tiny_model, tiny_tokenizer
from tiny_curated import curated_model
from trimtab.contrasts import Contrast
from trimtab.methods import describe
from trimtab.reading import (
    ScaledUnit,
    log_odds,
    runs_in_parts,
    scaled_log_p,
    side_readings,
)
from trimtab.steering import Dial, Intervention
from trimtab.steering.operators import Scale

#: The one that shares keys between its layers, so that it has to run whole.
WHOLE = "gemma4"


@cache
def _lm(name: str) -> tt.LanguageModel:
    return tt.wrap(curated_model(name), tiny_tokenizer()) if name == WHOLE else tiny_lm(name)


def _steering(lm: tt.LanguageModel, unit: ScaledUnit, positions: Any = "all") -> tt.Steering:
    """A steering of one unit."""
    operator = Scale(torch.tensor([unit.unit]), torch.ones(1), lm.anatomy.width(unit.site))
    acting = (Intervention(unit.site, operator, positions),)
    dial = Dial("alpha", unit.gamma, (-100.0, 100.0))
    return tt.Steering("austeer", {}, acting, dial, lm.identity)


def _odds(log_p: Tensor) -> Tensor:
    """Log-odds of pairs, [units, pairs], from those of their sides."""
    return log_p[:, 0::2] - log_p[:, 1::2]


#: Some units of several kinds of sites and layers, in no order, and one twice.
UNITS = [
    ScaledUnit("layers.2.ffn_out", 3, -2.5),
    ScaledUnit("layers.0.heads", 7, 4.0),
    ScaledUnit("layers.1.resid", 11, -1.0),
    ScaledUnit("layers.0.heads", 2, -6.0),
    ScaledUnit("layers.2.resid", 30, 3.0),
    ScaledUnit("layers.1.attn_out", 0, 5.0),
    ScaledUnit("layers.0.heads", 7, 0.5),
    ScaledUnit("layers.1.ffn_in", 9, 8.0),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_moe", "olmo2", WHOLE])
def test_each_unit_is_as_if_steered_alone(name: str) -> None:
    lm = _lm(name)
    assert runs_in_parts(lm, 1) == (name != WHOLE)
    found = _odds(scaled_log_p(lm, side_readings(lm, CONTRAST), UNITS))
    plain = log_odds(lm, CONTRAST)
    assert found[0].tolist() == pytest.approx(plain.tolist(), abs=1e-4)
    for unit, odds in zip(UNITS, found[1:], strict=True):
        expected = log_odds(lm, CONTRAST, _steering(lm, unit))
        assert odds.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert (expected - plain).abs().max() > 1e-3  # it does something


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_units_are_scaled_at_their_positions(positions: Any) -> None:
    lm, units = _lm("llama"), UNITS[:4]
    found = _odds(scaled_log_p(lm, side_readings(lm, CONTRAST), units, positions))
    for unit, odds in zip(units, found[1:], strict=True):
        expected = log_odds(lm, CONTRAST, _steering(lm, unit, positions))
        assert odds.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_units_are_scaled_beside_a_steering(positions: Any) -> None:
    lm, base = _lm("llama"), _steering(_lm("llama"), UNITS[2], positions)
    readings = side_readings(lm, CONTRAST)
    found = _odds(scaled_log_p(lm, readings, UNITS[:4], steering=base))
    assert found[0].tolist() == pytest.approx(log_odds(lm, CONTRAST, base).tolist(), abs=1e-4)
    for unit, odds in zip(UNITS[:4], found[1:], strict=True):
        with lm.steered(_steering(lm, unit)):
            expected = log_odds(lm, CONTRAST, base)
        assert odds.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@contextmanager
def _seen(lm: tt.LanguageModel, block: int) -> Iterator[list[int]]:
    """How many tokens each pass through a block's attention has."""
    sizes: list[int] = []
    module = lm.anatomy.blocks[block].self_attn
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["hidden_states"].shape[:2].numel()),
        with_kwargs=True,
    )
    try:
        yield sizes
    finally:
        handle.remove()


def test_blocks_below_run_once_and_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer())
    readings = side_readings(lm, CONTRAST)
    units = [ScaledUnit("layers.2.ffn_in", unit, 1.0) for unit in range(20)]
    whole = scaled_log_p(lm, readings, units)
    monkeypatch.setattr(tt.LanguageModel, "batch_tokens", 100)
    assert runs_in_parts(lm, 2)
    tokens = sum(len(reading.tokens) for reading in readings)
    with _seen(lm, 0) as lower, _seen(lm, 2) as upper:
        found = scaled_log_p(lm, readings, units)
    assert tokens <= sum(lower) < 1.3 * tokens
    assert 21 * tokens <= sum(upper) < 1.3 * 21 * tokens
    assert max(upper) <= 100
    assert found.flatten().tolist() == pytest.approx(whole.flatten().tolist(), abs=1e-4)


def test_what_overflows_is_not_finite_and_no_candidate() -> None:
    lm = tt.wrap(tiny_model("llama", dtype=torch.float16), tiny_tokenizer())
    units = [ScaledUnit("layers.1.resid", 3, 1e9), ScaledUnit("layers.1.resid", 3, 0.1)]
    found = scaled_log_p(lm, side_readings(lm, CONTRAST), units)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()
    assert found[2].isfinite().all()


def test_nothing_to_scale() -> None:
    lm = _lm("llama")
    found = _odds(scaled_log_p(lm, side_readings(lm, CONTRAST), []))
    assert found[0].tolist() == pytest.approx(log_odds(lm, CONTRAST).tolist(), abs=1e-4)


# -- in AUSteer -----------------------------------------------------------------------------------


def _by_hand(
    lm: tt.LanguageModel, contrast: Contrast, alpha: float, plain: tt.Steering
) -> dict[tuple[int, int], tuple[float, float, float]]:
    """(layer, unit) -> gain of each candidate alone, its standard error, and its gamma."""
    base, found = log_odds(lm, contrast), {}
    gains = plain.tables["gain"].tolist()
    for (layer, unit), gain in zip(ranked(plain), gains, strict=True):
        own = _steering(lm, ScaledUnit(f"layers.{layer}.heads", unit, alpha * gain))
        gained = (log_odds(lm, contrast, own) - base).numpy()
        error = gained.std(ddof=1) / np.sqrt(len(gained))
        found[layer, unit] = float(gained.mean()), float(error), alpha * gain
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("locate", ["effect", "effect_per_nat"])
def test_the_best_of_the_candidates_are_kept(locate: Any, name: str) -> None:
    lm, alpha, k = _lm(name), 3.0, 5
    plain = tt.AUSteer(k=4 * k, alpha=alpha, locate=locate).fit(lm, CONTRAST)
    steering = tt.AUSteer(k=k, alpha=alpha, locate=locate, verify=len(PAIRS)).fit(lm, CONTRAST)
    by_hand = _by_hand(lm, CONTRAST, alpha, plain)
    dear = (plain.tables["cost"].double() + _ridge(lm)).tolist()
    score = {}
    for place, cost in zip(ranked(plain), dear, strict=True):
        gain, _, gamma = by_hand[place]
        score[place] = gain
        if locate == "effect_per_nat":
            score[place] = gain * abs(gain) / (0.5 * cost * gamma**2)
    best = sorted(score, key=lambda place: -score[place])[:k]
    assert ranked(steering) == best != ranked(plain)[:k]
    tables = {column: values.tolist() for column, values in steering.tables.items()}
    for row, place in enumerate(best):
        gain, error, gamma = by_hand[place]
        assert tables["real"][row] == pytest.approx(gain, abs=1e-4)
        assert tables["real_error"][row] == pytest.approx(error, abs=1e-4)
        assert tables["predicted"][row] == pytest.approx(gamma * tables["effect"][row], rel=1e-4)
        assert tables["score"][row] == pytest.approx(score[place], rel=1e-3)
    assert steering.findings["chosen"] == {"dial": alpha, "verified_on": len(PAIRS)}
    assert all(each["real"] > 0 for each in describe(steering)["units"])


def _ridge(lm: tt.LanguageModel) -> float:
    """A tenth of the mean cost over all units of the site."""
    every = tt.AUSteer(k="all", locate="effect", alpha=1.0).fit(lm, CONTRAST)
    return 0.1 * float(every.tables["cost"].double().mean())
