"""Steerings as adapters: an engine that takes nothing of ours steers by LoRA, and exactly.

A steering that is linear in the activation, without a constant, on all tokens, is a small adapter
(`exchange`). Here one is made for each variant, steerings at their dials, when a request first asks
for it. It is known by the digest of what it does, in its path and in the engine, because engines
keep cached blocks and adapters by those; a number is never given twice. Its directory stays as long
as a request may run with it, because an engine reads it again whenever it has left memory.

An engine leaves out what an adapter has for modules that it does not wrap, and says nothing. So the
modules are named when it starts, each adapter is held against them, and its first request is a
short text whose log-probabilities are those of the steered model, or it is refused.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.serving.carrying import Adapted
from trimtab.serving.elsewhere import Given
from trimtab.serving.jobs import FullError, Job
from trimtab.serving.making import Maker, last_slot_leaks, to_its_end
from trimtab.steering import Steering

#: Adapters of one batch, and of the worker's memory, unless the engine's arguments say otherwise.
SLOTS, IN_MEMORY = 8, 32


@dataclass(eq=False)
class _Made:
    """An adapter: what the engine is given with a request, and how many jobs run with it."""

    request: Any
    jobs: int = 0


class Adapters:
    """Steers an engine by adapters, of which `most` are kept.

    The model of transformers keeps its weights, of which adapters are made."""

    def __init__(
        self, language_model: LanguageModel, carried: Adapted, most: int, *, slots: int = SLOTS
    ) -> None:
        self._carried, self._most, self._slots = carried, most, slots
        self._folder = Path(tempfile.mkdtemp(prefix="trimtab-adapters-"))
        self._maker = Maker(language_model, carried, self._folder)
        #: By the digest of what they do, those that were asked for last at the end.
        self._made: dict[str, _Made] = {}
        self._numbers = count(1)
        self._nothing: Any = None
        self._llm: Any = None
        self._making: asyncio.Lock

    @property
    def arguments(self) -> dict[str, Any]:
        """What the engine is started with: room for adapters, at some modules only."""
        assert self._carried.modules is not None
        return {
            "enable_lora": True,
            "max_loras": self._slots,
            "max_cpu_loras": max(self._slots, min(self._most, IN_MEMORY)),
            "max_lora_rank": self._carried.rank,
            "lora_target_modules": list(self._carried.modules),
        }

    def check(self, config: Any) -> None:
        """Refuse a configuration in which some requests could not run."""
        slots = config.lora_config.max_loras
        if last_slot_leaks(config) and slots < 2:
            raise TrimtabError(
                "on a CPU this vLLM takes one place of max_loras for requests that are not "
                "steered: give it --vllm max_loras=2 or more"
            )
        if config.lora_config.max_lora_rank != self._carried.rank:
            raise TrimtabError("max_lora_rank is settled before the engine starts")

    async def begin(self, llm: Any) -> None:
        """Have what requests need that are not steered."""
        self._llm, self._making = llm, asyncio.Lock()
        if last_slot_leaks(llm.vllm_config):
            assert self._carried.modules is not None
            nothing = self._maker.make_nothing(self._carried.modules)
            self._nothing = self._maker.request("nothing", next(self._numbers), nothing)
            await llm.add_lora(self._nothing)

    def close(self) -> None:
        """The engine has ended, and reads no adapter any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @asynccontextmanager
    async def given(self, job: Job) -> AsyncIterator[Given]:
        """The adapter of a job's steerings, which stays until the job is over."""
        acting = [s for s in job.acting if any(not i.idle_at(s.setting) for i in s.interventions)]
        if not acting:
            yield Given(adapter=self._nothing)
            return
        made = await self._hold(acting)
        try:
            yield Given(adapter=made.request)
        finally:
            made.jobs -= 1

    # -- making them --------------------------------------------------------------------------

    async def _hold(self, steerings: Sequence[Steering]) -> _Made:
        digest = self._maker.digest(steerings)
        while digest not in self._made:
            await to_its_end(self._making, partial(self._make, digest, steerings))
        made = self._made.pop(digest)
        self._made[digest] = made
        made.jobs += 1
        return made

    async def _make(self, digest: str, steerings: Sequence[Steering]) -> None:
        """Have an adapter, which another request may have had made meanwhile."""
        if digest not in self._made:
            await self._make_room()
            made = await self._maker.make(self._llm, digest, steerings, next(self._numbers))
            self._made[digest] = _Made(made)

    async def _make_room(self) -> None:
        """Have the engine leave the adapter that was asked for longest ago of those that no job
        has, and then delete it."""
        while len(self._made) >= self._most:
            idle = next((one for one, made in self._made.items() if not made.jobs), None)
            if idle is None:
                raise FullError(f"{self._most} variants are at work: try again later")
            gone = self._made.pop(idle)
            await self._llm.remove_lora(gone.request.lora_int_id)
            shutil.rmtree(self._folder / idle)
