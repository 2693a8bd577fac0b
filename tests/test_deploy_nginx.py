"""Two servers behind nginx, as deploy/nginx.conf has them; only where nginx is installed."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from helpers import PROMPTS, language_model, steer_at
from services import listening, nobody
from trimtab.serving import Access, Desk, Engine, Library, Limits, application

SETTINGS = Path(__file__).parents[1] / "deploy" / "nginx.conf"

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


@contextmanager
def proxied(folder: Path, *servers: str) -> Iterator[str]:
    """The address of nginx before two servers: its settings are ours but for ports and paths."""
    text = SETTINGS.read_text(encoding="utf-8")
    for name, url in zip(("first", "second"), servers, strict=True):
        assert f"server {name}:8000;" in text
        text = text.replace(f"server {name}:8000;", f"server {url.removeprefix('http://')};")
    address = nobody()
    host, port = address.removeprefix("http://").split(":")
    text = text.replace("listen 8000;", f"listen {host}:{port};")
    text = text.replace(
        "http {", f"http {{ access_log off; client_body_temp_path {folder}/body;", 1
    )
    file = folder / "nginx.conf"
    file.write_text(f"pid {folder}/pid; daemon off;\n{text}", encoding="utf-8")
    with (folder / "errors").open("wb") as errors:
        words = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(file)]
        process = subprocess.Popen(words, stderr=errors)
    try:
        for _ in range(200):
            assert process.poll() is None, (folder / "errors").read_text()
            try:
                socket.create_connection((host, int(port))).close()
                break
            except OSError:
                time.sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def test_two_servers_answer_as_one(tmp_path: Path) -> None:
    lm = language_model("llama")
    joy = steer_at(lm, "resid", seed=2)
    file = joy.save(tmp_path / "joy.safetensors")
    with ExitStack() as stack:
        servers = []
        for _ in range(2):
            library = Library(lm)
            library.read(str(file))
            engine = Engine(lm, Limits(rows=4))
            servers.append(application(Desk(lm, "base", library, engine, 60.0), Access()))
        first = ExitStack()
        stack.callback(first.close)
        urls = [first.enter_context(listening(servers[0])),
                stack.enter_context(listening(servers[1]))]  # fmt: skip
        address = stack.enter_context(proxied(tmp_path, *urls))
        client = stack.enter_context(httpx.Client(base_url=address, timeout=30))

        def answer(prompt: str) -> httpx.Response:
            body = {"model": "base+joy", "prompt": prompt, "max_tokens": 4, "temperature": 0}
            return client.post("/v1/completions", json=body)

        expected = [
            lm.generate([prompt], chat=False, steering=joy, max_new_tokens=4)[0].text
            for prompt in PROMPTS
        ]
        for prompt, text in zip(PROMPTS, expected, strict=True):
            assert answer(prompt).json()["choices"][0]["text"] == text
        counted = [httpx.get(f"{url}/metrics").text for url in urls]
        assert all('route="/v1/completions",status="200"' in text for text in counted)
        # One of them alone would have what is added here.
        assert client.get("/v1/steerings").status_code == 200
        assert client.post("/v1/steerings", content=b"").status_code == 403
        assert client.delete("/v1/steerings/joy").status_code == 403
        assert client.post("/v1/completions", content=b" " * (5 << 20)).status_code == 413
        first.close()
        for prompt, text in zip(PROMPTS, expected, strict=True):
            assert answer(prompt).json()["choices"][0]["text"] == text


def test_a_stream_comes_as_it_is_written(tmp_path: Path) -> None:
    seen = threading.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: one\n\n"
        for _ in range(500):  # the second is not written before the first was read
            if seen.is_set():
                break
            await asyncio.sleep(0.01)
        yield b"data: two\n\n" if seen.is_set() else b"data: late\n\n"

    async def written(request: Request) -> StreamingResponse:
        return StreamingResponse(pieces(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", written, methods=["POST"])])
    with (
        listening(app) as served,
        proxied(tmp_path, served, nobody()) as address,
        httpx.stream("POST", f"{address}/v1/chat/completions", timeout=30) as answer,
    ):
        lines = [line for line in _lines(answer, seen) if line]
    assert lines == ["data: one", "data: two"]


def _lines(answer: httpx.Response, seen: threading.Event) -> Iterator[str]:
    for line in answer.iter_lines():
        seen.set()
        yield line
