"""The engine that runs a model for many jobs: no job harms another, and none waits for nobody."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import PROMPTS, language_model, steer_at
from trimtab.model import acted
from trimtab.serving import Engine, Limits
from trimtab.serving.choosing import Settings
from trimtab.serving.jobs import Ended, FullError, Job, Piece, Told
from trimtab.steering import Condition, Gate

LONG = Settings(200, 0.0)


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


class Asked:
    """A job, and what was told of it; `pause` are seconds that each token of it takes at least."""

    def __init__(
        self, lm: tt.LanguageModel, settings: Settings, prompt: str = PROMPTS[0], **more: Any
    ) -> None:
        self.told: list[Told] = []
        self._pause: float = more.pop("pause", 0.0)
        self.over = Event()
        steerings: Callable[[], tuple[tt.Steering, ...]] = more.pop("steerings", tuple)
        tokens = list(lm.encode([prompt])[0])
        self.job = Job(tokens, steerings, settings, self._hear, **more)

    def _hear(self, told: Told) -> None:
        self.told.append(told)
        time.sleep(self._pause)
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


def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


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


def test_what_token_gates_decided_is_that_of_the_whole_answer(lm: tt.LanguageModel) -> None:
    width = lm.anatomy.width("layers.0.resid")
    joy, asked, expected = steer_at(lm, "resid", seed=2).at(20), [], []
    for seed, threshold in itertools.product(range(4), (0.1, 0.2, 0.3)):
        direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        condition = Condition("layers.0.resid", direction, threshold, score="cosine")
        acting = (joy.scoped("prompt"), joy.gated(Gate((condition,))))
        settings = Settings(12 - 2 * seed, 0.0)
        asked.append(Asked(lm, settings, PROMPTS[seed % 3], steerings=lambda acting=acting: acting))
        (done,) = lm.generate(
            [PROMPTS[seed % 3]], chat=False, steering=[list(acting)],
            max_new_tokens=settings.max_tokens,
        )  # fmt: skip
        expected.append(done.gates)
    with running(lm) as engine:
        begun_together(engine, asked)
        assert all(one.end == Ended("length") for one in asked)
    for one, (gate,) in zip(asked, expected, strict=True):
        (found,) = one.job.gates
        assert found == replace(gate, scores=pytest.approx(gate.scores, abs=1e-4))
        told = acted(lm.marks, one.job.acting, one.job.gates, one.job.tokens, one.job.new)[1]
        assert told["gate"]["tokens"] == {"prompt": gate.prompt_tokens, "answer": gate.new_tokens}
    # Some fire in the answer alone, and some nowhere.
    assert any(gate.fired and not gate.prompt_tokens for (gate,) in expected)
    assert not all(gate.fired for (gate,) in expected)


def test_who_left_or_is_late_takes_no_place_among_those_that_wait(lm: tt.LanguageModel) -> None:
    """Also while no batch may begin."""
    with running(lm, Limits(batches=1, waiting=3)) as engine:
        engine.submit((first := Asked(lm, LONG, pause=0.02)).job)
        until(lambda: engine.running == 1)
        gone = [Asked(lm, LONG) for _ in range(2)]
        late = Asked(lm, LONG, deadline=time.monotonic() + 0.1)
        for one in (*gone, late):
            engine.submit(one.job)
        for one in gone:
            one.job.left.set()
        assert late.end == Ended("timeout")
        until(lambda: not engine.waiting)
        assert engine.running == 1
        assert not first.over.is_set()
        first.job.left.set()


def test_who_left_makes_room_while_the_model_runs(lm: tt.LanguageModel) -> None:
    """A pass may take long, and whoever comes meanwhile is not turned away for those that left."""
    busy, on = Event(), Event()

    def search() -> tuple[tt.Steering, ...]:
        busy.set()
        assert on.wait(20)
        return ()

    with running(lm, Limits(waiting=1)) as engine:
        engine.submit(Asked(lm, LONG, steerings=search).job)
        assert busy.wait(20)
        engine.submit((gone := Asked(lm, LONG)).job)
        with pytest.raises(FullError):
            engine.submit(Asked(lm, LONG).job)
        gone.job.left.set()
        engine.submit((other := Asked(lm, Settings(2, 0.0))).job)
        on.set()
        assert other.end == Ended("length")


def test_nothing_is_searched_for_those_that_left_meanwhile(lm: tt.LanguageModel) -> None:
    searched: list[int] = []

    def search(number: int) -> tuple[tt.Steering, ...]:
        searched.append(number)
        asked[1].job.left.set()
        return ()

    asked = [Asked(lm, Settings(2, 0.0), steerings=partial(search, i)) for i in range(3)]
    with running(lm) as engine:
        begun_together(engine, asked)
        assert asked[2].end == Ended("length")
    assert searched == [0, 2]
    assert not asked[1].told
