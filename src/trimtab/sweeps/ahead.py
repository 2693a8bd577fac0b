"""What an engine says of many steerings at once, before anybody asks about each of them.

Trials are measured one after the other. An engine is best with all of them in one batch, so that it
is asked ahead; a steering about which it cannot say anything has the reason in place of an answer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from trimtab.contrasts import Part
from trimtab.errors import TrimtabError
from trimtab.evaluation import in_turns
from trimtab.figures import Record
from trimtab.steering import Steering

if TYPE_CHECKING:
    from trimtab.sweeps.rows import TaskRows

Some = TypeVar("Some")


class Ahead:
    """Answers about steerings of one task's rows; each is given out once."""

    def __init__(self, rows: TaskRows) -> None:
        self._rows = rows
        #: Each with its steering, so that no other takes its place.
        self._records: dict[tuple[int, Part], tuple[Steering, list[Record] | TrimtabError]] = {}
        self._nll: dict[int, tuple[Steering, Tensor | TrimtabError]] = {}

    def ask(
        self, steerings: Sequence[Steering], parts: Sequence[Part], max_cost: float | None
    ) -> None:
        """About plain text first, where cost has a limit, and about rows of what keeps it."""
        rows = self._rows
        self._records, self._nll = {}, {}
        allowed = list(steerings)
        if max_cost is not None:
            _ = rows.cost(None)  # what the unsteered model makes of it
            works = {id(one): rows.plain_work(one) for one in steerings}
            found = gathered(works, "plain text")
            for one in steerings:
                got = found[id(one)]
                nll = got if isinstance(got, TrimtabError) else _tensor(got, rows.plain_count)
                self._nll[id(one)] = one, nll
            allowed = [one for one in steerings if self._keeps(one, max_cost)]
        asked = {(id(one), part): rows.work(one, part) for one in allowed for part in parts}
        by_id = {id(one): one for one in allowed}
        for key, records in gathered(asked, rows.task).items():
            self._records[key] = by_id[key[0]], records

    def records(self, steering: Any, part: Part) -> list[Record] | None:
        """Those of all rows of a part, if they are there."""
        found = self._records.pop((id(steering), part), None)
        if found is None or found[0] is not steering:
            return None
        if isinstance(found[1], TrimtabError):
            raise found[1]
        return found[1]

    def nll(self, steering: Any) -> Tensor | None:
        """Summed negative log-likelihood of each plain text, if it is there."""
        found = self._nll.get(id(steering))
        if found is None or found[0] is not steering:
            return None
        if isinstance(found[1], TrimtabError):
            raise found[1]
        return found[1]

    def summed(self, work: Generator[list[tuple[int, float]]], count: int | None) -> Tensor:
        """What comes of one work on plain texts."""
        return _tensor([one for some in work for one in some], count or self._rows.plain_count)

    def _keeps(self, steering: Steering, max_cost: float) -> bool:
        try:
            return self._rows.cost(steering) <= max_cost
        except TrimtabError:
            return False


def gathered(
    works: dict[Any, Generator[list[Some]]], what: str
) -> dict[Any, list[Some] | TrimtabError]:
    """What comes of works that take turns, or why nothing does."""
    found: dict[Any, Any] = {key: [] for key in works}

    def guarded(key: Any, work: Generator[list[Some]]) -> Generator[list[Some]]:
        try:
            yield from work
        except TrimtabError as error:
            found[key] = error

    each: Iterable[Any] = [(key, guarded(key, work)) for key, work in works.items()]
    for key, some in in_turns(each, what, len(works)):
        found[key] += some
    return found


def _tensor(sums: Sequence[tuple[int, float]], count: int) -> Tensor:
    found = torch.zeros(count, dtype=torch.float64)
    for place, value in sums:
        found[place] = value
    return found
