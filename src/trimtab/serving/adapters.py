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
import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from trimtab.engines import vllm_version
from trimtab.errors import TrimtabError
from trimtab.exchange import export, modules_at, needs
from trimtab.model import LanguageModel, unsound
from trimtab.serving.elsewhere import Given
from trimtab.serving.jobs import FullError, Job
from trimtab.serving.proving import probe
from trimtab.steering import Steering, Steerings

#: Adapters of one batch, and of the worker's memory, unless the engine's arguments say otherwise.
SLOTS, IN_MEMORY = 8, 32
#: The first version that leaves requests without an adapter alone on a CPU, whatever the last slot
#: holds.
_RIGHT_ON_CPU = Version("0.33")
#: Of how many tokens log-probabilities are compared, and how far they may be off, as a share of
#: what the steering does to them, or of 1 nat: in float32, and in half precision.
_COMPARED, _OFF, _OFF_HALF = 20, 0.01, 0.2


@dataclass
class Adapted:
    """What an engine carries by adapters: called with a steering, it says why not, "" where it
    does. `modules` are the names of those that it was started with an adapter's place at, None as
    long as it was not; `rank` is the largest that it has room for."""

    language_model: LanguageModel
    modules: Collection[str] | None = None
    rank: int = 1
    #: What steerings need, by digest.
    _known: dict[str, tuple[str, tuple[str, ...], int]] = field(default_factory=dict)

    def __call__(self, steering: Steering) -> str:
        if steering.digest not in self._known:
            self._known[steering.digest] = self._needs(steering)
        reason, modules, rank = self._known[steering.digest]
        return reason or self.refusal(modules, rank, steering)

    def _needs(self, steering: Steering) -> tuple[str, tuple[str, ...], int]:
        try:
            found = needs(self.language_model, [_turned(steering)])
        except TrimtabError as error:
            other = "; --tier plugin and --engine transformers serve it without an adapter"
            return f"{error}{other}", (), 1
        return "", found.modules, found.rank

    def refusal(self, modules: Sequence[str], rank: int, steering: Steering) -> str:
        """Why the engine as it was started does not take an adapter; "" where it does."""
        if self.modules is None:
            return ""
        strange = [path for path in modules if _last(path) not in self.modules]
        if strange:
            kind = steering.interventions[0].site.rpartition(".")[2]
            return (
                f"it was not started with adapters at {strange[0]}, and would leave that out: "
                f"start it with --hook {kind}"
            )
        if rank > self.rank:
            return (
                f"its adapter has rank {rank}, and the engine room for {self.rank}: start it with "
                f"--vllm max_lora_rank={rank}"
            )
        return ""

    def start(self, steerings: Sequence[Steering], kinds: Sequence[str], rank: int | None) -> None:
        """Settle with which modules and which rank an engine is started: those that steerings need,
        and modules at some kinds of sites; or a larger `rank`."""
        each = [self._needs(steering) for steering in steerings]
        anatomy = self.language_model.anatomy
        sites = [site for kind in kinds for site in anatomy.sites(kind)]
        paths = [*modules_at(self.language_model, sites), *(p for _, own, _ in each for p in own)]
        if not paths:
            raise TrimtabError(
                "with --tier lora an engine is started for some modules: give it a steering, or "
                "--hook heads (or another kind of site) for those that are added later"
            )
        most = max((rank for _, _, rank in each), default=8)
        if rank is not None and rank < most:
            raise TrimtabError(
                f"--vllm max_lora_rank={rank}: the steerings that are served need {most}"
            )
        self.modules, self.rank = sorted(set(map(_last, paths))), rank or max(most, 8)


def _turned(steering: Steering) -> Steering:
    """A steering where it does something."""
    if any(not each.idle_at(steering.setting) for each in steering.interventions):
        return steering
    return steering.at(1.0) if steering.setting != 1 else steering


