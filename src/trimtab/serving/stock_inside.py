"""Steerings inside of a vLLM that was started by its own command, `vllm serve`.

The engine is started with the sites of the steerings, in `--additional-config`. Once it runs, the
endpoint plugin `trimtab` proves those sites, gives the workers the steerings of a directory, and
stands in front of the application: a request names steerings in its model, `base+joy@12`, in a
field `steering`, or in `vllm_xargs`, and what reaches vLLM is its own model with what the workers
read. What is not carried is refused; nothing runs unsteered that was to be steered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.engines import (
    ASKED,
    FIELD,
    READING,
    Wanted,
    configuration,
    configured,
    extra_args,
    graphs,
    places_of,
    refuse_ways,
    wanted_of,
    way_of,
)
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.serving.bodies import SteeringBody
from trimtab.serving.inside import Carried, Inside, sites_wanted
from trimtab.serving.library import Library, UnknownSteeringError
from trimtab.serving.names import MOST_STACKED, Asked, plainly_asked
from trimtab.serving.placing import acts_of
from trimtab.serving.stock import STEERINGS, Closed, opened, tell_served
from trimtab.steering import Steering

_LOG = logging.getLogger("vllm.trimtab")
#: What `vllm serve` has in its environment for it.
STOCK_INSIDE = f"{STEERINGS}=DIR VLLM_PLUGINS=trimtab"
#: The ends of routes whose requests carry `vllm_xargs` to the engine; of others a variant is no
#: model, because vLLM would leave the steering out.
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_LIST = TypeAdapter(list[SteeringBody])


def inside_flags(
    language_model: LanguageModel, steerings: Sequence[Steering], kinds: Sequence[str] = ()
) -> list[str]:
    """The arguments with which `vllm serve` carries steerings by the plugin, and others at some
    kinds of sites; those that it does not carry are left out, and none where that is all."""
    carried = Carried(language_model.anatomy)
    kept = [each for each in steerings if not refusal(each, carried)]
    places = places_of(language_model.anatomy, sites_wanted(kept, kinds, language_model.anatomy))
    if not places:
        return []
    said = [f"--{name.replace('_', '-')}={json.dumps(value)}" for name, value in graphs().items()]
    return ["--additional-config", json.dumps(configuration(places)), *said]


def refusal(steering: Steering, carried: Carried) -> str:
    """Why vLLM's own command does not serve a steering; "" where it does."""
    if steering.gate is not None:
        return "its gate is decided by trimtab serve --engine vllm, not by vLLM's own command"
    if any(scope.by_content for scope in steering.scopes):
        return (
            "its scope goes by turns of a chat, which trimtab serve --engine vllm finds, and not "
            "vLLM's own command"
        )
    return carried(steering)


