"""Running a model from a block on: the same numbers as plain passes, at any depth, for any row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, asked, language_model, relative, site_kinds, steer, steer_at, token_ids
from tiny import TINY, tiny_model
from trimtab.model.batching import batches_by_length
from trimtab.reading.streams import StreamCache, blocks_below, run_lower, run_upper
from trimtab.steering.operators import Add

#: Three texts of different lengths, the longest beyond the sliding window, and one token.
TEXTS = [token_ids(prompt) for prompt in PROMPTS] + [[1]]

#: For tests that leave the model as it is.
shared = cache(language_model)


def body(model: Any) -> Any:
    return model.transformer if hasattr(model, "transformer") else model.model


def blocks(model: Any) -> list[Any]:
    return list(body(model).h if hasattr(model, "transformer") else body(model).layers)


def plain(model: Any, ids: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """What the body of a plain model puts out for one text, and what each of its blocks does."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        for block in blocks(model)
    ]
    with torch.no_grad():
        hidden = body(model)(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return hidden, seen


def own(model: Any) -> list[Any]:
    """All that somebody could have left on a model's modules."""
    return [
        (
            name,
            "forward" in vars(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", TINY)
def test_resumed_is_plain_at_every_depth(name: str) -> None:
    lm = shared(name)
    expected = [plain(lm.model, text) for text in TEXTS]
    before = own(lm.model)
    for depth in range(lm.anatomy.layers + 1):
        streams = run_lower(lm, TEXTS, depth)
        if depth:
            for stream, (_, seen) in zip(streams, expected, strict=True):
                assert relative(stream, seen[depth - 1]) < 1e-5, depth
        with torch.no_grad():
            hidden = run_upper(lm, TEXTS, streams, depth)
        assert hidden.shape[:2] == (len(TEXTS), max(map(len, TEXTS)))
        for text, row, (alone, _) in zip(TEXTS, hidden, expected, strict=True):
            assert relative(row[: len(text)], alone) < 1e-5, depth
    assert own(lm.model) == before


def test_rows_may_be_resumed_in_any_order_and_several_times() -> None:
    lm = shared("gemma3")
    streams = run_lower(lm, TEXTS, 2)
    rows = [1, 1, 0, 3]
    with torch.no_grad():
        hidden = run_upper(lm, [TEXTS[i] for i in rows], [streams[i] for i in rows], 2)
    for i, row in zip(rows, hidden, strict=True):
        assert relative(row[: len(TEXTS[i])], plain(lm.model, TEXTS[i])[0]) < 1e-5


def test_each_block_runs_in_one_of_the_two_only() -> None:
    lm = asked(language_model("llama"))
    ran: list[int] = []
    for layer, block in enumerate(blocks(lm.model)):
        block.mlp.register_forward_hook(lambda m, a, o, layer=layer: ran.append(layer))
    streams = run_lower(lm, TEXTS[:1], 2)
    assert ran == [0, 1]
    ran.clear()
    with torch.no_grad():
        run_upper(lm, TEXTS[:1], streams, 2)
    assert ran == [2]


def test_texts_in_many_batches() -> None:
    """More tokens than one batch holds: 40 texts of up to 60 tokens."""
    lm = shared("llama")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(7, 300, (1 + 7 * i % 60,), generator=generator) for i in range(40)]
    streams = run_lower(lm, [text.tolist() for text in texts], 1)
    for text, stream in zip(texts, streams, strict=True):
        assert stream.shape == (len(text), lm.anatomy.hidden_size)
        assert relative(stream, plain(lm.model, text.tolist())[1][0]) < 1e-5


def test_bfloat16_keeps_its_dtype() -> None:
    lm = tt.wrap(tiny_model("gemma2", dtype=torch.bfloat16), shared("gemma2").tokenizer, "gemma2")
    streams = run_lower(lm, TEXTS[:1], 2)  # alone: in few bits padding shows in the rounding
    assert streams[0].dtype == torch.bfloat16
    with torch.no_grad():
        hidden = run_upper(lm, TEXTS[:1], streams, 2)
    assert relative(hidden[0], plain(lm.model, TEXTS[0])[0]) < 0.02


def test_what_somebody_put_on_a_block_is_applied_once_and_stays() -> None:
    """A hook on the last skipped block changes what is handed on; a forward of somebody's own on a
    skipped block comes back."""
    lm = language_model("llama")
    lm.model.model.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    original = lm.model.model.layers[0].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    lm.model.model.layers[0].forward = forward
    expected = plain(lm.model, TEXTS[0])[0]
    for depth in range(4):
        with torch.no_grad():
            hidden = run_upper(lm, TEXTS[:1], run_lower(lm, TEXTS[:1], depth), depth)
        assert relative(hidden[0], expected) < 1e-5, depth
    assert vars(lm.model.model.layers[0])["forward"] is forward


@pytest.mark.parametrize("stage", ["run_lower", "run_upper"])
def test_nothing_is_left_after_an_exception(stage: str) -> None:
    lm = language_model("gpt2")
    streams = run_lower(lm, TEXTS[:1], 2)

    def fail(*args: Any) -> None:
        raise RuntimeError("on the way")

    blocks(lm.model)[0 if stage == "run_lower" else 2].mlp.register_forward_hook(fail)
    before = own(lm.model)
    with pytest.raises(RuntimeError, match="on the way"):
        if stage == "run_lower":
            run_lower(lm, TEXTS[:1], 2)
        else:
            run_upper(lm, TEXTS[:1], streams, 2)
    assert own(lm.model) == before


# -- which blocks a steering leaves alone -----------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2"])
def test_blocks_below_are_those_that_do_not_feel_it(name: str) -> None:
    """Against the model: the first block whose output changes is the first that must run again,
    but for the block's own output, which is changed after it."""
    lm = shared(name)
    expected = plain(lm.model, TEXTS[0])[1]
    for kind in site_kinds(lm):
        layer = 1
        steering = steer_at(lm, kind, layer=layer)
        with lm.steered(steering):
            changed = plain(lm.model, TEXTS[0])[1]
        same = [torch.equal(a, b) for a, b in zip(changed, expected, strict=True)]
        felt = same.index(False) if False in same else lm.anatomy.layers
        below = blocks_below(lm.anatomy, [steering])
        assert below == felt + (kind == "resid"), kind


def test_the_lowest_of_several_sites_and_steerings_counts() -> None:
    lm = shared("llama")
    width = lm.anatomy.hidden_size
    high = steer(lm, ("final_norm", Add(torch.ones(width))))
    low = steer(
        lm,
        *(
            (f"layers.{i}.{kind}", Add(torch.ones(width)))
            for i, kind in ((2, "ffn_out"), (0, "resid"))
        ),
    )
    assert blocks_below(lm.anatomy, []) == lm.anatomy.layers
    assert blocks_below(lm.anatomy, [high]) == lm.anatomy.layers
    assert blocks_below(lm.anatomy, [high, low]) == 1
    assert blocks_below(lm.anatomy, [low, steer_at(lm, "embed")]) == 0


def test_groups_hold_every_text_once_and_keep_to_their_size() -> None:
    lengths = [5, 400, 3, 3, 90, 700, 12] * 30
    groups = list(batches_by_length(lengths, 512))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or len(group) * longest <= 512
        assert len(group) <= 64
    tops = [max(lengths[i] for i in group) for group in groups]
    assert all(a >= b for a, b in pairwise(tops))


# -- what is kept for later -------------------------------------------------------------------


#: As texts are kept: tuples, one of them twice.
KEPT = [tuple(text) for text in (*TEXTS, TEXTS[0])]


def counted(lm: tt.LanguageModel) -> list[int]:
    """The layers whose FFN ran, as they run."""
    ran: list[int] = []
    for layer, block in enumerate(blocks(lm.model)):
        block.mlp.register_forward_hook(lambda m, a, o, layer=layer: ran.append(layer))
    return ran


@pytest.mark.parametrize("name", TINY)
def test_what_is_kept_is_what_plain_transformers_has(name: str) -> None:
    """Whatever was asked for before: deeper, higher, the same, nothing."""
    lm = shared(name)
    last = lm.anatomy.layers
    kept = StreamCache(lm)
    with torch.no_grad():
        plain_states = [
            lm.model(torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
            for text in KEPT
        ]
    # transformers puts the final norm on the last of its states: that one is taken from the block.
    tops = [plain(lm.model, text)[1][-1] for text in KEPT]
    for depth in (2, 0, 1, last, 2, last, 1):
        found = kept.run_lower(KEPT, depth)
        assert len(found) == len(KEPT)
        for text, stream, states, top in zip(KEPT, found, plain_states, tops, strict=True):
            if depth == 0:
                assert stream.numel() == 0
                continue
            assert stream.shape == (len(text), lm.anatomy.hidden_size)
            expected = top if depth == last else states[depth][0]
            assert relative(stream, expected) < 1e-5, depth


def test_what_is_kept_is_computed_once_and_from_the_highest_block_below() -> None:
    lm = asked(language_model("llama"))
    ran = counted(lm)
    kept = StreamCache(lm)
    some, more = KEPT[:2], KEPT[2:4]
    for texts, depth, expected in (
        (some, 1, [0]),
        (some, 1, []),
        (some, 3, [1, 2]),
        (some, 2, [1]),
        (more, 2, [0, 1]),
        (some + more, 2, []),
        (some + more, 3, [2]),  # what is missing of the texts runs, the others do not
        (some + more, 1, [0]),
        (some + more, 0, []),
    ):
        ran.clear()
        kept.run_lower(texts, depth)
        assert ran == expected, (len(texts), depth)


def test_a_text_that_is_asked_for_twice_runs_once() -> None:
    lm = asked(language_model("llama"))
    seen: list[int] = []
    blocks(lm.model)[0].mlp.register_forward_hook(lambda m, a, o: seen.append(o.shape[0]))
    StreamCache(lm).run_lower([KEPT[0], KEPT[1], KEPT[0]], 1)
    assert seen == [2]


@pytest.mark.parametrize("rows", [0, 1, 2, 3.5])
def test_a_small_limit_costs_time_and_nothing_else(rows: float) -> None:
    """Room for none of a batch, or for a part of it; texts at different depths in one batch."""
    lm = shared("llama")
    longest = max(map(len, KEPT))
    limit = int(rows * longest * lm.anatomy.hidden_size * 4)
    kept = StreamCache(lm, limit)
    expected = [plain(lm.model, text)[1] for text in KEPT]
    for chosen, depth in (
        ([0, 1], 1),
        ([0, 1, 2, 3], 2),
        ([3, 2, 1, 0], 3),
        ([1], 1),
        ([0, 1, 2, 3, 4], 3),
        ([0, 1, 2], 1),
        ([2, 0, 3], 2),
    ):
        found = kept.run_lower([KEPT[i] for i in chosen], depth)
        for i, stream in zip(chosen, found, strict=True):
            assert relative(stream, expected[i][depth - 1]) < 1e-5
        held = sum(stream.nbytes for stream in kept._streams.values())
        assert held == kept._bytes <= limit


def test_what_was_not_used_for_longest_is_dropped() -> None:
    lm = language_model("llama")
    text_bytes = 6 * lm.anatomy.hidden_size * 4
    a, b, c = ((10 + i,) * 6 for i in range(3))
    kept = StreamCache(lm, 2 * text_bytes)
    kept.run_lower([a], 1)
    kept.run_lower([b], 1)
    kept.run_lower([a], 1)  # used again: b is the oldest now
    kept.run_lower([c], 1)
    ran = counted(lm)
    kept.run_lower([a, c], 1)
    assert ran == []
    kept.run_lower([b], 1)
    assert ran == [0]


def test_what_is_kept_of_bfloat16_is_bfloat16() -> None:
    lm = tt.wrap(tiny_model("gemma2", dtype=torch.bfloat16), shared("gemma2").tokenizer, "gemma2")
    kept = StreamCache(lm)
    for depth in (1, 2):
        (stream,) = kept.run_lower(KEPT[:1], depth)
        assert stream.dtype == torch.bfloat16
        assert torch.equal(stream, plain(lm.model, KEPT[0])[1][depth - 1])
    assert kept._bytes == 2 * len(KEPT[0]) * lm.anatomy.hidden_size * 2
