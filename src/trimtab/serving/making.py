"""Adapters as an engine takes them: made of steerings, known by what they do, and proved.

An adapter lies in a directory that is named by the digest of the steerings, their dials and the
base, because engines keep cached blocks and adapters by name and path. The first thing that an
engine answers with it is a short text, whose log-probabilities are those of the steered model, or
the adapter is refused: an engine leaves out what it has no place for, and says nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from trimtab.engines import vllm_version
from trimtab.errors import TrimtabError
from trimtab.exchange import export
from trimtab.model import LanguageModel, unsound
from trimtab.serving.carrying import Adapted, last
from trimtab.serving.proving import probe
from trimtab.steering import Steering, Steerings

#: The first version that leaves requests without an adapter alone on a CPU, whatever the last slot
#: holds.
_RIGHT_ON_CPU = Version("0.33")
#: Of how many tokens log-probabilities are compared, and how far they may be off, as a share of
#: what the steering does to them, or of 1 nat: in float32, and in half precision.
_COMPARED, _OFF, _OFF_HALF = 20, 0.01, 0.2


def last_slot_leaks(config: Any) -> bool:
    """Whether an engine gives requests without an adapter that of its last slot."""
    version = vllm_version()
    on_cpu = config.device_config.device_type == "cpu"
    return on_cpu and (version is None or Version(version) < _RIGHT_ON_CPU)


async def to_its_end(lock: asyncio.Lock, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Make something under a lock, which is kept until that has ended, also where whoever waits for
    it leaves: a thread goes on with the model, and nothing else may be made beside it."""
    await lock.acquire()
    making = asyncio.create_task(make())
    making.add_done_callback(lambda _: lock.release())
    await asyncio.shield(making)


class Maker:
    """Makes adapters of one model's steerings, in directories of a folder."""

    def __init__(self, language_model: LanguageModel, carried: Adapted, folder: Path) -> None:
        self._lm, self._carried, self._folder = language_model, carried, folder
        self._base = language_model.identity.digest

    def digest(self, steerings: Sequence[Steering]) -> str:
        """What steerings at their dials are known by."""
        return digest_of(steerings, self._base)

    def directory(self, digest: str) -> Path:
        """Where an adapter lies, or will."""
        return self._folder / digest

    async def make(self, llm: Any, digest: str, steerings: Sequence[Steering], number: int) -> Any:
        """An adapter that an engine has under a number, and that does in it what the steerings do:
        vLLM's request for it. What is refused leaves nothing behind."""
        directory = self.directory(digest)
        request = None
        try:
            text, plain, expected = await asyncio.to_thread(self._export, directory, steerings)
            request = self.request(digest, number, directory)
            await llm.add_lora(request)
            await self._prove(llm, request, text, plain, expected)
        except BaseException:
            try:
                if request is not None:
                    await llm.remove_lora(number)
            finally:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        return request

    def request(self, name: str, number: int, directory: Path) -> Any:
        """How vLLM is asked for an adapter."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number, str(directory))

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
        rank = made.details["rank"]
        if rank > self._carried.rank:
            raise TrimtabError(
                f"together they are an adapter of rank {rank}, and the engine has room for "
                f"{self._carried.rank}: stack fewer, or start it with "
                f"{self._carried.for_rank.format(rank=rank)}"
            )
        return text, plain, expected

    async def _prove(
        self, llm: Any, request: Any, text: list[int], plain: Tensor, expected: Tensor
    ) -> None:
        """Refuse an adapter that the engine does not carry out, or only in part."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, logprobs=_COMPARED)
        prompt = {"prompt_token_ids": text, "cache_salt": uuid.uuid4().hex}
        found: dict[int, float] = {}
        async for output in llm.generate(prompt, params, uuid.uuid4().hex, lora_request=request):
            for about in output.outputs[0].logprobs or ():
                found |= {token: one.logprob for token, one in about.items()}
        refuse_unlike(found, plain, expected, self._lm.dtype, self._carried.else_by)

    def make_nothing(self, modules: Collection[str]) -> Path:
        """The adapter of requests that are not steered: zeros at one module, and so everywhere."""
        path, module = next(
            (path, module)
            for path, module in self._lm.model.named_modules()
            if last(path) in modules
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
    found: dict[int, float], plain: Tensor, expected: Tensor, dtype: torch.dtype, else_by: str
) -> None:
    """Refuse an adapter with which an engine does not expect what the steered model does: log-
    probabilities by token in the engine, and [vocabulary] of the model plain and steered. `else_by`
    says what serves the steering otherwise."""
    tokens = torch.tensor(list(found))
    seen = torch.tensor(list(found.values()))
    off = float((seen - expected[tokens]).abs().max())
    effect = float((expected - plain)[tokens].abs().max())
    share = _OFF if dtype in (torch.float32, torch.float64) else _OFF_HALF
    if not off <= share * max(effect, 1.0):
        raise TrimtabError(
            f"the engine does not carry this steering's adapter out: log-probabilities are off by "
            f"{off:.2g} nats, and the steering moves them by {effect:.2g}; {else_by}"
        )
