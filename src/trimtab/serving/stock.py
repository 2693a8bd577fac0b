"""Steerings as adapters of a vLLM that was started by its own command, `vllm serve`.

vLLM asks a resolver for the adapter of a model that it does not know. Ours takes `base+joy@12`,
makes the adapter once, has the engine prove it, and hands its directory over; vLLM batches, caches
and evicts it from then on, on as many ranks and machines as it runs. An endpoint plugin of vLLM,
`trimtab_lora`, brings the resolver into the process that listens, and closes the routes on which
vLLM takes an adapter from any path. Nothing of this is in the engine.

What is not carried is a 404 that says why; nothing runs unsteered that was to be steered. vLLM
forgets no variant, so that there is a most of them, and reads a directory again whenever the
adapter has left memory, so that none is deleted while the server runs.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.errors import TrimtabError, first_line, shown
from trimtab.model import LanguageModel, load
from trimtab.serving.carrying import Adapted
from trimtab.serving.library import Library, described
from trimtab.serving.making import Maker, last_slot_leaks, to_its_end
from trimtab.serving.names import plainly_asked
from trimtab.steering import Steering

#: Under vLLM, whose settings silence others.
_LOG = logging.getLogger("vllm.trimtab")
#: The directory of steerings, where adapters are written, and how many variants there may be.
STEERINGS, ADAPTERS, VARIANTS = "TRIMTAB_STEERINGS", "TRIMTAB_ADAPTERS", "TRIMTAB_VARIANTS"
_MOST = 256
#: What `vllm serve` has in its environment for it.
STOCK = f"{STEERINGS}=DIR VLLM_PLUGINS=trimtab_lora VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
#: Numbers by which the engine knows an adapter while it is proved; vLLM counts its own from 1.
_FIRST = 1 << 40
#: The ends of routes that take an adapter from any path, or take one away; vLLM opens them together
#: with resolvers, and has those of SageMaker under /adapters. And SageMaker's route for requests,
#: which puts a header's name, or none, in the place of the model's that a body has.
_CLOSED = ("load_lora_adapter", "unload_lora_adapter", "adapters", "invocations")
_ELSE = "or serve it by trimtab's plugin (docs/serving.md)"


def carried_by(language_model: LanguageModel, modules: Sequence[str], rank: int) -> Adapted:
    """What an engine carries that was started with adapters at some modules, of a rank."""
    return Adapted(
        language_model,
        list(modules),
        rank,
        for_modules="{module} among --lora-target-modules",
        for_rank="--max-lora-rank {rank}",
        else_by=_ELSE,
    )


def flags_of(
    language_model: LanguageModel, steerings: Sequence[Steering], kinds: Sequence[str] = ()
) -> list[str]:
    """The arguments with which `vllm serve` carries steerings as adapters, and others at some kinds
    of sites; those that adapters cannot carry are left out, and none where that is all."""
    carried = Adapted(language_model)
    kept = [each for each in steerings if not carried(each)]
    if not kept and not kinds:
        return []
    carried.start(kept, kinds, None)
    assert carried.modules is not None
    return [
        *("--enable-lora", "--max-lora-rank", str(carried.rank)),
        *("--lora-target-modules", *carried.modules),
    ]


@dataclass
class Resolver:
    """Makes the adapter of a variant when it is first asked for. `bases` are the model's names,
    `refused` is the error by which vLLM tells a client that there is no such model."""

    bases: Sequence[str]
    library: Library
    maker: Maker
    llm: Any
    most: int
    refused: type[Exception]
    #: Names that were handed over, and adapters that were made, by digest.
    _names: set[str] = field(default_factory=set)
    _made: set[str] = field(default_factory=set)
    _numbers: Any = field(default_factory=lambda: count(_FIRST))
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """vLLM's request for a variant's adapter; None where it is another model's name."""
        try:
            return await self._resolved(lora_name)
        except TrimtabError as error:
            reason = str(error)
        except Exception as error:  # the engine's own
            reason = f"its adapter could not be loaded: {first_line(error)}"
            _LOG.exception("%s", shown(lora_name))
        _LOG.warning("%s is not served: %s", shown(lora_name), reason)
        raise self.refused(f"The model `{shown(lora_name)}` does not exist: {reason}")

    async def _resolved(self, name: str) -> Any:
        asked = plainly_asked(name, self.bases)
        if asked is None:
            return None
        steerings = [steering for _, steering in self.library.wanted(asked)]
        acting = [s for s in steerings if any(not i.idle_at(s.setting) for i in s.interventions)]
        if not acting:
            raise TrimtabError(f"it does nothing at that dial: ask for {self.bases[0]}")
        digest = self.maker.digest(acting)
        await to_its_end(self._making, partial(self._make, name, digest, acting))
        return self.maker.request(name, next(self._numbers), self.maker.directory(digest))

    async def _make(self, name: str, digest: str, steerings: Sequence[Steering]) -> None:
        """Have the adapter of a name."""
        if name not in self._names and len(self._names) >= self.most:
            raise TrimtabError(
                f"{self.most} variants are served, and none is left while the server runs: ask for "
                f"one of those (/v1/models), or start it with room for more ({VARIANTS}; with vLLM "
                "0.32 on a CPU --max-loras)"
            )
        if digest not in self._made:
            number = next(self._numbers)
            await self.maker.make(self.llm, digest, steerings, number)
            await self.llm.remove_lora(number)  # vLLM gives it a number of its own
            self._made.add(digest)
        self._names.add(name)


