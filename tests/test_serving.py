"""The API of a served model: what each request gets is what the attached steering writes, whatever
runs beside it."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

import trimtab as tt
from helpers import PROMPTS, language_model, steer_at
from trimtab.dials.rule import Within
from trimtab.serving import Access, Desk, Engine, Library, Limits, application

NEW = 8
KEYS = Access("answers", "changes", hosts=None)
ASK = {"Authorization": "Bearer answers"}
CHANGE = {"Authorization": "Bearer changes"}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def steerings(lm: tt.LanguageModel) -> dict[str, tt.Steering]:
    return {
        "joy": steer_at(lm, "resid", seed=2),
        "calm": steer_at(lm, "heads", "Scale", seed=3),
        "late": steer_at(lm, "resid", seed=5).scoped("generated[1:4]"),
        "asked": steer_at(lm, "resid", seed=6).scoped("prompt"),
    }


@pytest.fixture(scope="module")
def folder(steerings: dict[str, tt.Steering], tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("steerings")
    for name, steering in steerings.items():
        steering.save(room / f"{name}.safetensors")
    return room


@pytest.fixture
def client(lm: tt.LanguageModel, folder: Path) -> Iterator[TestClient]:
    yield from served(lm, folder)


def served(
    lm: tt.LanguageModel, folder: Path, limits: Limits = Limits(), **desk: Any
) -> Iterator[TestClient]:
    library = Library(lm)
    library.read(str(folder))
    desk = {"timeout": 60.0, **desk}
    with TestClient(
        application(Desk(lm, "base", library, Engine(lm, limits), **desk), KEYS)
    ) as opened:
        opened.headers = ASK
        yield opened


def asked(prompt: Any, /, **more: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}


def text_of(lm: tt.LanguageModel, prompt: str, *steerings: tt.Steering, new: int = NEW) -> str:
    """What generate writes of it alone."""
    (done,) = lm.generate([prompt], chat=False, steering=[list(steerings)], max_new_tokens=new)
    return done.text


def test_variants_and_bodies_are_the_attached_steerings(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    joy, calm = steerings["joy"], steerings["calm"]
    late = steerings["late"]
    cases: list[tuple[dict[str, Any], tuple[tt.Steering, ...]]] = [
        ({}, ()),
        ({"model": "base+joy"}, (joy,)),
        ({"model": "base+joy@4"}, (joy.at(4),)),
        ({"model": "base+joy@-3.5+calm@2"}, (joy.at(-3.5), calm.at(2))),
        ({"steering": [{"name": "joy", "dial": 4, "scope": "generated"}]},
         (joy.at(4).scoped("generated"),)),
        ({"model": "base+late@6"}, (late.at(6),)),
        ({"model": "base+asked@6"}, (steerings["asked"].at(6),)),
    ]  # fmt: skip
    texts = set()
    for prompt in PROMPTS[:2]:
        for more, expected in cases:
            answer = client.post("/v1/completions", json=asked(prompt, **more)).json()
            assert answer["choices"][0]["text"] == text_of(lm, prompt, *expected), more
            assert [one["dial"] for one in answer["choices"][0]["steering"]] == [
                s.setting for s in expected
            ]
            texts.add((prompt, answer["choices"][0]["text"]))
    assert len(texts) > 8


def test_a_budget_turns_the_dial_for_the_prompt(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    (done,) = lm.generate(
        PROMPTS[:1], chat=False, steering=tt.within(steerings["joy"], kl=0.2), max_new_tokens=NEW
    )
    for more in ({"model": "base+joy@kl=0.2"}, {"steering": [{"name": "joy", "kl": 0.2}]}):
        answer = client.post("/v1/completions", json=asked(PROMPTS[0], **more)).json()
        assert answer["choices"][0]["text"] == done.text
        dial = answer["choices"][0]["steering"][0]["dial"]
        assert dial == pytest.approx(float(done.steering[0].split("=")[1]), rel=1e-4)


def test_a_budget_is_searched_for_once_for_all_answers_to_a_prompt(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    dials = Within.dials

    def counted(rule: Any, lm: Any, texts: Any, force: bool) -> Any:
        searched.append(len(texts))
        return dials(rule, lm, texts, force)

    monkeypatch.setattr(Within, "dials", counted)
    body = asked(PROMPTS[:2], model="base+joy@kl=0.2", n=3)
    choices = client.post("/v1/completions", json=body).json()["choices"]
    assert sum(searched) == 2
    found = [choice["steering"][0]["dial"] for choice in choices]
    assert found[:3] == [found[0]] * 3
    assert found[3:] == [found[3]] * 3
    assert found[0] != found[3]


def test_what_acted_is_said(client: TestClient, lm: tt.LanguageModel) -> None:
    body = asked(PROMPTS[0], model="base+late@6+joy@1")
    answer = client.post("/v1/completions", json=body).json()
    late, joy = answer["choices"][0]["steering"]
    prompt = len(lm.tokenizer(PROMPTS[0])["input_ids"])
    assert late["tokens"] == {"prompt": 0, "answer": 3}
    assert joy["tokens"] == {"prompt": prompt, "answer": NEW - 1}
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == NEW


def test_everything_at_once_is_what_each_is_alone(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    draw = random.Random(0)
    asked_for = []
    for _ in range(60):
        prompt, name = draw.choice(PROMPTS), draw.choice([None, *steerings])
        dial, new = draw.choice([-4.0, 1.0, 5.0]), draw.randrange(1, 14)
        asked_for.append((prompt, name, dial, new, draw.random() < 0.3))

    def ask(case: tuple[Any, ...]) -> str:
        prompt, name, dial, new, streamed = case
        model = f"base+{name}@{dial:g}" if name else "base"
        body = asked(prompt, model=model, max_tokens=new, stream=streamed)
        if not streamed:
            text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return text
        return "".join(
            choice["text"] for event in streamed_events(client, body) for choice in event["choices"]
        )

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, asked_for))
    for (prompt, name, dial, new, _), text in zip(asked_for, found, strict=True):
        own = [steerings[name].at(dial)] if name else []
        assert text == text_of(lm, prompt, *own, new=new), (prompt, name, dial, new)


def streamed_events(client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with client.stream("POST", route, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_streams_end_with_what_acted_and_how_many_tokens(client: TestClient) -> None:
    body = asked(PROMPTS[0], model="base+joy@2", stream=True)
    *pieces, last = streamed_events(client, {**body, "stream_options": {"include_usage": True}})
    assert [choice["finish_reason"] for choice in pieces[-1]["choices"]] == ["length"]
    assert last["choices"] == []
    assert pieces[-1]["choices"][0]["steering"][0]["dial"] == 2
    assert last["usage"]["completion_tokens"] == NEW


def test_stop_texts_end_an_answer_and_are_not_in_it(
    client: TestClient, lm: tt.LanguageModel
) -> None:
    whole = text_of(lm, PROMPTS[0], new=16)
    stop = whole[7:11]
    expected = whole[: whole.index(stop)]
    body = asked(PROMPTS[0], max_tokens=16, stop=["never there", stop])
    answer = client.post("/v1/completions", json=body).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
    pieces = streamed_events(client, {**body, "stream": True})
    assert "".join(c["text"] for piece in pieces for c in piece["choices"]) == expected


def test_seeds_repeat_and_answers_differ(client: TestClient) -> None:
    body = asked(PROMPTS[0], temperature=1.5, seed=7, n=3)
    first, again = (client.post("/v1/completions", json=body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) == 3


def test_logprobs_are_those_of_the_steered_model(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering]
) -> None:
    logits = lm.logits(PROMPTS[:1], steering=steerings["joy"].at(3))[0]
    best = logits.log_softmax(-1).topk(2)
    body = asked(PROMPTS[0], model="base+joy@3", logprobs=2, max_tokens=1)
    told = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] == pytest.approx(float(best.values[0]), abs=1e-4)
    assert sorted(told["top_logprobs"][0].values(), reverse=True) == pytest.approx(
        best.values.tolist(), abs=1e-4
    )


def test_penalties_and_biases_are_carried_out(client: TestClient, lm: tt.LanguageModel) -> None:
    plain = client.post("/v1/completions", json=asked(PROMPTS[0])).json()["choices"][0]["text"]
    for more in ({"frequency_penalty": 2}, {"repetition_penalty": 5.0}):
        body = asked(PROMPTS[0], max_tokens=24, **more)
        base = text_of(lm, PROMPTS[0], new=24)
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] != base
    body = asked(PROMPTS[0], logit_bias={"60": 100}, max_tokens=3)
    told = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert told == lm.tokenizer.decode([60, 60, 60], skip_special_tokens=True) != plain


def test_steerings_change_while_answers_run(
    client: TestClient, lm: tt.LanguageModel, steerings: dict[str, tt.Steering], tmp_path: Path
) -> None:
    other = steer_at(lm, "resid", seed=9)
    content = other.save(tmp_path / "x.safetensors").read_bytes()
    assert client.put("/v1/steerings/joy", content=content).status_code == 401
    wanted = [text_of(lm, PROMPTS[0], one.at(5), new=40) for one in (steerings["joy"], other)]

    def ask() -> str:
        body = asked(PROMPTS[0], model="base+joy@5", max_tokens=40)
        text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(8) as pool:
        early = [pool.submit(ask) for _ in range(8)]
        time.sleep(0.05)
        made = client.put("/v1/steerings/joy", content=content, headers=CHANGE)
        late = [pool.submit(ask) for _ in range(4)]
        texts = [one.result() for one in early]
        assert {one.result() for one in late} == {wanted[1]}
    assert made.json()["name"] == "joy"
    assert set(texts) <= set(wanted)  # of one or the other, never a mixture
    assert client.delete("/v1/steerings/joy", headers=CHANGE).json()["deleted"]
    gone = client.post("/v1/completions", json=asked(PROMPTS[0], model="base+joy@5"))
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other"}, 404, "no model"),
        ({"model": "base+nobody"}, 404, "no steering"),
        ({"model": "base+../joy"}, 400, "no name"),
        ({"model": "base+joy@1e400"}, 400, "a dial must be a number"),
        ({"model": "base+joy@nan"}, 400, "strength"),
        ({"model": "base+joy@kl=-1"}, 400, "budget"),
        ({"model": "base+joy@kl=0.1+calm"}, 400, "cannot be stacked"),
        ({"model": "base+joy", "steering": [{"name": "calm"}]}, 400, "not in both"),
        ({"steering": [{"name": "joy", "dial": 1, "kl": 0.1}]}, 400, "not both"),
        ({"steering": [{"name": "joy", "scope": "nonsense"}]}, 400, "nonsense"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "exceed"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 1e-40}, 400, "temperature is 0, which is greedy, or at least 0.001"),
        ({"repetition_penalty": 1e-300}, 400, "repetition_penalty is at least 0.01"),
        ({"logit_bias": {"999999999": 1}}, 400, "logit_bias has 999999999"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, "token ids"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"n": 1000}, 400, "n"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    client: TestClient, body: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("/v1/completions", json=asked(PROMPTS[0], **body))
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json=asked(PROMPTS[0])).status_code == 200


def test_bodies_that_are_no_json_or_too_large(client: TestClient) -> None:
    kind = {"Content-Type": "application/json"}
    for content, status in (
        (b"{", 400), (b"[]", 400), (b'{"model": "base", "prompt": "a", "temperature": NaN}', 400),
        (b'{"model": "base", "prompt": "a", "temperature": 1e400}', 400),
        (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413),
    ):  # fmt: skip
        found = client.post("/v1/completions", content=content, headers={**ASK, **kind})
        assert found.status_code == status, content[:60]
        assert "error" in found.json()
    assert client.get("/health").json() == {"status": "ok"}


def test_keys(client: TestClient) -> None:
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/health", headers={"Authorization": ""}).status_code == 200
    assert client.delete("/v1/steerings/joy").status_code == 401  # the key for answers


def test_models_are_listed_with_dials(client: TestClient) -> None:
    data = client.get("/v1/models").json()["data"]
    assert [one["id"] for one in data] == [
        "base", "base+asked", "base+calm", "base+joy", "base+late",
    ]  # fmt: skip
    assert data[3]["steering"]["dial"]["range"]
    counted = client.get("/metrics").text
    assert "trimtab_running 0.0" in counted


def test_a_steering_of_another_model_is_refused(client: TestClient, tmp_path: Path) -> None:
    other = steer_at(language_model("gpt2"), "resid", seed=1)
    content = other.save(tmp_path / "x.safetensors").read_bytes()
    answer = client.put("/v1/steerings/x", content=content, headers=CHANGE)
    assert answer.status_code == 400
    assert "gpt2" in answer.json()["error"]["message"]
    broken = client.put("/v1/steerings/x", content=content[:-20], headers=CHANGE)
    assert broken.status_code == 400
    assert str(tmp_path) not in broken.text
    assert "/tmp" not in broken.text


def test_as_many_wait_as_may(lm: tt.LanguageModel, folder: Path) -> None:
    for client in served(lm, folder, Limits(rows=1, batches=1, waiting=1)):
        with ThreadPoolExecutor(8) as pool:
            bodies = [asked(PROMPTS[0], max_tokens=60)] * 8
            found = list(pool.map(lambda b: client.post("/v1/completions", json=b), bodies))
        codes = [one.status_code for one in found]
        assert 429 in codes
        assert 200 in codes
        assert set(codes) == {200, 429}


def test_a_server_that_ends_asks_nobody_to_try_again(lm: tt.LanguageModel) -> None:
    engine = Engine(lm)
    with TestClient(application(Desk(lm, "base", Library(lm), engine, 60.0), KEYS)) as client:
        engine.close()
        answer = client.post("/v1/completions", json=asked(PROMPTS[0]), headers=ASK)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the server ends"
    assert "Retry-After" not in answer.headers


def test_an_answer_that_takes_too_long_ends(lm: tt.LanguageModel, folder: Path) -> None:
    for client in served(lm, folder, timeout=0.0):
        assert client.post("/v1/completions", json=asked(PROMPTS[0])).status_code == 504


def test_who_leaves_makes_room(lm: tt.LanguageModel) -> None:
    from trimtab.serving.choosing import Settings
    from trimtab.serving.engine import Ended, Job

    engine, ended = Engine(lm, Limits(rows=1)), threading.Event()
    tokens = list(lm.encode(PROMPTS[:1])[0])
    first = Job(tokens, tuple, Settings(200, 0.0), lambda told: None)
    second = Job(
        tokens,
        tuple,
        Settings(4, 0.0),
        lambda told: ended.set() if isinstance(told, Ended) else None,
    )
    engine.submit(first)
    engine.submit(second)
    first.left.set()
    assert ended.wait(20)
    assert len(first.new) < 200
    engine.close()
    assert not torch.is_inference_mode_enabled()
