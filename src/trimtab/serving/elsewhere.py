"""vLLM as what answers jobs: it runs the model, and steers each request by trimtab inside of it, or
by an adapter of its own.

All of the API is as it is with transformers; what is said of a text, and where it ends, is worked
out by the same code. How steerings come into the engine is the business of `inside` and `adapters`.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from threading import Thread
from typing import Any, NamedTuple, Protocol

from trimtab.errors import TrimtabError, first_line
from trimtab.model import LanguageModel, end_tokens, unsound
from trimtab.serving.choosing import Chosen, Settings
from trimtab.serving.jobs import Ended, FullError, GoneError, Job, Limits, goes_on, in_words

#: Seconds between two looks whether clients still wait.
_LOOK = 0.1


class Given(NamedTuple):
    """What an engine is given with a request: what its sampling parameters carry, an adapter, and
    a salt where it is to read the whole prompt; what is to be asked once it has read it, and which
    of its replicas is to, where that is not all the same."""

    extra: dict[str, str] | None = None
    adapter: Any = None
    salt: str | None = None
    has_read: Callable[[], Awaitable[None]] | None = None
    replica: int | None = None


class Way(Protocol):
    """How steerings come into an engine."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the engine is started with for it."""

    def check(self, config: Any) -> None:
        """Refuse an engine's configuration in which it would not work."""

    async def begin(self, llm: Any) -> None:
        """The engine has started: see that it does what it should."""

    def given(self, job: Job) -> AbstractAsyncContextManager[Given]:
        """What a job's steerings come to, for as long as it runs."""

    def close(self) -> None:
        """The engine has ended."""


class Elsewhere:
    """An engine of vLLM that answers jobs until it is closed.

    `model` is the directory or hub id that it reads; `arguments` are its own, by name.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        model: str,
        way: Way,
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
        self._way = way
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="trimtab engine", daemon=True)
        self._thread.start()
        self._llm: Any = None
        self._watcher: asyncio.Task[None] | None = None
        try:
            self._wait(self._open(model, dict(arguments)))
        except Exception as error:
            self.close()
            if isinstance(error, TrimtabError):
                raise
            raise TrimtabError(
                f"vLLM does not start: {first_line(error)} (its log above says more)"
            ) from error

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, model: str, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        given = {
            "model": model,
            "dtype": str(self._lm.dtype).removeprefix("torch."),
            "max_num_seqs": self._limits.rows,
            **self._way.arguments,
            **arguments,
        }
        try:
            parsed = AsyncEngineArgs(**given)
        except TypeError as error:
            raise TrimtabError(f"vLLM takes no such argument: {first_line(error)}") from error
        config = parsed.create_engine_config()
        self._way.check(config)
        # A thread of its own, because starting takes long and blocks.
        start = partial(AsyncLLM.from_vllm_config, config, disable_log_stats=True)
        self._llm = await asyncio.to_thread(start)
        await self._way.begin(self._llm)
        self._lm.tokenizer.model_max_length = self._llm.model_config.max_model_len
        self._watcher = asyncio.create_task(self._watch())

    # -- for everybody ------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Have a job answered; refuses it where as many wait as may."""
        if self._closed:
            raise GoneError("the server ends")
        if not self.alive:
            raise GoneError
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
        self._way.close()
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
        """Leave what nobody waits for, and what takes too long, and all where the engine died. Each
        is left once: what it gives back then takes a while, and must not be broken off."""
        while True:
            await asyncio.sleep(_LOOK)
            for task, job in list(self._jobs.items()):
                if task.cancelling():
                    continue
                if not self.alive:
                    job.tell(GoneError())
                    task.cancel()
                elif job.left.is_set():
                    task.cancel()
                elif job.late:
                    task.cancel()
                    job.tell(Ended("timeout"))

    async def _answer(self, job: Job) -> None:
        try:
            job.acting = job.steerings()
            async with self._way.given(job) as given:
                await self._write(job, given)
        except Exception as error:
            job.tell(_in_words(error))

    async def _write(self, job: Job, given: Given) -> None:
        params = _sampling(job.settings, self._ends, bool(job.acting), given.extra)
        prompt: dict[str, Any] = {"prompt_token_ids": job.tokens}
        if given.salt is not None:
            prompt["cache_salt"] = given.salt
        writing = self._llm.generate(
            prompt,
            params,
            uuid.uuid4().hex,
            lora_request=given.adapter,
            data_parallel_rank=given.replica,
        )
        async with aclosing(writing) as outputs:
            async for output in outputs:
                if job.began is None:
                    job.began = time.monotonic()
                    self._begun.add(job)
                    if given.has_read is not None:
                        await given.has_read()
                _check_sound(output.outputs[0], job, self._lm)
                for chosen in _chosen(output.outputs[0], job.settings.logprobs):
                    if not goes_on(job, chosen, self._lm.tokenizer, self._ends):
                        return


def _sampling(
    settings: Settings, ends: Collection[int], steered: bool, extra: dict[str, str] | None
) -> Any:
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
        logprobs=max(settings.logprobs or 0, 1) if steered else settings.logprobs,
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
    """An error as a client may hear of it: what vLLM says that clients did is the request's fault,
    and any other is not theirs to read."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return GoneError()
    if isinstance(error, VLLMClientError):
        return TrimtabError(first_line(error))
    return in_words(error)
