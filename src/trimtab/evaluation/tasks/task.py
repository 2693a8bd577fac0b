"""What a task is: its data, its prompts, how outputs are read and judged, its contrast.

A task is a value of `Task`; one file holds one task. `protocol` is "paper", which follows the code
of the papers' authors to the letter, or "trimtab", which leaves it where it has known faults;
`differences` says where, in words for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.contrasts import Contrast, Pair, Part, Prompt
from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks.data import Columns, Row, Source, read_rows

Protocol = Literal["paper", "trimtab"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


#: Under `trimtab`, one in this many groups of train rows is held out for validation.
_HELD_OUT = 5


@dataclass(frozen=True)
class Example:
    """One prompt and what its answer should be; `target` is None where nothing is right or wrong.

    `fields` is what records and metrics want to know beside it.
    """

    id: str
    prompt: Prompt
    target: str | float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """How an answer is written: new tokens, greedy or sampled, and a pattern that ends it."""

    new_tokens: int | Callable[[str], int]  # or by architecture, as a paper has it
    sampled: bool = False
    stop: str | None = None

    def tokens_for(self, architecture: str) -> int:
        return self.new_tokens(architecture) if callable(self.new_tokens) else self.new_tokens


@dataclass(frozen=True)
class Task:
    """A task of the evaluation.

    `example` makes the prompt of a row; `read` finds the prediction in an output, None where there
    is none; `pairs` makes the contrast of train rows. `group` says which rows belong together, so
    that no prompt is held out whose twin was trained on. `options` are the answers of a choice. A
    task without `read` is free text: `measures` says what its outputs are scored on, `pairwise`
    that a judge compares steered with unsteered ones. `chat` prompts are conversations, which a
    model without a chat template is given as plain text. `read_file` reads other files than JSONL.
    """

    name: str
    about: str
    test: Source
    train: Source | None
    columns: Columns
    example: Callable[[Row, int, Protocol], Example]
    generation: Generation
    pairs: Callable[[Sequence[Row], Protocol, int], list[Pair]] | None = None
    train_columns: Columns | None = None
    read: Callable[[str, Protocol], str | float | None] | None = None
    options: tuple[str, ...] = ()
    right: Callable[[str | float | None, str | float | None], bool] = lambda a, b: a == b
    group: Callable[[Row], Any] = lambda row: row["id"]
    train_limit: int = 1000
    measures: tuple[str, ...] = ()
    pairwise: bool = False
    chat: bool = False
    read_file: Callable[[Path], Sequence[Row]] | None = None
    differences: str = ""
    #: What may be asked for in words, as after "Please", and its opposite; nothing where no words
    #: suit the task.
    behaviour: str = ""
    opposite: str = ""

    def rows(self, part: Part, protocol: Protocol, data: str | None) -> list[Row]:
        """The rows of a part, checked; validation rows are held out from the train rows."""
        if part == "test":
            return read_rows(self.name, self.test, self.columns, data, self.read_file)
        if self.train is None:
            raise TrimtabError(f"{self.name} has no train part, only a test part")
        columns = self.train_columns or self.columns
        rows = read_rows(self.name, self.train, columns, data)[: self.train_limit]
        if protocol == "paper":
            if part == "validation":
                raise TrimtabError(
                    f"{self.name}: the paper's protocol has no validation rows; use trimtab's"
                )
            return rows
        held_out = _held_out([self.group(row) for row in rows])
        return [row for row, out in zip(rows, held_out, strict=True) if out == (part != "train")]

    def contrast(
        self, protocol: Protocol = "trimtab", data: str | None = None, seed: int = 0
    ) -> Contrast:
        """Right against wrong answers, from the train rows (and validation rows, marked so)."""
        check_protocol(protocol)
        if self.pairs is None:
            raise TrimtabError(f"{self.name} has no contrast: it has prompts without answers")
        parts: list[Part] = ["train"] if protocol == "paper" else ["train", "validation"]
        found = []
        for part in parts:
            rows = self.rows(part, protocol, data)
            if rows:
                found += [
                    Pair(pair.prompt, pair.positive, pair.negative, part)
                    for pair in self.pairs(rows, protocol, seed)
                ]
        return Contrast(
            tuple(found), f"task:{self.name}", behaviour=self.behaviour, opposite=self.opposite
        )


def check_protocol(protocol: str) -> None:
    """Refuse an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise TrimtabError(f"unknown protocol {protocol!r}: known are {', '.join(PROTOCOLS)}")


def _held_out(groups: Sequence[Any]) -> list[bool]:
    """Whether each row is for validation: every fifth group, in the order of the file."""
    rank: dict[Any, int] = {}
    for group in groups:
        rank.setdefault(group, len(rank))
    return [rank[group] % _HELD_OUT == _HELD_OUT - 1 for group in groups]
