"""Threads: one steers at a time, and what outlives its block or ends out of order says so."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import trimtab as tt
from helpers import PROMPTS, asked, language_model, left_padded, logits_of, steer_at, traces
from tiny import tiny_tokenizer

POSITIONS = ("all", "prompt", "generated", "last")


def in_thread(action: Callable[[], Any]) -> Any:
    """What an action gives in a thread of its own; its error is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(timeout=60)


def texts(lm: tt.LanguageModel, steering: Any, prompts: list[str] = PROMPTS) -> list[str]:
    return [str(one) for one in lm.generate(prompts, steering=steering, max_new_tokens=8)]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_calls_in_many_threads_are_those_of_one(name: str) -> None:
    lm = language_model(name)
    other = tt.wrap(lm.model, lm.tokenizer, name)  # the same model, wrapped again
    steerings = [
        None,
        *(steer_at(lm, "resid", seed=i, positions=p) for i, p in enumerate(POSITIONS)),
        steer_at(lm, "ffn_in", "Scale"),
        [steer_at(lm, "heads", "Rotate").at(40), None, steer_at(lm, "resid", seed=9)],
    ]
    alone = [texts(lm, steering) for steering in steerings]
    assert len({tuple(each) for each in alone}) == len(alone)  # each has a text of its own
    jobs = [(i, lm if turn % 2 else other) for turn in range(2) for i in range(len(steerings))]
    with ThreadPoolExecutor(6) as pool:
        written = list(pool.map(lambda job: texts(job[1], steerings[job[0]]), jobs))
    for (i, _), each in zip(jobs, written, strict=True):
        assert each == alone[i]


def test_logits_and_fits_in_threads_are_those_of_one() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    contrast = tt.Contrast.from_pairs([(p, " yes", " no it is not") for p in PROMPTS])
    plain, steered = lm.logits(PROMPTS), lm.logits(PROMPTS, steering=steering)
    vector = tt.CAA(layer=1, token="last").fit(lm, contrast).interventions[0].operator.vector
    jobs: list[Callable[[], Any]] = [
        lambda: lm.logits(PROMPTS),
        lambda: lm.logits(PROMPTS, steering=steering),
        lambda: tt.CAA(layer=1, token="last").fit(lm, contrast).interventions[0].operator.vector,
    ]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda job: job(), jobs * 4))
    for i, result in enumerate(results):
        assert torch.equal(result, (plain, steered, vector)[i % 3])


def test_a_block_of_another_thread_is_refused_and_says_what_to_do() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    alone = texts(lm, None)
    with lm.steered(steering):
        for action in (
            lambda: texts(lm, None),
            lambda: texts(tt.wrap(lm.model, lm.tokenizer), steering),
            lambda: lm.logits(PROMPTS),
            lambda: lm.steered(steering).__enter__(),
            lambda: tt.CAA(layer=1, token="last").fit(
                lm, tt.Contrast.from_pairs([("a", " b", " c")])
            ),
        ):
            with pytest.raises(tt.TrimtabError, match=r"thread 'MainThread' is steering") as caught:
                in_thread(action)
            assert "\n" not in str(caught.value)
    assert in_thread(lambda: texts(lm, None)) == alone


def test_blocks_of_one_thread_nest() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "resid", seed=1), steer_at(lm, "resid", seed=2)
    both = lm.logits(PROMPTS, steering=a + b)
    with lm.steered(a), lm.steered(b):
        assert torch.equal(lm.logits(PROMPTS), both)


def test_coroutines_of_one_thread_do_not_share_a_block() -> None:
    lm = language_model("llama")
    a, b = steer_at(lm, "resid", seed=1), steer_at(lm, "resid", seed=2)
    expected = texts(lm, a)

    async def steer(steering: tt.Steering) -> list[str]:
        with lm.steered(steering):
            await asyncio.sleep(0.01)
            return texts(lm, None)

    async def both() -> list[Any]:
        return await asyncio.gather(steer(a), steer(b), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first == expected
    assert isinstance(second, tt.TrimtabError)
    assert "task" in str(second)
    with lm.steered(a):  # code without a task encloses the tasks that it runs
        assert asyncio.run(asyncio.to_thread(lambda: 1)) == 1

        async def inside() -> list[str]:
            return texts(lm, None)

        assert asyncio.run(inside()) == expected


def test_a_block_that_begins_while_another_thread_generates_is_refused_there() -> None:
    lm = language_model("llama")
    started, go_on = threading.Event(), threading.Event()

    def wait(*args: Any, **kwargs: Any) -> bool:
        started.set()
        go_on.wait(60)
        return False

    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            lm.model.generate, **left_padded(lm, PROMPTS[:1]), stopping_criteria=[wait], **options
        )
        assert started.wait(60)
        with (
            pytest.raises(tt.TrimtabError, match="in another thread: another thread was gener"),
            lm.steered(steer_at(lm, "resid")),
        ):
            go_on.set()
            with pytest.raises(tt.TrimtabError, match="was generating when the block began"):
                job.result(60)


