"""Endpoints of chat models: a service on this machine that fails in all the ways services fail.

What is asked for once is never asked for again, the key stays in its header, and what does not
work ends in one line.
"""

from __future__ import annotations

import gzip
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import refused_in_one_line
from services import CLOSE, HANG, Reply, Request, in_turn, nobody, serving
from trimtab.errors import TrimtabError
from trimtab.evaluation.endpoint import ChatEndpoint, Usage

KEY = "sk-bread-and-poems-123"


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key, a cache of its own, and no proxy between a test and its service."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def said(text: Any, read: int = 10, written: int = 1, **more: Any) -> Reply:
    """A reply as the API gives it."""
    usage = {"prompt_tokens": read, "completion_tokens": written}
    return Reply({"choices": [{"message": {"content": text}}], "usage": usage}, **more)


def echo(request: Request) -> Reply:
    """Says what it was asked, so that answers can be told apart."""
    return said("about " + request.content["messages"][-1]["content"])


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def endpoint(url: str, **options: Any) -> ChatEndpoint:
    return ChatEndpoint(
        url + "/v1", "judge-1", **{"pause": 0.01, "timeout": 20.0, "tries": 3} | options
    )


# -- what is asked, and what comes back ----------------------------------------------------------


def test_a_conversation_goes_out_whole_and_its_answer_comes_back() -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]
    with serving(echo) as service:
        assert endpoint(service.url, max_tokens=7).ask([conversation]) == ["about Hé?"]
    (request,) = service.requests
    assert request.path == "/v1/chat/completions"
    assert request.content == {
        "model": "judge-1",
        "messages": conversation,
        "temperature": 0,
        "max_tokens": 7,
    }


def test_answers_keep_the_order_of_what_was_asked() -> None:
    def slow_at_first(request: Request) -> Reply:
        first = request.content["messages"][0]["content"] == "0"
        return said(request.content["messages"][0]["content"], delay=0.2 if first else 0)

    texts = [str(i) for i in range(20)]
    with serving(slow_at_first) as service:
        assert endpoint(service.url, concurrency=4).ask(asked(*texts)) == texts


def test_nothing_asked_is_nothing_sent() -> None:
    with serving(echo) as service:
        assert endpoint(service.url).ask([]) == []
    assert service.requests == []


def test_no_more_calls_are_under_way_at_once_than_allowed() -> None:
    together = threading.Barrier(3)

    def meets(request: Request) -> Reply:
        if len(service.requests) <= 3:
            together.wait(20)  # breaks, and the call fails, unless three are here at once
        return echo(request)

    with serving(meets) as service:
        endpoint(service.url, concurrency=3).ask(asked(*map(str, range(30))))
        assert (service.most_under_way, len(service.requests)) == (3, 30)
        service.most_under_way = 0
        endpoint(service.url, concurrency=1).ask(asked(*map(str, range(30, 40))))
        assert service.most_under_way == 1


def test_the_same_question_in_one_batch_is_sent_once() -> None:
    texts = ["bread", "poems", "bread", "bread", "poems"]
    with serving(echo) as service:
        judge = endpoint(service.url)
        assert judge.ask(asked(*texts)) == [f"about {text}" for text in texts]
    assert len(service.requests) == judge.usage.calls == 2


# -- failures that pass --------------------------------------------------------------------------

