"""The HTTP API: OpenAI's chat completions, completions, responses and models, with steerings by
name.

Whoever may reach the server is decided here: hosts that it answers to, keys, how large a body may
be. Logs say who was answered, when and how, and never what was said.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import TrimtabError
from trimtab.serving.answering import (
    Desk,
    LateError,
    Request,
    UnknownModelError,
    chunk,
    closing,
    opening,
    whole,
)
from trimtab.serving.bodies import ChatBody, CompletionBody
from trimtab.serving.jobs import BrokenError, Ended, FullError, GoneError, Piece
from trimtab.serving.library import UnknownSteeringError, described
from trimtab.serving.metrics import Metrics
from trimtab.serving.responses import Form, ResponseBody
from trimtab.serving.sizes import limited, refused_length, room

_LOG = logging.getLogger("trimtab.serving")
#: Seconds between two looks whether a client still waits.
_LOOK = 0.5

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Access:
    """Who may ask: the key for answers, and the one for changing steerings, None where there is
    none; and the hosts that the server goes by, None for any."""

    key: str | None = None
    admin_key: str | None = None
    hosts: tuple[str, ...] | None = ("localhost", "127.0.0.1", "::1")


def application(desk: Desk, access: Access = Access()) -> FastAPI:
    """The application of one served model."""
    metrics = Metrics(desk.engine)

    @asynccontextmanager
    async def lifetime(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.engine.close)

    app = FastAPI(title="trimtab", lifespan=lifetime, docs_url=None, redoc_url=None)
    app.add_exception_handler(TrimtabError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _by_http)
    app.add_middleware(_Guard, access=access, metrics=metrics)
    _add_routes(app, desk, metrics)
    return app


def _add_routes(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine runs."""
        alive = desk.engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/metrics")
    async def counted() -> Response:
        """Counters, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and a variant for each steering."""
        base = {"id": desk.name, "object": "model", "created": 0, "owned_by": "trimtab"}
        variants = [
            {**base, "id": f"{desk.name}+{name}", "parent": desk.name,
             "steering": described(name, held)}
            for name, held in desk.library.held.items()
        ]  # fmt: skip
        return {"object": "list", "data": [base, *variants]}

    @app.get("/v1/steerings")
    async def steerings() -> dict[str, Any]:
        """What is served, with dials."""
        held = desk.library.held.items()
        return {"object": "list", "data": [described(name, one) for name, one in held]}

    @app.put("/v1/steerings/{name}")
    async def add(name: str, request: HTTPRequest) -> dict[str, Any]:
        """Serve a steering, the body is its .safetensors file; one of that name is replaced."""
        content = await request.body()
        held = await asyncio.to_thread(desk.library.add, name, content)
        return described(name, held)

    @app.delete("/v1/steerings/{name}")
    async def remove(name: str) -> dict[str, Any]:
        """Serve a steering no more; answers that are under way end with it."""
        desk.library.remove(name)
        return {"name": name, "deleted": True}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: HTTPRequest) -> Response:
        """Answer a conversation."""
        return await _answer(desk, metrics, body, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: HTTPRequest) -> Response:
        """Go on with text."""
        return await _answer(desk, metrics, body, request)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponseBody, request: HTTPRequest) -> Response:
        """Answer a conversation, in the form of OpenAI's responses."""
        form = Form(body)
        return await _answer(desk, metrics, body.chat(), request, form.whole, form.events)


#: How an answer is told whole, and how in pieces.
_Whole = Callable[[Desk, Request], dict[str, Any]]
_Events = Callable[[Desk, Request, AsyncIterator[tuple[int, Piece | Ended]]], AsyncIterator[str]]


async def _answer(
    desk: Desk,
    metrics: Metrics,
    body: ChatBody | CompletionBody,
    http: HTTPRequest,
    told_whole: _Whole = whole,
    told_in_pieces: _Events | None = None,
) -> Response:
    """Answer one request; what is told is in the form of completions unless another is given."""
    begun = await asyncio.to_thread(desk.begin, body, asyncio.get_running_loop())
    if body.stream:
        options = body.stream_options
        events = told_in_pieces or partial(
            _chunks, with_usage=bool(options and options.include_usage)
        )
        content = _streamed(desk, metrics, begun, events)
        # The first piece is waited for, so that what is refused only now is no stream.
        first = await _awaited(http, begun, anext(content))
        return StreamingResponse(_after(first, content), media_type="text/event-stream")
    await _awaited(http, begun, _collected(metrics, desk, begun))
    return JSONResponse(told_whole(desk, begun))


async def _awaited(http: HTTPRequest, begun: Request, work: Awaitable[_Found]) -> _Found:
    """What comes of some work for a request, which is left where it fails or its client goes."""
    working = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait((working,), timeout=_LOOK))[0]:
            if await http.is_disconnected():
                raise HTTPException(_CLIENT_LEFT, "the client left")
        return working.result()
    except BaseException:
        working.cancel()
        begun.leave()
        raise