class Closed:
    """In front of an application: nobody loads an adapter from a path, or takes one away, and no
    variant's name is passed over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(part in _CLOSED for part in scope["path"].split("/")):
            said = "this route is closed by trimtab, because it would pass steerings over"
            body = {"error": {"message": said, "type": "NotFoundError", "code": 404}}
            await JSONResponse(body, 404)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def tell_served(app: FastAPI, library: Callable[[], Library | None]) -> None:
    """Add the route that says which steerings are served; none as long as there is no library."""

    @app.get("/v1/steerings")
    async def steerings() -> dict[str, Any]:
        """What is served, with dials."""
        found = library()
        held = {} if found is None else found.held
        return {"object": "list", "data": [described(name, one) for name, one in held.items()]}


class Endpoint:
    """vLLM's endpoint plugin `trimtab_lora`, which it loads in the process that listens where
    VLLM_PLUGINS names it."""

    name, required_tasks = "trimtab_lora", ("generate",)

    def __init__(self) -> None:
        self._resolver: Resolver | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """What vLLM asks; it knows no model before the engine has started."""
        if self._resolver is None:
            return None
        return await self._resolver.resolve_lora(base_model_name, lora_name)

    def attach_router(self, app: FastAPI) -> None:
        """Close routes, and tell what is served."""
        from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

        LoRAResolver.register(Endpoint)  # which needs nothing of that class
        LoRAResolverRegistry.register_resolver(self.name, self)
        app.add_middleware(Closed)
        tell_served(app, lambda: None if self._resolver is None else self._resolver.library)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """The engine has started: read the model and the steerings."""
        from vllm import envs
        from vllm.exceptions import VLLMNotFoundError
        from vllm.lora.resolver import LoRAResolverRegistry

        if engine_client is None:  # a server that only makes prompts of chats
            return
        serving = state.openai_serving_models
        config = engine_client.vllm_config
        refuse_start(config, os.environ, envs)
        most = most_variants(config, os.environ)
        if last_slot_leaks(config):
            others = set(LoRAResolverRegistry.get_supported_resolvers()) - {self.name}
            if others or args.lora_modules:
                raise TrimtabError(
                    "on a CPU vLLM 0.32 needs its last place of --max-loras empty, and other "
                    "adapters may take it: leave --lora-modules and other resolvers out"
                )
        language_model, library = await asyncio.to_thread(opened, config)
        lora = config.lora_config
        carried = carried_by(language_model, lora.target_modules, lora.max_lora_rank)
        refuse_all(library, carried)
        folder = folder_in(os.environ.get(ADAPTERS))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._resolver = Resolver(
            [one.name for one in serving.base_model_paths],
            library,
            Maker(language_model, carried, folder),
            engine_client,
            most,
            VLLMNotFoundError,
        )
        _LOG.warning("trimtab: %d steerings, at most %d variants", len(library.held), most)


def refuse_start(config: Any, environment: Mapping[str, str], envs: Any) -> None:
    """Refuse an engine in which a variant could run unsteered, or none would be found."""
    lora = config.lora_config
    reasons = {
        f"{STEERINGS} names no directory of steerings": not environment.get(STEERINGS),
        "adapters need --enable-lora": lora is None,
        "vLLM would wrap all modules, and trimtab not know which: give it --lora-target-modules "
        "(trimtab serve --check --engine vllm --tier lora says which)": (
            lora is not None and not lora.target_modules
        ),
        "vLLM asks for adapters with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 only": (
            not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
        ),
        "with VLLM_SKIP_MODEL_NAME_VALIDATION every name would be the unsteered model": (
            envs.VLLM_SKIP_MODEL_NAME_VALIDATION
        ),
        "adapters are computed from weights, and these are quantised": (
            config.model_config.quantization is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise TrimtabError(f"trimtab_lora: {reason}")


def most_variants(config: Any, environment: Mapping[str, str]) -> int:
    """How many variants there may be, each an adapter that vLLM knows for good. Where requests
    without an adapter get that of the last place, that place must stay empty."""
    said = environment.get(VARIANTS, str(_MOST))
    if not said.isdecimal() or not int(said):
        raise TrimtabError(f"{VARIANTS} must be a whole number above 0, not '{shown(said, 40)}'")
    if not last_slot_leaks(config):
        return int(said)
    places = int(config.lora_config.max_loras) - 1
    if not places:
        raise TrimtabError(
            "on a CPU vLLM 0.32 needs its last place of adapters empty, so that no variant fits: "
            "give it --max-loras 2, or more: one more than there are to be variants"
        )
    return min(int(said), places)


def folder_in(place: str | None) -> Path:
    """A new folder for adapters; of None where temporary files are."""
    try:
        return Path(tempfile.mkdtemp(prefix="trimtab-adapters-", dir=place))
    except OSError as error:
        raise TrimtabError(f"{ADAPTERS}={shown(place)}: {error.strerror}: make it first") from error


def opened(config: Any) -> tuple[LanguageModel, Library]:
    """The model as transformers has it, in the engine's dtype on the CPU, and the steerings."""
    about = config.model_config
    language_model = load(
        about.model,
        dtype=about.dtype,
        device="cpu",
        revision=about.revision,
        trust_remote_code=about.trust_remote_code,
    )
    # That it refuses what takes passes is all that this refusal does here: why a steering is not
    # carried is said when it is asked for, beside those that are.
    library = Library(language_model, refusal=lambda steering: "")
    library.read(os.environ[STEERINGS])
    return language_model, library


def refuse_all(library: Library, carried: Adapted) -> None:
    """Say which steerings are not carried, and refuse to serve where none is."""
    reasons = {name: carried(held.steering) for name, held in library.held.items()}
    for name, reason in reasons.items():
        if reason:
            _LOG.warning("%s is not served: %s", name, reason)
    if all(reasons.values()):
        raise TrimtabError(f"no steering is carried: {next(iter(reasons.values()))}")
