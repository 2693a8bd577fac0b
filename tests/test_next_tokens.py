"""Next tokens of many texts: equal to plain passes of one unpadded text each, whatever is shared.

The readings are made so that padding, batches, sliding windows and shared beginnings all take
part; the oracle is transformers alone with plain hooks. Then the plans, by their properties; and
the answers of a task, which are made with them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
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
from tiny import tiny_model, tiny_tokenizer
from trimtab.evaluation.answering import Entry, Settings, answer
from trimtab.evaluation.tasks.data import Source
from trimtab.evaluation.tasks.task import Example, Generation, Task
from trimtab.model.packing import BATCH_ROWS
from trimtab.reading import next_tokens as module
from trimtab.reading.next_tokens import Batch, Next, Reading, after, next_tokens, plan
from trimtab.reading.streams import Kept
from trimtab.steering.artifact import POSITIONS, Positions

#: Heads wider than the model; a sliding window of 8; learnt positions; experts; norms after.
MODELS = ("llama", "gemma3", "gpt2", "qwen3_moe", "olmo2")

BOS = 1
#: How many tokens of the readings below are the same: none but BOS, fewer than the sliding window
#: of 8 and more, and more than the window of a window.
BEGINNINGS = {"apart": 0, "short": 5, "long": 30}


def some_readings(beginning: int, count: int = 14, seed: int = 0) -> list[Reading]:
    """Random texts of different lengths; each asks for all positions from its prompt's end on."""
    chance = random.Random(seed)

    def words(length: int) -> list[int]:
        return [chance.randrange(10, 400) for _ in range(length)]

    start = [BOS, *words(beginning)]
    readings = []
    for _ in range(count):
        tokens = (*start, *words(chance.randrange(3, 20)))
        prompt = chance.randrange(len(start) + 1, len(tokens))
        positions = tuple(range(prompt - 1, len(tokens)))
        readings.append(Reading(tokens, positions, prompt, tuple(words(len(positions)))))
    return readings


def found_by(
    lm: tt.LanguageModel,
    readings: Sequence[Reading],
    steering: Any = None,
    batches: Sequence[Batch] | None = None,
    batch_tokens: int = 60,
    kept: Kept | None = None,
) -> dict[int, Next]:
    if batches is None:
        batches = plan(readings, batch_tokens)
    return {
        i: each
        for batch, rows in next_tokens(lm, readings, batches, steering, kept=kept)
        for i, each in zip(batch.rows, rows, strict=True)
    }


