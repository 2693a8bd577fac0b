"""Reads a gate from one string: a file, or several put together.

    either = both { "|" both }
    both   = one { "&" one }
    one    = "!" one | "(" either ")" | FILE

A file whose name has one of these signs, or a blank, stands alone or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.errors import TrimtabError, shown
from trimtab.files import exists
from trimtab.steering.gates import Gate

_LEXEMES = re.compile(r"\s*(?:([&|!()])|([^\s&|!()]+))")
_DEEPEST = 32


def read_gate(text: str) -> Gate:
    """The gate that a string names."""
    if text.strip() and exists(Path(text)):
        return Gate.load(text)
    return _Reader(text).whole()


class _Reader:
    """Goes through the signs and the files of one string."""

    def __init__(self, text: str) -> None:
        found = [match[1] or match[2] for match in _LEXEMES.finditer(text)]
        self.text, self.left, self.depth = text, found, 0

    def whole(self) -> Gate:
        gate = self.either()
        if self.left:
            raise self._error(f"'{shown(self.left[0], 60)}' cannot stand where it does")
        return gate

    def either(self) -> Gate:
        gate = self.both()
        while self._take("|"):
            gate = gate | self.both()
        return gate

    def both(self) -> Gate:
        gate = self.one()
        while self._take("&"):
            gate = gate & self.one()
        return gate

    def one(self) -> Gate:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._error(f"more than {_DEEPEST} signs inside of each other")
        try:
            if self._take("!"):
                return ~self.one()
            if self._take("("):
                gate = self.either()
                if not self._take(")"):
                    raise self._error("a bracket is not closed")
                return gate
        finally:
            self.depth -= 1
        if not self.left or self.left[0] in "&|!()":
            raise self._error("a file is missing")
        return Gate.load(self.left.pop(0))

    def _take(self, sign: str) -> bool:
        if self.left[:1] != [sign]:
            return False
        del self.left[0]
        return True

    def _error(self, what: str) -> TrimtabError:
        return TrimtabError(
            f"gate '{shown(self.text, 100)}': {what}; write FILE, or "
            "'a.safetensors & !b.safetensors'"
        )
