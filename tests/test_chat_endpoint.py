"""Chats with a server of ours, and with others: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import language_model, steer_at
from services import Reply, listening, serving
from trimtab.chat import Answer, Remote, Session
from trimtab.serving import Access, Desk, Engine, Library, application

NEW = 8
HELLO = [{"role": "user", "content": "Today I feel"}]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def joy(lm: tt.LanguageModel) -> tt.Steering:
    return steer_at(lm, "resid", seed=2)


@pytest.fixture(scope="module")
def address(
    lm: tt.LanguageModel, joy: tt.Steering, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    library = Library(lm)
    library.read(str(joy.save(tmp_path_factory.mktemp("steerings") / "joy.safetensors")))
    access = Access("secret", hosts=None)
    app = application(Desk(lm, "base", library, Engine(lm), 60.0), access)
    with listening(app) as served:
        yield f"{served}/v1"


@pytest.fixture
def session(address: str, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    return Session(Remote(address, "base", {"max_tokens": NEW, "temperature": 0}))


def ask(session: Session, question: str) -> Answer:
    pieces: list[str] = []
    answer = session.ask(question, pieces.append)
    assert "".join(pieces) == answer.text
    return answer


def test_a_server_of_ours_answers_under_steerings_by_name(
    session: Session, lm: tt.LanguageModel, joy: tt.Steering
) -> None:
    def whole(*steerings: tt.Steering) -> str:
        messages = session.as_json()["messages"][:-1]
        return str(lm.generate([messages], steering=[list(steerings)], max_new_tokens=NEW)[0])

    assert ask(session, "Today I feel").text == whole()
    session.steer("joy@4")
    answer = ask(session, "Why is that")
    assert answer.text == whole(joy.at(4))
    assert answer.receipt.acted[0]["name"] == "joy"
    assert answer.receipt.acted[0]["dial"] == 4
    assert answer.receipt.tokens == NEW
    session.system = "Be brief."
    session.change("joy", lambda put: put.turned(dial=6.0, scope="generated"))
    assert ask(session, "Go on").text == whole(joy.at(6).scoped("generated"))
    heard: list[str] = ["", ""]

    def add(place: int, piece: str) -> None:
        heard[place] += piece

    unsteered, steered = session.compare(add)
    assert heard == [unsteered.text, steered.text]
    assert unsteered.text == whole()
    assert steered.text == session.turns[-1].answer.text
    session.change(None, lambda put: put.turned(kl=0.2, dial=None, scope=None))
    assert 0 < ask(session, "And").receipt.acted[0]["dial"] < 6
    with pytest.raises(tt.TrimtabError, match="no steering is called 'anger'.* there are joy"):
        session.steer("anger@2")
    with pytest.raises(tt.TrimtabError, match="write NAME@DIAL"):
        session.steer("joy@1e999")
    with pytest.raises(tt.TrimtabError, match="/cost is for models here"):
        session.cost()
    session.steer("joy@loud")
    with pytest.raises(tt.TrimtabError, match="status 400: loud is no dial"):
        session.ask("Hello", lambda piece: None)


def test_stopped_answers_are_left_at_the_server(session: Session) -> None:
    said: list[str] = []

    def stop(piece: str) -> None:
        said.append(piece)
        raise KeyboardInterrupt

    answer = session.ask("Today I feel", stop)
    assert answer.text == "".join(said)
    assert answer.receipt.stopped
    assert ask(session, "Go on").text


def test_a_wrong_key_is_said_and_not_repeated(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    session = Session(Remote(address, "base", {}))
    for act in (lambda: session.steer("joy"), lambda: session.ask("Hello", lambda piece: None)):
        with pytest.raises(tt.TrimtabError, match="status 401") as refused:
            act()
        assert "wrong-key" not in str(refused.value)
    assert session.turns == []


def events(*said: Any) -> Reply:
    """A stream of events as servers send them."""
    lines = [f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in said]
    return Reply("".join(lines).encode(), headers={"Content-Type": "text/event-stream"})


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, **more}]}


def test_other_servers_answer_and_do_not_steer() -> None:
    told = events(piece("Good "), piece("day", finish_reason="stop"), {"choices": []}, "[DONE]")
    with serving(lambda request: told) as service:
        session = Session(Remote(service.url, "other", {"max_tokens": 4, "top_k": 3}, seed=5))
        answer = ask(session, "Hello")
        assert answer.text == "Good day"
        assert answer.receipt.tokens == 2  # pieces, where nobody counts tokens
        assert answer.receipt.line.startswith("unsteered · 2 tokens")
        with pytest.raises(tt.TrimtabError, match="no server of trimtab and cannot steer"):
            session.steer("joy@2")
        sent = service.requests[0].content
        assert sent["messages"] == [{"role": "user", "content": "Hello"}]
        assert (sent["seed"], sent["top_k"], sent["stream"]) == (5, 3, True)
        assert "steering" not in sent


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply({"error": {"message": "too\nbusy"}}, status=429), "status 429: too busy"),
        (events(piece("Good")), "broke off"),
        (events({"error": {"message": "no memory"}}), "no memory"),
        (events("nonsense"), "not in OpenAI's form"),
        (events({"choices": [{"delta": {"content": 5}}]}), "not in OpenAI's form"),
    ],
)
def test_what_goes_wrong_is_one_line_and_keeps_no_turn(reply: Reply, said: str) -> None:
    with serving(lambda request: reply) as service:
        session = Session(Remote(service.url, "other", {}))
        with pytest.raises(tt.TrimtabError, match=said) as refused:
            session.ask("Hello", lambda piece: None)
        assert "\n" not in str(refused.value)
        assert session.turns == []


def test_addresses_are_checked_and_may_be_dead() -> None:
    with pytest.raises(tt.TrimtabError, match="must not hold a key"):
        Remote("http://user:key@127.0.0.1/v1", "base", {})
    session = Session(Remote("http://127.0.0.1:9/v1", "base", {}))
    with pytest.raises(tt.TrimtabError, match="is the server running"):
        session.ask("Hello", lambda piece: None)


def test_what_is_saved_of_a_server_goes_on_there(session: Session, tmp_path: Path) -> None:
    session.steer("joy@4")
    answer = ask(session, "Today I feel")
    session.save(str(tmp_path / "talk.jsonl"))
    again = Session(session.speaker)
    again.load(str(tmp_path / "talk.jsonl"))
    assert [str(put) for put in again.stack] == ["joy@4"]
    again.retry(lambda piece: None)
    assert again.turns[-1].answer.text == answer.text