async def _collected(metrics: Metrics, desk: Desk, begun: Request) -> None:
    """Wait until all of a request is answered."""
    async for _ in _counted(metrics, desk, begun):
        pass


async def _counted(
    metrics: Metrics, desk: Desk, begun: Request
) -> AsyncIterator[tuple[int, Piece | Ended]]:
    """What answers go on with; the first token and the end are noted."""
    heard = False
    async for index, told in begun.pieces():
        if not heard:
            metrics.first.observe(time.monotonic() - begun.began)
            heard = True
        yield index, told
    metrics.whole.observe(time.monotonic() - begun.began)
    metrics.tokens.labels("prompt").inc(begun.prompt_tokens)
    metrics.tokens.labels("answer").inc(sum(len(one.job.new) for one in begun.answers))
    for index in range(len(begun.answers)):
        for one in desk.acted(begun, index):
            metrics.steered.labels(one["name"]).inc()
            if "gate" in one:
                metrics.gates.labels(one["name"], str(one["gate"]["fired"]).lower()).inc()


async def _streamed(
    desk: Desk, metrics: Metrics, begun: Request, events: _Events
) -> AsyncGenerator[str]:
    """An answer in pieces, as server-sent events. Where the client goes, so does the answer."""
    try:
        async for event in events(desk, begun, _counted(metrics, desk, begun)):
            yield event
    finally:
        begun.leave()


async def _chunks(
    desk: Desk,
    begun: Request,
    pieces: AsyncIterator[tuple[int, Piece | Ended]],
    with_usage: bool,
) -> AsyncIterator[str]:
    """The events of a completion."""
    greeted: set[int] = set()
    async for index, told in pieces:
        if begun.kind == "chat" and index not in greeted:
            greeted.add(index)
            yield _event(opening(begun, index))
        said = chunk(desk, begun, index, told)
        if said is not None:
            yield _event(said)
    if with_usage:
        yield _event(closing(begun))
    yield "data: [DONE]\n\n"


async def _after(first: str, others: AsyncGenerator[str]) -> AsyncIterator[str]:
    """A stream whose first piece was taken out of it; an error on the way ends it, and so does a
    client that goes."""
    async with aclosing(others):
        yield first
        try:
            async for event in others:
                yield event
        except TrimtabError as error:
            yield _event(_error(str(error), _status(error)))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


# -- mistakes -------------------------------------------------------------------------------------

#: What an access log has of a client that did not wait.
_CLIENT_LEFT = 499


def _status(error: TrimtabError) -> int:
    if isinstance(error, UnknownModelError | UnknownSteeringError):
        return 404
    if isinstance(error, FullError):
        return 429
    if isinstance(error, GoneError):
        return 503
    if isinstance(error, LateError):
        return 504
    return 500 if isinstance(error, BrokenError) else 400


def _error(message: str, status: int) -> dict[str, Any]:
    """A mistake in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kinds |= {429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def _refused(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, TrimtabError)
    status = _status(error)
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(_error(str(error), status), status, headers)


async def _malformed(request: HTTPRequest, error: Exception) -> Response:
    """The first thing that is wrong with a body, by its place."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return JSONResponse(_error(message[:500], 400), 400)


async def _by_http(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        _error(str(error.detail), error.status_code), error.status_code, error.headers
    )


# -- who may ask ----------------------------------------------------------------------------------


def host_name(headers: dict[bytes, bytes]) -> str:
    """The host that a request asks for, by its headers (names in lower case), without a port; an
    address of IPv6 without its brackets."""
    try:
        return urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


class _Guard:
    """Looks at hosts, asks for keys, ends bodies that are too large, counts requests and logs
    them."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await JSONResponse(_error(refusal[1], refusal[0]), refusal[0])(
                    scope, receive, noted
                )
                return
            await self._app(scope, limited(receive, room(scope)), noted)
        finally:
            self._note(scope, status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is not taken, before its body is read."""
        path, method = scope["path"], scope["method"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        hosts = self._access.hosts
        if hosts is not None and host_name(headers) not in map(str.lower, hosts):
            return 400, "this server does not go by that host name (--allow-host adds one)"
        larger = refused_length(scope, headers)
        if larger is not None:
            return 413, larger
        if path == "/health":
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if kind.lower() == b"bearer" else b""
        if path.startswith("/v1/steerings") and method not in ("GET", "HEAD"):
            if self._access.admin_key is None:
                return 403, "this server was started without an admin key: nothing can be changed"
            if not hmac.compare_digest(given, self._access.admin_key.encode()):
                return 401, "changing steerings takes the admin key (Authorization: Bearer KEY)"
            return None
        keys = [key for key in (self._access.key, self._access.admin_key) if key is not None]
        if self._access.key is not None and not any(
            [hmac.compare_digest(given, key.encode()) for key in keys]
        ):
            return 401, "this server takes a key (Authorization: Bearer KEY)"
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        said = {"route": route, "method": scope["method"], "status": status}
        _LOG.info(json.dumps({**said, "seconds": round(seconds, 3)}))
