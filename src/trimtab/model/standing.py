"""Where the rows of a batch stand: which columns of each are its prompt, which come after it.

A column is a place in the padded batch, counted from the first token that the cache holds. Words of
place (`all`, `prompt`, `generated`, `last`) and windows of them are a stretch of columns of each
row, worked out once for a text; at every pass it takes a comparison of numbers to know that all
tokens of the pass are in it, or none, and tensors only where some are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.steering import Part, Window, Word

#: Where the prompt of a beginning ends that many texts share: later than any token.
UNKNOWN_END = 1 << 40
#: Beyond any column.
_FAR = 1 << 60
_PLACES = ("all", "prompt", "generated", "last")


class Standing(NamedTuple):
    """Of one row the columns of its first token, of the end of its prompt, and of the first token
    after it, which comes after the padding on the right of a prompt."""

    start: int
    end: int
    resumes: int


class _Stretch(NamedTuple):
    """From which column on, up to which one, each row is in a part."""

    first: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(eq=False)
class Prompts:
    """Where the prompts of a batch's texts stand, a `Standing` for each row, or one for all."""

    rows: tuple[Standing, ...]
    _known: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def ending(cls, ends: Sequence[int], starts: Sequence[int] = ()) -> Prompts:
        """Texts that go on right where their prompts end."""
        starts = starts or [0] * len(ends)
        return cls(tuple(Standing(a, b, b) for a, b in zip(starts, ends, strict=True)))

    @property
    def last_end(self) -> int:
        """The column before which all prompts end."""
        end: int = self._once("last end", lambda: max(row.end for row in self.rows))
        return end

    def repeated(self, rows: int) -> Prompts:
        """For so many rows, where beams and samples repeat each in place."""
        times = rows // len(self.rows)
        if len(self.rows) == 1 or times < 2:
            return self
        made: Prompts = self._once(
            ("repeated", times),
            lambda: Prompts(tuple(row for row in self.rows for _ in range(times))),
        )
        return made

    def moved(self, move: Callable[[Tensor], Tensor]) -> Prompts:
        """Those of rows that were put in another order, repeated or chosen."""
        if len(self.rows) == 1:
            return self
        return Prompts(tuple(self.rows[i] for i in move(torch.arange(len(self.rows))).tolist()))

    def column(self, of: str, device: torch.device) -> Tensor:
        """A column of each row (`start`, `end` or `resumes`), [rows, 1]."""
        made: Tensor = self._once(
            (of, device),
            lambda: torch.tensor([getattr(row, of) for row in self.rows], device=device)[:, None],
        )
        return made

    def within(self, part: Part, first: int, stop: int, device: torch.device) -> Tensor | bool:
        """Which of the columns from `first` to `stop` are in a part that `is_stretch`: one answer
        for all, or [rows, columns]."""
        of_rows: _Stretch = self._once(part, lambda: self._stretch(part))
        begin, end = of_rows
        if max(begin) <= first and stop <= min(end):
            return True
        if stop <= min(begin) or max(end) <= first:
            return False
        columns = torch.arange(first, stop, device=device)
        after = self._once((part, device), lambda: _as_columns(of_rows, device))
        inside: Tensor = (columns >= after[0]) & (columns < after[1])
        return inside

    def _stretch(self, part: Part) -> _Stretch:
        found = [_columns(part, row) for row in self.rows]
        return _Stretch(tuple(a for a, _ in found), tuple(b for _, b in found))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def is_stretch(part: Part) -> bool:
    """Whether a part is a word of place, or a window of one: some columns in a row."""
    while isinstance(part, Window):
        part = part.of
    return isinstance(part, Word) and part.name in _PLACES


def _columns(part: Part, row: Standing) -> tuple[int, int]:
    first, stop = _tokens(part, row.end - row.start)
    return _column(first, row), _column(stop, row, last=True)


def _tokens(part: Part, prompt: int) -> tuple[int, int]:
    """From which token on, up to which one, a part is in a text whose prompt has so many."""
    if isinstance(part, Window):
        begin, end = _tokens(part.of, prompt)
        first, stop = begin, end
        if part.first is not None:
            first = begin + part.first if part.first >= 0 else max(begin, end + part.first)
        if part.stop is not None:
            stop = min(end, begin + part.stop) if part.stop >= 0 else end + part.stop
        return first, max(first, stop)
    assert isinstance(part, Word)
    return {
        "all": (0, _FAR),
        "prompt": (0, prompt),
        "generated": (prompt, _FAR),
        "last": (max(0, prompt - 1), _FAR),
    }[part.name]


def _column(token: int, row: Standing, last: bool = False) -> int:
    """The column of a token by its number in its text; what ends with the prompt ends there."""
    prompt = row.end - row.start
    before = token <= prompt if last else token < prompt
    return token + (row.start if before else row.resumes - prompt)


def _as_columns(found: _Stretch, device: torch.device) -> tuple[Tensor, Tensor]:
    first, stop = (torch.tensor(ends, device=device)[:, None] for ends in found)
    return first, stop
