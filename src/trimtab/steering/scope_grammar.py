"""Reads a scope from its text.

    scope  = either [ "~" FACTOR ]                      a decay over generated tokens
    either = both { ("|" | "or") both }
    both   = one { ("&" | "and") one }
    one    = ("!" | "not") one | part
    part   = atom { "[" [NUMBER] ":" [NUMBER] "]" }     a window
    atom   = WORD | "token" "(" NUMBER {"," NUMBER} ")"
           | "between" "(" mark "," mark ")" | "(" either ")"
    mark   = "TEXT" | 'TEXT' | NUMBER | "[" NUMBER {"," NUMBER} "]"

A mistake is an error of one line that says which word or character it is about.
"""

from __future__ import annotations

import ast
import difflib
import re
from typing import NamedTuple

from trimtab.errors import TrimtabError, shown
from trimtab.steering.scope_tree import (
    WORDS,
    And,
    Between,
    Mark,
    Not,
    Or,
    Part,
    TokenIs,
    Window,
    Word,
)

#: How long a scope may be, in characters, how deep in brackets, and how large a number of tokens.
LONGEST, _DEEPEST, _LARGEST = 1000, 50, 10**9
_FUNCTIONS = ("token", "between")
#: What one word stands for.
_AS_SIGNS = {"and": "&", "or": "|", "not": "!"}
_LEXEMES = re.compile(
    r"""(?P<space>\s+)
    |(?P<word>[A-Za-z_][A-Za-z_0-9]*)
    |(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|-?\.\d+)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<sign>[&|!~()\[\]:,])""",
    re.VERBOSE | re.ASCII,
)


class _Lexeme(NamedTuple):
    kind: str  # word, number, text, sign; "end" at the end
    text: str
    place: int  # of its first character, counted from 1


def read(text: str) -> tuple[Part, float | None]:
    """The parts of a scope, and the factor of its decay."""
    if len(text) > LONGEST:
        raise TrimtabError(
            f"scope '{shown(text, 60)}' has {len(text)} characters: {LONGEST} are the most"
        )
    return _Reader(text).whole()


