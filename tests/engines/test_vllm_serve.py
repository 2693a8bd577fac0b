"""`trimtab serve --engine vllm`: the API that transformers has, over vLLM.

Everything is asked over HTTP of one server, at once where that matters, and compared with what
`generate` writes of each prompt alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_server import CHANGE, NEW, PYTHON, asked, served, text_of, tiny_llama

import trimtab as tt
from helpers import kl_at, steer, steer_at
from operator_formulas import random_operator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

PROMPTS = ["She looked at the map and asked", "Today I feel sad because of", "What is the best way"]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    turn = random_operator("Turn", 6, 64)
    return {
        "joy": steer_at(lm, "resid", seed=2).at(6),
        "calm": steer_at(lm, "heads", "Scale", seed=3).at(2),
        "late": steer_at(lm, "resid", layer=2, seed=5).scoped("generated[1:4]").at(9),
        "asked": steer_at(lm, "resid", seed=6).scoped("user").at(40),
        "turn": steer(lm, *((f"layers.{i}.ffn_norm", turn) for i in range(4)), alpha=80.0),
    }


@pytest.fixture(scope="module")
def client(
    lm: tt.LanguageModel,
    steerings: dict[str, tt.Steering],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    with served(lm, steerings, tmp_path_factory.mktemp("served"), "--hook", "ffn_out") as running:
        yield running.client


def test_everything_at_once_is_what_each_is_alone(
    client: httpx.Client, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    draw = random.Random(0)
    cases = []
    for _ in range(60):
        prompt, name = draw.choice(PROMPTS), draw.choice([None, "joy", "calm", "late", "turn"])
        dial, new = draw.choice([-4.0, 3.0, 8.0]), draw.randrange(1, 14)
        cases.append((prompt, name, dial, new))

    def ask(case: tuple[Any, ...]) -> str:
        prompt, name, dial, new = case
        body = asked(prompt, model=f"base+{name}@{dial:g}" if name else "base", max_tokens=new)
        text: str = client.post("completions", json=body).json()["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, cases))
    expected = [
        text_of(lm, prompt, *([steerings[name].at(dial)] if name else []), new=new)
        for prompt, name, dial, new in cases
    ]
    assert found == expected
    assert len(set(found)) > 20


def test_bodies_chats_and_streams(
    client: httpx.Client, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    joy, calm = steerings["joy"], steerings["calm"]
    stacked = [{"name": "joy", "dial": 5, "scope": "generated"}, {"name": "calm"}]
    answer = client.post("completions", json=asked(PROMPTS[0], steering=stacked)).json()
    choice = answer["choices"][0]
    assert choice["text"] == text_of(lm, PROMPTS[0], joy.at(5).scoped("generated"), calm)
    prompt = answer["usage"]["prompt_tokens"]
    told = [{"prompt": 0, "answer": NEW - 1}, {"prompt": prompt, "answer": NEW - 1}]
    assert [one["tokens"] for one in choice["steering"]] == told

    messages = [{"role": "user", "content": "Why?"}]
    body = {"model": "base+asked", "messages": messages, "max_tokens": NEW, "temperature": 0}
    expected = text_of(lm, messages, steerings["asked"])
    said = client.post("chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert said == expected != text_of(lm, messages)
    with client.stream("POST", "chat/completions", json={**body, "stream": True}) as stream:
        assert '"steering"' in stream.read().decode()

    body = asked(PROMPTS[1], logprobs=2, seed=3, n=2, temperature=0.8, stop=[" "])
    sampled = client.post("completions", json=body).json()["choices"]
    assert len(sampled) == 2
    assert all(" " not in one["text"] and len(one["logprobs"]["tokens"]) for one in sampled)


def test_adding_replacing_and_removing(
    client: httpx.Client, lm: tt.LanguageModel, tmp_path: Path
) -> None:
    def put(steering: tt.Steering) -> httpx.Response:
        file = steering.save(tmp_path / "new.safetensors", overwrite=True)
        return client.put("steerings/new", content=file.read_bytes(), headers=CHANGE)

    texts = []
    for seed in (11, 12):  # the second takes the name of the first
        steering = steer_at(lm, "ffn_out", layer=2, seed=seed).at(9)
        assert put(steering).status_code == 200
        answer = client.post("completions", json=asked(PROMPTS[2], model="base+new")).json()
        texts.append(answer["choices"][0]["text"])
        assert texts[-1] == text_of(lm, PROMPTS[2], steering)
    assert len(set(texts)) == 2
    assert "base+new" in [one["id"] for one in client.get("models").json()["data"]]
    nowhere = put(steer_at(lm, "attn_out"))
    assert nowhere.status_code == 400
    assert "--hook attn_out" in nowhere.json()["error"]["message"]
    assert client.delete("steerings/new", headers=CHANGE).status_code == 200
    assert client.post("completions", json=asked("a", model="base+new")).status_code == 404


@pytest.mark.parametrize(("name", "kl"), [("joy", 0.02), ("calm", 0.05)])
def test_a_budget_finds_its_dial_for_each_prompt(
    client: httpx.Client, lm: tt.LanguageModel, steerings: dict[str, tt.Steering],
    name: str, kl: float,
) -> None:  # fmt: skip
    """At the dial that is told the next token is so many nats off, as transformers measures it, or
    the dial is at its end; and what is written is what is written at that dial."""

    def ask(prompt: str) -> dict[str, Any]:
        answer = client.post("completions", json=asked(prompt, model=f"base+{name}@kl={kl}"))
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, PROMPTS))
    steering = steerings[name]
    for prompt, choice in zip(PROMPTS, found, strict=True):
        dial = choice["steering"][0]["dial"]
        nats = kl_at(lm, steering, prompt, dial)
        ends = dial == pytest.approx(steering.dial.range[1])
        assert nats == pytest.approx(kl, rel=0.02) or (ends and nats < kl), (nats, dial)
        assert choice["text"] == text_of(lm, prompt, steering.at(dial))
    assert len({choice["steering"][0]["dial"] for choice in found}) > 1


def test_who_leaves_frees_a_place(client: httpx.Client) -> None:
    body = asked(PROMPTS[0], model="base+turn", max_tokens=200, stream=True)
    for _ in range(5):
        with client.stream("POST", "completions", json=body) as stream:
            next(stream.iter_lines())
    for _ in range(100):
        counted = client.get(str(client.base_url.join("/metrics"))).text
        if "trimtab_running 0.0" in counted and "trimtab_waiting 0.0" in counted:
            return
        time.sleep(0.2)
    raise AssertionError(counted)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (asked("a", model="base+nobody"), 404, "no steering is called"),
        (asked("a", model="base+late@kl=0.1"), 400, "generated tokens only"),
        (asked("a", model="base+turn@kl=0.1"), 400, "does nothing at no dial"),
        (asked("a", model="base+joy@kl=0"), 400, "above 0 nats"),
        (asked("a", model="base+joy@kl=0.1+calm"), 400, "cannot be stacked"),
        (asked("a", model="base+asked"), 400, "no turn of a chat"),
        (asked("a", steering=[{"name": "joy", "scope": "nowhere"}]), 400, "nowhere"),
        (asked([7] * 300), 400, "tokens"),
        (asked("a", more=1), 400, "more"),
        (asked("a", model="base+joy@3e38"), 400, "not finite"),
        (asked("a", model="base+joy@1e400"), 400, "number"),
    ],
)
def test_what_cannot_be_done_gets_a_line(
    client: httpx.Client, body: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("completions", json=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
    assert client.post("completions", json=asked("a")).status_code == 200
    assert client.get(str(client.base_url.join("/health"))).status_code == 200