@contextmanager
def hand_hooked(model: Any, op: Any, positions: Positions, prompt: int) -> Iterator[None]:
    """The operator at block 1's output, at some tokens of one text."""
    change = by_hand(op)
    first = {"all": 0, "prompt": 0, "generated": prompt, "last": prompt - 1}[positions]
    stop = prompt if positions == "prompt" else 10**6

    def hook(module: Any, args: Any, x: Tensor) -> Tensor:
        return torch.cat((x[:, :first], change(x[:, first:stop]), x[:, stop:]), dim=1)

    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handle = blocks[1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def agrees(found: Next, reading: Reading, logits: Tensor, tolerance: float) -> None:
    """What was found is what these logits [tokens, vocabulary] of the whole text say."""
    asked = logits[list(reading.positions)].double()
    best = asked.gather(-1, found.best[:, None]).squeeze(-1)
    # The best one, or one that rounding cannot tell from it.
    assert (asked.amax(-1) - best).max() <= tolerance
    log_p = asked.log_softmax(-1)
    wanted = log_p.gather(-1, torch.tensor(reading.targets)[:, None]).squeeze(-1)
    torch.testing.assert_close(found.log_p, wanted, rtol=0, atol=tolerance)


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
    readings = [after(tokens) for tokens in lm.encode(texts)]
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
    readings = [after(ids[0]), Reading(ids[1], (2, 3), 3, (50, 60))]
    found = found_by(lm, readings)
    log_p = plain_logits(lm.model, list(ids[1])).double().log_softmax(-1)
    wanted = torch.stack([log_p[2, 50], log_p[3, 60]])
    torch.testing.assert_close(found[1].log_p, wanted, rtol=0, atol=1e-5)
    assert int(found[0].best[0]) == int(plain_logits(lm.model, list(ids[0]))[-1].argmax())


def test_few_logits_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gemma2")  # its logits are capped
    readings = some_readings(30)
    whole = found_by(lm, readings)
    monkeypatch.setattr(module, "_LOGITS", 1000)  # two positions
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
    reading = next_tokens(lm, readings, plan(readings, 60), steer_at(lm, "resid"))
    next(reading)
    assert not torch.equal(plain_logits(lm.model, token_ids(PROMPTS[0])), before)
    reading.close()
    assert torch.equal(plain_logits(lm.model, token_ids(PROMPTS[0])), before)


def test_a_steering_of_answers_that_meets_only_prompts_is_an_error() -> None:
    lm = language_model("llama")
    readings = [after(token_ids(prompt)) for prompt in PROMPTS]
    steering = steer_at(lm, "resid", positions="generated")
    refused_in_one_line(lambda: found_by(lm, readings, steering), "touched nothing")


def test_a_steering_of_answers_that_meets_an_answer_is_none() -> None:
    lm = language_model("llama")
    readings = [*some_readings(30), after(token_ids(PROMPTS[0]))]
    steering = steer_at(lm, "resid", positions="generated")
    assert len(found_by(lm, readings, steering)) == len(readings)
    # At the dial that does nothing there is nothing to miss.
    assert len(found_by(lm, readings[-1:], steering.at(0.0))) == 1


def test_nothing_to_read() -> None:
    assert plan([], 100) == []
    assert found_by(language_model("llama"), [], steer_at(language_model("llama"), "resid")) == {}


# -- on top of what the blocks below put out before ---------------------------------------------


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
@pytest.mark.parametrize("name", MODELS)
def test_on_what_is_kept_positions_mean_the_same(name: str, beginning: int) -> None:
    """One `Kept` for all of them: what one steering leaves there must be right for the next."""
    lm = language_model(name)
    op = operator("Add", lm.anatomy.hidden_size)
    readings = some_readings(beginning, count=8)
    kept = Kept(lm)
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
    kept = Kept(lm)
    steerings: list[Any] = [
        steer_at(lm, kind, "Scale" if layer else "Add", layer, seed=layer, positions=positions)
        for number, kind in enumerate(site_kinds(lm))
        for layer in ((1,) if kind in ("embed", "final_norm") else (0, 2))
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
    lm = language_model("llama")
    readings = some_readings(beginning, count=6)
    kept = Kept(lm)
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
    found_by(lm, readings, steer_at(lm, "ffn_in", layer=1), kept=Kept(lm))
    assert passes[0].count(31) == passes[2].count(31) == 1


@pytest.mark.parametrize("beginning", [12, 30])
@pytest.mark.parametrize("limit", [0, 3000, 20_000])
def test_on_little_that_is_kept(limit: int, beginning: int) -> None:
    lm = language_model("gemma3")
    readings = some_readings(beginning, count=10)
    kept = Kept(lm, limit)
    for layer, positions in ((2, "last"), (0, "all"), (2, "generated"), (1, "prompt")):
        steering = steer_at(lm, "ffn_out", layer=layer, positions=positions)
        expected = found_by(lm, readings, steering)
        found = found_by(lm, readings, steering, kept=kept)
        for i in range(len(readings)):
            torch.testing.assert_close(found[i].log_p, expected[i].log_p, rtol=0, atol=1e-4)


def test_bfloat16_on_what_is_kept() -> None:
    lm = tt.wrap(tiny_model("gemma3", dtype=torch.bfloat16), tiny_tokenizer(), "gemma3")
    readings = some_readings(12, count=5)
    kept = Kept(lm)
    one_by_one = [Batch(0, (i,)) for i in range(len(readings))]  # padding shows in the rounding
    for layer in (2, 1):
        steering = steer_at(lm, "resid", layer=layer, positions="last")
        expected = found_by(lm, readings, steering, one_by_one)
        found = found_by(lm, readings, steering, one_by_one, kept=kept)
        for i in range(len(readings)):
            assert torch.equal(found[i].log_p, expected[i].log_p)


def test_answers_and_prompts_apart_on_what_is_kept() -> None:
    """A batch in which nothing is generated, beside one in which something is."""
    lm = language_model("llama")
    same = [after([BOS, 50 + i, 60, 70]) for i in range(2)]
    readings = [*same, *some_readings(5, count=2)]
    batches = [Batch(0, (0, 1)), Batch(0, (2, 3))]
    steering = steer_at(lm, "resid", positions="generated")
    found = found_by(lm, readings, steering, batches, kept=Kept(lm))
    expected = found_by(lm, readings, steering, batches)
    for i in range(len(readings)):
        torch.testing.assert_close(found[i].log_p, expected[i].log_p, rtol=0, atol=1e-4)
    refused_in_one_line(
        lambda: found_by(lm, same, steering, kept=Kept(lm)), "the steering touched nothing"
    )


def test_a_model_that_is_steered_already_leaves_nothing_behind() -> None:
    lm = language_model("llama")
    readings = some_readings(5, count=4)
    kept = Kept(lm)
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
    refused_in_one_line(lambda: found_by(lm, readings, kept=Kept(other)), "not of this llama")


def test_hooks_are_gone_when_reading_on_what_is_kept_stops_early() -> None:
    lm = language_model("llama")
    before = plain_logits(lm.model, token_ids(PROMPTS[0]))
    readings = some_readings(5)
    batches = plan(readings, 60)
    reading = next_tokens(lm, readings, batches, steer_at(lm, "resid"), kept=Kept(lm))
    next(reading)
    reading.close()
    assert torch.equal(plain_logits(lm.model, token_ids(PROMPTS[0])), before)


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
    readings = [after([*start, 200 + i, 201]) for start in (first, second) for i in range(4)]
    readings += [after([BOS, 300 + i, 301, 302]) for i in range(4)]
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
    readings = [after(whole[:length]) for length in range(20, 51, 5)]
    assert plan(readings, 1000)[0].shared == 19
    for i, each in found_by(lm, readings).items():
        assert int(each.best[0]) == int(plain_logits(lm.model, whole[: 20 + 5 * i])[-1].argmax())


# -- answering ---------------------------------------------------------------------------------


def a_task(generation: Generation, **options: Any) -> Task:
    return Task(
        name="songs",
        about="",
        test=Source("songs.jsonl"),
        train=None,
        columns={},
        example=lambda row, index, protocol: Example(str(index), row["prompt"]),
        generation=generation,
        **options,
    )


ONE_TOKEN = a_task(
    Generation(1),
    read=lambda output, protocol: output if protocol == "paper" else output.upper(),
    right=lambda a, b: a == b,
)
SAMPLED = a_task(Generation(6, sampled=True))
GREEDY = a_task(Generation(6))

LINES = [f"{prompt} {line}" for line in range(4) for prompt in PROMPTS]


def entries(
    prompts: Sequence[Any], protocols: Sequence[Any] = ("trimtab",), target: str | None = None
) -> list[Entry]:
    examples = tuple(Example(f"no {i}", prompt, target) for i, prompt in enumerate(prompts))
    return [Entry(protocol, examples) for protocol in protocols]


def answered(lm: tt.LanguageModel, task: Task, *args: Any, **options: Any) -> list[dict[str, Any]]:
    steering = options.pop("steering", None)
    done = options.pop("done", set())
    chosen = Settings(**{"batch_size": 3, **options.pop("settings", {})})
    given = args[0] if args else entries(LINES)
    return [r for some in answer(lm, task, given, steering, done, chosen, **options) for r in some]


@contextmanager
def counted_rows(lm: tt.LanguageModel) -> Iterator[list[int]]:
    """How many rows each pass of the model has."""
    rows: list[int] = []
    handle = lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda m, args: rows.append(args[0].shape[0])
    )
    try:
        yield rows
    finally:
        handle.remove()


def plainly(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its time."""
    return {key: value for key, value in record.items() if key != "seconds"}


def by_index(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    found = {(record["protocol"], record["index"]): plainly(record) for record in records}
    assert len(found) == len(records)
    return found


@pytest.mark.parametrize("steered", [False, True])
def test_one_token_answers_are_the_most_probable_tokens(steered: bool) -> None:
    lm = language_model("gemma3")
    op = operator("Add", lm.anatomy.hidden_size)
    steering = steer(lm, ("layers.1.resid", op), positions="last") if steered else None
    records = by_index(answered(lm, ONE_TOKEN, steering=steering))
    for i, line in enumerate(LINES):
        ids = token_ids(line)
        if steered:
            with hand_hooked(lm.model, op, "last", len(ids)):
                best = int(plain_logits(lm.model, ids)[-1].argmax())
        else:
            best = int(plain_logits(lm.model, ids)[-1].argmax())
        record = records["trimtab", i]
        assert record["output"] == tiny_tokenizer().decode([best], skip_special_tokens=True)
        assert record["id"] == f"no {i}"
        assert record["prompt"] == line


def test_a_prompt_of_both_protocols_is_answered_once_and_read_by_each() -> None:
    lm = language_model("llama")
    both = entries(LINES, ("paper", "trimtab"))
    with counted_rows(lm) as rows:
        records = by_index(answered(lm, GREEDY, both))
    assert sum(rows) == 6 * len(LINES)
    assert len(records) == 2 * len(LINES)
    for i in range(len(LINES)):
        assert records["paper", i]["output"] == records["trimtab", i]["output"]
    read = by_index(answered(lm, ONE_TOKEN, both))
    for i in range(len(LINES)):
        output = read["paper", i]["output"]
        assert read["paper", i]["prediction"] == output
        assert read["trimtab", i]["prediction"] == output.upper()


def test_rows_with_one_prompt_are_answered_once_each_with_its_own_target() -> None:
    lm = language_model("llama")
    best = tiny_tokenizer().decode(
        [int(plain_logits(lm.model, token_ids(PROMPTS[0]))[-1].argmax())]
    )
    examples = (Example("a", PROMPTS[0], best.upper()), Example("b", PROMPTS[0], "something else"))
    with counted_rows(lm) as rows:
        records = answered(lm, ONE_TOKEN, [Entry("trimtab", examples)])
    assert sum(rows) == 1
    assert [(record["id"], record["values"]["accuracy"]) for record in records] == [
        ("a", 1.0),
        ("b", 0.0),
    ]


@pytest.mark.parametrize("task", [ONE_TOKEN, GREEDY, SAMPLED], ids=["one", "greedy", "sampled"])
def test_a_run_goes_on_with_the_very_same_answers(task: Task) -> None:
    lm = language_model("llama")
    whole = answered(lm, task)
    full = by_index(whole)
    for kept in (3, 4, 7, len(whole)):  # also in the middle of a batch
        done = {(record["protocol"], record["index"]) for record in whole[:kept]}
        rest = by_index(answered(lm, task, done=done))
        assert rest.keys() == full.keys() - done
        assert all(full[key] == record for key, record in rest.items())


def test_what_is_done_is_not_run_again() -> None:
    lm = language_model("llama")
    for task in (ONE_TOKEN, SAMPLED):
        whole = answered(lm, task)
        done = {(record["protocol"], record["index"]) for record in whole}
        with counted_rows(lm) as rows:
            assert answered(lm, task, done=done) == []
            assert rows == []
    done -= {("trimtab", whole[-1]["index"])}
    with counted_rows(lm) as rows:
        [record] = answered(lm, SAMPLED, done=done)
    assert plainly(record) == plainly(whole[-1])
    assert set(rows) == {3}  # its batch, and no other


def test_sampled_answers_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    seeds: list[int] = []
    generate = lm.generate

    def watched(*args: Any, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        return generate(*args, seed=seed, **options)

    monkeypatch.setattr(lm, "generate", watched)
    first = by_index(answered(lm, SAMPLED))
    assert len(set(seeds)) == len(seeds) == 4  # one for each batch
    torch.manual_seed(5)
    assert by_index(answered(lm, SAMPLED)) == first
    assert by_index(answered(lm, SAMPLED, settings={"seed": 1})) != first


def test_greedy_answers_are_generated_as_by_hand() -> None:
    lm = language_model("gemma3")
    records = by_index(answered(lm, GREEDY, settings={"max_new_tokens": 4}))
    for i, line in enumerate(LINES):
        ids = token_ids(line)
        for _ in range(4):
            ids = [*ids, int(plain_logits(lm.model, ids)[-1].argmax())]
        new = ids[-4:]
        assert records["trimtab", i]["output"] == tiny_tokenizer().decode(
            new, skip_special_tokens=True
        )


def test_each_output_is_measured_once_and_for_its_own_example() -> None:
    lm = language_model("llama")
    seen: list[str] = []

    def measure(examples: Any, completions: Any) -> list[dict[str, float | None]]:
        assert [e.prompt for e in examples] == [c.prompt for c in completions]
        seen.extend(example.prompt for example in examples)
        return [{"length": float(len(c.text)), "none": None} for c in completions]

    records = answered(lm, GREEDY, entries(LINES, ("paper", "trimtab")), measure=measure)
    assert sorted(seen) == sorted(LINES)
    assert len(records) == 2 * len(LINES)
    for record in records:
        assert record["values"] == {"length": float(len(record["output"])), "none": None}


def test_a_long_prompt_loses_its_beginning_but_not_bos() -> None:
    lm = language_model("llama")
    long = "The answer to the question is not known. " * 40
    ids = token_ids(long)
    room = lm.max_length - 1
    assert len(ids) > room
    with pytest.warns(tt.TrimtabWarning, match=f"1 of 2 prompts are longer than {room} tokens"):
        records = by_index(answered(lm, ONE_TOKEN, entries([long, PROMPTS[0]])))
    kept = [ids[0], *ids[len(ids) - room + 1 :]]
    assert len(kept) == room
    best = int(plain_logits(lm.model, kept)[-1].argmax())
    assert records["trimtab", 0]["output"] == tiny_tokenizer().decode([best])
    assert records["trimtab", 0]["prompt"] == long


def test_a_prompt_without_room_for_its_answer_is_refused_before_anything_runs() -> None:
    lm = language_model("llama")
    long = "The answer to the question is not known. " * 40
    with counted_rows(lm) as rows:
        refused_in_one_line(
            lambda: answered(lm, GREEDY, entries([*LINES, long])), "songs: a prompt of .* tokens"
        )
    assert rows == []


def test_a_prompt_without_tokens_is_refused() -> None:
    lm = language_model("gpt2")
    lm.tokenizer = tiny_tokenizer().__class__(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<pad>"
    )
    lm.encode = lambda prompts: [[] for _ in prompts]  # type: ignore[method-assign,assignment,misc]
    refused_in_one_line(lambda: answered(lm, ONE_TOKEN, entries([""])), "has no tokens")


def test_conversations_go_through_the_template_or_become_plain_text() -> None:
    lm = language_model("llama")
    chat = (("system", "Write a poem."), ("user", "About bread."))
    [with_template] = answered(lm, ONE_TOKEN, entries([chat]))
    rendered = "<s><|system|>\nWrite a poem.</s>\n<|user|>\nAbout bread.</s>\n<|assistant|>\n"
    ids = tiny_tokenizer()(rendered, add_special_tokens=False).input_ids
    best = int(plain_logits(lm.model, ids)[-1].argmax())
    assert with_template["output"] == tiny_tokenizer().decode([best])
    plain = language_model("llama")
    plain.tokenizer = tiny_tokenizer().__class__(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<s>", pad_token="<pad>"
    )
    [without] = answered(plain, ONE_TOKEN, entries([chat]))
    best = int(plain_logits(lm.model, token_ids("Write a poem.\n\nAbout bread.\n"))[-1].argmax())
    assert without["output"] == tiny_tokenizer().decode([best])


def test_a_stop_pattern_ends_the_answer() -> None:
    lm = language_model("llama")
    plain = by_index(answered(lm, a_task(Generation(12))))
    stopped = by_index(answered(lm, a_task(Generation(12, stop=r"\S\s"))))
    shorter = 0
    for key, record in plain.items():
        assert record["output"].startswith(stopped[key]["output"])
        shorter += len(stopped[key]["output"]) < len(record["output"])
    assert shorter
