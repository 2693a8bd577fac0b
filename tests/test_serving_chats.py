"""Conversations as the server puts them to the model, whatever their messages have beside a role
and a text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

import trimtab as tt
from seeing import seeing_model, seeing_processor, seeing_tokenizer
from services import Said
from tiny import tiny_model, tiny_tokenizer
from trimtab.serving import Access, Desk, Library, application
from trimtab.serving.jobs import Ended

#: Which shows who speaks, what calls of tools there are, and the tools.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>\n{{ tools | tojson }}{{ eos_token }}\n{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}<|{{ message['role'] }}|>\n"
    "{% if message['name'] is defined %}({{ message['name'] }}) {% endif %}"
    "{% if message['refusal'] is defined %}(refusal) {% endif %}"
    "{{ message['content'] }}{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}"
    "{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KIND = "<s><|system|>\nBe kind.</s>\n"
HI: dict[str, Any] = {"role": "user", "content": "Hi"}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tt.wrap(tiny_model("llama"), tokenizer, "tiny", system="Be kind.")


@pytest.fixture
def engine() -> Said:
    return Said(Ended("stop"))


@pytest.fixture
def client(lm: tt.LanguageModel, engine: Said) -> Iterator[TestClient]:
    desk = Desk(lm, "base", Library(lm), engine, 60.0)
    with TestClient(application(desk, Access(hosts=None))) as opened:
        yield opened


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HI], f"{KIND}<|user|>\nHi</s>\n<|assistant|>\n"),
        ([{**HI, "name": "Ann"}], f"{KIND}<|user|>\n(Ann) Hi</s>\n<|assistant|>\n"),
        ([{**HI, "name": None}], f"{KIND}<|user|>\nHi</s>\n<|assistant|>\n"),
        (
            [{"role": "developer", "content": "Be brief.", "name": "x"}, HI],
            "<s><|system|>\n(x) Be brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
        ),
        # The turn is gone on with, and an answer is sent back as it came.
        (
            [{**HI, "name": "Ann"}, {"role": "assistant", "content": "Well", "refusal": None}],
            f"{KIND}<|user|>\n(Ann) Hi</s>\n<|assistant|>\nWell",
        ),
        (
            [HI, {"role": "assistant", "content": "", "name": "x"}],
            f"{KIND}<|user|>\nHi</s>\n<|assistant|>\n",
        ),
        # One that calls tools is whole.
        (
            [HI, {"role": "assistant", "content": None, "tool_calls": CALLS}],
            f"{KIND}<|user|>\nHi</s>\n<|assistant|>\n"
            '[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]</s>\n'
            "<|assistant|>\n",
        ),
    ],
)
def test_messages_are_put_as_conversations_are(
    client: TestClient,
    lm: tt.LanguageModel,
    engine: Said,
    messages: list[dict[str, Any]],
    expected: str,
) -> None:
    body = {"model": "base", "messages": messages}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert lm.tokenizer.decode(engine.jobs[0].tokens) == expected
    plain = [{"role": one["role"], "content": one["content"] or ""} for one in messages]
    if expected == lm.render(lm.prompts([plain], True)[0]):
        assert engine.jobs[0].tokens == lm.encode(lm.prompts([plain], True))[0]


def test_tools_change_nothing_else(client: TestClient, lm: tt.LanguageModel, engine: Said) -> None:
    begun = {"role": "assistant", "content": "Well"}
    body = {"model": "base", "messages": [HI, begun], "tools": [TOOL]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    told = lm.tokenizer.decode(engine.jobs[0].tokens)
    assert told.startswith('<s><|system|>\n[{"type": "function"')
    assert told.endswith(f"{KIND.removeprefix('<s>')}<|user|>\nHi</s>\n<|assistant|>\nWell")


def test_what_the_server_puts_before_messages_is_not_told(client: TestClient) -> None:
    body = {"model": "base", "messages": [HI, {"role": "tool", "content": "4"}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert said == "the chat template of base refuses these messages: no tools here"


def test_what_is_no_text_is_the_client_s_mistake(client: TestClient) -> None:
    for half in ('{"role": "user", "content": "\\ud800"}',
                 '{"role": "user", "content": "a", "name": "\\ud800"}'):  # fmt: skip
        body = f'{{"model": "base", "messages": [{half}]}}'
        kind = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content=body, headers=kind)
        assert answer.status_code == 400


def test_words_that_stand_for_an_image_are_refused_where_none_comes() -> None:
    seeing = tt.wrap(seeing_model(), seeing_tokenizer(), "seeing", processor=seeing_processor())
    engine, text = Said(Ended("stop")), "a <img> b"
    ids = list(seeing.tokenizer(text)["input_ids"])
    assert not seeing.image_tokens.isdisjoint(ids)
    desk = Desk(seeing, "base", Library(seeing), engine, 60.0)
    with TestClient(application(desk, Access(hosts=None))) as client:
        for route, more in (
            ("/v1/completions", {"prompt": text}),
            ("/v1/completions", {"prompt": ["a", text]}),
            ("/v1/completions", {"prompt": ids}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
            ("/v1/responses", {"input": text}),
        ):
            answer = client.post(route, json={"model": "base", **more})
            assert answer.status_code == 400, (route, more)
            assert "stand for an image" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"model": "base", "prompt": "a"}).is_success
