"""Next tokens of many texts: equal to plain passes of one unpadded text each, whatever is shared.

The readings are made so that padding, batches, sliding windows and shared beginnings all take part;
the oracle is transformers alone with plain hooks. Then the plans, by their properties.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab as tt
from helpers import (
    PROMPTS,
    by_hand,
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
from trimtab.model.batching import BATCH_ROWS
from trimtab.reading.reader import Reading, plan, prompt_reading, run_batches
from trimtab.steering import POSITIONS, Positions

# -- the same as one text at a time ------------------------------------------------------------


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_asked_position_equals_a_plain_pass(name: str, beginning: str) -> None:
    lm = language_model(name)
    readings = some_readings(BEGINNINGS[beginning])
    batches = plan(readings, 60)
    assert len(batches) > 2
    assert {batch.shared for batch in batches} == (
        {0} if beginning == "apart" else {BEGINNINGS[beginning] + 1}
    )
    found = found_by(lm, readings, batches=batches)
    for i, reading in enumerate(readings):
        agrees(found[i], reading, plain_logits(lm.model, list(reading.tokens)), 1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("beginning", ["short", "long"])
@pytest.mark.parametrize("name", MODELS)
def test_steered_positions_mean_the_same_after_a_shared_beginning(
    name: str, beginning: str, positions: Positions
) -> None:
    lm = language_model(name)
    op = operator("Add", lm.anatomy.hidden_size)
    readings = some_readings(BEGINNINGS[beginning])
    found = found_by(lm, readings, steer(lm, ("layers.1.resid", op), positions=positions))
    moved = 0.0
    for i, reading in enumerate(readings):
        with hand_hooked(lm.model, op, positions, reading.prompt):
            steered = plain_logits(lm.model, list(reading.tokens))
        agrees(found[i], reading, steered, 1e-4)
        plain = plain_logits(lm.model, list(reading.tokens))
        moved = max(moved, float((steered - plain)[list(reading.positions)].abs().max()))
    assert moved > 0.01  # or the oracle would be met by doing nothing


@pytest.mark.parametrize("kind", ["Scale", "Rotate", "Adaptive"])
def test_operators_that_look_at_each_token_after_a_shared_beginning(kind: str) -> None:
    lm = language_model("gemma3")
    op = operator(kind, lm.anatomy.hidden_size)
    dial = 200.0 if kind in ("Rotate", "Adaptive") else 1.5
    readings = some_readings(30)
    found = found_by(lm, readings, steer(lm, ("layers.1.resid", op), alpha=dial))
    change = by_hand(op, dial)
    handle = lm.model.model.layers[1].register_forward_hook(lambda m, a, x: change(x))
    expected = [plain_logits(lm.model, list(reading.tokens)) for reading in readings]
    handle.remove()
    for i, reading in enumerate(readings):
        agrees(found[i], reading, expected[i], 1e-4)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_every_kind_of_site_is_steered_as_logits_are(name: str) -> None:
    """`logits` reads whole texts, without a cache; the test of the model compares it by hand."""
    lm = language_model(name)
    start = "When the rain came, the children ran into the house and sat by the fire. "
    texts = [start + prompt for prompt in PROMPTS] + PROMPTS
    readings = [prompt_reading(tokens) for tokens in lm.encode(texts)]
    batches = plan(readings, 40)
    assert max(batch.shared for batch in batches) > 20
    for kind in site_kinds(lm):
        steering = steer_at(lm, kind)
        expected = lm.logits(texts, steering=steering)
        for i, each in found_by(lm, readings, steering, batches).items():
            assert float(expected[i].max() - expected[i, each.best[0]]) < 1e-4, kind


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16(name: str, positions: Positions) -> None:
    model = tiny_model(name, dtype=torch.bfloat16)
    lm = tt.wrap(model, tiny_tokenizer(), name)
    op = operator("Add", lm.anatomy.hidden_size)
    reference = tiny_model(name)  # the same rounded weights, in float32
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    readings = some_readings(30)
    found = found_by(lm, readings, steer(lm, ("layers.1.resid", op), positions=positions))
    for i, reading in enumerate(readings):
        with hand_hooked(reference, op, positions, reading.prompt):
            agrees(found[i], reading, plain_logits(reference, list(reading.tokens)), 0.15)


def test_two_steerings_act_together() -> None:
    lm = language_model("llama")
    first, second = (operator(kind, lm.anatomy.hidden_size, 1) for kind in ("Scale", "Add"))
    readings = some_readings(30)
    both = steer(lm, ("layers.1.resid", first)) + steer(lm, ("layers.1.resid", second))
    found = found_by(lm, readings, both)
    handles = [
        lm.model.model.layers[1].register_forward_hook(lambda m, a, x, op=op: by_hand(op)(x))
        for op in (first, second)
    ]
    expected = [plain_logits(lm.model, list(reading.tokens)) for reading in readings]
    for handle in handles:
        handle.remove()
    for i, reading in enumerate(readings):
        agrees(found[i], reading, expected[i], 1e-4)


@pytest.mark.parametrize("window", [4, 20, 31, 32, 33, 100])
def test_shared_beginnings_of_any_length_in_a_sliding_window(window: int) -> None:
    lm = language_model("gemma3", sliding_window=window)
    readings = some_readings(30)  # 31 tokens with BOS
    found = found_by(lm, readings)
    for i, reading in enumerate(readings):
        agrees(found[i], reading, plain_logits(lm.model, list(reading.tokens)), 1e-4)


def test_one_position_may_be_asked_about_several_tokens() -> None:
    lm = language_model("llama")
    ids = tuple(token_ids(PROMPTS[0]))
    end = len(ids) - 1
    [found] = found_by(lm, [Reading(ids, (end, end, end), len(ids), (50, 60, 70))]).values()
    log_p = plain_logits(lm.model, list(ids))[-1].double().log_softmax(-1)
    torch.testing.assert_close(found.log_p, log_p[[50, 60, 70]], rtol=0, atol=1e-5)
    assert found.best.tolist() == [int(log_p.argmax())] * 3


def test_readings_with_and_without_targets_in_one_batch() -> None:
    lm = language_model("llama")
    ids = [tuple(token_ids(prompt)) for prompt in PROMPTS[:2]]
    readings = [prompt_reading(ids[0]), Reading(ids[1], (2, 3), 3, (50, 60))]
    found = found_by(lm, readings)
    log_p = plain_logits(lm.model, list(ids[1])).double().log_softmax(-1)
    wanted = torch.stack([log_p[2, 50], log_p[3, 60]])
    torch.testing.assert_close(found[1].log_p, wanted, rtol=0, atol=1e-5)
    assert int(found[0].best[0]) == int(plain_logits(lm.model, list(ids[0]))[-1].argmax())


def test_few_logits_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gemma2")  # its logits are capped
    readings = some_readings(30)
    whole = found_by(lm, readings)
    monkeypatch.setattr(sys.modules[run_batches.__module__], "_LOGITS", 1000)  # two positions
    parts = found_by(lm, readings)
    for i, reading in enumerate(readings):
        assert torch.equal(whole[i].best, parts[i].best)
        torch.testing.assert_close(whole[i].log_p, parts[i].log_p, rtol=0, atol=1e-6)
        agrees(parts[i], reading, plain_logits(lm.model, list(reading.tokens)), 1e-4)


# -- what is run -------------------------------------------------------------------------------


def test_a_shared_beginning_runs_once_and_the_head_only_where_asked() -> None:
    lm = language_model("llama")
    readings = some_readings(30)
    batches = plan(readings, 60)
    passes: list[tuple[int, ...]] = []
    unembedded: list[int] = []
    embedding = lm.model.get_input_embeddings()
    handles = [
        embedding.register_forward_pre_hook(lambda m, args: passes.append(tuple(args[0].shape))),
        lm.model.lm_head.register_forward_pre_hook(
            lambda m, args: unembedded.append(args[0].numel() // args[0].shape[-1])
        ),
    ]
    found_by(lm, readings, batches=batches)
    for handle in handles:
        handle.remove()
    assert passes[0] == (1, 31)
    assert [shape[0] for shape in passes[1:]] == [len(batch.rows) for batch in batches]
    assert max(columns for _, columns in passes[1:]) < 20
    assert sum(unembedded) == sum(len(reading.positions) for reading in readings)


def test_any_of_the_planned_batches_by_themselves_give_the_very_same() -> None:
    lm = language_model("gemma3")
    readings = some_readings(30) + some_readings(12, seed=1) + some_readings(0, seed=2)
    batches = plan(readings, 60)
    steering = steer_at(lm, "resid", positions="last")
    whole = found_by(lm, readings, steering, batches)
    assert len({batch.shared for batch in batches}) == 3
    for some in (batches[1::2], batches[-1:], batches[::-1]):
        for i, each in found_by(lm, readings, steering, some).items():
            assert torch.equal(each.best, whole[i].best)
            assert torch.equal(each.log_p, whole[i].log_p)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    lm = language_model("gemma3")
    readings = some_readings(30)
    whole = found_by(lm, readings)
    for i, reading in enumerate(readings):
        [alone] = found_by(lm, [reading]).values()
        torch.testing.assert_close(alone.log_p, whole[i].log_p, rtol=0, atol=1e-4)


def test_hooks_are_gone_when_reading_stops_early() -> None:
    lm = language_model("llama")
    before = plain_logits(lm.model, token_ids(PROMPTS[0]))
    readings = some_readings(30)
    reading = run_batches(lm, readings, plan(readings, 60), steer_at(lm, "resid"))
    next(reading)
    assert not torch.equal(plain_logits(lm.model, token_ids(PROMPTS[0])), before)
    reading.close()
    assert torch.equal(plain_logits(lm.model, token_ids(PROMPTS[0])), before)


def test_a_steering_of_answers_that_meets_only_prompts_is_an_error() -> None:
    lm = language_model("llama")
    readings = [prompt_reading(token_ids(prompt)) for prompt in PROMPTS]
    steering = steer_at(lm, "resid", positions="generated")
    refused_in_one_line(lambda: found_by(lm, readings, steering), "touched nothing")


def test_a_steering_of_answers_that_meets_an_answer_is_none() -> None:
    lm = language_model("llama")
    readings = [*some_readings(30), prompt_reading(token_ids(PROMPTS[0]))]
    steering = steer_at(lm, "resid", positions="generated")
    assert len(found_by(lm, readings, steering)) == len(readings)
    # At the dial that does nothing there is nothing to miss.
    assert len(found_by(lm, readings[-1:], steering.at(0.0))) == 1


def test_nothing_to_read() -> None:
    assert plan([], 100) == []
    assert found_by(language_model("llama"), [], steer_at(language_model("llama"), "resid")) == {}


# -- plans, by their properties ----------------------------------------------------------------


@st.composite
def readings_that_share(draw: st.DrawFn) -> list[Reading]:
    """Texts of few different tokens, whose beginnings come from a small stock."""
    tokens = st.integers(1, 3)
    stock = draw(st.lists(st.lists(tokens, max_size=50), min_size=1, max_size=4))
    readings = []
    for _ in range(draw(st.integers(1, 25))):
        start = draw(st.sampled_from(stock))
        text = (*start, *draw(st.lists(tokens, min_size=1, max_size=6)))
        prompt = draw(st.integers(1, len(text)))
        first = draw(st.integers(0, len(text) - 1))
        readings.append(Reading(text, tuple(range(first, len(text))), prompt))
    return readings


@settings(max_examples=150, deadline=None)
@given(readings_that_share(), st.integers(1, 200))
def test_plans_hold_every_reading_once_and_share_only_what_is_equal(
    readings: list[Reading], batch_tokens: int
) -> None:
    batches = plan(readings, batch_tokens)
    assert sorted(i for batch in batches for i in batch.rows) == list(range(len(readings)))
    saved: dict[tuple[int, ...], int] = {}
    for batch in batches:
        rows = [readings[i] for i in batch.rows]
        assert len({row.tokens[: batch.shared] for row in rows}) == 1
        # What is read, or may be told apart as prompt or answer, is in no beginning.
        assert all(batch.shared <= min(row.positions[0], row.prompt - 1) for row in rows)
        longest = max(len(row.tokens) for row in rows) - batch.shared
        assert longest >= 1
        assert len(rows) <= BATCH_ROWS
        assert len(rows) == 1 or len(rows) * longest <= batch_tokens
        if batch.shared:
            start = rows[0].tokens[: batch.shared]
            saved[start] = saved.get(start, 0) + len(rows) * batch.shared
    for start, tokens in saved.items():
        assert tokens - len(start) >= 64  # or a pass of its own costs more than it saves
    # Batches of one group follow each other: its beginning is run once.
    starts = [readings[b.rows[0]].tokens[: b.shared] for b in batches]
    changes = sum(a != b for a, b in pairwise(starts))
    assert changes + 1 == len(set(starts))


def test_unlike_texts_are_not_held_to_what_all_of_them_share() -> None:
    """Two questions with four long options each, and texts that have nothing in common."""
    first, second = [BOS, *range(10, 60)], [BOS, *range(60, 110)]
    readings = [
        prompt_reading([*start, 200 + i, 201]) for start in (first, second) for i in range(4)
    ]
    readings += [prompt_reading([BOS, 300 + i, 301, 302]) for i in range(4)]
    shared = {i: batch.shared for batch in plan(readings, 10**6) for i in batch.rows}
    assert [shared[i] for i in range(8)] == [51] * 8
    assert [shared[i] for i in range(8, 12)] == [0] * 4
    # One beginning after another of the same length.
    lm = language_model("llama")
    for i, each in found_by(lm, readings, batch_tokens=6).items():
        logits = plain_logits(lm.model, list(readings[i].tokens))[-1]
        assert float(logits.max() - logits[each.best[0]]) < 1e-4


def test_a_text_that_is_the_beginning_of_others() -> None:
    lm = language_model("llama")
    whole = [BOS, *range(10, 60)]
    readings = [prompt_reading(whole[:length]) for length in range(20, 51, 5)]
    assert plan(readings, 1000)[0].shared == 19
    for i, each in found_by(lm, readings).items():
        assert int(each.best[0]) == int(plain_logits(lm.model, whole[: 20 + 5 * i])[-1].argmax())