class _Reader:
    """Goes through the lexemes of one text, one behind the other."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.lexemes = self._split(text)

    def _split(self, text: str) -> list[_Lexeme]:
        found, place = [], 0
        while place < len(text):
            match = _LEXEMES.match(text, place)
            if match is None:
                if text[place] in "\"'":
                    raise self._error("the text that begins here has no end", place + 1)
                raise self._error(f"{_quoted(text[place])} means nothing here", place + 1)
            kind, word = str(match.lastgroup), match.group()
            if kind != "space":
                sign = _AS_SIGNS.get(word) if kind == "word" else None
                found.append(_Lexeme("sign" if sign else kind, sign or word, place + 1))
            place = match.end()
        return [*found, _Lexeme("end", "", len(text) + 1)]

    # -- the rules of the grammar -------------------------------------------------------------

    def whole(self) -> tuple[Part, float | None]:
        part, decay = self.either(), None
        if self._take("~"):
            decay = self.factor()
        if self.now.kind != "end":
            before = self.lexemes[self.at - 1].text
            raise self._error(
                f"{_quoted(self.now.text)} cannot follow {_quoted(before)}: put &, | or a bracket "
                "between them, and a decay (~) at the end"
            )
        return part, decay

    def either(self) -> Part:
        parts = [self.both()]
        while self._take("|"):
            parts.append(self.both())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def both(self) -> Part:
        parts = [self.one()]
        while self._take("&"):
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def one(self) -> Part:
        if not self._take("!"):
            return self.part()
        self._deeper()
        made = Not(self.one())
        self.depth -= 1
        return made

    def part(self) -> Part:
        made, windows = self.atom(), 0
        while self.now.text == "[" and self.now.kind == "sign":
            windows += 1
            if windows > _DEEPEST:
                raise self._error(f"more than {_DEEPEST} windows on one part")
            made = self.window(made)
        return made

    def window(self, of: Part) -> Window:
        begin = self.now
        self._expect("[")
        first = self.number("a window begins with") if self.now.kind == "number" else None
        self._expect(":")
        stop = self.number("a window ends with") if self.now.kind == "number" else None
        self._expect("]")
        if first is None and stop is None:
            raise self._error(
                "this window takes all: write [:n] for the first n, [n:] for those after them",
                begin.place,
            )
        ends = [end for end in (first, stop) if end is not None and end < 0]
        if ends and of != Word("prompt"):
            raise self._error(
                f"{ends[0]} counts from an end that is not known while the model reads: only "
                "prompt takes numbers below 0",
                begin.place,
            )
        same_side = first is not None and stop is not None and (first < 0) == (stop < 0)
        if stop == 0 or (same_side and first is not None and stop is not None and stop <= first):
            raise self._error("this window is empty", begin.place)
        return Window(of, first, stop)

    def atom(self) -> Part:
        begin = self.now
        if self._take("("):
            self._deeper()
            made = self.either()
            self._expect(")")
            self.depth -= 1
            return made
        if begin.kind != "word":
            self._missing()
        self.at += 1
        if begin.text == "token":
            return TokenIs(self.ids("(", ")"))
        if begin.text == "between":
            self._expect("(")
            start = self.mark()
            self._expect(",")
            end = self.mark()
            self._expect(")")
            return Between(start, end)
        if begin.text not in WORDS:
            near = difflib.get_close_matches(begin.text, [*WORDS, *_FUNCTIONS], 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(WORDS)}"
            raise self._error(f"there is no word '{shown(begin.text, 60)}': {hint}", begin.place)
        return Word(begin.text)

    def mark(self) -> Mark:
        now = self.now
        if now.kind == "text":
            self.at += 1
            return self._text(now)
        if now.kind == "number":
            return (self._id(),)
        if now.text == "[" and now.kind == "sign":
            return self.ids("[", "]")
        raise self._error(
            f'{self._here()} is no marker: write text in quotation marks, "<think>", or token ids, '
            "[27, 9112]"
        )

    def ids(self, opens: str, closes: str) -> tuple[int, ...]:
        self._expect(opens)
        found = [self._id()]
        while self._take(","):
            found.append(self._id())
        self._expect(closes)
        return tuple(found)

    def factor(self) -> float:
        now = self.now
        if now.kind != "number":
            raise self._error(f"{self._here()} is no factor of a decay: write a number, ~ 0.95")
        self.at += 1
        value = float(now.text)
        if not 0 < value < 1:
            raise self._error(
                f"a decay is a factor between 0 and 1, not {shown(now.text, 30)}", now.place
            )
        return value

    def number(self, what: str) -> int:
        now = self.now
        if re.fullmatch(r"-?\d{1,10}", now.text) is None or abs(int(now.text)) > _LARGEST:
            raise self._error(f"{what} a whole number of tokens, not {shown(now.text, 30)}")
        self.at += 1
        return int(now.text)

    # -- small steps --------------------------------------------------------------------------

    @property
    def now(self) -> _Lexeme:
        return self.lexemes[self.at]

    def _take(self, sign: str) -> bool:
        taken = self.now.kind == "sign" and self.now.text == sign
        self.at += taken
        return taken

    def _expect(self, sign: str) -> None:
        if not self._take(sign):
            raise self._error(f"{_quoted(sign)} is expected, not {self._here()}")

    def _id(self) -> int:
        if self.now.kind != "number":
            raise self._error(f"{self._here()} is no token id: write whole numbers")
        value = self.number("a token id is")
        if value < 0:
            raise self._error(f"{value} is no token id", self.lexemes[self.at - 1].place)
        return value

    def _text(self, lexeme: _Lexeme) -> str:
        try:
            made = ast.literal_eval(lexeme.text)
            made.encode()
        except (SyntaxError, ValueError) as error:
            raise self._error("this text is not written as Python writes text") from error
        if not made.strip():
            raise self._error("a marker must say something, and this text is empty", lexeme.place)
        return str(made)

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._error(f"more than {_DEEPEST} brackets inside of each other")

    def _here(self) -> str:
        return "the end" if self.now.kind == "end" else _quoted(self.now.text)

    def _missing(self) -> None:
        if not self.text.strip():
            raise TrimtabError(f"a scope is empty: write all, or one of {', '.join(WORDS)}")
        before = self.lexemes[self.at - 1].text if self.at else ""
        if self.now.kind == "end":
            raise self._error(f"something is missing after {_quoted(before)}", self.now.place - 1)
        after = f" after {_quoted(before)}" if before else " at the beginning"
        raise self._error(f"{_quoted(self.now.text)} cannot stand{after}")

    def _error(self, what: str, place: int | None = None) -> TrimtabError:
        place = self.now.place if place is None else place
        return TrimtabError(f"scope '{shown(self.text, 120)}', character {place}: {what}")


def _quoted(text: str) -> str:
    return f"'{shown(text, 40)}'"
