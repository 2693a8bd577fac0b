"""vLLM as what answers jobs: it runs the model, and trimtab inside of it steers each request.

All of the API is as it is with transformers; what is said of a text, and where it ends, is worked
out by the same code. The model of transformers is read once, to know where its sites are and to see
that the engine has the same activations there; then its weights are let go.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import torch

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
from trimtab.errors import TrimtabError, first_line
from trimtab.model import LanguageModel, end_tokens, scope_weights, unsound
from trimtab.serving.choosing import Chosen, Settings
from trimtab.serving.jobs import Ended, FullError, Job, Limits, goes_on, in_words
from trimtab.serving.placing import acts_of
from trimtab.serving.proving import joined, last_activations, probe, refuse_others
from trimtab.steering import Steering

#: Steerings that workers hold at once, those that nobody asks for any more among them.
_HELD = 512
#: Seconds between two looks whether clients still wait.
_LOOK = 0.1


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


class Elsewhere:
    """An engine of vLLM that answers jobs until it is closed.

    `model` is the directory or hub id that it reads; `arguments` are its own, by name.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        model: str,
        sites: Sequence[str],
        arguments: Mapping[str, Any],
        limits: Limits = Limits(),
    ) -> None:
        self._lm, self._limits = language_model, limits
        self._ends = end_tokens(language_model.model.generation_config.eos_token_id)
        self._jobs: dict[asyncio.Task[None], Job] = {}
        #: All that are not over, and of these the ones that have begun.
        self._taken: set[Job] = set()
        self._begun: set[Job] = set()
        self._closed = False
        #: Steerings that the workers hold, by digest, and how many jobs run with each.
        self._held: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="trimtab engine", daemon=True)
        self._thread.start()
        self._llm: Any = None
        self._watcher: asyncio.Task[None] | None = None
        try:
            self._wait(self._open(model, list(sites), dict(arguments)))
        except Exception as error:
            self.close()
            if isinstance(error, TrimtabError):
                raise
            raise TrimtabError(
                f"vLLM does not start: {first_line(error)} (its log above says more)"
            ) from error

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, model: str, sites: list[str], arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        text, expected = probe(self._lm), last_activations(self._lm, sites)
        places = places_of(self._lm.anatomy, sites)
        given = {
            "model": model,
            "dtype": str(self._lm.dtype).removeprefix("torch."),
            "max_num_seqs": self._limits.rows,
            "additional_config": configuration(places),
            **arguments,
        }
        try:
            parsed = AsyncEngineArgs(**given)
        except TypeError as error:
            raise TrimtabError(f"vLLM takes no such argument: {first_line(error)}") from error
        self._lm.model.to("meta")  # its weights have said what they had to say
        config = parsed.create_engine_config()
        refuse_ways(config)
        # A thread of its own, because starting takes long and blocks.
        start = partial(AsyncLLM.from_vllm_config, config, disable_log_stats=True)
        self._llm = await asyncio.to_thread(start)
        self._loading = asyncio.Lock()
        await self._prove(text, expected)
        self._lm.tokenizer.model_max_length = self._llm.model_config.max_model_len
        self._watcher = asyncio.create_task(self._watch())

    async def _prove(self, text: list[int], expected: Mapping[str, torch.Tensor]) -> None:
        """See that each site is what it is in transformers."""
        from vllm import SamplingParams

        await self._llm.collective_rpc("trimtab_watch")
        prompt = {"prompt_token_ids": text, "cache_salt": uuid.uuid4().hex}
        async for _ in self._llm.generate(prompt, SamplingParams(max_tokens=1), uuid.uuid4().hex):
            pass
        seen = await self._llm.collective_rpc("trimtab_seen")
        refuse_others(expected, joined(seen), self._lm.dtype)

    # -- for everybody ------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Have a job answered; refuses it where as many wait as may."""
        if self._closed:
            raise FullError("the server ends")
        if len(self._taken) >= self._limits.rows + self._limits.waiting:
            raise FullError(f"{self.waiting} requests wait already: try again later")
        self._taken.add(job)
        self._loop.call_soon_threadsafe(self._begin, job)

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._begun)

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return max(0, len(self._taken) - len(self._begun))

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    def close(self) -> None:
        """End what is under way, and answer nothing more."""
        self._closed = True
        if self._llm is not None:
            self._wait(self._end_all())
            self._llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _end_all(self) -> None:
        tasks = dict(self._jobs)
        for task in (*tasks, self._watcher):
            if task is not None:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in tasks.values():
            job.tell(Ended("closed"))

    # -- in the engine's thread ---------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        task = self._loop.create_task(self._answer(job))
        self._jobs[task] = job
        task.add_done_callback(partial(self._over, job))

    def _over(self, job: Job, task: asyncio.Task[None]) -> None:
        self._jobs.pop(task, None)
        self._taken.discard(job)
        self._begun.discard(job)

    async def _watch(self) -> None:
        """Leave what nobody waits for, and what takes too long."""
        while True:
            await asyncio.sleep(_LOOK)
            for task, job in list(self._jobs.items()):
                if job.left.is_set():
                    task.cancel()
                elif job.late:
                    task.cancel()
                    job.tell(Ended("timeout"))

    async def _answer(self, job: Job) -> None:
        wanted: list[Wanted] = []
        try:
            job.acting = job.steerings()
            for steering in job.acting:
                self._check_scopes(steering, job.tokens)
                wanted.append(await self._hold(steering))
            await self._write(job, extra_args(wanted))
        except Exception as error:
            job.tell(_in_words(error))
        finally:
            for one in wanted:
                self._held[one.digest] -= 1

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

    async def _write(self, job: Job, extra: dict[str, str] | None) -> None:
        params = _sampling(job.settings, self._ends, extra)
        prompt = {"prompt_token_ids": job.tokens}
        async with aclosing(self._llm.generate(prompt, params, uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                if job.began is None:
                    job.began = time.monotonic()
                    self._begun.add(job)
                _check_sound(output.outputs[0], job, self._lm)
                for chosen in _chosen(output.outputs[0], job.settings.logprobs):
                    if not goes_on(job, chosen, self._lm.tokenizer, self._ends):
                        return


def _sampling(settings: Settings, ends: Collection[int], extra: dict[str, str] | None) -> Any:
    """How vLLM chooses tokens. Where a text ends is found out here, but for the tokens that end
    it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        repetition_penalty=settings.repetition_penalty,
        logit_bias=settings.bias or None,
        seed=settings.seed,
        # Of what is steered always, because a dial too large shows in them.
        logprobs=settings.logprobs if extra is None else max(settings.logprobs or 0, 1),
        stop_token_ids=list(ends),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra,
    )


def _check_sound(output: Any, job: Job, language_model: LanguageModel) -> None:
    """Refuse to go on where logits are no numbers, or all equal, because a dial is too large: the
    likeliest of so many tokens is then as likely as any."""
    least = -math.log(language_model.anatomy.config.vocab_size) + 1e-5
    for about in output.logprobs or ():
        best = max(one.logprob for one in about.values())
        if not best > least:
            labels = tuple(one.label for one in job.acting)
            raise unsound("this request", labels, language_model.dtype)


def _chosen(output: Any, top: int | None) -> list[Chosen]:
    """New tokens, with their log-probabilities where some are told."""
    if top is None:
        return [Chosen(token) for token in output.token_ids]
    found = []
    for token, about in zip(output.token_ids, output.logprobs, strict=True):
        each = sorted(((one.logprob, key) for key, one in about.items()), reverse=True)
        likeliest = tuple((key, logprob) for logprob, key in each[:top])
        found.append(Chosen(token, about[token].logprob, likeliest))
    return found


def _in_words(error: Exception) -> TrimtabError:
    """An error as a client may hear of it: what vLLM refuses is the request's fault."""
    from vllm.exceptions import VLLMClientError

    if isinstance(error, VLLMClientError | ValueError):
        return TrimtabError(first_line(error))
    return in_words(error)
