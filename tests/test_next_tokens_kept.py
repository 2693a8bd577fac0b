"""Next tokens on top of what the blocks below put out before: as without it, with less work."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tiny
import trimtab as tt
from helpers import (
    PROMPTS,
    asked,
    language_model,
    operator,
    plain_logits,
    refused_in_one_line,
    site_kinds,
    steer,
    steer_at,
    token_ids,
)
from readings import BEGINNINGS, BOS, MODELS, agrees, found_by, hand_hooked, some_readings
from tiny import tiny_model, tiny_tokenizer
from trimtab.reading.reader import PlannedBatch, plan, prompt_reading, run_batches
from trimtab.reading.streams import StreamCache
from trimtab.steering import POSITIONS

# -- on top of what the blocks below put out before ---------------------------------------------


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
@pytest.mark.parametrize("name", MODELS)
def test_on_what_is_kept_positions_mean_the_same(name: str, beginning: int) -> None:
    """One `StreamCache` for all: what one steering leaves there must be right for the next."""
    lm = language_model(name)
    op = operator("Add", lm.anatomy.hidden_size)
    readings = some_readings(beginning, count=8)
    kept = StreamCache(lm)
    for positions in POSITIONS:
        steering = steer(lm, ("layers.1.resid", op), positions=positions)
        found = found_by(lm, readings, steering, kept=kept)
        for i, reading in enumerate(readings):
            with hand_hooked(lm.model, op, positions, reading.prompt):
                steered = plain_logits(lm.model, list(reading.tokens))
            agrees(found[i], reading, steered, 1e-4)
    found = found_by(lm, readings, None, kept=kept)
    for i, reading in enumerate(readings):
        agrees(found[i], reading, plain_logits(lm.model, list(reading.tokens)), 1e-4)


@pytest.mark.parametrize("name", tiny.TINY)
def test_on_what_is_kept_every_site_of_every_layer_is_steered_as_without(name: str) -> None:
    lm = language_model(name)
    readings = [*some_readings(30, count=4), *some_readings(40, count=4, seed=1)]
    assert {batch.shared for batch in plan(readings, 60)} == {31, 41}
    kept = StreamCache(lm)
    steerings: list[Any] = [
        steer_at(lm, kind, "Scale" if layer else "Add", layer, seed=layer, positions=positions)
        for number, kind in enumerate(site_kinds(lm))
        for layer in ((1,) if kind in ("embed", "final_norm", "router") else (0, 2))
        for positions in (POSITIONS[(number + layer) % len(POSITIONS)],)
    ]
    high, low = steerings[-2], steerings[1]
    steerings += [None, low.at(0.0), low + high, high + low, low.at(-1.5) + low]
    random.Random(0).shuffle(steerings)
    for steering in steerings:
        expected = found_by(lm, readings, steering)
        found = found_by(lm, readings, steering, kept=kept)
        for i in range(len(readings)):
            torch.testing.assert_close(found[i].log_p, expected[i].log_p, rtol=0, atol=1e-4)
            assert torch.equal(found[i].best, expected[i].best), steering


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
def test_only_the_blocks_above_run_on_what_is_kept(beginning: int) -> None:
    lm = asked(language_model("llama"))
    readings = some_readings(beginning, count=6)
    kept = StreamCache(lm)
    ran: set[int] = set()
    for layer, block in enumerate(lm.model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, o, layer=layer: ran.add(layer))
    for steering, expected in (
        (steer_at(lm, "ffn_in", layer=1), {0, 1, 2}),
        (steer_at(lm, "ffn_in", layer=1).at(-2.0), {1, 2}),
        (steer_at(lm, "resid", layer=1), {1, 2}),  # block 1 ran steered: it runs again
        (steer_at(lm, "heads", layer=2), {2}),
        (steer_at(lm, "resid", layer=2), {2}),
        (steer_at(lm, "final_norm"), set()),
        (steer_at(lm, "resid", layer=2) + steer_at(lm, "heads", layer=1), {1, 2}),
    ):
        ran.clear()
        found_by(lm, readings, steering, kept=kept)
        assert ran == expected


def test_what_texts_begin_with_runs_once_for_all_batches() -> None:
    lm = language_model("llama")
    readings = some_readings(30, count=14)
    assert len(plan(readings, 60)) > 2
    passes: dict[int, list[int]] = {0: [], 2: []}  # how many tokens block 0 read, and block 2
    for layer, found in passes.items():
        mlp = lm.model.model.layers[layer].mlp
        mlp.register_forward_hook(lambda m, a, o, found=found: found.append(o.shape[1]))
    found_by(lm, readings, steer_at(lm, "ffn_in", layer=1), kept=StreamCache(lm))
    assert passes[0].count(31) == passes[2].count(31) == 1


@pytest.mark.parametrize("beginning", [12, 30])
@pytest.mark.parametrize("limit", [0, 3000, 20_000])
def test_on_little_that_is_kept(limit: int, beginning: int) -> None:
    lm = language_model("gemma3")
    readings = some_readings(beginning, count=10)
    kept = StreamCache(lm, limit)
    for layer, positions in ((2, "last"), (0, "all"), (2, "generated"), (1, "prompt")):
        steering = steer_at(lm, "ffn_out", layer=layer, positions=positions)
        expected = found_by(lm, readings, steering)
        found = found_by(lm, readings, steering, kept=kept)
        for i in range(len(readings)):
            torch.testing.assert_close(found[i].log_p, expected[i].log_p, rtol=0, atol=1e-4)


def test_bfloat16_on_what_is_kept() -> None:
    lm = tt.wrap(tiny_model("gemma3", dtype=torch.bfloat16), tiny_tokenizer(), "gemma3")
    readings = some_readings(12, count=5)
    kept = StreamCache(lm)
    one_by_one = [
        PlannedBatch(0, (i,)) for i in range(len(readings))
    ]  # padding shows in the rounding
    for layer in (2, 1):
        steering = steer_at(lm, "resid", layer=layer, positions="last")
        expected = found_by(lm, readings, steering, one_by_one)
        found = found_by(lm, readings, steering, one_by_one, kept=kept)
        for i in range(len(readings)):
            assert torch.equal(found[i].log_p, expected[i].log_p)


def test_answers_and_prompts_apart_on_what_is_kept() -> None:
    """A batch in which nothing is generated, beside one in which something is."""
    lm = language_model("llama")
    same = [prompt_reading([BOS, 50 + i, 60, 70]) for i in range(2)]
    readings = [*same, *some_readings(5, count=2)]
    batches = [PlannedBatch(0, (0, 1)), PlannedBatch(0, (2, 3))]
    steering = steer_at(lm, "resid", positions="generated")
    found = found_by(lm, readings, steering, batches, kept=StreamCache(lm))
    expected = found_by(lm, readings, steering, batches)
    for i in range(len(readings)):
        torch.testing.assert_close(found[i].log_p, expected[i].log_p, rtol=0, atol=1e-4)
    refused_in_one_line(
        lambda: found_by(lm, same, steering, kept=StreamCache(lm)), "the steering touched nothing"
    )


def test_a_model_that_is_steered_already_leaves_nothing_behind() -> None:
    lm = language_model("llama")
    readings = some_readings(5, count=4)
    kept = StreamCache(lm)
    outer, inner = steer_at(lm, "resid", layer=0), steer_at(lm, "resid", layer=2)
    with lm.steered(outer):
        nested = found_by(lm, readings, inner, kept=kept)
    for expected, found in (
        (found_by(lm, readings, outer + inner), nested),
        (found_by(lm, readings, inner), found_by(lm, readings, inner, kept=kept)),
    ):
        for i in range(len(readings)):
            torch.testing.assert_close(found[i].log_p, expected[i].log_p, rtol=0, atol=1e-4)


def test_what_is_kept_of_another_model_is_refused() -> None:
    readings = some_readings(5, count=2)
    lm, other = language_model("llama"), language_model("llama")
    refused_in_one_line(
        lambda: found_by(lm, readings, kept=StreamCache(other)), "not of this llama"
    )


def test_hooks_are_gone_when_reading_on_what_is_kept_stops_early() -> None:
    lm = language_model("llama")
    before = plain_logits(lm.model, token_ids(PROMPTS[0]))
    readings = some_readings(5)
    batches = plan(readings, 60)
    reading = run_batches(lm, readings, batches, steer_at(lm, "resid"), kept=StreamCache(lm))
    next(reading)
    reading.close()
    assert torch.equal(plain_logits(lm.model, token_ids(PROMPTS[0])), before)
