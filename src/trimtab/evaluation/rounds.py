"""Work that gives records a batch at a time, one after the other or all of it in turns.

An engine takes the requests of all work that has begun into one batch. So all of it begins, and
whoever has his turn takes the next step for everybody.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing
from typing import TypeVar

from trimtab.terminal import progress

Key = TypeVar("Key")
Some = TypeVar("Some")
#: Work by its key: batches of something, of which some may be empty.
Works = Iterable[tuple[Key, Generator[list[Some]]]]
#: How much work is begun at once: what waits in an engine is held in memory.
_BEGUN = 64


def one_by_one(works: Works[Key, Some]) -> Generator[tuple[Key, list[Some]]]:
    """All that one gives, and then all that the next one does; who does not want all of it closes
    it."""
    for key, work in works:
        with closing(work) as batches:
            for records in batches:
                yield key, records


def in_turns(works: Works[Key, Some], what: str, count: int) -> Generator[tuple[Key, list[Some]]]:
    """A batch of each, again and again, until none has any more; a bar is called `what`, and there
    are `count` in all."""
    left = iter(works)
    # The bar of all of them ends last.
    with progress(what, count) as advance, ExitStack() as opened:
        begun: list[tuple[Key, Generator[list[Some]]]] = []
        while True:
            while len(begun) < _BEGUN and (new := next(left, None)) is not None:
                opened.enter_context(closing(new[1]))
                records = next(new[1], None)
                if records is not None:
                    begun.append(new)
                    yield new[0], records
                else:
                    advance(1)
            if not begun:
                return
            for one in list(begun):
                records = next(one[1], None)
                if records is None:
                    begun.remove(one)
                    advance(1)
                else:
                    yield one[0], records
