"""Scopes on a running model: every way to cut texts into passes does what a plain loop over whole
texts does with an explicit mask."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import trimtab as tt
from helpers import (
    PROMPTS,
    few_quick,
    language_model,
    left_padded,
    raw_greedy,
    refused_in_one_line,
    relative,
    steer,
    token_ids,
)
from scopes_by_hand import (
    CLOSES,
    OF_CHATS,
    OPENS,
    QUICK,
    SCOPES,
    Weights,
    masked_by_hand,
    written_by_hand,
)
from tiny import TINY, tiny_model
from trimtab.model.versions import cache_argument
from trimtab.reading import StreamCache, log_odds, next_tokens, prompt_reading
from trimtab.reading.reader import Reading
from trimtab.steering import Add, Turn

#: A text that repeats itself, so that looking up what followed before finds something.
REPEATS = "the rudder turns the ship and the rudder turns the ship and the rudder turns"
CHATS = [
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Today I feel"}],
    [
        {"role": "user", "content": "She looked at the map"},
        {"role": "assistant", "content": "The answer is yes"},
        {"role": "user", "content": "What is the best way?"},
    ],
]
DIAL = 4.0


def vector(lm: tt.LanguageModel) -> Tensor:
    width = lm.anatomy.width("layers.1.resid")
    return torch.randn(width, generator=torch.Generator().manual_seed(5))


def scoped(lm: tt.LanguageModel, scope: str, dial: float = DIAL) -> tt.Steering:
    return steer(lm, ("layers.1.resid", Add(vector(lm)))).scoped(scope).at(dial)


def by_hand(lm: tt.LanguageModel, scope: str, ids: list[int], new: int) -> list[int]:
    weights = {**SCOPES, **OF_CHATS}[scope]
    return written_by_hand(lm.model, ids, new, (weights, vector(lm), DIAL))


def padded_weights(weights: Weights, widths: list[int], ends: int) -> Any:
    """Masks of left-padded rows [rows, columns], from the ids that each of them has: the rows'
    lengths in the prompt, whose last column is `ends`."""

    def find(ids: Tensor) -> Tensor:
        times = len(ids) // len(widths)
        rows = []
        for row, text in enumerate(ids.tolist()):
            width = widths[row // times]
            pad = ends - width
            rows.append([0.0] * pad + weights(text[pad:], width))
        return torch.tensor(rows)

    return find


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", few_quick(TINY, "llama", "gemma3"))
def test_generate_equals_a_loop_by_hand_with_and_without_cache(name: str, scope: str) -> None:
    lm = language_model(name)
    if name == "gemma3" and scope not in QUICK:
        pytest.skip("the quick scopes are enough where another architecture has all")
    one, new = scoped(lm, scope), 7
    expected = [by_hand(lm, scope, token_ids(prompt), new) for prompt in PROMPTS]
    with lm.steered(one):
        assert raw_greedy(lm, PROMPTS, new) == expected
        assert raw_greedy(lm, PROMPTS, new, use_cache=False) == expected
        assert raw_greedy(lm, PROMPTS[:1], new) == expected[:1]
    with lm.steered([one, None, one.at(-DIAL)]):
        rows = raw_greedy(lm, PROMPTS, new)
    assert rows[0] == expected[0]
    assert rows[1] == raw_greedy(lm, PROMPTS[1:2], new)[0]


@pytest.mark.parametrize("scope", few_quick(SCOPES, *QUICK))
@pytest.mark.parametrize("how", ["lookup", "assistant", "same assistant", "parts", "one by one"])
def test_guesses_and_parts_are_plain_decoding(how: str, scope: str) -> None:
    lm = language_model("llama")
    assistant = lm.model if how == "same assistant" else tiny_model("llama", seed=3)
    assistant.generation_config.eos_token_id = None
    options: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 4},
        "parts": {"prefill_chunk_size": 3},
        "one by one": {"prefill_chunk_size": 1},
    }.get(how, {"assistant_model": assistant})
    for text in (REPEATS, PROMPTS[0]):
        expected = by_hand(lm, scope, token_ids(text), 10)
        with lm.steered(scoped(lm, scope)):
            assert raw_greedy(lm, [text], 10, **options) == [expected]


@pytest.mark.parametrize("scope", few_quick(SCOPES, *QUICK))
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_are_those_of_a_hook_that_sees_whole_texts(options: Any, scope: str) -> None:
    """Rows change places while they are written, and what was read goes along with each."""
    lm = language_model("qwen2")
    prompts = [*PROMPTS[:2]]
    inputs = left_padded(lm, prompts)
    width = inputs["input_ids"].shape[1]
    widths = [len(token_ids(prompt)) for prompt in prompts]
    hook = padded_weights(SCOPES[scope], widths, width)
    settings = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, **options}
    with masked_by_hand(lm.model, 1, hook, vector(lm), DIAL):
        expected = lm.model.generate(**inputs, **settings, use_cache=False)
    with lm.steered(scoped(lm, scope)):
        found = lm.model.generate(**inputs, **settings)
    assert found.tolist() == expected.tolist()


def test_a_cache_whose_rows_move_takes_its_texts_along() -> None:
    """By hand, as beam search does it; a copy of the cache has a text of its own."""
    lm = language_model("llama")
    scope = f"between({OPENS}, {CLOSES})"
    name = cache_argument(lm.anatomy.body)
    first = torch.tensor([[1, OPENS, 60], [1, 60, 61]])
    with torch.no_grad(), lm.steered(scoped(lm, scope)):
        cache = lm.model(first, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        moved = lm.model(torch.tensor([[62], [62]]), **{name: cache}).logits[:, -1]
        still = lm.model(torch.tensor([[62], [62]]), **{name: kept}).logits[:, -1]
    whole = torch.cat((first, torch.tensor([[62], [62]])), 1)
    weights = torch.tensor([SCOPES[scope](ids, 3) for ids in whole.tolist()])
    with torch.no_grad(), masked_by_hand(lm.model, 1, lambda ids: weights, vector(lm), DIAL):
        expected = lm.model(input_ids=whole, use_cache=False).logits[:, -1]
    assert relative(still, expected) < 1e-5
    assert relative(moved, expected.flip(0)) < 1e-5
    assert relative(moved, expected) > 0.01


def test_rows_that_are_chosen_of_a_cache_take_their_places_and_dials_along() -> None:
    """A batch that is padded on the left, of which some rows go on, in another order."""
    lm = language_model("llama")
    inputs = left_padded(lm, PROMPTS)
    lengths, width = inputs["attention_mask"].sum(-1).tolist(), inputs["input_ids"].shape[1]
    name, kept = cache_argument(lm.anatomy.body), [2, 0]
    window = slice(min(lengths), min(lengths) + 2)  # of the shortest text what is written first
    scope = f"all[{window.start}:{window.stop}]"
    new = torch.tensor([[60], [61]])
    rows = [scoped(lm, scope).at(dial) for dial in (4.0, 1.0, -4.0)]
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with lm.steered(rows):
            cache = DynamicCache(config=lm.model.config)
            lm.model(**inputs, use_cache=True, **{name: cache})
        cache.batch_select_indices(torch.tensor(kept))
        mask = torch.cat((inputs["attention_mask"][kept], torch.ones(2, 1, dtype=torch.long)), 1)
        place = mask.sum(-1, keepdim=True) - 1
        with lm.steered([rows[i] for i in kept]):
            found = lm.model(new, attention_mask=mask, position_ids=place, **{name: cache}).logits
    for at, row in enumerate(kept):
        ids = torch.tensor([[*token_ids(PROMPTS[row]), *new[at].tolist()]])
        weights = torch.zeros(ids.shape)
        weights[:, window] = 1.0
        with (
            torch.no_grad(),
            masked_by_hand(lm.model, 1, lambda _, w=weights: w, vector(lm), rows[row].setting),
        ):
            expected = lm.model(ids, use_cache=False).logits[0, -1]
        assert relative(found[at, -1], expected) < 1e-5, (row, width)


@pytest.mark.parametrize("scope", few_quick(SCOPES, *QUICK, "all[2:9]", "prompt[-4:]"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_in_a_loop_of_the_users_own(side: Any, scope: str) -> None:
    """What is written after a prompt that is padded on the right comes after its padding."""
    lm = language_model("llama")
    inputs = dict(lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side))
    name, mask = cache_argument(lm.anatomy.body), inputs["attention_mask"]
    new = torch.tensor([[OPENS, 60, CLOSES, 61], [61, OPENS, 62, 63], [60, 61, OPENS, CLOSES]])
    found = []
    with torch.no_grad(), lm.steered(scoped(lm, scope)):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=lm.model.config)
        lm.model(**inputs, position_ids=positions, use_cache=True, **{name: cache})
        for step in range(new.shape[1]):
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
            place = mask.sum(-1, keepdim=True) - 1
            output = lm.model(
                new[:, step : step + 1], attention_mask=mask, position_ids=place, **{name: cache}
            )
            found.append(output.logits[:, -1])
    for row, prompt in enumerate(PROMPTS):
        ids = [*token_ids(prompt), *new[row].tolist()]
        weights = torch.tensor([SCOPES[scope](ids, len(ids) - 4)])
        with (
            torch.no_grad(),
            masked_by_hand(lm.model, 1, lambda now, w=weights: w, vector(lm), DIAL),  # type: ignore[misc]
        ):
            expected = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -4:]
        assert relative(torch.stack(found, 1)[row], expected) < 1e-4


@pytest.mark.parametrize("scope", OF_CHATS)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"use_cache": False}])
def test_turns_of_chats(scope: str, options: dict[str, Any]) -> None:
    """The same in `lm.generate` and in a raw generate that is given token ids."""
    lm = language_model("llama")
    prompts = lm.encode(lm.prompts(CHATS, True))
    expected = [by_hand(lm, scope, list(ids), 7) for ids in prompts]
    assert len({tuple(row) for row in expected}) == 2
    one = scoped(lm, scope)
    if not options:
        done = lm.generate(CHATS, max_new_tokens=7, steering=one)
        assert [list(each.tokens) for each in done] == expected
    for ids, row in zip(prompts, expected, strict=True):
        with lm.steered(one):
            output = lm.model.generate(
                torch.tensor([ids]), max_new_tokens=7, do_sample=False, **options
            )
        assert output[0, len(ids) :].tolist() == row


# -- texts that are read --------------------------------------------------------------------------


def logits_by_hand(lm: tt.LanguageModel, scope: str, ids: list[int], end: int) -> Tensor:
    weights = torch.tensor([{**SCOPES, **OF_CHATS}[scope](ids, end)])
    with (
        torch.no_grad(),
        masked_by_hand(lm.model, 1, lambda now: weights, vector(lm), DIAL),
    ):
        logits: Tensor = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("scope", few_quick(SCOPES, *QUICK, "prompt[-4:]", "prompt"))
def test_texts_that_begin_alike_are_read_as_each_alone(scope: str) -> None:
    """Their beginning runs once for all of them; what is seen of it goes on into each."""
    lm = language_model("llama")
    start = token_ids(f"{REPEATS} {PROMPTS[0]}")[:90]
    start[20], start[40] = OPENS, 61
    texts = [(*start, 60 + i, CLOSES, 70 + i, OPENS, 75, 76) for i in range(5)]
    ends = [len(start) + i % 3 for i in range(5)]
    readings = [
        Reading(text, (len(text) - 2, len(text) - 1), end, (7, 8))
        for text, end in zip(texts, ends, strict=True)
    ]
    for batch, found in [*next_tokens(lm, readings, scoped(lm, scope))]:
        for i, one in zip(batch.rows, found, strict=True):
            log_p = logits_by_hand(lm, scope, list(texts[i]), ends[i])
            expected = log_p[[len(texts[i]) - 2, len(texts[i]) - 1], [7, 8]]
            assert torch.allclose(one.log_p, expected, atol=1e-4)


@pytest.mark.parametrize("scope", [each for each in OF_CHATS if "generated" not in each])
@pytest.mark.parametrize("keeps", [False, True])
def test_chats_that_begin_alike_are_read_as_each_alone(scope: str, keeps: bool) -> None:
    """Also where the blocks below the steering run apart, and are kept for the next one."""
    lm = language_model("llama")
    long = [{"role": "system", "content": f"{REPEATS} {PROMPTS[0]} {REPEATS}"}, *CHATS[1]]
    chats = [[*long[:-1], {"role": "user", "content": f"What is {i}?"}] for i in range(4)]
    readings = [prompt_reading(ids) for ids in lm.encode(lm.prompts(chats, True))]
    readings = [replace(each, targets=(7,)) for each in readings]
    kept = StreamCache(lm) if keeps else None
    for _ in range(2):
        for batch, found in [*next_tokens(lm, readings, scoped(lm, scope), kept=kept)]:
            for i, one in zip(batch.rows, found, strict=True):
                ids = list(readings[i].tokens)
                expected = logits_by_hand(lm, scope, ids, len(ids))[-1, 7]
                assert float(one.log_p[0]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("scope", few_quick(SCOPES, *QUICK, "last", "all[5:]"))
def test_both_sides_of_a_pair_count_their_own_tokens(scope: str) -> None:
    lm = language_model("llama")
    pairs = [("Today I feel", " happy and good", " sad"), ("The ship", " left the harbour", " is")]
    found = log_odds(lm, tt.Contrast.from_pairs(pairs), scoped(lm, scope))
    for odds, (prompt, *sides) in zip(found.tolist(), pairs, strict=True):
        end, scores = len(token_ids(prompt)), []
        for side in sides:
            ids = token_ids(prompt + side)
            log_p = logits_by_hand(lm, scope, ids, end)
            scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(end, len(ids))))
        assert odds == pytest.approx(scores[0] - scores[1], abs=1e-3)


# -- what cannot be known is refused --------------------------------------------------------------


def test_turns_of_a_text_that_is_no_chat_are_refused() -> None:
    lm = language_model("llama")
    for scope in ("user", "assistant & generated", "last_user"):
        one = scoped(lm, scope)
        for run in (
            lambda one=one: lm.generate(PROMPTS, chat=False, steering=one),
            lambda one=one: lm.logits(PROMPTS, steering=one),
        ):
            refused_in_one_line(run, f"no turn of a chat, so that the scope '{scope}' is nowhere")
    # A row that is not steered may say what it likes.
    chat = lm.render(lm.prompts(CHATS[1:], True)[0])
    lm.generate([chat, PROMPTS[0]], chat=False, steering=[scoped(lm, "user"), None])
    lm = tt.wrap(lm.model, copy.deepcopy(lm.tokenizer), "llama")
    lm.tokenizer.chat_template = None
    refused_in_one_line(
        lambda: lm.generate([chat], chat=False, steering=scoped(lm, "user")), "has no chat template"
    )


def test_what_a_cache_has_read_must_have_been_seen() -> None:
    lm = language_model("llama")
    name, ids = cache_argument(lm.anatomy.body), torch.tensor([token_ids(PROMPTS[0])])
    for fill in (None, "generated"):
        cache = DynamicCache(config=lm.model.config)
        with torch.no_grad():
            if fill is None:
                lm.model(ids, use_cache=True, **{name: cache})
            else:
                with lm.steered(scoped(lm, "last")):
                    lm.model(ids, use_cache=True, **{name: cache})
            with lm.steered(scoped(lm, f"token({OPENS})")):
                refused_in_one_line(
                    lambda cache=cache: lm.model(torch.tensor([[5]]), **{name: cache}),
                    "no pass under this steering has filled",
                )
    with lm.steered(scoped(lm, f"token({OPENS})")):
        embeddings = lm.model.get_input_embeddings()(ids)
        refused_in_one_line(lambda: lm.model(inputs_embeds=embeddings), "without input_ids")


def test_a_decay_needs_a_dial_that_does_nothing_at_zero() -> None:
    lm = language_model("llama")
    turn = tt.Intervention("layers.1.resid", Turn(torch.eye(lm.anatomy.hidden_size)[:2]))
    steering = tt.Steering(
        "test", {}, (turn,), tt.Dial("theta", 30.0, (-360.0, 360.0)), lm.identity
    )
    refused_in_one_line(lambda: steering.scoped("generated ~ 0.9"), "leave the decay out")


def test_two_scopes_act_side_by_side() -> None:
    """a + b, each on its own tokens, is one loop by hand with both masks."""
    lm = language_model("llama")
    span = f"generated & !between({OPENS}, {CLOSES})"
    both = scoped(lm, "prompt[-4:]") + scoped(lm, span)

    def weights(ids: Any, end: int) -> list[float]:
        pairs = zip(SCOPES["prompt[-4:]"](ids, end), SCOPES[span](ids, end), strict=True)
        return [a + b for a, b in pairs]

    expected = written_by_hand(lm.model, token_ids(PROMPTS[0]), 8, (weights, vector(lm), DIAL))
    (done,) = lm.generate(PROMPTS[:1], chat=False, max_new_tokens=8, steering=both)
    assert list(done.tokens) == expected
