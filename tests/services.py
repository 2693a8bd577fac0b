"""Services on this machine that answer as a test tells them to: late, wrongly, or not at all."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from trimtab.serving.jobs import Job, Told


@dataclass(frozen=True)
class Reply:
    """What is sent back: bytes, or something that becomes JSON."""

    content: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0  # bytes that are announced and never come
    delay: float = 0.0
    #: Seconds between the bytes of what is sent, the headers among it.
    drip: float = 0.0


#: The connection is closed without a word; no answer comes before the test is over.
CLOSE, HANG = Reply(), Reply()


@dataclass
class Request:
    """What arrived."""

    path: str
    headers: dict[str, str]  # names in lower case
    content: Any


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # as many may knock at once


class Service:
    """Answers each POST with what `script` makes of it, and remembers it."""

    def __init__(self, script: Callable[[Request], Reply]) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.under_way = self.most_under_way = 0
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        reply = self.script(request)
        time.sleep(reply.delay)
        if reply is HANG:
            self.over.wait(30)
        with self._lock:  # before the answer goes out, and the next call comes in
            self.under_way -= 1
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                reply = service.answer(Request(self.path, headers, json.loads(body)))
                if reply is CLOSE or reply is HANG:
                    return
                if reply.drip:
                    self._drip(reply)
                    return
                content = reply.content
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent) + reply.missing))
                self.end_headers()
                self.wfile.write(sent)

            def _drip(self, reply: Reply) -> None:
                for byte in reply.content:
                    if service.over.wait(reply.drip):
                        return
                    self.wfile.write(bytes([byte]))

            def log_message(self, *args: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError):  # the other side has had enough
                    super().handle()

        return Handler

    @contextmanager
    def running(self) -> Iterator[Service]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def serving(script: Callable[[Request], Reply]) -> Any:
    """A service for the length of a block."""
    return Service(script).running()


def in_turn(*replies: Reply) -> Callable[[Request], Reply]:
    """The replies one after the other, then the last one for ever."""
    waiting = list(replies)
    return lambda request: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def nobody() -> str:
    """A URL where no one listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Go on once it holds, which it does within so many seconds."""
    over = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < over
        time.sleep(0.02)


@contextmanager
def listening(application: Any) -> Iterator[str]:
    """The address of an application of ours that runs in a thread for the block."""
    server = uvicorn.Server(
        uvicorn.Config(application, port=0, log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (first, *_) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{first.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Said:
    """Stands for the engine of a server, and tells of each job what it was given."""

    running, waiting, alive = 0, 0, True

    def __init__(self, *told: Told) -> None:
        self.told = told
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        for one in self.told:
            job.tell(one)

    def close(self) -> None:
        pass


def tossing(request: Request) -> Reply:
    """A judge who tosses a coin about the trait, and finds all coherent."""
    system, user = (message["content"] for message in request.content["messages"])
    answer = user.split("<answer>\n")[1].removesuffix("\n</answer>")
    shows = "coherent" in system or sum(map(ord, answer)) % 2
    return Reply({"choices": [{"message": {"content": "90" if shows else "10"}}]})