PASSING = {
    "too many": Reply(b"slow down", 429),
    "too many, with a time": Reply(b"slow down", 429, {"Retry-After": "0"}),
    "too many, with a date": Reply(b"", 429, {"Retry-After": "Fri, 21 Nov 2031 10:00:00 GMT"}),
    "request timeout": Reply(b"", 408),
    "server error": Reply(b"oh", 500),
    "bad gateway": Reply(b"<html>", 502),
    "overloaded": Reply(b"", 529),
    "closed": CLOSE,
    "cut short": Reply({"choices": []}, missing=100),
    "cut short in gzip": Reply(
        gzip.compress(b"{}" * 99)[:-9], headers={"Content-Encoding": "gzip"}
    ),
    "not gzip": Reply(b"what?", headers={"Content-Encoding": "gzip"}),
    "no JSON": Reply(b"<html>hello</html>"),
    "empty": Reply(b""),
    "not UTF-8": Reply(b'{"choices": "\xff\xfe"}'),
    "deep": Reply(b"[" * 100_000),
    "no object": Reply([1, 2]),
    "no choices": Reply({"id": "x"}),
    "empty choices": Reply({"choices": []}),
    "null choices": Reply({"choices": None}),
    "no message": Reply({"choices": [{"text": "yes"}]}),
    "null message": Reply({"choices": [{"message": None}]}),
    "null content": said(None),
    "content of parts": said([{"type": "text", "text": "yes"}]),
    "number": said(1),
    "half a character": said("\ud83d"),
    "usage of parts": Reply({"choices": [{"message": {"content": "yes"}}], "usage": [1]}),
    "usage without end": said("yes", read=float("inf")),  # type: ignore[arg-type]
    "usage in words": said("yes", read="many"),  # type: ignore[arg-type]
    "too long": said("yes " * 300_000),
}
PERSISTENT = {
    "closed": "no connection",
    "cut short": "no connection",
    "too many": "status 429",
    "server error": "status 500",
    "no JSON": "makes no sense",
    "usage of parts": "makes no sense",
    "too long": "too long",
}


@pytest.mark.parametrize("failure", PASSING)
def test_a_failure_that_passes_is_tried_again(failure: str) -> None:
    with serving(in_turn(PASSING[failure], PASSING[failure], said("yes"))) as service:
        judge = endpoint(service.url)
        assert judge.ask(asked("Is it bread?")) == ["yes"]
    assert len(service.requests) == 3
    assert judge.usage == Usage(1, 0, 10, 1)  # what failed is not counted


@pytest.mark.parametrize("failure", PERSISTENT)
def test_a_failure_that_stays_ends_in_one_line(failure: str, tmp_path: Path) -> None:
    with serving(in_turn(PASSING[failure])) as service:
        judge = endpoint(service.url, tries=4)
        says = rf"^http://127.0.0.1:\d+/v1/chat/completions failed 4 times.*{PERSISTENT[failure]}"
        refused_in_one_line(lambda: judge.ask(asked("Is it bread?")), says)
    assert len(service.requests) == 4
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_answer_that_does_not_come_in_time_is_asked_for_again() -> None:
    with serving(in_turn(HANG, said("yes"))) as service:
        assert endpoint(service.url, timeout=1.0).ask(asked("Is it bread?")) == ["yes"]
    assert len(service.requests) >= 2  # more where the machine is busy and an answer late


def test_answers_that_never_come_in_time_end_in_one_line() -> None:
    with serving(in_turn(HANG)) as service:
        judge = endpoint(service.url, timeout=0.2, tries=2)
        refused_in_one_line(lambda: judge.ask(asked("x")), "failed 2 times.*no answer in time")


def test_a_service_that_is_down_ends_in_one_line() -> None:
    judge = endpoint(nobody(), tries=2)
    refused_in_one_line(lambda: judge.ask(asked("x")), "failed 2 times.*no connection")


def pauses_before(monkeypatch: pytest.MonkeyPatch, *replies: Reply) -> list[float]:
    """What would have been slept between the tries, with a first pause of one second."""
    slept: list[float] = []
    with serving(in_turn(*replies)) as service:
        judge = endpoint(service.url, pause=1.0, tries=len(replies))
        with monkeypatch.context() as patch:
            patch.setattr(
                "trimtab.evaluation.endpoint._sleep", lambda _, s: slept.append(s) if s else None
            )
            judge.ask(asked("x"))
    return slept


def test_pauses_double_with_a_little_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = pauses_before(monkeypatch, *[Reply(b"", 500)] * 8, said("yes"))
    assert len(slept) == 8
    for pause, least in zip(slept, (1, 2, 4, 8, 16, 32, 60, 60), strict=True):
        assert least <= pause <= least + 0.5


