"""Answers that do not come to their end: late, cut off, or nobody waits for them."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
from fastapi.testclient import TestClient

import trimtab as tt
from helpers import PROMPTS, language_model
from services import Said, listening, wait_for
from trimtab.serving import Access, Desk, Elsewhere, Library, application, elsewhere
from trimtab.serving.choosing import Settings
from trimtab.serving.elsewhere import Given
from trimtab.serving.jobs import BrokenError, Ended, GoneError, Job, Piece, Told

TEXT: dict[str, Any] = {"model": "base", "prompt": PROMPTS[0]}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"model": "base", "input": "Hi"},
}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@contextmanager
def served(lm: tt.LanguageModel, engine: Said) -> Iterator[TestClient]:
    desk = Desk(lm, "base", Library(lm), engine, 60.0)
    with TestClient(application(desk, Access(hosts=None))) as opened:
        yield opened


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("reason", "status"), [("timeout", 504), ("closed", 503)])
def test_an_answer_that_is_cut_off_never_looks_whole(
    lm: tt.LanguageModel, route: str, reason: Any, status: int
) -> None:
    body, streamed = ROUTES[route], {**ROUTES[route], "stream": True}
    with served(lm, Said(Ended(reason))) as client:
        for asked in (body, streamed):
            answer = client.post(route, json=asked)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == status
    with served(lm, Said(Piece("Some", ()), Ended(reason))) as client:
        assert client.post(route, json=body).status_code == status
        answer = client.post(route, json=streamed)
        assert answer.status_code == 200
        *_, last = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == status
        assert "Some" in answer.text
        for whole in ("[DONE]", "length", "response.completed", "response.incomplete"):
            assert whole not in answer.text


@pytest.mark.parametrize("route", ROUTES)
def test_who_leaves_before_the_first_piece_is_noticed(lm: tt.LanguageModel, route: str) -> None:
    engine = Said()  # and nothing
    app = application(Desk(lm, "base", Library(lm), engine, 60.0), Access())
    with listening(app) as address:
        for count, more in enumerate(({}, {"stream": True}), 1):
            client = HTTPConnection(address.removeprefix("http://"))
            kind = {"Content-Type": "application/json"}
            client.request("POST", route, json.dumps({**ROUTES[route], **more}), kind)
            wait_for(partial(arrived, engine, count))
            client.close()
            assert engine.jobs[-1].left.wait(30)
        left = f'trimtab_requests_total{{route="{route}",status="499"}} 2.0'
        wait_for(lambda: left in httpx.get(f"{address}/metrics").text)


class _Slow:
    """A way into an engine that takes a while to give back what a job had."""

    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.given_back = threading.Event()

    def check(self, config: Any) -> None:
        pass

    async def begin(self, llm: Any) -> None:
        pass

    @asynccontextmanager
    async def given(self, job: Job) -> AsyncIterator[Given]:
        job.began = time.monotonic()
        try:
            await asyncio.Event().wait()
            yield Given()
        finally:
            await asyncio.sleep(5 * elsewhere._LOOK)
            self.given_back.set()

    def close(self) -> None:
        pass


class _Started(Elsewhere):
    """An engine that has started, as far as anybody sees."""

    async def _open(self, model: str, arguments: dict[str, Any]) -> None:
        self._llm = SimpleNamespace(errored=False, shutdown=lambda: None)
        self._watcher = asyncio.create_task(self._watch())


@pytest.mark.parametrize("late", [False, True])
def test_what_a_job_had_is_given_back_whole(lm: tt.LanguageModel, late: bool) -> None:
    way, told = _Slow(), list[Told]()
    engine = _Started(lm, "model", way, {})
    deadline = time.monotonic() if late else None
    job = Job([1], tuple, Settings(4, 0.0), told.append, deadline)
    engine.submit(job)
    wait_for(lambda: job.began is not None)
    if not late:
        job.left.set()
    assert way.given_back.wait(30)
    wait_for(lambda: not engine.running)
    engine.close()
    assert told == ([Ended("timeout")] if late else [])


def test_of_vllms_errors_clients_hear_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class VLLMClientError(Exception):
        pass

    class EngineDeadError(Exception):
        pass

    for name, error in (
        ("vllm.exceptions", VLLMClientError), ("vllm.v1.engine.exceptions", EngineDeadError),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{error.__name__: error}))
    theirs = elsewhere._in_words(VLLMClientError("top_k must be so\nand more"))
    assert (type(theirs), str(theirs)) == (tt.TrimtabError, "top_k must be so")
    ours = elsewhere._in_words(ValueError("/srv/models/secret is broken"))
    assert (type(ours), str(ours)) == (BrokenError, "the engine failed (ValueError)")
    assert isinstance(elsewhere._in_words(EngineDeadError()), GoneError)
    refused = tt.TrimtabError("no such steering")
    assert elsewhere._in_words(refused) is refused


def arrived(engine: Said, count: int) -> bool:
    return len(engine.jobs) == count
