"""A file of prompts: JSONL, each row with steerings of its own where it names some.

    {"prompt": "Today I feel"}
    {"messages": [{"role": "user", "content": "Why?"}], "id": "a7", "steer": "joy.safetensors@4"}
    {"prompt": "Why?", "steer": ["joy.safetensors", "formal.safetensors"], "dial": [4, "clear"]}
    {"prompt": "Why?", "steer": [], "id": 12}

A row without `steer` has the steerings that are given for all rows, at its own `dial` and in its
own `scope` where it says them; an empty list is no steering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.contrasts import Prompt, images_in, read_prompt
from trimtab.errors import TrimtabError
from trimtab.files import json_object
from trimtab.steering import Scope, Steering

_KNOWN = ("prompt", "messages", "id", "steer", "dial", "scope")


@dataclass(frozen=True)
class Row:
    """A prompt, in which line of the file it stands, what it is called there, and under which
    steerings it is answered; `given` is the prompt as the file has it."""

    line: int
    prompt: Prompt
    given: Any
    steerings: tuple[Steering, ...] = ()
    id: str | int | None = None


def read_rows(file: Path, steerings: Sequence[Steering] = ()) -> list[Row]:
    """The rows of a file; `steerings` are for rows that name none. What is wrong with a row is said
    with its line."""
    rows: list[Row] = []
    read, turned, scoped = cache(Steering.read), cache(_turned), cache(_scoped)
    try:
        # Iterating over the file, not str.splitlines(): texts may hold U+2028 and the like.
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    row = json_object(line, where)
                    try:
                        acting = _steerings(row, tuple(steerings), read, turned, scoped)
                        rows.append(_row(row, number, where, acting))
                    except TrimtabError as error:
                        said = str(error)
                        at = "" if said.startswith(where) else f"{where}: "
                        raise TrimtabError(f"{at}{said}") from error
    except OSError as error:
        raise TrimtabError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{file} is not UTF-8 text: {error}") from error
    if not rows:
        raise TrimtabError(f"{file} has no rows")
    return rows


def _row(row: dict[str, Any], number: int, where: str, acting: tuple[Steering, ...]) -> Row:
    strange = [name for name in row if name not in _KNOWN]
    if strange:
        raise TrimtabError(f"{strange[0]!r} is nothing that a row has: {', '.join(_KNOWN)}")
    named = [name for name in ("prompt", "messages") if name in row]
    if len(named) != 1:
        raise TrimtabError("a row has a prompt, or messages")
    given, name = row[named[0]], row.get("id")
    if named == ["messages"] and not isinstance(given, list):
        raise TrimtabError("messages are a list")
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        raise TrimtabError("an id is text or a whole number")
    prompt = read_prompt(given, where)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise TrimtabError("the prompt is empty")
    if images_in(prompt):
        raise TrimtabError("a file of prompts is text: images go on the command line (--image)")
    return Row(number, prompt, given, acting, name)


def _steerings(
    row: dict[str, Any],
    given: tuple[Steering, ...],
    read: Callable[[str], Steering],
    turned: Callable[[Steering, Any], Steering],
    scoped: Callable[[Steering, str], Steering],
) -> tuple[Steering, ...]:
    """What a row is steered by. Rows that say the same have the very same steerings."""
    steerings = given
    if "steer" in row:
        named = row["steer"]
        named = [named] if isinstance(named, str) else [] if named is None else named
        if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise TrimtabError("steer is FILE, FILE@DIAL, or a list of such")
        steerings = tuple(map(read, named))
    for name, act in (("dial", turned), ("scope", scoped)):
        if name in row:
            said = _for_each(name, row[name], len(steerings))
            pairs = zip(steerings, said, strict=True)
            steerings = tuple(act(one, value) for one, value in pairs)
    return steerings


def _for_each(name: str, said: Any, count: int) -> list[Any]:
    """What a row says of each of its steerings."""
    kinds = str if name == "scope" else str | int | float
    each = said if isinstance(said, list) else [said]
    if not all(isinstance(one, kinds) and not isinstance(one, bool) for one in each):
        of = "text" if name == "scope" else "a number, or gentle, clear, strong"
        raise TrimtabError(f"{name} is {of}, or a list with one for each steering")
    if len(each) != count:
        raise TrimtabError(f"{len(each)} times {name} for {count} steerings")
    return each


def _turned(steering: Steering, dial: Any) -> Steering:
    return steering.at(dial)


def _scoped(steering: Steering, scope: str) -> Steering:
    return steering.scoped(Scope.parse(scope))