def test_a_raw_pass_beside_another_threads_call_is_refused() -> None:
    lm = asked(language_model("llama"))
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    handle = lm.model.model.layers[2].register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(lambda: texts(lm, steer_at(lm, "resid")))
        assert inside.wait(60)
        handle.remove()
        try:
            with pytest.raises(tt.TrimtabError, match="another thread steers this model"):
                logits_of(lm)
        finally:
            go_on.set()
        assert generating.result(60) == texts(lm, steer_at(lm, "resid"))


# -- a generation in a thread of its own ------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_streamer_inside_the_block_is_steered_as_generate_is(positions: Any) -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions=positions)
    expected = lm.generate(PROMPTS[:1], steering=steering, max_new_tokens=12, chat=False)[0].text
    streamer = TextIteratorStreamer(
        tiny_tokenizer(), skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    inputs = left_padded(lm, PROMPTS[:1])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "streamer": streamer}
    with lm.steered(steering):
        thread = threading.Thread(target=lm.model.generate, kwargs={**inputs, **options})
        thread.start()
        written = "".join(streamer)
        thread.join(60)
    assert written == expected


def test_two_generations_in_one_block_keep_their_own_prompts() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid", positions="generated")
    prompts = [PROMPTS[0], "Today"]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}

    def raw(prompt: str) -> list[int]:
        tokens: list[int] = lm.model.generate(**left_padded(lm, [prompt]), **options)[0].tolist()
        return tokens

    with lm.steered(steering):
        alone = [raw(prompt) for prompt in prompts]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(raw, prompts * 6)) == alone * 6


def test_leaving_a_block_while_it_generates_is_an_error_on_both_sides() -> None:
    lm = language_model("llama")
    before = traces(lm.model)
    plain = logits_of(lm)
    started, go_on = threading.Event(), threading.Event()

    class Slow(TextIteratorStreamer):
        def put(self, value: Any) -> None:
            started.set()
            go_on.wait(60)

    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    options |= {"streamer": Slow(tiny_tokenizer())}
    with ThreadPoolExecutor(1) as pool:
        with (
            pytest.raises(tt.TrimtabError, match="still running in another thread") as caught,
            lm.steered(steer_at(lm, "resid")),
        ):
            job = pool.submit(lm.model.generate, **left_padded(lm, PROMPTS[:1]), **options)
            assert started.wait(60)
        assert "\n" not in str(caught.value)
        go_on.set()
        with pytest.raises(tt.TrimtabError, match=r"has ended: wait for the thread"):
            job.result(60)
    assert traces(lm.model) == before
    assert torch.equal(logits_of(lm), plain)


# -- in any order -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_blocks_left_in_any_order_leave_nothing(name: str, order: tuple[int, ...]) -> None:
    lm = language_model(name)
    before, plain = traces(lm.model), logits_of(lm)
    made = [steer_at(lm, kind, seed=i) for i, kind in enumerate(("resid", "ffn_in", "ffn_in"))]
    blocks = [lm.steered(steering) for steering in made]
    for each in blocks:
        each.__enter__()
    open_ones = dict(enumerate(made))
    for i in order:
        logits_of(lm)
        blocks[i].__exit__(None, None, None)
        open_ones.pop(i)
        left = tt.Steerings(open_ones.values())
        now = logits_of(lm)
        if not left:
            assert torch.equal(now, plain)
            continue
        fresh = language_model(name)
        with fresh.steered(left):
            assert torch.equal(now, logits_of(fresh))
    assert traces(lm.model) == before
    assert "generate" not in vars(lm.model)


def test_a_steered_model_is_neither_copied_nor_pickled() -> None:
    lm = language_model("qwen3_moe")
    for kind in ("resid", "ffn_in", "heads"):
        with lm.steered(steer_at(lm, kind)):
            for action in (copy.deepcopy, pickle.dumps):
                with pytest.raises(tt.TrimtabError, match="after the block"):
                    action(lm.model)
    with torch.no_grad():
        twin = copy.deepcopy(lm.model)
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(twin(ids).logits, lm.model(ids).logits)
