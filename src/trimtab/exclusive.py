"""One at a time: a model that one thread steers, reads through hooks or copies is not another's.

Hooks sit on the model's modules, so whatever a thread attaches, every pass of every other thread
would run through. All that puts something on a model therefore takes its turn here. Calls that
hold the model for one batch (`generate`, `logits`, the passes of `fit`) wait for each other. A
`with lm.steered(...)` block holds it for as long as its thread likes, and that thread may be
waiting for the very one that would wait for it: others are refused until the block ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from trimtab.errors import TrimtabError


class _Turn:
    """Whose turn it is on one model."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.owner: threading.Thread | None = None
        self.depth = 0  # how many of the owner's calls and blocks are open
        self.blocks = 0  # how many of them are blocks

    def take(self, block: bool) -> None:
        me = threading.current_thread()
        with self.changed:
            while self.owner not in (None, me):
                if self.blocks:
                    assert self.owner is not None
                    raise TrimtabError(
                        f"a `with` block of thread {self.owner.name!r} is steering this model: "
                        "end that block first, or give generate() and logits() their steering as "
                        "an argument in all threads, which then wait for each other"
                    )
                self.changed.wait()
            self.owner = me
            self.depth += 1
            self.blocks += block

    def give_back(self, block: bool) -> None:
        with self.changed:
            self.depth -= 1
            self.blocks -= block
            if not self.depth:
                self.owner = None
            self.changed.notify_all()


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def exclusively(body: nn.Module, block: bool = False) -> Iterator[None]:
    """Hold a model, known by its transformer body, which all that wrap the model share.

    The thread that holds it may take it again. `block` says that it is held for longer than a
    call. Raises TrimtabError where another thread has such a block open.
    """
    with _LOCK:
        turn = _TURNS.setdefault(body, _Turn())
    turn.take(block)
    try:
        yield
    finally:
        turn.give_back(block)
