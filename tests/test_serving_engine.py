"""The engine that runs a model for many jobs: no job harms another, and none waits for nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest

import trimtab as tt
from helpers import PROMPTS, language_model
from trimtab.serving import Engine, Limits
from trimtab.serving.choosing import Settings
from trimtab.serving.jobs import Ended, Job, Piece, Told


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


class Asked:
    """A job, and what was told of it."""

    def __init__(
        self, lm: tt.LanguageModel, settings: Settings, prompt: str = PROMPTS[0], **more: Any
    ) -> None:
        self.told: list[Told] = []
        self.over = Event()
        steerings: Callable[[], tuple[tt.Steering, ...]] = more.pop("steerings", tuple)
        tokens = list(lm.encode([prompt])[0])
        self.job = Job(tokens, steerings, settings, self._hear, **more)

    def _hear(self, told: Told) -> None:
        self.told.append(told)
        if not isinstance(told, Piece):
            self.over.set()

    @property
    def end(self) -> Told:
        """How it ended: with a reason, or an error."""
        assert self.over.wait(20)
        return self.told[-1]


@contextmanager
def running(lm: tt.LanguageModel, limits: Limits = Limits(), **more: Any) -> Iterator[Engine]:
    engine = Engine(lm, limits, **more)
    try:
        yield engine
    finally:
        engine.close()


def begun_together(engine: Engine, asked: Sequence[Asked]) -> None:
    """Have some jobs begin in one batch."""
    with engine._changed:  # its thread waits for it
        for one in asked:
            engine._waiting.append(one.job)
        engine._changed.notify()


def test_a_text_that_cannot_be_gone_on_with_harms_none_beside_it(lm: tt.LanguageModel) -> None:
    strange = Asked(lm, Settings(8, bias={999_999_999: 1.0}))
    other = Asked(lm, Settings(8, 0.0))
    with running(lm) as engine:
        begun_together(engine, [strange, other])
        assert isinstance(strange.end, tt.TrimtabError)
        assert other.end == Ended("length")
    (done,) = lm.generate(PROMPTS[:1], chat=False, max_new_tokens=8)
    assert other.job.new == list(done.tokens)