def _last(path: str) -> str:
    return path.rpartition(".")[2]


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
        self._lm, self._carried, self._most, self._slots = language_model, carried, most, slots
        self._folder = Path(tempfile.mkdtemp(prefix="trimtab-adapters-"))
        self._base = language_model.identity.digest
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
        if self._needs_nothing(config) and slots < 2:
            raise TrimtabError(
                "on a CPU this vLLM takes one place of max_loras for requests that are not "
                "steered: give it --vllm max_loras=2 or more"
            )
        if config.lora_config.max_lora_rank != self._carried.rank:
            raise TrimtabError("max_lora_rank is settled before the engine starts")

    async def begin(self, llm: Any) -> None:
        """Have what requests need that are not steered."""
        self._llm, self._making = llm, asyncio.Lock()
        if self._needs_nothing(llm.vllm_config):
            self._nothing = self._request("nothing", self._save_nothing())
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

    def _needs_nothing(self, config: Any) -> bool:
        """Whether requests without an adapter are given that of the last slot."""
        version = vllm_version()
        on_cpu = config.device_config.device_type == "cpu"
        return on_cpu and (version is None or Version(version) < _RIGHT_ON_CPU)

    async def _hold(self, steerings: Sequence[Steering]) -> _Made:
        digest = digest_of(steerings, self._base)
        async with self._making:
            made = self._made.pop(digest, None)
            if made is None:
                await self._make_room()
                made = await self._make(digest, steerings)
            self._made[digest] = made
            made.jobs += 1
        return made

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

    async def _make(self, digest: str, steerings: Sequence[Steering]) -> _Made:
        """An adapter that the engine has, and that does in it what the steerings do."""
        directory = self._folder / digest
        try:
            text, plain, expected = await asyncio.to_thread(self._export, directory, steerings)
            request = self._request(digest, directory)
            await self._llm.add_lora(request)
            await self._prove(request, text, plain, expected)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return _Made(request)

    def _export(
        self, directory: Path, steerings: Sequence[Steering]
    ) -> tuple[list[int], Tensor, Tensor]:
        """Write an adapter; a short text, and what the model expects after it, plain and
        steered."""
        for steering in steerings:
            if reason := self._carried(steering):
                raise TrimtabError(f"this {steering.method} steering is not carried: {reason}")
        together, text = Steerings(steerings), probe(self._lm)
        plain = _expects(self._lm, text)
        with self._lm.steered(*together, force=True):
            expected = _expects(self._lm, text)
        if not expected.isfinite().all():
            raise unsound("this request", tuple(s.label for s in steerings), self._lm.dtype)
        made = export(self._lm, together, "lora", directory, force=True)
        if made.details["rank"] > self._carried.rank:
            raise TrimtabError(
                f"together they are an adapter of rank {made.details['rank']}, and the engine has "
                f"room for {self._carried.rank}: stack fewer, or start it with "
                f"--vllm max_lora_rank={made.details['rank']}"
            )
        return text, plain, expected

    async def _prove(self, request: Any, text: list[int], plain: Tensor, expected: Tensor) -> None:
        """Refuse an adapter that the engine does not carry out, or only in part."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, logprobs=_COMPARED)
        prompt = {"prompt_token_ids": text, "cache_salt": uuid.uuid4().hex}
        found: dict[int, float] = {}
        async for output in self._llm.generate(
            prompt, params, uuid.uuid4().hex, lora_request=request
        ):
            for about in output.outputs[0].logprobs or ():
                found |= {token: one.logprob for token, one in about.items()}
        refuse_unlike(found, plain, expected, self._lm.dtype)

    def _request(self, name: str, directory: Path) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, next(self._numbers), str(directory))

    def _save_nothing(self) -> Path:
        """The adapter of requests that are not steered: zeros at one module, and so everywhere."""
        assert self._carried.modules is not None
        path, module = next(
            (path, module)
            for path, module in self._lm.model.named_modules()
            if _last(path) in self._carried.modules
        )
        written, read = module.weight.shape
        if isinstance(module, Conv1D):
            written, read = read, written
        key = f"base_model.model.{path}"
        directory = self._folder / "nothing"
        directory.mkdir()
        tensors = {"lora_A": torch.zeros(1, read), "lora_B": torch.zeros(written, 1)}
        named = {f"{key}.{name}.weight": tensor for name, tensor in tensors.items()}
        save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [path],
                  "base_model_name_or_path": self._lm.name, "bias": "none"}  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(config))
        return directory


def digest_of(steerings: Sequence[Steering], base: str) -> str:
    """What steerings at their dials do to a model: sites, operators, and each dial in its shortest
    form, 12 rather than 12.0."""
    said = [[one.digest, f"{one.setting:.17g}"] for one in steerings]
    return hashlib.sha256(json.dumps([base, said]).encode()).hexdigest()


@torch.inference_mode()
def _expects(language_model: LanguageModel, text: Sequence[int]) -> Tensor:
    """The log-probabilities of the token after a text, [vocabulary] in float32."""
    ids = torch.tensor([list(text)], device=language_model.device)
    logits = language_model.model(input_ids=ids, use_cache=False).logits[0, -1]
    found: Tensor = logits.float().cpu().log_softmax(-1)
    return found


def refuse_unlike(
    found: dict[int, float], plain: Tensor, expected: Tensor, dtype: torch.dtype
) -> None:
    """Refuse an adapter with which an engine does not expect what the steered model does: log-
    probabilities by token in the engine, and [vocabulary] of the model plain and steered."""
    tokens = torch.tensor(list(found))
    seen = torch.tensor(list(found.values()))
    off = float((seen - expected[tokens]).abs().max())
    effect = float((expected - plain)[tokens].abs().max())
    share = _OFF if dtype in (torch.float32, torch.float64) else _OFF_HALF
    if not off <= share * max(effect, 1.0):
        raise TrimtabError(
            f"the engine does not carry this steering's adapter out: log-probabilities are off by "
            f"{off:.2g} nats, and the steering moves them by {effect:.2g}; serve it with the "
            "plugin (--tier plugin), with --engine transformers, or baked (--bake)"
        )
