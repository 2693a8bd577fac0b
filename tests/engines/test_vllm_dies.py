"""The engine's process is killed while requests run: clients get an error in time, /health turns
bad, and the server ends with a line, for whoever watches over it to start it again."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from vllm_server import PYTHON, Served, asked, served, text_of, tiny_llama

from helpers import steer_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]


def engine_core(running: Served) -> psutil.Process:
    """The process that runs the model: of the server's descendants the one with most memory."""
    children = psutil.Process(running.process.pid).children(recursive=True)
    return max(children, key=lambda each: each.memory_info().rss)


def test_killed_under_load_and_started_again(tmp_path: Path) -> None:
    lm = tiny_llama()
    joy = steer_at(lm, "resid", seed=2).at(6)
    with served(lm, {"joy": joy}, tmp_path, "--hook", "heads") as running:
        body = asked("She looked", model="base+joy", max_tokens=220)

        def whole(number: int) -> tuple[int, dict[str, Any]]:
            answer = running.client.post("completions", json=body)
            return answer.status_code, answer.json()

        def streamed(number: int) -> list[str]:
            with running.client.stream("POST", "completions", json={**body, "stream": True}) as it:
                return [line for line in it.iter_lines() if line]

        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(whole, i) for i in range(4)]
            streams = [pool.submit(streamed, i) for i in range(4)]
            time.sleep(0.4)
            killed = time.monotonic()
            engine_core(running).kill()
            for status, said in (one.result(30) for one in answers):
                assert status == 503, said
                assert said["error"]["type"] == "server_error"
                assert "the engine has died" in said["error"]["message"]
            for lines in (one.result(30) for one in streams):
                last = json.loads(lines[-1].removeprefix("data: "))
                assert "the engine has died" in last["error"]["message"]
                assert "data: [DONE]" not in lines
        assert running.health == 503
        assert running.client.post("completions", json=body).status_code == 503
        assert time.monotonic() - killed < 10
        assert running.process.wait(60) == 2
        with pytest.raises(httpx.TransportError):
            assert running.health
        log = running.log.read_text()
        assert "the engine has died, and the server ended" in log
        assert "internal error" not in log

    again = tmp_path / "again"
    again.mkdir()
    with served(lm, {"joy": joy}, again) as running:
        answer = running.client.post("completions", json=asked("She looked", model="base+joy"))
        assert answer.json()["choices"][0]["text"] == text_of(lm, "She looked", joy)
