"""`trimtab chat` as a pipe and as a terminal."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

import trimtab as tt
from commands import Command, Ran, home, refused, trimtab, work  # noqa: F401
from services import Reply, serving

CHAT = "chat --model model --max-new-tokens 6"
#: What the editor of lines tells a terminal when it begins to listen.
READY = re.escape("\x1b[?2004h")


@pytest.fixture
def piped(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:  # noqa: F811
    """Runs a chat with lines on standard input."""

    def run(line: str, *lines: str) -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{one}\n" for one in lines)))
        return trimtab(line)

    return run


def texts(*conversations: Any, **options: Any) -> list[str]:
    lm = tt.load("model", device="cpu")
    found = []
    for messages in conversations:
        (done,) = lm.generate([messages], max_new_tokens=6, **options)
        found.append(done.text)
    return found


def asked(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def test_a_pipe_gets_answers_only(piped: Callable[..., Ran]) -> None:
    (one,) = texts(asked("Today I feel"))
    caa = tt.Steering.load("caa.safetensors").at(3)
    (two,) = texts(asked("Today I feel", one, "Why"), steering=caa)
    ran = piped(CHAT, "Today I feel", "", "/steer caa.safetensors@3", "Why", "/save talk.jsonl")
    assert (ran.status, ran.out) == (0, f"{one}\n{two}\n")
    assert ran.err.splitlines() == ["put on caa@3", "saved 2 turns to talk.jsonl"]
    said = piped(f"{CHAT} --receipt", "/load talk.jsonl", "/retry")
    assert said.out == f"{two}\n"
    assert re.search(r"^caa@3 on \d+\+5 tokens · 6 tokens, ", said.err, re.M)


def test_json_is_one_object_with_receipts(piped: Callable[..., Ran]) -> None:
    line = f"{CHAT} --steer caa.safetensors@3 --steer au.safetensors --scope all --json"
    found = piped(line, "Today I feel", "/compare", "/quit", "not asked").json
    one, two = (tt.Steering.load(f"{name}.safetensors") for name in ("caa", "au"))
    (text,) = texts(asked("Today I feel"), steering=one.at(3) + two)
    assert found["messages"] == asked("Today I feel", text)
    assert [each["name"] for each in found["receipts"][0]["acted"]] == ["caa", "au"]
    assert found["compared"][0]["steered"]["text"] == text
    assert found["steering"][0] == {
        "name": "caa", "source": "caa.safetensors", "dial": 3, "kl": None, "scope": None, "on": True
    }  # fmt: skip


def test_a_budget_and_a_system_message(piped: Callable[..., Ran]) -> None:
    line = f"{CHAT} --steer caa.safetensors --kl 0.2 --system Brief --json"
    found = piped(line, "Today I feel").json
    assert found["messages"][0] == {"role": "system", "content": "Brief"}
    assert found["steering"][0]["kl"] == 0.2
    assert found["receipts"][0]["acted"][0]["dial"] != 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("chat", "missing option --model"),
        ("chat --model base", "no chat template"),
        (f"{CHAT} --steer nowhere.safetensors", "nowhere.safetensors"),
        (f"{CHAT} --kl 0.1", "--kl turns one dial"),
        (f"{CHAT} --scope all", "--scope says how a steering acts"),
        ("chat --model m --endpoint ftp://x", "is not the URL of a service"),
        ("chat --model m --endpoint http://127.0.0.1:9/v1 --force", "--force is for"),
        ("chat --model m --endpoint http://127.0.0.1:9/v1 --dtype bfloat16", "--dtype is for"),
        ("chat --model m --endpoint http://127.0.0.1:9/v1 --steer a --gate g", "--gate is for"),
        ("chat --model m --endpoint http://127.0.0.1:9/v1 --steer a", "is the server running"),
    ],
)
def test_mistakes_get_one_line(
    trimtab: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    said: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    refused(trimtab(line), said)


def test_a_mistake_in_a_pipe_ends_it(piped: Callable[..., Ran]) -> None:
    refused(piped(CHAT, "/dial 2", "Hello"), "nothing steers")


def test_a_server_is_asked_by_name(piped: Callable[..., Ran]) -> None:
    event = b'data: {"choices": [{"delta": {"content": "Good day"}, "finish_reason": "stop"}]}\n\n'
    with serving(lambda request: Reply(event)) as service:
        line = f"chat --model gpt --endpoint {service.url} --temperature 0.5 --option stop=x --json"
        found = piped(line, "Hello").json
        assert found["messages"] == asked("Hello", "Good day")
        sent = service.requests[0].content
        assert (sent["model"], sent["temperature"], sent["stop"]) == ("gpt", 0.5, "x")


@pytest.mark.slow  # starts the program, which takes seconds
def test_a_terminal(home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Asked, turned, compared, stopped, taken back, saved and left, as a person does it."""
    line = f"-m trimtab chat --model {home}/model --steer {home}/caa.safetensors@3"
    child = pexpect.spawn(
        sys.executable,
        shlex.split(f"{line} --max-new-tokens 100"),
        env={"PATH": "/usr/bin:/bin", "TERM": "xterm", "HOME": str(tmp_path),
             "PYTHONPATH": str(Path(tt.__file__).parent.parent), "OMP_NUM_THREADS": "1",
             "PROMPT_TOOLKIT_NO_CPR": "1", "TRIMTAB_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path, encoding="utf-8", timeout=60, dimensions=(40, 100),
    )  # fmt: skip
    log = child.logfile_read = io.StringIO()

    def send(text: str, *expected: str) -> None:
        child.expect(READY)
        child.send(f"{text}\r")
        for each in expected:
            child.expect(each)

    send("Today I feel", r"caa@3 on \d+\+\d+ tokens")
    send("/dial 2", "caa@2")
    send("/wrong", "there is no command /wrong")
    send("/compare", "unsteered", "caa", r"unsteered · \d+ tokens", r"caa@2 on")
    child.expect(READY)
    child.send("Write something long\r")
    child.expect("Write something long")
    child.expect("\x1b\\[2K")  # it is being written
    child.send("\x03")
    child.expect(" · stopped|stopped before a word|caa@2 on")
    send("/new", "a new conversation")
    send("One", "caa@2 on")
    send("Two", "caa@2 on")
    send("/undo", "took back: Two")
    send("/save talk.jsonl", "saved")
    child.expect(READY)
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, log.getvalue()[-2000:]
    assert "Traceback" not in log.getvalue()
    assert (tmp_path / "talk.jsonl").exists()
    assert (tmp_path / ".local/state/trimtab/chat_history").stat().st_mode & 0o777 == 0o600
