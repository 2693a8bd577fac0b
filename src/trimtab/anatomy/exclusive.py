"""One at a time: a model that one thread steers, reads through hooks or copies is not another's.

Hooks sit on the model's modules, so whatever a thread attaches, every pass of every other thread
would run through. All that puts something on a model therefore takes its turn here. Calls that
hold the model for one batch (`generate`, `logits`, the passes of `fit`) wait for each other. A
`with lm.steered(...)` block holds it for as long as its thread likes, and that thread may be
waiting for the very one that would wait for it: others are refused until the block ends. So are
other coroutines of the same thread, which would otherwise run in the middle of the block.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from trimtab.errors import TrimtabError


@dataclass(frozen=True)
class _Owner:
    """Who runs a piece of code: a thread and, where there is one, its asyncio task."""

    thread: threading.Thread
    task: asyncio.Task[Any] | None

    @classmethod
    def here(cls) -> _Owner:
        """Whoever runs now, or on whose behalf a thread works."""
        sender = _SENDER.get()
        if sender is not None:
            return sender
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs in this thread
            task = None
        return cls(threading.current_thread(), task)

    def lets(self, other: _Owner) -> bool:
        """Whether somebody runs inside of what this owner does: in the same task, in tasks that
        code without a task runs, or after the task, which has left its block open."""
        if self.thread is not other.thread:
            return False
        return self.task in (None, other.task) or self.task.done()

    def __str__(self) -> str:
        task = "" if self.task is None else f", task {self.task.get_name()!r}"
        return f"thread {self.thread.name!r}{task}"


_SENDER: ContextVar[_Owner | None] = ContextVar("sender", default=None)


@contextmanager
def on_behalf_of_this_thread() -> Iterator[None]:
    """A context that is copied inside is this thread's also where another thread runs in it. It is
    for work that this thread waits for."""
    token = _SENDER.set(_Owner.here())
    try:
        yield
    finally:
        _SENDER.reset(token)


class _Turn:
    """Whose turn it is on one model."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.owner: _Owner | None = None
        self.depth = 0  # how many of the owner's calls and blocks are open
        self.blocks = 0  # how many of them are blocks

    def take(self, block: bool) -> None:
        me = _Owner.here()
        with self.changed:
            while self.owner is not None and not self.owner.lets(me):
                if self.blocks or self.owner.thread is me.thread:
                    raise TrimtabError(
                        f"a `with` block of {self.owner} is steering this model: end that block "
                        "first, or give generate() and logits() their steering as an argument in "
                        "all threads, which then wait for each other"
                    )
                self.changed.wait()
            self.owner = self.owner or me
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


@contextmanager
def exclusively_whole(model: nn.Module) -> Iterator[None]:
    """Hold a model of which nobody knows yet which of its modules is the body, and with it every
    body inside of it that somebody else may hold."""
    with ExitStack() as held:
        for module in model.modules():
            if module is model or module in _TURNS:
                held.enter_context(exclusively(module))
        yield
