"""What a terminal shows of a chat: markdown while it is written, two answers side by side, nothing
that is obeyed; and what is typed: history, several lines, completion."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import trimtab as tt
from helpers import language_model, steer_at
from trimtab.chat import Answer, Local, Plain, Receipt, Screen, Session, joined, typed_lines
from trimtab.chat.editor import completions
from trimtab.chat.screen import whole_blocks
from trimtab.terminal import CleanConsole

TEXT = """\
# Fruits

Here is a **list** with <b>HTML</b> and `code`:

1. pears
2. plums

```python
for i in range(3):

    print(i)
```

A [link](http://example.org) at the end.
"""


def shown(write: Any, width: int = 60, height: int = 12) -> str:
    """What is left on a screen of that size when something has been written."""
    out = io.StringIO()
    console = CleanConsole(file=out, force_terminal=True, width=width, height=height)
    write(Screen(console))
    return played(out.getvalue())


def played(output: str) -> str:
    """The text that is left when a terminal has obeyed what rich wrote: it moves up and clears."""
    lines, row = [""], 0
    parts = output.replace("\x1b", "\0\x1b").split("\0")
    for part in parts:
        if part.startswith("\x1b["):
            end = next(i for i, c in enumerate(part[2:], 2) if c.isalpha())
            code, number, part = part[end], part[2:end], part[end + 1 :]
            if code == "A":
                row = max(0, row - int(number or 1))
            elif code == "K":
                lines[row] = ""
        for char in part:
            if char == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif char == "\r":
                continue
            else:
                lines[row] += char
    return "\n".join(line.rstrip() for line in lines)


def in_pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_ends_as_the_markdown_of_its_text(size: int) -> None:
    def write(screen: Screen) -> None:
        def speak(on_text: Any) -> Answer:
            for piece in in_pieces(TEXT, size):
                on_text(piece)
            return Answer(TEXT, Receipt())

        screen.answer(speak)

    lines = [line.strip() for line in shown(write).splitlines() if line.strip()]
    assert any("Fruits" in line for line in lines)
    assert "Here is a list with <b>HTML</b> and code:" in lines
    assert lines.count("1 pears") == lines.count("2 plums") == 1
    assert sum("for i in range(3):" in line for line in lines) == 1
    assert "A link (http://example.org) at the end." in lines


def test_markup_of_a_model_is_not_obeyed() -> None:
    evil = "a \x1b]0;title\x07 b &#8238; c [red]d[/red] :smile:\n\n\x1b[2Jend"

    def write(screen: Screen) -> None:
        screen.answer(lambda on_text: (on_text(evil), Answer(evil, Receipt()))[1])

    text = shown(write)
    assert "\\x1b]0;title\\x07" in text
    assert "\\u202e" in text
    assert "[red]d[/red] :smile:" in text
    assert "\\x1b[2Jend" in text


def test_two_answers_stand_side_by_side_also_where_they_are_long() -> None:
    texts = [" ".join(["left"] * 90), " ".join(["right"] * 90)]

    def write(screen: Screen) -> None:
        def speak(on_both: Any) -> tuple[Answer, Answer]:
            for pieces in zip(*(in_pieces(text, 9) for text in texts), strict=False):
                for place, piece in enumerate(pieces):
                    on_both(place, piece)
            return Answer(texts[0], Receipt()), Answer(texts[1], Receipt())

        screen.both(speak, ("unsteered", "warm"))

    lines = shown(write).splitlines()
    (head,) = [line for line in lines if "unsteered" in line]
    assert head.index("unsteered") < head.index("warm")
    both = [line for line in lines if "left" in line and "right" in line]
    assert len(both) > 10
    assert sum(line.count("left") for line in lines) == 90


def test_blocks_are_whole_where_nothing_after_them_changes_them() -> None:
    assert TEXT[: whole_blocks(TEXT)].endswith("```\n\n")
    assert whole_blocks("One\n\n") == 0  # what follows is not known
    assert whole_blocks("One\n\nTwo") == len("One\n\n")
    assert whole_blocks("```\na\n\nb") == 0
    assert whole_blocks("- one\n\n  more of one") == 0


# -- what is typed --------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    lm = language_model("llama")
    steer_at(lm, "resid", seed=2).save(tmp_path / "joy.safetensors")
    return Session(Local(lm, {"max_new_tokens": 4}))


def typed(session: Session, keys: str) -> list[str]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return list(typed_lines(session))


def test_lines_are_kept_for_the_users_eyes_only(session: Session, tmp_path: Path) -> None:
    assert typed(session, "hello\r/undo\r\x04") == ["hello", "/undo"]
    file = tmp_path / "state/trimtab/chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    # Up goes back in what was typed another time.
    assert typed(session, "\x1b[A\x1b[A!\r\x04") == ["hello!"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_several_lines_and_lines_that_are_thrown_away(session: Session) -> None:
    assert typed(session, "one\x1b\rtwo\r\x04") == ["one\ntwo"]
    assert typed(session, "one\\\rtwo\r\x04") == ["one\ntwo"]
    assert typed(session, "wrong\x03right\r\x04") == ["right"]


def test_where_history_cannot_be_kept_it_is_said(
    session: Session, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("a file")
    assert typed(session, "hello\r\x04") == ["hello"]
    assert capsys.readouterr().err.startswith("trimtab: lines are not kept: ")


def test_without_the_extra_lines_are_read_plainly(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prompt_toolkit", None)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\ntwo\nthree\n"))
    assert list(typed_lines(session)) == ["one\ntwo", "three"]
    assert "trimtab[chat]" in capsys.readouterr().err


def test_completion_knows_commands_files_and_dials(session: Session) -> None:
    assert completions(session, "/st") == ["/steer"]
    os.mkdir("jolly")
    assert completions(session, "/steer jo") == ["jolly/", "joy.safetensors"]
    assert "joy.safetensors@clear" in completions(session, "/steer joy.safetensors@")
    session.steer("joy.safetensors@2")
    assert completions(session, "/off j") == ["joy"]
    assert completions(session, "/scope gen") == ["generated"]
    assert completions(session, "/dial str") == ["strong"]
    assert completions(session, "/steer nowhere@") == []
    assert completions(session, "no command") == []


def test_piped_lines_go_on_after_a_backslash() -> None:
    assert list(joined(["one\\\n", "two\n", "three"])) == ["one\ntwo", "three"]
    broken = io.TextIOWrapper(io.BytesIO(b"a\n\xff\xfe\n"), encoding="utf-8")
    with pytest.raises(tt.TrimtabError, match="not UTF-8"):
        list(joined(broken))


def test_in_a_pipe_a_stopped_answer_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        Plain().answer(lambda on_text: Answer("so far", Receipt(stopped=True)))
    assert capsys.readouterr().out == "so far\n"
