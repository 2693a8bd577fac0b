"""Lines that a person types: with history, completion and several lines where prompt_toolkit is
installed, and plainly where it is not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.chat.commands import COMMANDS
from trimtab.chat.session import Session
from trimtab.errors import TrimtabError
from trimtab.files import state_dir
from trimtab.steering import STRENGTHS
from trimtab.terminal import note, printable

if TYPE_CHECKING:
    from prompt_toolkit.document import Document

_PROMPT, _MORE = "> ", ". "
#: Words of scopes that are offered.
_SCOPES = ("own", "all", "prompt", "generated", "last", "user", "assistant", "thinking")
_OF_NAMES = ("dial", "kl", "scope", "off", "on", "drop")


def typed_lines(session: Session) -> Iterator[str]:
    """What the user types, until Ctrl-D. Ctrl-C throws away what is begun."""
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        note("history and completion need the extra chat: pip install 'trimtab[chat]'")
        yield from _plainly()
        return
    yield from _edited(session)


def _plainly() -> Iterator[str]:
    """Lines by `input`; one that ends with a backslash goes on with the next."""
    begun: list[str] = []
    while True:
        try:
            line = input(_MORE if begun else _PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            begun = []
            continue
        if line.endswith("\\"):
            begun.append(line[:-1])
            continue
        yield "\n".join([*begun, line])
        begun = []


def history_file() -> Path | None:
    """Where lines are kept that were typed, for the user's eyes only; None, with a word about it,
    where it cannot be."""
    path = state_dir() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OSError as error:
        note(f"lines are not kept: {path}: {error.strerror or error}")
        return None
    return path


def _edited(session: Session) -> Iterator[str]:
    """Lines by prompt_toolkit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        """Send, or go on in the next line after a backslash."""
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    class Completing(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            word = last_word(text)
            for offered in completions(session, text):
                yield Completion(offered, start_position=-len(word))

    path = history_file()
    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        completer=Completing(),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation=_MORE,
        bottom_toolbar=lambda: printable(_standing(session)),
    )
    while True:
        try:
            yield prompt.prompt(_PROMPT)
        except EOFError:
            return
        except KeyboardInterrupt:
            continue


def _standing(session: Session) -> str:
    """What answers, and what steers it."""
    steering = " + ".join(map(str, session.stack)) or "unsteered"
    return f"{session.speaker.name} · {steering} · Alt-Enter: new line · /help"


# -- completion -----------------------------------------------------------------------------------


def last_word(text: str) -> str:
    """What is being typed."""
    return text[max(text.rfind(" "), text.rfind("\n")) + 1 :]


def completions(session: Session, text: str) -> list[str]:
    """What the last word of a line that begins with a command may become."""
    if not text.startswith("/") or "\n" in text:
        return []
    name, space, _ = text[1:].partition(" ")
    word = last_word(text)
    if not space:
        return [f"/{one}" for one in COMMANDS if one.startswith(name)]
    offered: Iterable[str] = ()
    if name == "steer":
        offered = _steerings(session, word)
    elif name in ("save", "load"):
        offered = _files(word, ".jsonl")
    elif name in _OF_NAMES:
        offered = [put.name for put in session.stack]
        if name == "dial":
            offered = [*offered, *STRENGTHS]
        elif name == "scope":
            offered = [*offered, *_SCOPES]
    elif name == "receipt":
        offered = ("on", "off")
    return [one for one in offered if one.startswith(word)]


def _steerings(session: Session, word: str) -> list[str]:
    """Files and names of steerings, and behind an @ where its dial may stand."""
    source, at, _ = word.rpartition("@")
    if not at:
        return [*session.speaker.known(), *_files(word, ".safetensors")]
    dials = list(STRENGTHS)
    try:
        steering = session.speaker.put(source).steering
    except TrimtabError:
        return []
    if steering is not None:
        low, high = steering.dial.range
        dials += [f"{value:.4g}" for value in dict.fromkeys((steering.setting, low, high))]
    return [f"{source}@{dial}" for dial in dials]


def _files(word: str, ending: str) -> list[str]:
    """Files with an ending, and directories, whose paths begin with a word."""
    folder, _, begun = word.rpartition("/")
    base = f"{folder}/" if "/" in word else ""
    try:
        entries = sorted(os.scandir(os.path.expanduser(base) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        hidden = entry.name.startswith(".") and not begun.startswith(".")
        if entry.is_dir() and not hidden:
            found.append(f"{base}{entry.name}/")
        elif entry.name.endswith(ending) and not hidden:
            found.append(f"{base}{entry.name}")
    return [one for one in found if one.startswith(word)]
