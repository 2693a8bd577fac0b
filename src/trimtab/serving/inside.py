"""Steerings inside of an engine: trimtab's plugin in each of its processes steers each request.

The model of transformers is read once, to know where its sites are and to see that the engine has
the same activations there; then its weights are let go.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from trimtab.anatomy import Anatomy
from trimtab.engines import (
    LOADED,
    Wanted,
    configuration,
    content_of,
    extra_args,
    places_of,
    refuse_ways,
    sites_of,
    steps_of,
    wanted_of,
    why_not,
)
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, scope_weights
from trimtab.serving.elsewhere import Given
from trimtab.serving.jobs import FullError, Job
from trimtab.serving.placing import acts_of
from trimtab.serving.proving import joined, last_activations, probe, refuse_others
from trimtab.steering import Steering

#: Steerings that workers hold at once, those that nobody asks for any more among them.
_HELD = 512


@dataclass
class Carried:
    """What an engine carries: called with a steering, it says why not, "" where it does. `sites`
    are those that it was started with, None as long as it was not; `ranks` split its units."""

    anatomy: Anatomy
    ranks: int = 1
    sites: Collection[str] | None = None

    def __call__(self, steering: Steering) -> str:
        if reason := why_not(steering):
            return reason
        wanted = sites_of([steering])
        try:
            places_of(self.anatomy, wanted)
            steps_of(steering, 0, self.ranks)
        except TrimtabError as error:
            return str(error)
        strange = [] if self.sites is None else [site for site in wanted if site not in self.sites]
        if strange:
            kind = strange[0].rpartition(".")[2]
            return f"it was not started with {strange[0]}: start it with --hook {kind}"
        return ""


def sites_wanted(
    steerings: Sequence[Steering], kinds: Sequence[str], anatomy: Anatomy
) -> list[str]:
    """The sites to start an engine with: those that steerings act at, and all of some kinds."""
    more = [site for kind in kinds for site in anatomy.sites(kind)]
    return list(dict.fromkeys([*sites_of(steerings), *more]))


class Inside:
    """Steers inside of an engine, at some sites of a model, whose weights are let go."""

    def __init__(self, language_model: LanguageModel, sites: Sequence[str]) -> None:
        self._lm = language_model
        self._places = places_of(language_model.anatomy, sites)
        self._probe = probe(language_model)
        self._expected = last_activations(language_model, sites)
        language_model.model.to("meta")  # its weights have said what they had to say
        #: Steerings that the workers hold, by digest, and how many jobs run with each.
        self._held: dict[str, int] = {}
        self._llm: Any = None
        self._loading: asyncio.Lock

    @property
    def arguments(self) -> dict[str, Any]:
        """What the engine is started with: its sites."""
        return {"additional_config": configuration(self._places)}

    def check(self, config: Any) -> None:
        """Refuse a configuration in which rows could be steered wrongly."""
        refuse_ways(config)

    async def begin(self, llm: Any) -> None:
        """See that each site is what it is in transformers."""
        from vllm import SamplingParams

        self._llm, self._loading = llm, asyncio.Lock()
        await llm.collective_rpc("trimtab_watch")
        prompt = {"prompt_token_ids": self._probe, "cache_salt": uuid.uuid4().hex}
        async for _ in llm.generate(prompt, SamplingParams(max_tokens=1), uuid.uuid4().hex):
            pass
        seen = await llm.collective_rpc("trimtab_seen")
        refuse_others(self._expected, joined(seen), self._lm.dtype)

    @asynccontextmanager
    async def given(self, job: Job) -> AsyncIterator[Given]:
        """What the job's request carries, while the workers hold its steerings."""
        wanted: list[Wanted] = []
        try:
            for steering in job.acting:
                self._check_scopes(steering, job.tokens)
                wanted.append(await self._hold(steering))
            yield Given(extra_args(wanted))
        finally:
            for one in wanted:
                self._held[one.digest] -= 1

    def close(self) -> None:
        """Nothing is left of it."""

    def _check_scopes(self, steering: Steering, tokens: Sequence[int]) -> None:
        """Refuse a text that has no turns of a chat where a scope asks for some."""
        for scope in steering.scopes:
            if scope.by_content:
                scope_weights(self._lm.marks, scope, tokens, len(tokens))

    async def _hold(self, steering: Steering) -> Wanted:
        """Have the workers hold a steering until the job that asked for it is over."""
        wanted = wanted_of(steering, partial(acts_of, self._lm))
        async with self._loading:
            if wanted.digest not in self._held:
                await self._make_room()
                args = (wanted.digest, content_of(steering))
                await self._llm.collective_rpc("trimtab_load", args=args)
                LOADED.add(wanted.digest)
                self._held[wanted.digest] = 0
            self._held[wanted.digest] += 1
        return wanted

    async def _make_room(self) -> None:
        """Have the workers leave the steering that was loaded first of those that no job has."""
        if len(self._held) < _HELD:
            return
        idle = next((digest for digest, jobs in self._held.items() if not jobs), None)
        if idle is None:
            raise FullError(f"{_HELD} steerings are at work: try again later")
        del self._held[idle]
        LOADED.discard(idle)
        await self._llm.collective_rpc("trimtab_unload", args=(idle,))
