"""vLLM in this process: requests go in, steps are taken, and what each step brought comes out.

All requests that are under way share one continuous batch, each under steerings of its own. What is
known here is token ids and steerings by their digests; who asks knows the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from safetensors.torch import load
from torch import Tensor

from trimtab.engines.asking import ReadingOf, Wanted, extra_args, reading_args
from trimtab.engines.modules import Place
from trimtab.engines.plugin import LOADED, configuration, graphs, refuse_ways
from trimtab.errors import TrimtabError, first_line

#: Arguments of vLLM's engine that trimtab gives itself.
OURS = ("model", "dtype", "additional_config", "tokenizer")


@dataclass(frozen=True)
class Ask:
    """One request: token ids, what is wanted of it, and how many tokens are to follow, `fewest` at
    least. `scored` asks for the log-probability of each of its own tokens from the second on;
    `told` for new tokens at each step, not all at the end; `choosing` says how tokens are chosen,
    in vLLM's words (nothing: the likeliest). `reading` is what the workers read of it; `salt` keeps
    its blocks apart from those of all others."""

    tokens: tuple[int, ...]
    wanted: tuple[Wanted, ...] = ()
    new: int = 1
    fewest: int = 0
    scored: bool = False
    told: bool = False
    choosing: Mapping[str, Any] = field(default_factory=dict)
    reading: ReadingOf | None = None
    salt: str | None = None

    @property
    def extra_args(self) -> dict[str, str] | None:
        """What its sampling parameters carry of steerings, and of what is read."""
        steered = extra_args(self.wanted) or {}
        return steered | ({} if self.reading is None else reading_args(self.reading)) or None


class Heard(NamedTuple):
    """What a step brought of a request: new tokens, whether each was chosen from logits that can
    choose one, whether it is over; and where it is scored, of each of its own tokens from the
    second on the log-probability, and which token was the likeliest there. `cached` of its tokens
    were known from other requests."""

    name: str
    tokens: tuple[int, ...]
    sound: tuple[bool, ...]
    over: bool
    log_p: tuple[float, ...] = ()
    likeliest: tuple[int, ...] = ()
    cached: int = 0


class InProcess:
    """An engine of vLLM in this process, on the weights in `model` (a directory or hub id), hooked
    at `places`. `ends` are the tokens that end a text; `arguments` are vLLM's own, by name."""

    def __init__(
        self,
        model: str,
        dtype: str,
        places: dict[str, Place],
        ends: Collection[int],
        arguments: Mapping[str, Any],
    ) -> None:
        # Else a single worker would be a process by itself on a CPU.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        given = {"model": model, "dtype": dtype, "additional_config": configuration(places)}
        try:
            parsed = EngineArgs(**given, **{**graphs(), **arguments})
        except TypeError as error:
            raise TrimtabError(f"vLLM takes no such argument: {first_line(error)}") from error
        self._ends = sorted(ends)
        try:
            config = parsed.create_engine_config()
            refuse_ways(config)
            self._engine = LLMEngine(
                config, Executor.get_class(config), log_stats=False, multiprocess_mode=False
            )
        except TrimtabError:
            raise
        except Exception as error:
            raise TrimtabError(
                f"vLLM does not start: {first_line(error)} (its log above says more)"
            ) from error
        self.longest = int(config.model_config.max_model_len)
        self.words = int(config.model_config.get_vocab_size())

    def load(self, digest: str, content: bytes) -> None:
        """Have the workers hold a steering, from the content of its file."""
        self._engine.collective_rpc("trimtab_load", args=(digest, content))
        LOADED.add(digest)

    def unload(self, digest: str) -> None:
        """Have them leave one that no request has."""
        LOADED.discard(digest)
        self._engine.collective_rpc("trimtab_unload", args=(digest,))

    def seen(self, name: str, tokens: Sequence[int]) -> list[bytes]:
        """What each rank has at each site at the last token of a text, as safetensors."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        self._engine.collective_rpc("trimtab_watch")
        prompt = tokens_input(list(tokens), cache_salt=name)
        params = SamplingParams(max_tokens=1, detokenize=False)
        self._engine.add_request(name, prompt, params)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return list(self._engine.collective_rpc("trimtab_seen"))

    def add(self, name: str, ask: Ask) -> None:
        """A request comes, under a name that no other has."""
        from vllm.inputs.engine import tokens_input

        try:
            prompt = tokens_input(list(ask.tokens), cache_salt=ask.salt)
            self._engine.add_request(name, prompt, self._params(ask))
        except ValueError as error:  # vLLM's own refusals are such
            raise TrimtabError(f"vLLM refuses a request: {first_line(error)}") from error

    def leave(self, name: str) -> None:
        """A request is over for who asked."""
        self._engine.abort_request([name])

    def told(self, name: str) -> list[dict[str, Tensor]]:
        """What each rank has read of a text, by the name of what was to be read; it is forgotten
        there."""
        ranks = self._engine.collective_rpc("trimtab_read", args=(name,))
        return [load(content) for content in ranks]

    def step(self) -> list[Heard]:
        """One pass of the model for all that fit into it."""
        return [self._heard(output) for output in self._engine.step()]

    def close(self) -> None:
        """Let memory and workers go."""
        self._engine.engine_core.shutdown()

    def _params(self, ask: Ask) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **{"temperature": 0.0, **ask.choosing},
            max_tokens=ask.new,
            min_tokens=ask.fewest,
            # In them a dial too large shows.
            logprobs=1 if ask.wanted else None,
            prompt_logprobs=1 if ask.scored else None,
            stop_token_ids=self._ends,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if ask.told else RequestOutputKind.FINAL_ONLY,
            extra_args=ask.extra_args,
        )

    def _heard(self, output: Any) -> Heard:
        new = output.outputs[0]
        tokens = tuple(new.token_ids)
        sound = tuple(self._is_sound(about) for about in new.logprobs or ())
        own = list(output.prompt_logprobs or ())[1:] if output.finished else []
        told = zip(own, list(output.prompt_token_ids or ())[1:], strict=False)
        log_p = tuple(about[token].logprob for about, token in told)
        likeliest = tuple(
            next(token for token, one in about.items() if one.rank == 1) for about in own
        )
        sound = sound or (True,) * len(tokens)
        if own:
            sound = (*sound, *map(self._is_sound, own))
        cached = output.num_cached_tokens or 0
        return Heard(output.request_id, tokens, sound, output.finished, log_p, likeliest, cached)

    def _is_sound(self, about: Mapping[int, Any]) -> bool:
        """Whether logits could choose a token: they cannot where they are no numbers, or all equal,
        and then the likeliest of so many tokens is as likely as any."""
        best: float = max(one.logprob for one in about.values())
        return best > 1e-5 - math.log(self.words)
