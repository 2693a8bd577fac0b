"""What a scope is made of: words, windows, spans, and how they are put together.

Frozen values without a model: `scope_grammar.py` reads them from text, `model/marks.py` finds what
they are in one model's tokens. What can be said of a part without looking at a text is said here:
whether it holds of a kind of token always, never, or depending on the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

#: Words that say where a token stands in its text.
PLACES = ("all", "prompt", "generated", "last")
#: Words that say of which kind it is, of a model that sees images.
KINDS = ("text", "image")
#: Words that say whose turn of a chat it is in.
ROLES = ("system", "user", "assistant", "last_user")
#: Words for what a model writes between markers of its own, and for what is not thinking of that.
SPANS = ("thinking", "answer", "tool_call")
WORDS = (*PLACES, *KINDS, *ROLES, *SPANS)

#: A marker: text, or the ids of its tokens.
Mark = str | tuple[int, ...]


class Situation(NamedTuple):
    """A kind of token: one of the prompt, the prompt's last, or a generated one; text or image."""

    place: Literal["prompt", "end", "generated"]
    kind: Literal["text", "image"] = "text"


#: Every kind of token that there is; what a next token is read from is text.
READ = (Situation("prompt"), Situation("prompt", "image"), Situation("end"))
SITUATIONS = (*READ, Situation("generated"))


@dataclass(frozen=True)
class Word:
    """Tokens that a word names."""

    name: str

    def __str__(self) -> str:
        return self.name

    def holds(self, at: Situation) -> bool | None:
        """Whether it holds of a kind of token; None where that depends on the text."""
        known = {
            "all": True,
            "prompt": at.place != "generated",
            "generated": at.place == "generated",
            "last": at.place != "prompt",
            "text": at.kind == "text",
            "image": at.kind == "image",
        }
        if self.name in known:
            return known[self.name]
        only_there = {"answer": "generated", "last_user": "prompt"}.get(self.name)
        if only_there == "generated":
            return None if at.place == "generated" else False
        return False if only_there == "prompt" and at.place == "generated" else None


@dataclass(frozen=True)
class TokenIs:
    """Tokens with one of some ids."""

    ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"token({', '.join(map(str, self.ids))})"

    def holds(self, at: Situation) -> bool | None:
        return None


@dataclass(frozen=True)
class Between:
    """Tokens from a marker on, up to another one."""

    start: Mark
    end: Mark

    def __str__(self) -> str:
        return f"between({_mark(self.start)}, {_mark(self.end)})"

    def holds(self, at: Situation) -> bool | None:
        return None


@dataclass(frozen=True)
class Window:
    """Of the tokens of another part those from number `first` up to number `stop`, counted from
    0; of the prompt negative numbers count from its end."""

    of: Part
    first: int | None
    stop: int | None

    def __str__(self) -> str:
        first, stop = ("" if end is None else end for end in (self.first, self.stop))
        return f"{_inside(self.of, (Word, TokenIs, Between, Window))}[{first}:{stop}]"

    def holds(self, at: Situation) -> bool | None:
        return False if self.of.holds(at) is False else None


@dataclass(frozen=True)
class Not:
    """The other tokens."""

    of: Part

    def __str__(self) -> str:
        return f"!{_inside(self.of, (Word, TokenIs, Between, Window, Not))}"

    def holds(self, at: Situation) -> bool | None:
        found = self.of.holds(at)
        return None if found is None else not found


@dataclass(frozen=True)
class And:
    """Tokens of which all parts hold."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return " & ".join(
            _inside(each, (Word, TokenIs, Between, Window, Not)) for each in self.parts
        )

    def holds(self, at: Situation) -> bool | None:
        found = {each.holds(at) for each in self.parts}
        return False if False in found else None if None in found else True


@dataclass(frozen=True)
class Or:
    """Tokens of which one part holds."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return " | ".join(
            _inside(each, (Word, TokenIs, Between, Window, Not, And)) for each in self.parts
        )

    def holds(self, at: Situation) -> bool | None:
        found = {each.holds(at) for each in self.parts}
        return True if True in found else None if None in found else False


Part = Word | TokenIs | Between | Window | Not | And | Or


def parts_of(part: Part) -> list[Part]:
    """A part and all that it is made of."""
    match part:
        case Window(of=of) | Not(of=of):
            return [part, *parts_of(of)]
        case And(parts=several) | Or(parts=several):
            return [part, *(inner for each in several for inner in parts_of(each))]
        case _:
            return [part]


def _inside(part: Part, plain: tuple[type, ...]) -> str:
    """A part as it is written inside of another, in brackets unless it is one of the plain ones."""
    return str(part) if isinstance(part, plain) else f"({part})"


def _mark(mark: Mark) -> str:
    if isinstance(mark, str):
        return json.dumps(mark, ensure_ascii=False)
    return str(mark[0]) if len(mark) == 1 else f"[{', '.join(map(str, mark))}]"
