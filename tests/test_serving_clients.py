"""A server on a port of its own, as OpenAI's client and others meet it."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

import trimtab as tt
from helpers import PROMPTS, language_model, steer_at
from services import listening, wait_for
from trimtab.serving import Access, Desk, Engine, Library, Limits, application

CHAT: Any = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def joy(lm: tt.LanguageModel) -> tt.Steering:
    return steer_at(lm, "resid", seed=2)


@pytest.fixture(scope="module")
def engine(lm: tt.LanguageModel) -> Engine:
    return Engine(lm, Limits(rows=16))


@pytest.fixture(scope="module")
def address(
    lm: tt.LanguageModel,
    joy: tt.Steering,
    engine: Engine,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    library = Library(lm)
    file = joy.save(tmp_path_factory.mktemp("steerings") / "joy.safetensors")
    library.read(str(file))
    app = application(Desk(lm, "base", library, engine, 60.0), Access())
    with listening(app) as served:
        yield served


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_chats_are_those_of_the_attached_steering(
    client: openai.OpenAI, lm: tt.LanguageModel, joy: tt.Steering
) -> None:
    asked: Any = {"messages": CHAT, "temperature": 0, "max_tokens": 12}
    for model, steering in (("base", None), ("base+joy@4", joy.at(4))):
        (expected,) = lm.generate([CHAT], steering=steering, max_new_tokens=12)
        answer = client.chat.completions.create(model=model, **asked)
        assert answer.choices[0].message.content == expected.text
        stream = client.chat.completions.create(model=model, stream=True, **asked)
        pieces = [piece.choices[0].delta.content or "" for piece in stream]
        assert "".join(pieces) == expected.text
        assert len(pieces) > 3
    body = {"steering": [{"name": "joy", "dial": 4}]}
    answer = client.chat.completions.create(model="base", extra_body=body, **asked)
    assert answer.choices[0].message.content == expected.text


def test_logprobs_and_models_are_read_by_the_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "base+joy"]
    answer = client.chat.completions.create(
        model="base", messages=CHAT, max_tokens=2, logprobs=True, top_logprobs=3, temperature=0
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    for one in told.content:
        assert one.logprob == max(top.logprob for top in one.top_logprobs)
        assert len(one.top_logprobs) == 3


def test_responses_are_those_of_the_attached_steering(
    client: openai.OpenAI, lm: tt.LanguageModel, joy: tt.Steering
) -> None:
    asked: Any = {"temperature": 0, "max_output_tokens": 12}
    told = [{"role": "system", "content": "Be brief."}, *CHAT]
    for model, steering in (("base", None), ("base+joy@4", joy.at(4))):
        (expected,) = lm.generate([told], steering=steering, max_new_tokens=12)
        for given in (CHAT[0]["content"], CHAT, [{**CHAT[0], "type": "message"}]):
            answer = client.responses.create(
                model=model, input=given, instructions="Be brief.", **asked
            )
            assert answer.output_text == expected.text
        assert answer.status == ("completed" if len(expected.tokens) < 12 else "incomplete")
        assert answer.usage is not None
        assert answer.usage.output_tokens == len(expected.tokens)
    body = {"steering": [{"name": "joy", "dial": 4}]}
    events = list(client.responses.create(
        model="base", input=told, stream=True, extra_body=body,
        include=["message.output_text.logprobs"], top_logprobs=2, **asked,
    ))  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(one.delta for one in events if one.type.endswith(".delta")) == expected.text
    assert events[-1].response.output_text == expected.text
    (acted,) = events[-1].response.model_extra["steering"]
    assert acted["name"] == "joy"
    assert acted["dial"] == 4
    (part,) = events[-1].response.output[0].content
    assert len(part.logprobs) == len(expected.tokens)
    assert len(part.logprobs[0].top_logprobs) == 2


def test_a_response_that_needs_more_than_the_model_is_refused(client: openai.OpenAI) -> None:
    tool: Any = {"type": "web_search"}
    for more in ({"previous_response_id": "resp_1"}, {"tools": [tool]}, {"background": True}):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="base", input="Hello", **more)
    # What an answer was is sent back as it came.
    first = client.responses.create(model="base", input="Hello", max_output_tokens=3)
    said: Any = [one.model_dump() for one in first.output]
    turns = [{"role": "user", "content": "Hello"}, *said, {"role": "user", "content": "And?"}]
    assert client.responses.create(model="base", input=turns, max_output_tokens=3).output_text


def test_mistakes_are_the_client_s_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="takes no tools"):
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="base", messages=CHAT, tools=[tool])
    image: Any = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": [image]}]
        )


def test_other_hosts_are_not_answered(address: str) -> None:
    """A page that a browser shows may send requests here under a name of its own."""
    for host in ("evil.example", "evil.example:8000", "[::2]:8000", "[::1", "::1", ""):
        found = httpx.get(f"{address}/v1/models", headers={"Host": host})
        assert found.status_code == 400, host
        assert "--allow-host" in found.json()["error"]["message"]
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        found = httpx.get(f"{address}/v1/models", headers={"Host": host})
        assert found.status_code == 200, host
    counted = httpx.get(f"{address}/metrics").text
    assert 'trimtab_requests_total{route="other",status="400"}' in counted
    simple = {"Content-Type": "text/plain"}
    posted = httpx.post(f"{address}/v1/completions", content="{}", headers=simple)
    assert posted.status_code == 400


def test_a_client_that_goes_makes_room(address: str, engine: Engine) -> None:
    body = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 200, "temperature": 0}
    with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json={**body, "n": 64}, timeout=0.1)
    wait_for(lambda: not (engine.running or engine.waiting))


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_lost_and_nothing_is_wrong(
    count: int, address: str, lm: tt.LanguageModel, joy: tt.Steering, engine: Engine
) -> None:
    """Random steerings, lengths and cancellations, many at once; each answer is its solo run's."""
    draw, known = random.Random(1), {}
    for prompt in PROMPTS:
        for dial in (None, -4.0, 2.0, 6.0):
            own = None if dial is None else joy.at(dial)
            (done,) = lm.generate([prompt], chat=False, steering=own, max_new_tokens=20)
            known[prompt, dial] = list(done.tokens)
    cases = [
        (*draw.choice(list(known)), draw.randrange(1, 21), draw.random()) for _ in range(count)
    ]
    with httpx.Client(base_url=address, timeout=120) as http, ThreadPoolExecutor(32) as pool:

        def ask(case: tuple[str, float | None, int, float]) -> bool:
            prompt, dial, new, luck = case
            model = "base" if dial is None else f"base+joy@{dial:g}"
            body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0}
            if luck < 0.2:  # left at once
                with http.stream("POST", "/v1/completions", json={**body, "stream": True}):
                    return True
            told = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return bool(
                told == lm.tokenizer.decode(known[prompt, dial][:new], skip_special_tokens=True)
            )

        assert all(pool.map(ask, cases))
    wait_for(lambda: not (engine.running or engine.waiting))


@pytest.mark.slow
def test_memory_is_flat_under_load(address: str, engine: Engine) -> None:
    """After a thousand requests the process holds no more than after the first hundreds."""
    process, held = psutil.Process(), []
    with httpx.Client(base_url=address, timeout=120) as http, ThreadPoolExecutor(16) as pool:

        def ask(i: int) -> int:
            model = ("base", "base+joy@2", f"base+joy@{i % 7 + 0.5:g}")[i % 3]
            body = {"model": model, "prompt": PROMPTS[i % 3], "max_tokens": 4 + i % 9}
            return http.post("/v1/completions", json=body).status_code

        for _ in range(4):
            assert set(pool.map(ask, range(300))) == {200}
            gc.collect()
            held.append(process.memory_info().rss / 2**20)
    assert not engine.running
    assert held[-1] - held[0] < 16, held
