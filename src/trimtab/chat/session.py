"""A conversation under steerings: its turns, and what steers the next answer. It knows no terminal,
so that whatever shows a chat may use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.chat.answers import (
    Answer,
    Asked,
    Cost,
    OnBoth,
    OnText,
    Put,
    Receipt,
    Speaker,
    check_together,
)
from trimtab.errors import TrimtabError, shown
from trimtab.files import exists, read_jsonl, user_path, write_whole

#: The receipt of an answer that was written some other time.
_LOADED = Receipt()


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what was set when it was asked."""

    question: str
    answer: Answer
    system: str | None = None
    stack: tuple[Put, ...] = ()


@dataclass
class Session:
    """A chat with a speaker. What is refused changes nothing."""

    speaker: Speaker
    system: str | None = None
    stack: tuple[Put, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    #: Pairs of answers that were compared, with their questions.
    compared: list[tuple[str, Answer, Answer]] = field(default_factory=list)
    #: How many answers there were, those that were taken back with them.
    answers: int = 0
    #: The file that it was saved to or loaded from, which it may replace.
    file: Path | None = None

    # -- questions and answers --------------------------------------------------------------------

    def ask(self, question: str, on_text: OnText) -> Answer:
        """Ask, and keep the turn; one that is stopped before a word is not kept."""
        return self._ask(self.turns, question, on_text)

    def retry(self, on_text: OnText) -> Answer:
        """Ask the last question again, under what steers now."""
        last = self._last("/retry asks the last question again")
        return self._ask(self.turns[:-1], last.question, on_text)

    def _ask(self, before: list[Turn], question: str, on_text: OnText) -> Answer:
        _check_text(question)
        answer = self.speaker.answer(self._asked(before, question), on_text)
        self.answers += 1
        if answer.text or not answer.receipt.stopped:
            self.turns = [*before, Turn(question, answer, self.system, self.stack)]
        return answer

    def compare(self, on_both: OnBoth) -> tuple[Answer, Answer]:
        """The last question answered without and with what steers; the conversation stays. Where
        all is off, all of it is on for this."""
        last = self._last("/compare answers the last question twice")
        stack = self.stack
        if not any(put.on for put in stack):
            stack = tuple(put.turned(on=True) for put in stack)
        if not stack:
            raise TrimtabError("nothing steers: /steer FILE@DIAL, and then /compare")
        check_together(stack)
        asked = self._asked(self.turns[:-1], last.question, stack)
        unsteered, steered = self.speaker.both(asked, on_both)
        self.answers += 1
        self.compared.append((last.question, unsteered, steered))
        return unsteered, steered

    def cost(self) -> Cost:
        """What steering changed in the last answer."""
        last = self._last("/cost is of the last answer")
        asked = Asked(self._messages(self.turns[:-1], last.question), last.system, last.stack)
        return self.speaker.cost(asked, last.answer)

    def undo(self) -> str:
        """Take the last turn back; its question."""
        question = self._last("/undo takes the last turn back").question
        self.turns = self.turns[:-1]
        return question

    def new(self) -> None:
        """Begin again, with the same system message and steerings."""
        self.turns = []

    def _last(self, does: str) -> Turn:
        if not self.turns:
            raise TrimtabError(f"nothing was asked yet: {does}")
        return self.turns[-1]

    def _asked(
        self, before: Sequence[Turn], question: str, stack: tuple[Put, ...] | None = None
    ) -> Asked:
        own = self.stack if stack is None else stack
        return Asked(self._messages(before, question), self.system, own, self.answers)

    def _messages(self, before: Sequence[Turn], question: str) -> list[dict[str, str]]:
        messages = []
        for turn in before:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.text})
        return [*messages, {"role": "user", "content": question}]

    # -- what steers ------------------------------------------------------------------------------

    def steer(self, argument: str) -> Put:
        """Put a steering on the chat by FILE@DIAL, or turn the one of that file anew."""
        return self.put_on(self.speaker.put(argument))

    def put_on(self, put: Put) -> Put:
        """The same with one that was read."""
        place = next((i for i, one in enumerate(self.stack) if one.source == put.source), None)
        if place is not None:
            put = put.turned(name=self.stack[place].name)
            self._put((*self.stack[:place], put, *self.stack[place + 1 :]))
        else:
            put = put.turned(name=self._free(put.name))
            self._put((*self.stack, put))
        return put

    def change(self, name: str | None, change: Callable[[Put], Put]) -> Put:
        """Change a steering by its name, or the one that was put on last."""
        old = self.named(name)
        new = change(old)
        self._put(tuple(new if put is old else put for put in self.stack))
        return new

    def switch(self, on: bool, name: str | None = None) -> None:
        """Have a steering act or not, by its name, or all of them."""
        chosen = self.named(name)
        self._put(
            tuple(put.turned(on=on) if name is None or put is chosen else put for put in self.stack)
        )

    def drop(self, name: str | None) -> Put:
        """Take a steering off the chat."""
        old = self.named(name)
        self._put(tuple(put for put in self.stack if put is not old))
        return old

    def named(self, name: str | None) -> Put:
        """A steering by its name; None is the one that was put on last."""
        if not self.stack:
            raise TrimtabError("nothing steers: /steer FILE@DIAL puts a steering on")
        if name is None:
            return self.stack[-1]
        found = next((put for put in self.stack if put.name == name), None)
        if found is None:
            there = ", ".join(put.name for put in self.stack)
            raise TrimtabError(f"no steering here is called {shown(name, 80)}: there are {there}")
        return found

    def _put(self, stack: tuple[Put, ...]) -> None:
        check_together(stack)
        self.stack = stack

    def _free(self, name: str) -> str:
        """A name that no other steering has."""
        taken = {put.name for put in self.stack}
        names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 2)))
        return next(one for one in names if one not in taken)

    # -- files ------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """The conversation with the receipts of its answers, and what was compared."""
        return {
            **self._row(),
            "compared": [
                {
                    "question": question,
                    "unsteered": {"text": one.text, **one.receipt.as_json()},
                    "steered": {"text": other.text, **other.receipt.as_json()},
                }
                for question, one, other in self.compared
            ],
        }

    def _row(self) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = self._messages(self.turns, "")[:-1]
        return {
            "model": self.speaker.name,
            "messages": [*system, *messages],
            "steering": [put.as_json() for put in self.stack],
            "receipts": [turn.answer.receipt.as_json() for turn in self.turns],
        }

    def save(self, file: str) -> Path:
        """Write the conversation as one row of JSONL, with `messages` as chats have them elsewhere,
        what steers, and the receipts."""
        if not self.turns:
            raise TrimtabError("nothing was asked yet: there is nothing to save")
        path = user_path(file)
        own = self.file is not None and path.absolute() == self.file.absolute()
        content = json.dumps(self._row(), ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(path, content.encode(), overwrite=own)
        self.file = path
        return path

    def load(self, file: str) -> Path:
        """Go on with the last conversation of a JSONL file, under the steerings that it was saved
        with, where it names some; else what steers stays."""
        path = user_path(file)
        if not exists(path):
            raise TrimtabError(f"there is no file {shown(path, 200)}")
        rows = [row for row in read_jsonl(path) if "messages" in row]
        if not rows:
            raise TrimtabError(f'{path} has no conversation: rows are {{"messages": [...]}}')
        row = rows[-1]
        system, pairs = _conversation(row["messages"], str(path))
        loaded = Session(self.speaker)
        for one in row.get("steering") or ():
            loaded._restore(one, str(path))
        stack = loaded.stack if "steering" in row else self.stack
        self.turns = [Turn(question, Answer(text, _LOADED), system) for question, text in pairs]
        self.system, self.stack, self.file = system, stack, path
        return path

    def _restore(self, said: Any, where: str) -> None:
        """Put on what a saved conversation was steered with."""
        try:
            source, on = str(said["source"]), bool(said["on"])
            changes = {name: said[name] for name in ("dial", "kl", "scope")}
        except (LookupError, TypeError) as error:
            raise TrimtabError(f"{where}: its steering cannot be read") from error
        put = self.steer(source)
        self.change(put.name, lambda put: put.turned(on=on, **changes))


def _check_text(text: str) -> None:
    """Refuse bytes of a terminal, or of a pipe, that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TrimtabError("the question is not UTF-8 text") from error


def _conversation(messages: Any, where: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The system message, and questions with their answers."""
    try:
        said = [(str(one["role"]), one["content"]) for one in messages]
    except (LookupError, TypeError) as error:
        raise TrimtabError(f"{where}: its messages are no conversation") from error
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    texts = [text for _, text in said]
    in_turn = [role for role, _ in said] == ["user", "assistant"] * (len(said) // 2)
    plain = all(isinstance(text, str) for text in [*texts, system or ""])
    if not (said and in_turn and plain):
        raise TrimtabError(
            f"{where}: a chat goes on with questions and answers in turn, user and assistant, "
            "that end with an answer and are plain text"
        )
    return system, list(zip(texts[::2], texts[1::2], strict=True))