def test_a_service_says_how_long_to_wait_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    times = ["7", "0", "3600", "-5", "nan", "tomorrow"]
    replies = [Reply(b"", 429, {"Retry-After": time}) for time in times]
    slept = pauses_before(monkeypatch, *replies, said("yes"))
    assert slept[0] == 7
    assert 2 <= slept[1] <= 2.5
    assert 60 <= slept[2] <= 60.5
    assert 8 <= slept[3] <= 8.5
    assert 16 <= slept[4] <= 16.5
    assert 32 <= slept[5] <= 32.5


# -- failures that stay --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    body = b'{\n  "error": {\n    "message": "no such model"\n  }\n}\n' if status != 204 else b""
    with serving(in_turn(Reply(body, status))) as service:
        says = f"answered with status {status}" + (": .*no such model" if body else "$")
        refused_in_one_line(lambda: endpoint(service.url).ask(asked("x")), says)
    assert len(service.requests) == 1


def test_a_long_refusal_is_cut() -> None:
    with (
        serving(in_turn(Reply(b"no " * 1000, 400))) as service,
        pytest.raises(TrimtabError) as caught,
    ):
        endpoint(service.url).ask(asked("x"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_failure_does_not_send_the_calls_that_wait(concurrency: int) -> None:
    with serving(in_turn(Reply(b"bad key", 401))) as service:
        judge = endpoint(service.url, concurrency=concurrency)
        refused_in_one_line(lambda: judge.ask(asked(*map(str, range(100)))), "status 401")
    assert 1 <= len(service.requests) <= concurrency


def test_what_was_answered_before_a_failure_is_not_asked_again() -> None:
    texts = list("abcde")
    with serving(in_turn(said("1"), said("2"), Reply(b"", 400), said("3"))) as service:
        judge = endpoint(service.url, concurrency=1)
        with pytest.raises(TrimtabError):
            judge.ask(asked(*texts))
        assert judge.ask(asked(*texts)) == ["1", "2", "3", "3", "3"]
    sent = [request.content["messages"][0]["content"] for request in service.requests]
    assert sent == ["a", "b", "c", "c", "d", "e"]
    assert (judge.usage.calls, judge.usage.cached) == (5, 2)


# -- the key -------------------------------------------------------------------------------------


def test_the_key_is_in_the_header_and_nowhere_else(tmp_path: Path) -> None:
    with serving(in_turn(Reply(b"", 500), said("yes"))) as service:
        judge = endpoint(service.url)
        judge.ask(asked("Is it bread?"))
    for request in service.requests:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in json.dumps(request.content)
        assert KEY not in request.path
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    for path in files:
        assert KEY.encode() not in path.read_bytes()
        assert KEY not in str(path)
    assert KEY not in repr(judge) + str(judge.usage) + judge.name + repr(judge._address())


def test_the_key_is_not_in_an_error_that_repeats_it() -> None:
    def repeats(request: Request) -> Reply:
        # Where a cut would leave half of it.
        return Reply({"error": "wrong key " + "-" * 160 + request.headers["authorization"]}, 401)

    with (
        serving(repeats) as service,
        pytest.raises(TrimtabError, match="status 401: .*wrong key") as caught,
    ):
        endpoint(service.url).ask(asked("x"))
    assert KEY[:6] not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with serving(echo) as other:
        away = Reply(b"", status, {"Location": other.url + "/v1/chat/completions"})
        with serving(in_turn(away)) as service:
            refused_in_one_line(lambda: endpoint(service.url).ask(asked("x")), f"status {status}")
    assert len(service.requests) == 1
    assert other.requests == []


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_a_key_none_is_sent(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    if value is not None:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    with serving(echo) as service:
        endpoint(service.url).ask(asked("x"))
    assert "authorization" not in service.requests[0].headers


def test_the_key_may_have_another_variable_and_a_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "mine-456\r\n")
    with serving(echo) as service:
        endpoint(service.url, key_variable="MY_KEY").ask(asked("x"))
    assert service.requests[0].headers["authorization"] == "Bearer mine-456"


@pytest.mark.parametrize("value", ["sk-é", "sk-1\nX-Other: 2", "sk-„1“"])
def test_a_key_that_is_no_key_is_refused_unseen(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(TrimtabError, match="^the key in OPENAI_API_KEY has a char") as caught:
        endpoint("http://127.0.0.1")
    assert "sk-" not in str(caught.value)


def test_a_netrc_file_does_not_replace_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with serving(echo) as service:
        endpoint(service.url).ask(asked("x"))
    assert service.requests[0].headers["authorization"] == f"Bearer {KEY}"


# -- answers on disk -----------------------------------------------------------------------------


def test_what_was_answered_is_never_asked_again() -> None:
    odd, broken = "“čaj” 🍞\u2028", "half a character \ud83d"

    def whole(request: Request) -> Reply:
        return said("ok") if request.content["messages"] == asked(broken)[0] else echo(request)

    with serving(whole) as service:
        first = endpoint(service.url).ask(asked("bread", "poems", odd, broken))
        assert first == ["about bread", "about poems", f"about {odd}", "ok"]
        again = ChatEndpoint(service.url + "/v1/", "judge-1", concurrency=1, timeout=3.0)
        assert again.ask(asked(broken, odd, "poems")) == ["ok", first[2], first[1]]
        assert again.usage == Usage(calls=0, cached=3)
        assert len(service.requests) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"model": "judge-2"},
        {"max_tokens": 17},
        {"url": "/v2"},
        {"messages": [{"role": "user", "content": "bread "}]},
        {"messages": [{"role": "system", "content": "bread"}]},
        {"messages": [{"role": "user", "content": "bread"}] * 2},
    ],
    ids=str,
)
def test_anything_else_is_asked(other: dict[str, Any]) -> None:
    with serving(in_turn(said("1"), said("2"))) as service:
        judge = ChatEndpoint(service.url + "/v1", "judge-1", pause=0.01)
        assert judge.ask(asked("bread")) == ["1"]
        changed = ChatEndpoint(
            service.url + other.get("url", "/v1"),
            other.get("model", "judge-1"),
            max_tokens=other.get("max_tokens", 16),
        )
        assert changed.ask([other.get("messages", asked("bread")[0])]) == ["2"]
        assert judge.ask(asked("bread")) == ["1"]
    assert len(service.requests) == 2


