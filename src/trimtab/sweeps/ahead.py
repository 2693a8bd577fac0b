"""What an engine says of many steerings at once, before anybody asks about each of them.

Trials are measured one after the other. An engine is best with all of them in one batch, so that it
is asked ahead; a steering about which it cannot say anything has the reason in place of an answer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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

    def ask(
        self, steerings: Sequence[Steering], parts: Sequence[Part], max_cost: float | None
    ) -> None:
        """About plain text first, where cost has a limit, and about rows of what keeps it."""
        rows = self._rows
        self._records = {}
        rows.plain.ask_ahead([] if max_cost is None else steerings)
        allowed = [one for one in steerings if max_cost is None or self._keeps(one, max_cost)]
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

    def _keeps(self, steering: Steering, max_cost: float) -> bool:
        try:
            return self._rows.plain.cost(steering) <= max_cost
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
