"""An endpoint's wait ends: at its deadline, whatever trickles in, and at once on an interrupt."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import refused_in_one_line
from services import HANG, Reply, Request, in_turn, serving, wait_for
from trimtab.errors import TrimtabError
from trimtab.evaluation.endpoint import Address, ChatEndpoint, together
from trimtab.evaluation.metrics.toxicity import RemoteScorer, find_scorer

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"
#: A service that says nothing, one that sends a byte at a time, one that puts off.
SLOW: dict[str, Reply] = {
    "silent": HANG,
    "dripping body": Reply(_HEAD + b" " * 10_000, drip=0.02),
    "dripping headers": Reply(b"HTTP/1.1 200 OK\r\nX-Pad: " + b"x" * 10_000, drip=0.02),
    "retry after": Reply(b"", 503, {"Retry-After": "50"}),
}


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "PERSPECTIVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# -- a deadline for each answer -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["silent", "dripping body", "dripping headers"])
def test_an_answer_that_takes_too_long_is_given_up(kind: str) -> None:
    with serving(in_turn(SLOW[kind])) as service:
        judge = ChatEndpoint(service.url, "m", timeout=0.5, tries=2, pause=0.01)
        started = time.monotonic()
        refused_in_one_line(
            lambda: judge.ask([[{"role": "user", "content": "x"}]]), "no answer in time"
        )
        assert time.monotonic() - started < 60  # 200 s of bytes are announced
        wait_for(lambda: len(service.requests) == 2, 60)


def test_a_slow_answer_that_comes_in_time_is_taken() -> None:
    body = b'{"choices": [{"message": {"content": "yes"}}]}'
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(in_turn(Reply(head + body, drip=0.005))) as service:
        judge = ChatEndpoint(service.url, "m", timeout=20, tries=1)
        assert judge.ask([[{"role": "user", "content": "x"}]]) == ["yes"]


def test_an_answer_without_end_is_given_up_at_its_size() -> None:
    with serving(in_turn(Reply(b"x" * (1 << 22)))) as service:
        judge = ChatEndpoint(service.url, "m", timeout=20, tries=1)
        refused_in_one_line(lambda: judge.ask([[{"role": "user", "content": "x"}]]), "too long")


# -- an interrupt ---------------------------------------------------------------------------------

#: A process that is started in the background ignores interrupts, and so do those that it starts.
_HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
_ASK = """
import sys
from trimtab.evaluation.endpoint import ChatEndpoint
judge = ChatEndpoint(sys.argv[1], "m", timeout=100, tries=5)
print("asking", flush=True)
try:
    judge.ask([[{"role": "user", "content": str(i)}] for i in range(9)])
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""
_SCORE = """
import sys
from trimtab.evaluation.metrics.toxicity import RemoteScorer
print("asking", flush=True)
try:
    RemoteScorer(sys.argv[1], timeout=100).scores(["one", "two", "three"])
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""
_POST = """
import sys
from trimtab.evaluation.endpoint import Address
print("asking", flush=True)
try:
    Address(sys.argv[1], timeout=100).post({}, str)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("program", "at_once"),
    [
        pytest.param(_ASK, 8, id="judge"),
        pytest.param(_SCORE, 3, id="scorer", marks=pytest.mark.slow),
        pytest.param(_POST, 1, id="address", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_the_process_at_once(program: str, at_once: int) -> None:
    kinds = list(SLOW)

    def script(request: Request) -> Reply:
        return SLOW[kinds[len(service.requests) % len(kinds)]] if program != _POST else HANG

    with serving(script) as service:
        arguments = [sys.executable, "-c", _HEED + program, service.url]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            wait_for(lambda: len(service.requests) >= at_once, 60)  # all that are asked together
            assert process.stdout is not None
            process.stdout.readline()
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            try:
                said = process.stdout.readline()
                seconds = time.monotonic() - started
                process.wait(60)  # for libraries, which take a second or two to be put away
            finally:
                process.kill()
        assert (said, process.returncode) == (b"interrupted\n", 130)
        assert seconds < 30  # an answer is waited for 100 s
        assert len(service.requests) == at_once


def test_after_an_interrupt_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def interrupt(item: int, stopped: threading.Event) -> int:
        if item == 0:
            raise KeyboardInterrupt
        try:
            address.post({}, str, stopped)
        except TrimtabError:
            tried.append(item)
        return item

    with serving(in_turn(Reply(b"", 503, {"Retry-After": "50"}))) as service:
        address = Address(service.url)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            together(interrupt, [1, 0], 2)
        assert time.monotonic() - started < 30  # the service asks for a pause of 50 s
        wait_for(lambda: len(tried) == 1, 60)
        assert len(service.requests) <= 1


def test_together_keeps_the_order_and_ends_on_the_first_failure() -> None:
    def square(item: int, stopped: threading.Event) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert together(square, range(20), 4) == [i * i for i in range(20)]
    assert together(square, [], 4) == []

    begun = []

    def fail(item: int, stopped: threading.Event) -> int:
        begun.append(item)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        together(fail, range(20), 1)
    assert begun == [0]


# -- a key in a URL -------------------------------------------------------------------------------

SECRET = "s3cr3t"
LEAKS = [
    f"http://host/v1?key={SECRET}",
    f"http://host/v1?{SECRET}",
    f"http://host?api-version=1&token={SECRET}",
    f"http://host/v1#{SECRET}",
    f"https://user:{SECRET}@host/v1",
    f"https://{SECRET}@host:80/v1",
    f"https:/user:{SECRET}@host/v1",
    f"HTTPS://user:{SECRET}@host/v1",
    f"htps://user:{SECRET}@host/v1",
    f"user:{SECRET}@host/v1",
    f"http://[user:{SECRET}@host/v1",
    f"http://host:80:{SECRET}@x/",
]


@pytest.mark.parametrize("url", LEAKS)
@pytest.mark.parametrize(
    "take",
    [lambda url: ChatEndpoint(url, "m"), RemoteScorer, Address, find_scorer],
    ids=["judge", "scorer", "address", "toxicity"],
)
def test_a_url_that_may_hold_a_key_is_refused_unseen(take: Callable[[str], Any], url: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        take(url)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_at_sign_in_a_path_is_no_key() -> None:
    assert ChatEndpoint("https://host/v1/@cf", "m").url == "https://host/v1/@cf"