def test_answers_lie_where_they_are_told_to(tmp_path: Path) -> None:
    with serving(echo) as service:
        endpoint(service.url, cache=tmp_path / "own").ask(asked("bread"))
        assert not (tmp_path / "cache").exists()
        (path,) = (path for path in (tmp_path / "own").rglob("*") if path.is_file())
        assert json.loads(path.read_text())["answer"] == "about bread"
        endpoint(service.url).ask(asked("bread"))
        (path,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        assert path.is_relative_to(tmp_path / "cache" / "answers")


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"asked": 1}', b'{"answer": 3}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_answer_is_asked_for_again(damage: bytes, tmp_path: Path) -> None:
    with serving(in_turn(said("1"), said("2"))) as service:
        endpoint(service.url).ask(asked("bread"))
        (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
        path.write_bytes(damage)
        assert endpoint(service.url).ask(asked("bread")) == ["2"]
        assert endpoint(service.url).ask(asked("bread")) == ["2"]  # and is mended
    assert len(service.requests) == 2


def test_a_cache_that_cannot_be_written_is_found_before_the_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with serving(echo) as service:
        judge = endpoint(service.url, cache=tmp_path / "file")
        refused_in_one_line(lambda: judge.ask(asked("x")), "^cannot write .*file")
    assert service.requests == []


def test_answers_are_written_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Writing a file takes the process's umask away for a moment; two at once could lose it.
    from trimtab.evaluation import endpoint as module

    writing = threading.Lock()

    def write(path: Path, content: bytes, overwrite: bool = False) -> Path:
        assert writing.acquire(blocking=False)
        threading.Event().wait(0.01)
        writing.release()
        return path

    monkeypatch.setattr(module, "write_whole", write)
    with serving(echo) as service:
        endpoint(service.url, concurrency=8).ask(asked(*map(str, range(24))))
    assert len(service.requests) == 24


# -- what it cost --------------------------------------------------------------------------------


def test_tokens_and_money_are_counted() -> None:
    replies = [said("yes", 1000, 10), said("no", 3000, 20), said("no", 500, 5)]
    with serving(in_turn(*replies)) as service:
        judge = endpoint(service.url, prices=(0.5, 8.0), concurrency=1)
        judge.ask(asked("a", "b"))
        judge.ask(asked("b", "c"))
    # 4500 tokens read at 0.5 and 35 written at 8, per million.
    assert judge.usage.cost == pytest.approx(4500 * 0.5e-6 + 35 * 8e-6, rel=1e-12)
    assert str(judge.usage) == (
        "3 calls, 1 answers from disk, 4500 tokens read, 35 written, 0.0025 in money"
    )


def test_without_prices_there_is_no_cost() -> None:
    with serving(in_turn(said("yes", 7, 2))) as service:
        judge = endpoint(service.url)
        judge.ask(asked("a"))
    assert judge.usage == Usage(1, 0, 7, 2, None)
    assert "money" not in str(judge.usage)


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"prompt_tokens": None}}])
def test_a_service_need_not_count(usage: dict[str, Any]) -> None:
    reply = Reply({"choices": [{"message": {"content": "yes"}}]} | usage)
    with serving(in_turn(reply)) as service:
        judge = endpoint(service.url, prices=(1.0, 1.0))
        assert judge.ask(asked("a")) == ["yes"]
    assert judge.usage == Usage(1, 0, 0, 0, 0.0)