@dataclass
class Named:
    """Puts what requests say of steerings into what an engine's workers read. `bases` are the
    model's names."""

    bases: Sequence[str]
    language_model: LanguageModel
    library: Library
    carried: Carried

    def put(self, body: dict[str, Any], carries: bool = True) -> dict[str, Any]:
        """A request's body as vLLM is to have it; the same where nothing is steered. On a route
        that carries no steerings to the engine there must be none."""
        xargs = body.get("vllm_xargs") or {}
        if not isinstance(xargs, dict):
            return body  # which vLLM refuses
        raw = [name for name in (FIELD, READING) if name in xargs or name in _extra(body)]
        if raw:
            raise TrimtabError(f"{raw[0]} is not for clients to give: name steerings")
        asked = self._asked(body, xargs)
        if not asked:
            return body
        if not carries:
            raise TrimtabError(f"this route carries no steerings: ask {', '.join(_ROUTES)}")
        if body.get("use_beam_search"):
            raise TrimtabError("vLLM leaves steerings out of a beam search")
        wanted = [self._wanted(one, steering) for one, steering in self.library.wanted(asked)]
        kept = {name: value for name, value in xargs.items() if name != ASKED}
        kept |= extra_args(wanted) or {}
        rest = {name: value for name, value in body.items() if name != ASKED}
        return {**rest, "model": self.bases[0], "vllm_xargs": kept}

    def _asked(self, body: Mapping[str, Any], xargs: Mapping[str, Any]) -> list[Asked]:
        """What a request asks for, in one of three places."""
        model = body.get("model")
        places = {
            "model": plainly_asked(model, self.bases) if isinstance(model, str) else None,
            "steering": _list(body[ASKED]) if ASKED in body else None,
            "vllm_xargs": self._said(xargs[ASKED]) if ASKED in xargs else None,
        }
        found = [asked for asked in places.values() if asked is not None]
        if len(found) > 1:
            raise TrimtabError(f"name steerings once: in {', in '.join(places)}")
        asked = found[0] if found else []
        if asked and places["model"] is None and model not in (None, *self.bases):
            raise UnknownSteeringError(f"there is no model '{model}'")
        return asked

    def _said(self, text: Any) -> list[Asked]:
        """`joy@12+calm`, or a list as the field `steering` has it, in JSON."""
        if not isinstance(text, str):
            raise TrimtabError(f"vllm_xargs.{ASKED} is a text, as in 'joy@12+calm'")
        if not text.startswith("["):
            return plainly_asked(f"{self.bases[0]}+{text}", self.bases) or []
        try:
            return _list(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise TrimtabError(f"vllm_xargs.{ASKED} is no JSON") from error

    def _wanted(self, asked: Asked, steering: Steering) -> Wanted:
        if reason := refusal(steering, self.carried):
            raise TrimtabError(f"{asked.name} is not carried: {reason}")
        return wanted_of(steering, partial(acts_of, self.language_model))


def _extra(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a body of vLLM's route for token ids gives the engine itself."""
    params = body.get("sampling_params")
    extra = params.get("extra_args") if isinstance(params, dict) else None
    return extra if isinstance(extra, dict) else {}


def _list(given: Any) -> list[Asked]:
    try:
        every = _LIST.validate_python(given)
    except ValidationError as error:
        raise TrimtabError(f"steering: {error.errors()[0]['msg']}") from error
    if len(every) > MOST_STACKED:
        raise TrimtabError(f"a request may stack {MOST_STACKED} steerings, not {len(every)}")
    return [one.asked for one in every]


class InsideEndpoint:
    """vLLM's endpoint plugin `trimtab`, which it loads in the process that listens where
    VLLM_PLUGINS names it."""

    name, required_tasks = "trimtab", ("generate",)

    def __init__(self) -> None:
        self.named: Named | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Stand in front of the application, and tell what is served."""
        app.add_middleware(Before, endpoint=self)
        app.add_middleware(Closed)  # the last one is asked first
        tell_served(app, lambda: None if self.named is None else self.named.library)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """The engine has started: read the model, and give workers the steerings."""
        from vllm import envs

        if engine_client is None:  # a server that only makes prompts of chats
            return
        config = engine_client.vllm_config
        places = configured(config)
        if not os.environ.get(STEERINGS):
            raise TrimtabError(f"trimtab: {STEERINGS} names no directory of steerings")
        if not places:
            raise TrimtabError(
                "trimtab: the engine has no sites: give it --additional-config (trimtab serve "
                "--check --engine vllm says which)"
            )
        if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
            raise TrimtabError(
                "trimtab: with VLLM_SKIP_MODEL_NAME_VALIDATION every name is the unsteered model"
            )
        if (args.api_server_count or 1) > 1:
            raise TrimtabError("trimtab: give vLLM --api-server-count 1")
        refuse_ways(config)
        language_model, library = await asyncio.to_thread(opened, config)
        if places_of(language_model.anatomy, list(places)) != places:
            raise TrimtabError("trimtab: --additional-config has the sites of another model")
        parallel = config.parallel_config
        carried = Carried(
            language_model.anatomy,
            parallel.tensor_parallel_size,
            list(places),
            parallel.pipeline_parallel_size,
            way_of(config) == "kernel",
        )
        kept = []
        for name, held in library.held.items():
            if reason := refusal(held.steering, carried):
                _LOG.warning("%s is not served: %s", name, reason)
            else:
                kept.append(held.steering)
        if not kept:
            raise TrimtabError("trimtab: no steering is carried; why is said above")
        inside = await asyncio.to_thread(Inside, language_model, list(places))
        await inside.begin(engine_client)
        for steering in kept:
            await inside.hold(steering)
        bases = [one.name for one in state.openai_serving_models.base_model_paths]
        self.named = Named(bases, language_model, library, carried)
        _LOG.warning("trimtab: %d steerings", len(kept))


class Before:
    """In front of an application: requests that name steerings become those that carry them."""

    def __init__(self, app: ASGIApp, endpoint: InsideEndpoint) -> None:
        self._app, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = self._endpoint.named
        if named is None or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        content = await whole_body(receive)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None  # which vLLM refuses
        if isinstance(body, dict):
            try:
                # In a thread, because a model's markers are looked for in its tokens.
                carries = scope["path"].rstrip("/").endswith(_ROUTES)
                changed = await asyncio.to_thread(named.put, body, carries)
            except TrimtabError as error:
                unknown = isinstance(error, UnknownSteeringError)
                await _refused(str(error), 404 if unknown else 400)(scope, receive, send)
                return
            if changed is not body:
                content = json.dumps(changed).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        await self._app({**scope, "headers": headers}, again(content, receive), send)


async def whole_body(receive: Receive) -> bytes:
    """All of a request's body, or what came of it before the client went."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def again(content: bytes, receive: Receive) -> Receive:
    """What gives a body as if it had just come, and then waits for the client to go."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return receive_again


def _refused(reason: str, status: int) -> JSONResponse:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return JSONResponse({"error": {"message": reason, "type": kind, "code": status}}, status)
