"""Bodies that are wrong in many places, and what is said of them: the first mistake, at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from helpers import language_model
from services import Said
from trimtab.serving import Access, Desk, Library, application
from trimtab.serving.bodies import ChatBody, CompletionBody
from trimtab.serving.jobs import Ended
from trimtab.serving.responses import ResponseBody

COUNT = 5000
STRANGE = {f"x{i}": 1 for i in range(COUNT)}
TEXT: dict[str, Any] = {"model": "base", "prompt": "Hi"}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
RESPONSE: dict[str, Any] = {"model": "base", "input": "Hi"}


@pytest.fixture
def engine() -> Said:
    return Said(Ended("stop"))


@pytest.fixture
def client(engine: Said) -> Iterator[TestClient]:
    lm = language_model("llama")
    app = application(Desk(lm, "base", Library(lm), engine, 60.0), Access(None, "changes", None))
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {**TEXT, "prompt": [-1] * COUNT}),
        (CompletionBody, {**TEXT, "prompt": [[-1] * COUNT] * 60}),
        (CompletionBody, {**TEXT, "prompt": [[]] * COUNT}),
        (CompletionBody, {**TEXT, **STRANGE}),
        (CompletionBody, {**TEXT, "steering": [STRANGE]}),
        (CompletionBody, {**TEXT, "logit_bias": STRANGE}),
        (CompletionBody, {**TEXT, "stop": [1] * COUNT}),
        (ChatBody, {**CHAT, "messages": [{}] * COUNT}),
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": [{}] * 300}] * 100}),
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": [STRANGE]}]}),
        (ChatBody, {**CHAT, "stream_options": STRANGE}),
        (ChatBody, {**CHAT, "tools": [1] * 128}),
        (ResponseBody, {**RESPONSE, "input": [{"role": "user", "content": [{}] * 300}] * 100}),
        (ResponseBody, {**RESPONSE, "include": [1] * COUNT}),
        (ResponseBody, {**RESPONSE, "text": STRANGE}),
    ],
)
def test_few_mistakes_are_kept_of_a_body(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """Each that is kept takes a kilobyte and the time of all other requests."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() < 10


def test_many_token_ids_are_read(client: TestClient) -> None:
    """Which every form of a prompt but one takes for mistakes."""
    body = CompletionBody.model_validate({**TEXT, "prompt": [11] * COUNT})
    assert body.prompt == [11] * COUNT
    answer = client.post("/v1/completions", json={**TEXT, **STRANGE})
    assert answer.status_code == 400
    assert "fields" in answer.json()["error"]["message"]


def test_parts_of_a_response_may_be_longer_together_than_a_text(client: TestClient) -> None:
    """As those of a chat may; that the model has not the room is said in its turn."""
    part = {"type": "input_text", "text": "a" * 600_000}
    body = {**RESPONSE, "input": [{"role": "user", "content": [part, part]}]}
    answer = client.post("/v1/responses", json=body)
    assert answer.status_code == 400
    assert "exceed" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "metadata",
    ['{"a": NaN}', '{"a": "\\ud800"}', '{"a": {"b": 1}}', f'{{"{"k" * 65}": "v"}}',
     f'{{"k": "{"v" * 513}"}}', str({f"{i}": "v" for i in range(17)}).replace("'", '"')],
)  # fmt: skip
def test_what_is_told_again_with_a_response_is_read_before(
    client: TestClient, engine: Said, metadata: str
) -> None:
    body = f'{{"model": "base", "input": "Hi", "metadata": {metadata}}}'
    kind = {"Content-Type": "application/json"}
    answer = client.post("/v1/responses", content=body, headers=kind)
    assert answer.status_code == 400
    assert "metadata" in answer.json()["error"]["message"]
    assert not engine.jobs
    kept = {"topic": "é" * 512}
    assert (
        client.post("/v1/responses", json={**RESPONSE, "metadata": kept}).json()["metadata"] == kept
    )


@pytest.mark.parametrize(
    "route", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/steerings/joy"]
)
def test_a_body_that_does_not_say_how_long_it_is_may_be_no_longer(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr("trimtab.serving.sizes._LARGEST_BODY", 1000)
    monkeypatch.setattr("trimtab.serving.sizes.LARGEST", 1000)

    def pieces() -> Iterator[bytes]:
        yield b'{"model": "base", "prompt": "'
        yield from [b"a" * 500] * 3
        yield b'"}'

    method = "PUT" if route.endswith("joy") else "POST"
    headers = {"Content-Type": "application/json", "Authorization": "Bearer changes"}
    answer = client.request(method, route, content=pieces(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "a request may have 1000 bytes"
