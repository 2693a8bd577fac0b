"""What a line of a chat says: a question, or a command that begins with /."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trimtab.chat.answers import Answer, OnBoth, OnText
from trimtab.chat.session import Session
from trimtab.errors import TrimtabError, shown
from trimtab.steering import Steering, as_number


class Face(Protocol):
    """What shows a chat: a terminal, a pipe."""

    #: Whether a receipt is shown below each answer.
    receipts: bool

    def say(self, text: str) -> None:
        """A line that is no answer."""

    def answer(self, write: Callable[[OnText], Answer]) -> Answer:
        """Show an answer while it is written."""

    def both(
        self, write: Callable[[OnBoth], tuple[Answer, Answer]], heads: tuple[str, str]
    ) -> tuple[Answer, Answer]:
        """Show two answers side by side."""


class LeaveError(Exception):
    """The user is done."""


@dataclass(frozen=True)
class Command:
    """A command: what it takes, what it does, and the function that does it with what follows its
    name."""

    takes: str
    does: str
    act: Callable[[Session, Face, str], None]


def obey(session: Session, face: Face, line: str) -> None:
    """Do what a line says. Errors: a TrimtabError of one line, after which nothing has changed;
    LeaveError where it ends the chat."""
    text = line.strip()
    if not text:
        return
    if not text.startswith("/") or text.startswith("//"):
        question = text[1:] if text.startswith("//") else text
        _show(face, lambda on_text: session.ask(question, on_text))
        return
    name, _, rest = text[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise TrimtabError(f"there is no command /{shown(name, 40)}: {hint} (// sends a /)")
    if rest.strip() and not command.takes:
        raise TrimtabError(f"/{name} takes nothing behind it, and there is {shown(rest, 40)}")
    command.act(session, face, rest.strip())


def _show(face: Face, write: Callable[[OnText], Answer]) -> None:
    """Show an answer and its receipt."""
    answer = face.answer(write)
    if answer.receipt.stopped and not answer.text:
        face.say("stopped before a word: nothing is kept of it")
    elif face.receipts or answer.receipt.stopped:
        face.say(answer.receipt.line)


# -- what steers ----------------------------------------------------------------------------------


def _list(session: Session, face: Face) -> None:
    if not session.stack:
        face.say("nothing steers: /steer FILE@DIAL puts a steering on")
    for put in session.stack:
        face.say(str(put) if put.steering is None else f"{put}: {_described(put.steering)}")


def _described(steering: Steering) -> str:
    """Its method, and how far its dial goes."""
    dial, gated = steering.dial, "" if steering.gate is None else ", gated"
    low, high = dial.range
    return f"{shown(steering.method)}, {shown(dial.name)} {low:.4g} to {high:.4g}{dial.unit}{gated}"


def _steer(session: Session, face: Face, rest: str) -> None:
    if not rest:
        _list(session, face)
        return
    before = session.stack
    try:
        puts = [session.steer(argument) for argument in _words(rest)]
    except TrimtabError:
        session.stack = before  # all of them, or none
        raise
    for put in puts:
        face.say(f"put on {put}")


def _dial(session: Session, face: Face, rest: str) -> None:
    name, value = _named(session, rest, "/dial 0.5, or /dial NAME 0.5")
    dial = value if value.lstrip("-").isalpha() else _number(value, "a dial")
    face.say(str(session.change(name, lambda put: put.turned(dial=dial, kl=None))))


def _kl(session: Session, face: Face, rest: str) -> None:
    name, value = _named(session, rest, "/kl 0.1, or /kl NAME 0.1")
    kl = _number(value, "a budget")
    if kl <= 0:
        raise TrimtabError(f"a budget must be above 0 nats, not {kl:g}")
    face.say(str(session.change(name, lambda put: put.turned(kl=kl))))


def _scope(session: Session, face: Face, rest: str) -> None:
    if not rest:
        _list(session, face)
        return
    first, _, more = rest.partition(" ")
    named = bool(more) and any(put.name == first for put in session.stack)
    name, scope = (first, more.strip()) if named else (None, rest)
    own = None if scope == "own" else scope
    face.say(str(session.change(name, lambda put: put.turned(scope=own))))


def _off(session: Session, face: Face, rest: str) -> None:
    session.switch(False, rest or None)
    _list(session, face)


def _on(session: Session, face: Face, rest: str) -> None:
    session.switch(True, rest or None)
    _list(session, face)


def _drop(session: Session, face: Face, rest: str) -> None:
    face.say(f"took off {session.drop(rest or None).name}")


def _compare(session: Session, face: Face, rest: str) -> None:
    acting = [put for put in session.stack if put.on] or session.stack
    heads = "unsteered", " + ".join(put.name for put in acting)
    for answer in face.both(session.compare, heads):
        if face.receipts:
            face.say(answer.receipt.line)


def _cost(session: Session, face: Face, rest: str) -> None:
    face.say(session.cost().line)


# -- the conversation -----------------------------------------------------------------------------


def _system(session: Session, face: Face, rest: str) -> None:
    if rest:
        session.system = None if rest == "none" else rest
    face.say("no system message" if session.system is None else f"system: {session.system}")


def _undo(session: Session, face: Face, rest: str) -> None:
    face.say(f"took back: {shown(' '.join(session.undo().split()), 100)}")


def _retry(session: Session, face: Face, rest: str) -> None:
    _show(face, session.retry)


def _new(session: Session, face: Face, rest: str) -> None:
    session.new()
    face.say("a new conversation")


def _save(session: Session, face: Face, rest: str) -> None:
    face.say(f"saved {len(session.turns)} turns to {session.save(_file(rest, '/save'))}")


def _load(session: Session, face: Face, rest: str) -> None:
    path = session.load(_file(rest, "/load"))
    face.say(f"loaded {len(session.turns)} turns from {path}")
    for put in session.stack:
        face.say(str(put))


def _receipt(session: Session, face: Face, rest: str) -> None:
    if rest not in ("", "on", "off"):
        raise TrimtabError("write /receipt on, or /receipt off")
    face.receipts = rest == "on" if rest else not face.receipts
    face.say(f"receipts {'on' if face.receipts else 'off'}")


def _help(session: Session, face: Face, rest: str) -> None:
    names = [f"/{name} {command.takes}".rstrip() for name, command in COMMANDS.items()]
    width = max(map(len, names))
    for name, command in zip(names, COMMANDS.values(), strict=True):
        face.say(f"{name.ljust(width)}  {command.does}")


def _quit(session: Session, face: Face, rest: str) -> None:
    raise LeaveError


# -- what follows a command -----------------------------------------------------------------------


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise TrimtabError(f"{shown(text, 100)}: a quotation mark has no end") from error


def _file(text: str, command: str) -> str:
    words = _words(text)
    if len(words) != 1:
        raise TrimtabError(f"{command} takes one file: {command} FILE.jsonl")
    return words[0]


def _named(session: Session, text: str, form: str) -> tuple[str | None, str]:
    """A steering's name, None where it is the last one's, and what follows."""
    words = _words(text)
    if len(words) not in (1, 2):
        raise TrimtabError(f"write {form}")
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def _number(text: str, what: str) -> float:
    number = as_number(text)
    if number is None:
        raise TrimtabError(f"{what} is a number, not {shown(text, 40)}")
    return number


COMMANDS: dict[str, Command] = {
    "steer": Command("[FILE@DIAL ...]", "put a steering on, or turn it anew; alone: list", _steer),
    "dial": Command("[NAME] NUMBER", "turn a dial (0.5, or gentle, clear, strong)", _dial),
    "kl": Command("[NAME] NATS", "turn it for each question to so many nats", _kl),
    "scope": Command("[NAME] SCOPE", "on which tokens it acts; own: the file's", _scope),
    "off": Command("[NAME]", "leave it out, or all", _off),
    "on": Command("[NAME]", "have it act again, or all", _on),
    "drop": Command("[NAME]", "take it off", _drop),
    "compare": Command("", "the last question, unsteered and steered side by side", _compare),
    "cost": Command("", "what steering changed in the last answer, in nats per token", _cost),
    "system": Command("[TEXT]", "the system message; none: without", _system),
    "undo": Command("", "take the last turn back", _undo),
    "retry": Command("", "answer the last question again", _retry),
    "new": Command("", "begin again", _new),
    "save": Command("FILE.jsonl", "write the conversation", _save),
    "load": Command("FILE.jsonl", "go on with one", _load),
    "receipt": Command("[on|off]", "a line below each answer on what acted", _receipt),
    "help": Command("", "this list", _help),
    "quit": Command("", "leave (Ctrl-D too)", _quit),
}
