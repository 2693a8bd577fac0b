"""Chats with a model in memory: the texts are those of `generate` on the whole conversation,
whatever was turned in between; commands do what they say, and mistakes change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import language_model, steer_at
from trimtab.chat import Answer, LeaveError, Local, Receipt, Session, obey
from trimtab.monitoring.chats import read_chats

NEW = 8


class Heard:
    """A face that keeps what it is shown."""

    def __init__(self) -> None:
        self.receipts = True
        self.said: list[str] = []
        self.pieces: list[str] = []
        self.pairs: list[tuple[Answer, Answer]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def answer(self, write: Any) -> Any:
        return write(self.pieces.append)

    def both(self, write: Any, heads: Any) -> Any:
        texts = ["", ""]

        def add(place: int, piece: str) -> None:
            texts[place] += piece

        answers = write(add)
        assert texts == [one.text for one in answers]
        self.pairs.append(answers)
        return answers


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def folder(lm: tt.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("steerings")
    steer_at(lm, "resid", seed=2).save(room / "joy.safetensors")
    steer_at(lm, "heads", "Scale", seed=3).save(room / "calm.safetensors")
    return room


@pytest.fixture
def session(lm: tt.LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(folder)
    return Session(Local(lm, {"max_new_tokens": NEW}))


@pytest.fixture
def face() -> Heard:
    return Heard()


@pytest.fixture
def do(session: Session, face: Heard) -> Callable[..., str]:
    """Does lines, and returns what was said of the last one."""

    def run(*lines: str) -> str:
        for line in lines:
            face.said.clear()
            obey(session, face, line)
        return "\n".join(face.said)

    return run


def whole(lm: tt.LanguageModel, session: Session, *steerings: tt.Steering, **more: Any) -> str:
    """What generate writes in place of the last answer, from the whole conversation."""
    row = session.as_json()["messages"][:-1]
    (done,) = lm.generate([row], steering=[list(steerings)], max_new_tokens=NEW, **more)
    return done.text


def test_answers_are_those_of_whole_conversations(
    lm: tt.LanguageModel, session: Session, face: Heard, do: Callable[..., str]
) -> None:
    joy, calm = tt.Steering.load("joy.safetensors"), tt.Steering.load("calm.safetensors")
    steps: list[tuple[str, str, tuple[tt.Steering, ...]]] = [
        ("", "Today I feel sad", ()),
        ("/steer joy.safetensors@4", "Why is that", (joy.at(4),)),
        ("/dial 6", "The ship left", (joy.at(6),)),
        ("", "Go on", (joy.at(6),)),
        ("/steer calm.safetensors@2", "And then", (joy.at(6), calm.at(2))),
        ("/scope joy generated", "She said", (joy.at(6).scoped("generated"), calm.at(2))),
        ("/off joy", "Read", (calm.at(2),)),
        ("/system Be brief.", "Write", (calm.at(2),)),
        ("/off", "Speak", ()),
    ]
    texts, reused = [], []
    for command, question, acting in steps:
        do(command, question)
        answer = session.turns[-1].answer
        assert answer.text == whole(lm, session, *acting), command
        assert "".join(face.pieces) == answer.text
        face.pieces.clear()
        named = [(each["name"], each["dial"]) for each in answer.receipt.acted]
        assert [dial for _, dial in named] == [one.setting for one in acting]
        texts.append(answer.text)
        reused.append(answer.receipt.reused)
    assert len(set(texts)) > 6
    assert reused[:3] == [0, 0, 0]
    assert reused[3] > 20  # under the same steering what was read is used again
    assert session.as_json()["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_budget_turns_the_dial_for_each_question(
    lm: tt.LanguageModel, session: Session, do: Callable[..., str]
) -> None:
    do("/steer joy.safetensors", "/kl 0.2", "Today I feel")
    rule = tt.within(tt.Steering.load("joy.safetensors"), kl=0.2)
    (done,) = lm.generate(["Today I feel"], steering=rule, max_new_tokens=NEW)
    answer = session.turns[-1].answer
    assert answer.text == done.text
    assert f"{answer.receipt.acted[0]['dial']:g}" == done.steering[0].split("=")[1]
    with pytest.raises(tt.TrimtabError, match="budget"):
        do("/steer calm.safetensors")
    assert [put.name for put in session.stack] == ["joy"]


def test_compare_is_both_answers_and_leaves_the_conversation(
    lm: tt.LanguageModel, session: Session, face: Heard, do: Callable[..., str]
) -> None:
    joy = tt.Steering.load("joy.safetensors").at(4)
    do("Today I feel sad", "/steer joy.safetensors@4", "Why is that", "/compare")
    before = session.as_json()["messages"]
    ((unsteered, steered),) = face.pairs
    assert unsteered.text == whole(lm, session)
    assert steered.text == whole(lm, session, joy) == session.turns[-1].answer.text
    assert session.as_json()["messages"] == before
    do("/off", "/compare")
    assert face.pairs[1][1].text == steered.text
    assert session.as_json()["compared"][0]["steered"]["text"] == steered.text


def test_cost_is_the_divergence_at_the_answers_tokens(
    lm: tt.LanguageModel, session: Session, do: Callable[..., str]
) -> None:
    do("Today I feel", "/steer joy.safetensors@2", "Why is that")
    joy, answer = tt.Steering.load("joy.safetensors").at(2), session.turns[-1].answer
    (prompt,) = lm.encode([[(m["role"], m["content"]) for m in session.as_json()["messages"][:-1]]])
    ids = torch.tensor([[*prompt, *answer.tokens]])
    with torch.no_grad():
        base = lm.model(ids).logits[0].double().log_softmax(-1)
        with lm.steered(joy):
            turned = lm.model(ids).logits[0].double().log_softmax(-1)
    each, gained = [], []
    for place, token in enumerate(answer.tokens, len(prompt) - 1):
        p = base[place].exp()
        each.append(float((p * (base[place] - turned[place])).sum()))
        gained.append(float(turned[place, token] - base[place, token]))
    cost = session.cost()
    assert cost.mean == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert cost.largest == pytest.approx(max(each), rel=1e-4)
    assert cost.gain == pytest.approx(sum(gained) / len(gained), rel=1e-3, abs=1e-5)
    assert cost.tokens == NEW
    assert "nats per token" in do("/cost")


def test_turns_are_taken_back_asked_again_saved_and_loaded(
    session: Session, lm: tt.LanguageModel, do: Callable[..., str], tmp_path: Path
) -> None:
    do("/system Be brief.", "/steer joy.safetensors@4", "/scope generated", "One", "Two")
    two = session.turns[-1].answer.text
    file = tmp_path / "talk.jsonl"
    assert "2 turns" in do(f"/save {file}")
    row = json.loads(file.read_text())
    assert [one["role"] for one in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert row["receipts"][1]["tokens"] == NEW
    (chat,) = read_chats(file)
    assert chat[-1] == ("assistant", two)

    assert do("/undo") == "took back: Two"
    do("Two")
    assert session.turns[-1].answer.text == two
    do("/off", "/retry")
    assert session.turns[-1].answer.text == whole(lm, session)
    assert len(session.turns) == 2
    do(f"/save {file}")  # its own file may be replaced

    other = Session(Local(lm, {"max_new_tokens": NEW}))
    other.load(str(file))
    assert other.as_json()["messages"] == session.as_json()["messages"]
    assert other.system == "Be brief."
    assert [str(put) for put in other.stack] == ["joy@4 on generated (off)"]
    other.switch(True)
    other.undo()
    other.ask("Two", lambda piece: None)
    assert other.turns[-1].answer.text == two
    do("/new")
    assert session.turns == []


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    session: Session, lm: tt.LanguageModel
) -> None:
    said: list[str] = []

    def stop(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    session.ask("Today I feel", stop)
    (turn,) = session.turns
    assert turn.answer.text == "".join(said)
    assert turn.answer.receipt.stopped
    session.ask("Go on", lambda piece: None)
    assert session.turns[-1].answer.text == whole(lm, session)

    def at_once(piece: str) -> None:
        raise KeyboardInterrupt

    lm_session = Session(_Silent())
    assert lm_session.ask("Hello", at_once).text == ""
    assert lm_session.turns == []


class _Silent:
    """A speaker who is stopped before a word."""

    name = "silent"

    def __getattr__(self, name: str) -> Any:
        return lambda *given: Answer("", Receipt(stopped=True))


def test_a_long_conversation_is_refused_with_what_to_do(lm: tt.LanguageModel) -> None:
    session = Session(Local(lm, {"max_new_tokens": 300}))
    answer = session.ask("Today I feel", lambda piece: None)
    assert len(answer.tokens) < 256  # as many as there is room for
    with pytest.raises(tt.TrimtabError, match="/undo"):
        session.ask("And", lambda piece: None)
    assert len(session.turns) == 1


def test_seeds_draw_another_answer_each_time(lm: tt.LanguageModel) -> None:
    options = {"max_new_tokens": NEW, "temperature": 1.5, "seed": 7}
    sessions = [Session(Local(lm, options)) for _ in range(2)]
    drawn = []
    for session in sessions:
        first = session.ask("Today I feel", lambda piece: None).text
        drawn.append((first, session.retry(lambda piece: None).text))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/stear joy.safetensors", "did you mean /steer?"),
        ("/steer nowhere.safetensors", "nowhere.safetensors"),
        ("/steer joy.safetensors@x", "no number"),
        ("/steer 'joy", "quotation mark"),
        ("/steer calm.safetensors nowhere.safetensors", "nowhere.safetensors"),
        ("/undo twice", "takes nothing"),
        ("/dial", "/dial 0.5"),
        ("/dial nan", "a number"),
        ("/dial anger 2", "no steering here is called anger"),
        ("/kl -1", "above 0"),
        ("/scope nonsense(", "scope"),
        ("/off calm", "called calm"),
        ("/save", "one file"),
        ("/load nowhere.jsonl", "no file"),
        ("/load broken.jsonl", "in turn"),
        ("/receipt perhaps", "/receipt on"),
        ("\udcff", "UTF-8"),
    ],
)
def test_mistakes_get_one_line_and_change_nothing(
    session: Session, do: Callable[..., str], line: str, said: str
) -> None:
    Path("broken.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    do("Today I feel", "/steer joy.safetensors@2")
    before = session.as_json()
    with pytest.raises(tt.TrimtabError) as refused:
        do(line)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert session.as_json() == before


def test_what_cannot_be_done_yet_says_what_comes_first(
    session: Session, do: Callable[..., str], lm: tt.LanguageModel
) -> None:
    for line in ("/undo", "/retry", "/compare", "/cost", "/save talk.jsonl"):
        with pytest.raises(tt.TrimtabError, match="asked yet"):
            do(line)
    for line in ("/dial 2", "/off", "/drop", "/scope all"):
        with pytest.raises(tt.TrimtabError, match="nothing steers"):
            do(line)
    do("Hello")
    for line, said in (("/compare", "nothing steers"), ("/cost", "not steered")):
        with pytest.raises(tt.TrimtabError, match=said):
            do(line)
    bare = language_model("llama")
    bare.tokenizer.chat_template = None
    with pytest.raises(tt.TrimtabError, match="no chat template"):
        Local(bare, {})


def test_lists_names_and_slashes(session: Session, do: Callable[..., str], folder: Path) -> None:
    assert "nothing steers" in do("/steer")
    do("/steer joy.safetensors@2", "/steer joy.safetensors@3")
    (folder / "other").mkdir(exist_ok=True)
    tt.Steering.load("calm.safetensors").save(folder / "other/joy.safetensors", overwrite=True)
    do("/steer other/joy.safetensors@1")
    said = do("/steer").splitlines()
    assert [line.partition(":")[0] for line in said] == ["joy@3", "joy-2@1"]
    do("/drop joy-2", "/on")
    assert [str(put) for put in session.stack] == ["joy@3"]
    assert "/compare" in do("/help")
    assert do("/receipt") == "receipts off"
    assert do("//steer is a word") == ""
    assert session.turns[-1].question == "/steer is a word"
    with pytest.raises(LeaveError):
        do("/quit")
