"""Steerings inside of an engine: trimtab's plugin in each of its processes steers each request.

The model of transformers is read once, to know where its sites are and to see that the engine has
the same activations there; then its weights are let go.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.dials import divergence, searched
from trimtab.engines import (
    LOADED,
    Read,
    ReadingOf,
    Wanted,
    configuration,
    content_of,
    extra_args,
    graphs,
    not_captured,
    places_of,
    reading_args,
    refuse_ways,
    sites_of,
    steps_of,
    wanted_of,
    way_of,
    why_not,
)
from trimtab.errors import TrimtabError
from trimtab.model import Fired, LanguageModel, fired_by
from trimtab.serving.deciding import (
    check_scopes,
    decided,
    early_of,
    read_of,
    scores_of,
    token_by_token,
)
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
    are those that it was started with, None as long as it was not; `ranks` split its units, its
    blocks lie on so many `stages`, and whole passes may be `captured` in CUDA graphs."""

    anatomy: Anatomy
    ranks: int = 1
    sites: Collection[str] | None = None
    stages: int = 1
    captured: bool = False

    def __call__(self, steering: Steering) -> str:
        reason = why_not(steering, self.ranks, self.stages)
        if not reason and self.captured:
            reason = not_captured(steering)
        if reason:
            return reason
        wanted = sites_of([steering])
        try:
            places_of(self.anatomy, wanted)
            steps_of(decided(steering), 0, self.ranks)
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
        #: The replica that is asked what it has seen; None where there is one.
        self._replica: int | None = None
        #: Whether all that steers is captured in graphs.
        self._captured = False
        self._loading: asyncio.Lock

    @property
    def arguments(self) -> dict[str, Any]:
        """What the engine is started with: its sites; and all log-probabilities may be asked for,
        of which budgets are measured."""
        steered = {"additional_config": configuration(self._places), "max_logprobs": -1}
        return {**graphs(), **steered}

    def check(self, config: Any) -> None:
        """Refuse a configuration in which rows could be steered wrongly."""
        refuse_ways(config)
        self._captured = way_of(config) == "kernel"

    async def begin(self, llm: Any) -> None:
        """See that each site is what it is in transformers."""
        from vllm import SamplingParams

        self._llm, self._loading = llm, asyncio.Lock()
        # All replicas are told what to do, and of what they answer vLLM hands on the first one's.
        self._replica = 0 if llm.vllm_config.parallel_config.data_parallel_size > 1 else None
        await llm.collective_rpc("trimtab_watch")
        prompt = {"prompt_token_ids": self._probe, "cache_salt": uuid.uuid4().hex}
        params, name = SamplingParams(max_tokens=1), uuid.uuid4().hex
        async for _ in llm.generate(prompt, params, name, data_parallel_rank=self._replica):
            pass
        seen = await llm.collective_rpc("trimtab_seen")
        refuse_others(self._expected, joined(seen), self._lm.dtype)

    @asynccontextmanager
    async def given(self, job: Job) -> AsyncIterator[Given]:
        """What the job's request carries, while the workers hold its steerings.

        Gates that decide of the prompt as a whole decide before, from a pass of their own; those
        that decide token by token do so in the workers, and are asked afterwards what they did."""
        reasons = [not_captured(steering) for steering in job.acting] if self._captured else []
        if any(reasons):
            raise TrimtabError(next(filter(None, reasons)))
        if job.kl is not None:
            job.acting = (await self._within(job.acting[0], job.kl, job.tokens),)
        early = await self._decide(job)
        acting = {
            place: decided(steering)
            for place, steering in enumerate(job.acting)
            if place not in early or early[place].fired
        }
        by_token = {
            number: place
            for number, (place, steering) in enumerate(acting.items())
            if steering.gate is not None
        }
        job.gates = tuple(early.values())
        wanted: list[Wanted] = []
        reading = ReadingOf(uuid.uuid4().hex) if by_token else None
        try:
            for steering in acting.values():
                check_scopes(self._lm, steering.scopes, job.tokens)
                wanted.append(await self.hold(steering))
            extra = extra_args(wanted)
            if reading is None:
                yield Given(extra)
            else:
                told = partial(self._ask_gates, job, reading.name, early, by_token)
                salt = uuid.uuid4().hex  # what is read again is not known to gates
                extra = {**(extra or {}), **reading_args(reading)}
                yield Given(extra, salt=salt, has_read=told, replica=self._replica)
        finally:
            for one in wanted:
                self._held[one.digest] -= 1
            if reading is not None:
                await self._read(reading.name)

    # -- budgets ------------------------------------------------------------------------------

    async def _within(self, steering: Steering, kl: float, tokens: Sequence[int]) -> Steering:
        """A steering at the dial at which a prompt's next token is `kl` nats from the unsteered
        model's. Its gate does not count: a dial is measured where it fires."""
        free = replace(steering, gate=None)
        check_scopes(self._lm, free.scopes, tokens)
        search = searched(free, kl)
        wanted = await self.hold(free)
        try:
            base, dial = await self._expects(tokens), next(search)
            while True:
                found = await self._expects(tokens, replace(wanted, dial=dial))
                known = base.isfinite()  # an engine may have fewer tokens than the model's table
                dial = search.send(float(divergence(base[known], found[known])))
        except StopIteration as end:
            return steering.at(end.value.dial)
        finally:
            self._held[wanted.digest] -= 1

    async def _expects(self, tokens: Sequence[int], wanted: Wanted | None = None) -> Tensor:
        """The log-distribution of the token after a text, [vocabulary] in float32."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, logprobs=-1, flat_logprobs=True, detokenize=False,
            extra_args=extra_args([] if wanted is None else [wanted]),
        )  # fmt: skip
        prompt = {"prompt_token_ids": list(tokens)}
        found = torch.full((self._lm.anatomy.config.vocab_size,), -torch.inf)
        async for output in self._llm.generate(prompt, params, uuid.uuid4().hex):
            told = output.outputs[0].logprobs
            if told:
                found[torch.tensor(told.token_ids)] = torch.tensor(told.logprobs)
        return found

    # -- gates --------------------------------------------------------------------------------

    async def _decide(self, job: Job) -> dict[int, Fired]:
        """What gates decide of a prompt before it is read under steerings, by the place of their
        steering: from a pass that is not steered. A latched gate decides at the prompt's last
        token, from activations that its steering does not change, so that this is the same."""
        early = early_of(job.acting)
        if not early:
            return {}
        conditions = [each for gate in early.values() for each in gate.conditions]
        reads = [read_of(self._lm, each, job.tokens) for each in conditions]
        told = await self._told(job.tokens, reads)
        found, first = {}, 0
        for place, gate in early.items():
            found[place] = fired_by(job.acting[place], scores_of(gate, told, first))
            first += len(gate.conditions)
        return found

    async def _told(self, tokens: Sequence[int], reads: Sequence[Read]) -> list[dict[str, Tensor]]:
        """What each rank reads of a prompt that is not steered."""
        from vllm import SamplingParams

        reading = ReadingOf(uuid.uuid4().hex, tuple(reads))
        params = SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, extra_args=reading_args(reading)
        )
        prompt = {"prompt_token_ids": list(tokens), "cache_salt": uuid.uuid4().hex}
        try:
            async for _ in self._llm.generate(
                prompt, params, reading.name, data_parallel_rank=self._replica
            ):
                pass
        finally:
            ranks = await self._read(reading.name)
        return ranks

    async def _ask_gates(
        self, job: Job, name: str, early: Mapping[int, Fired], by_token: Mapping[int, int]
    ) -> None:
        """The prompt is read: what gates decided of it, token by token, by their number there. What
        they decide of the answer is not asked for: receipts say so."""
        told = await self._read(name)
        found = dict(early)
        for number, place in by_token.items():
            found[place] = token_by_token(job.acting[place], number, told, len(job.tokens))
        job.gates = tuple(found[place] for place in sorted(found))

    async def _read(self, name: str) -> list[dict[str, Tensor]]:
        """What each rank has read of a prompt; it is forgotten there."""
        ranks = await self._llm.collective_rpc("trimtab_read", args=(name,))
        return [load(content) for content in ranks]

    def close(self) -> None:
        """Nothing is left of it."""

    # -- steerings ----------------------------------------------------------------------------

    async def hold(self, steering: Steering) -> Wanted:
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