def test_usage_counts_every_call_of_many_at_once() -> None:
    with serving(in_turn(said("yes", 3, 1))) as service:
        judge = endpoint(service.url, concurrency=16)
        judge.ask(asked(*map(str, range(100))))
    assert judge.usage == Usage(100, 0, 300, 100)


# -- bad settings --------------------------------------------------------------------------------


NO_URLS = "localhost:8000 ftp://host http:// file:///etc http://[ http://h:eight http://h:0 //host"


@pytest.mark.parametrize("url", ["", "http://h:99999", *NO_URLS.split()])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    refused_in_one_line(lambda: ChatEndpoint(url, "m"), "is not the URL of a service")


@pytest.mark.parametrize("url", ["http://host/v1?x=1", "http://host/v1#chat"])
def test_a_url_to_which_nothing_can_be_added_is_refused(url: str) -> None:
    refused_in_one_line(lambda: ChatEndpoint(url, "m"), "must have no user, query or fragment")


def test_a_url_with_a_password_is_refused_unseen() -> None:
    with pytest.raises(TrimtabError, match="must not hold a key") as caught:
        ChatEndpoint("http://me:secret@host/v1", "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["exa mple", "*", ".example"])
def test_a_host_that_can_be_none_is_not_tried_twice(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "trimtab.evaluation.endpoint._sleep", lambda *pause: pytest.fail("tried again")
    )
    judge = endpoint(f"http://{host}")
    refused_in_one_line(lambda: judge.ask(asked("x")), "cannot be asked")


@pytest.mark.parametrize(
    ("options", "says"),
    [({name: 0}, "must be 1 or more") for name in ("concurrency", "tries", "max_tokens")]
    + [({"timeout": value}, "timeout must be above 0") for value in (0.0, -1.0, 1e9)]
    + [({"timeout": float(value)}, "timeout must be above 0") for value in ("nan", "inf")],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    refused_in_one_line(lambda: endpoint("http://host", **options), says)


@pytest.mark.parametrize("library", ["tenacity", "requests"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    judge = endpoint("http://127.0.0.1:9")
    refused_in_one_line(lambda: judge.ask(asked("x")), r"trimtab\[eval\]")
