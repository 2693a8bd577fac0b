"""The one piece of long work that goes on behind the pages, whether or not one of them looks:
pairs that a model writes, or a steering that is made. What it said, how far it is and what came of
it stay here, so that a page that is opened again finds it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Literal

from trimtab.errors import TrimtabError, one_line
from trimtab.terminal import watched

_LOG = logging.getLogger(__name__)
#: Lines that are kept of what is said.
_LINES = 200

State = Literal["waiting", "running", "stopping", "done", "failed", "stopped"]
#: Does the work, and is handed whom to tell what goes on.
Act = Callable[[Callable[[str], object]], dict[str, Any]]


class _StoppedError(BaseException):
    """Ends the work as Ctrl-C does: nothing on the way takes it for a mistake."""


@dataclass(eq=False)
class Job:
    """A piece of work; `asked` is what it was begun with."""

    kind: Literal["pairs", "make"]
    name: str
    asked: dict[str, Any]
    state: State = "waiting"
    said: list[str] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: str = ""
    _began: float = field(default_factory=time.monotonic)
    _took: float | None = None
    _stop: Event = field(default_factory=Event)

    @property
    def goes_on(self) -> bool:
        """Whether it is not over yet."""
        return self.state in ("waiting", "running", "stopping")

    def stop(self) -> None:
        """End it at its next step."""
        self._stop.set()
        if self.goes_on:
            self.state = "stopping"

    def work(self, act: Act) -> None:
        """Do it, in the thread of the model."""
        try:
            self._check()
            self.state = "running"
            with watched(self._hear):
                self.result = act(self._say)
            self.state = "done"
        except _StoppedError:
            self.state = "stopped"
        except TrimtabError as error:
            self.error, self.state = one_line(error), "failed"
        except Exception as error:
            _LOG.exception("work failed")
            self.error, self.state = f"it failed ({type(error).__name__})", "failed"
        finally:
            self._took = time.monotonic() - self._began

    def _check(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _say(self, text: str) -> None:
        self._check()
        self.said = [*self.said, text][-_LINES:]

    def _hear(self, what: str, done: int, total: int) -> None:
        self._check()
        self.progress = {"what": what, "done": done, "total": total}

    def as_json(self, whole: bool = False) -> dict[str, Any]:
        """As it stands; `whole` with what it was begun with and what came of it."""
        took = self._took if self._took is not None else time.monotonic() - self._began
        said = {
            "kind": self.kind,
            "name": self.name,
            "state": self.state,
            "said": self.said,
            "progress": self.progress,
            "error": self.error,
            "seconds": round(took, 1),
        }
        return {**said, "asked": self.asked, "result": self.result} if whole else said
