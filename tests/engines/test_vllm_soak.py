"""A thousand requests through OpenAI's client, thirty-two at a time, while steerings come, change
and go: each is what it is alone, none gets a mixture, and nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from vllm_server import CHANGE, PYTHON, Served, served, tiny_llama

import trimtab as tt
from helpers import steer, steer_at
from operator_formulas import random_operator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

REQUESTS, AT_ONCE, LONGEST = 1000, 32, 24
SHARED = "The notes below were written over a long summer by the sea, and they do not all agree. "
PROMPTS = ["She looked at the map", "Today I feel sad", SHARED + "Read them", SHARED + "She said"]
SCOPES = (None, "generated", "prompt", "last", "generated[1:4]")
#: In so many parts the requests come, after each of which memory is measured.
PARTS = 5
#: Bytes that the API and the engine's core may grow by after the first part; and the worker in the
#: last one, where kernels for sizes of batches that were not met before are still kept, which an
#: engine does that is not steered, too.
GROWTH, LAST_GROWTH = 16 * 2**20, 32 * 2**20


@dataclass(frozen=True)
class Case:
    """A request: steerings by name at dials, in a scope; its prompt; how many tokens; how it is
    asked, and after how many pieces the client goes, if it does."""

    names: tuple[tuple[str, float], ...]
    scope: str | None
    prompt: str
    new: int
    stream: bool
    leaves: int | None


def drawn(names: list[str]) -> Iterator[Case]:
    draw = random.Random(0)
    for _ in range(REQUESTS):
        few = draw.choice([0, 1, 1, 1, 1, 2])
        chosen = tuple((name, draw.choice((-4.0, 3.0, 8.0))) for name in draw.sample(names, few))
        scope = draw.choice(SCOPES) if len(chosen) == 1 else None
        stream = draw.random() < 0.4
        leaves = draw.randrange(1, 6) if stream and draw.random() < 0.3 else None
        new = draw.randrange(1, LONGEST + 1)
        yield Case(chosen, scope, draw.choice(PROMPTS), new, stream, leaves)


def solo(
    lm: tt.LanguageModel, versions: dict[str, list[tt.Steering]]
) -> Callable[[Case], list[str]]:
    """What a request may come to: what `generate` writes of it alone, under any of the steerings
    that ever have its name."""

    @cache
    def tokens(prompt: str, scope: str | None, names: tuple[Any, ...], version: int) -> list[int]:
        acting = [versions[name][version % len(versions[name])].at(dial) for name, dial in names]
        scoped = acting if scope is None else [one.scoped(scope) for one in acting]
        (done,) = lm.generate([prompt], chat=False, steering=[scoped], max_new_tokens=LONGEST)
        return list(done.tokens)

    def texts(case: Case) -> list[str]:
        most = max((len(versions[name]) for name, _ in case.names), default=1)
        each = [tokens(case.prompt, case.scope, case.names, version) for version in range(most)]
        return [lm.tokenizer.decode(one[: case.new], skip_special_tokens=True) for one in each]

    return texts


@contextmanager
def changing(running: Served, versions: list[tt.Steering], folder: Path) -> Iterator[list[int]]:
    """Another thread replaces `new` under its name all the time, and removes it now and then; how
    often it did."""
    files = [one.save(folder / f"{i}.safetensors").read_bytes() for i, one in enumerate(versions)]
    over, times = threading.Event(), [0]

    def change() -> None:
        draw = random.Random(1)
        while not over.is_set():
            if draw.random() < 0.2:
                running.client.delete("steerings/new", headers=CHANGE)
            else:
                content = files[times[0] % len(files)]
                done = running.client.put("steerings/new", content=content, headers=CHANGE)
                assert done.status_code == 200, done.text
            times[0] += 1
            time.sleep(0.1)

    with ThreadPoolExecutor(1) as pool:
        changes = pool.submit(change)
        try:
            yield times
        finally:
            over.set()
            changes.result(60)


def asked(client: openai.OpenAI, case: Case) -> str | None:
    """What a request is answered, as far as its client waits; None where its steering is gone."""
    field = [{"name": name, "dial": dial} for name, dial in case.names]
    if case.scope is not None:
        field = [{**one, "scope": case.scope} for one in field]
    body: dict[str, Any] = {"model": "base", "prompt": case.prompt, "max_tokens": case.new}
    body |= {"temperature": 0, "extra_body": {"steering": field} if field else None}
    try:
        if not case.stream:
            text: str = client.completions.create(**body).choices[0].text
            return text
        pieces = []
        with client.completions.create(**body, stream=True) as stream:
            for number, chunk in enumerate(stream):
                pieces.append(chunk.choices[0].text)
                if number == case.leaves:
                    break
        return "".join(pieces)
    except openai.NotFoundError:
        return None


def memory(running: Served) -> list[int]:
    """Of the server and of each of its processes, without what they share; the last one is the
    worker, which the engine's core has started."""
    server = psutil.Process(running.process.pid)
    family = [server, *server.children(recursive=True)]
    return [each.memory_full_info().uss for each in family]


def test_a_thousand_requests(tmp_path: Path) -> None:
    lm = tiny_llama()
    turn = random_operator("Turn", 6, 64)
    steerings = {
        "joy": steer_at(lm, "resid", seed=2),
        "calm": steer_at(lm, "heads", "Scale", seed=3),
        "kept": steer_at(lm, "ffn_out", layer=2, seed=5),
        "turn": steer(lm, *((f"layers.{i}.ffn_norm", turn) for i in range(4))),
    }
    new = [steer_at(lm, "resid", layer=2, seed=seed) for seed in (11, 12, 13)]
    versions = {name: [one] for name, one in steerings.items()} | {"new": new}
    cases, texts = list(drawn([*versions, "new"])), solo(lm, versions)
    # Few blocks, or the cache would fill all along, and hide what else grows.
    few = ("--hook", "resid", "--vllm", "num_gpu_blocks_override=160")
    with served(lm, steerings, tmp_path, *few) as running:
        client = openai.OpenAI(base_url=running.address, api_key="none", max_retries=0)
        sizes, found = [], []
        with changing(running, new, tmp_path) as times, ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(0, REQUESTS, REQUESTS // PARTS):
                some = cases[first : first + REQUESTS // PARTS]
                found += list(pool.map(lambda case: asked(client, case), some))
                sizes.append(memory(running))
        counted = ""
        for _ in range(100):
            counted = running.client.get(running.client.base_url.join("/metrics")).text
            if "trimtab_running 0.0" in counted and "trimtab_waiting 0.0" in counted:
                break
            time.sleep(0.1)
        assert "trimtab_running 0.0" in counted
        assert running.health == 200
    gone = [case for case, text in zip(cases, found, strict=True) if text is None]
    assert all(any(name == "new" for name, _ in case.names) for case in gone)
    wrong = []
    for case, text in zip(cases, found, strict=True):
        if text is None:
            continue
        allowed = texts(case)
        left = case.leaves is not None
        if not (text in allowed or (left and any(one.startswith(text) for one in allowed))):
            wrong.append((case, text, allowed))
    assert not wrong, (len(wrong), wrong[:3])
    print(f"\n{len(cases)} requests, {len(gone)} of a steering that was gone, {times[0]} changes, "
          f"{sum(case.leaves is not None for case in cases)} left, memory {sizes}")  # fmt: skip
    assert times[0] > 20
    *others, worker = zip(*sizes, strict=True)
    assert all(each[-1] - each[0] < GROWTH for each in others), sizes
    assert worker[-1] - worker[-2] < LAST_GROWTH, sizes
