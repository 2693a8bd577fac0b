"""`trimtab serve`: a model behind OpenAI's API, with steerings by name."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json, trusting
from trimtab.cli.engines import LOGS, Running, read_beside
from trimtab.cli.listening import LOOPBACK, as_address, bound_to
from trimtab.cli.options import Force, Json, Opened
from trimtab.cli.tables import show
from trimtab.cli.values import read_named
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.options import option
from trimtab.reports import Table

if TYPE_CHECKING:
    from trimtab.model import LanguageModel
    from trimtab.serving import Adapted, Carried, Library
    from trimtab.steering import Steering


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where the server listens, and who may ask it."""

    heading = "Server"

    host: str = option(
        "The address to listen on; others than this machine's own take a key.", "127.0.0.1"
    )
    port: int = option("0 takes a free one.", 8000, least=0, most=65535)
    name: str | None = option("What clients call the model (default: its own name).", None)
    allow_host: Sequence[str] = option(
        "A host name that clients reach it by, beside localhost (behind a proxy); repeat.", ()
    )
    timeout: float = option("Seconds that an answer may take.", 600.0)
    rows: int = option("Texts that are written at once.", 32, least=1)
    tokens: int | None = option(
        "Tokens that these may come to, all together (default: 65,536; vLLM goes by its memory).",
        None,
        least=1,
    )
    waiting: int = option("Requests that may wait; the next is told to try again.", 256, least=1)


@dataclass(frozen=True, kw_only=True)
class Served(Running):
    """The same, how it steers, and where it may."""

    hook: Sequence[str] = option(
        "With vllm, a kind of sites (resid, attn_norm ...) for steerings that are added later; "
        "repeat.",
        (),
    )
    tier: Literal["auto", "plugin", "lora"] = option(
        "With vllm, how it steers: plugin, or lora (an exact adapter for each variant, made when "
        "it is first asked for); auto takes the plugin where it is tested with that vLLM.",
        "auto",
    )
    variants: int = option(
        "With --tier lora, how many variants (steerings at their dials) are kept.", 256, least=2
    )


def serve(
    *,
    opened: Opened,
    steer: Annotated[
        Sequence[str],
        Parameter(
            name=("--steer", "-s"),
            help="A directory of steerings, FILE or FILE@DIAL, served by the file's name; repeat.",
        ),
    ] = (),
    bake: Annotated[
        Sequence[str],
        Parameter(name="--bake", help="FILE@DIAL: fold it into the weights first; repeat."),
    ] = (),
    serving: Serving = Serving(),
    running: Served = Served(),
    check: Annotated[
        bool,
        Parameter(name="--check", help="Say what would be served, and end.", negative=()),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Serve a model with OpenAI's API, each request under steerings of its own.

    Clients name a variant as the model, `smollm2-135m-instruct+warm@2`, or give the body a field
    `steering`. With TRIMTAB_API_KEY in the environment requests take that key; with
    TRIMTAB_ADMIN_KEY steerings can be added and removed while the server runs.

    Example: `trimtab serve --model smollm2-135m-instruct --steer warm.safetensors --port 8000`
    """
    from trimtab.serving import Carried, Library

    key, admin_key = (
        os.environ.get(name) or None for name in ("TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY")
    )
    if serving.host not in LOOPBACK and key is None:
        raise TrimtabError(
            f"{serving.host} can be reached by others: set TRIMTAB_API_KEY, or listen on 127.0.0.1"
        )
    _require_extra()
    arguments = _arguments(running, opened, serving, check)
    language_model = open_model(opened if arguments is None else read_beside(opened))
    for argument in bake:
        language_model = _baked(language_model, argument, force)
    name = serving.name or language_model.name
    carried = None
    if arguments is not None:
        carried = _carried(_tier(running), language_model, arguments)
    by_engine = isinstance(carried, Carried)
    refusal = None if check else carried
    library = Library(language_model, force=force, refusal=refusal, by_engine=by_engine)
    for source in steer:
        library.read(source)
    if check or as_json:
        flags = _flags(carried, library, running, language_model)
        _say_what_is_served(name, library, (list(bake), flags), carried, as_json)
    if check:
        return
    if carried is None:
        engine = partial(_transformers, language_model, serving, force)
    else:
        assert arguments is not None
        way = partial(_way, carried, library, running, language_model, arguments)
        engine = partial(_vllm, language_model, opened, way, arguments, serving)
    _run(language_model, name, library, serving, (key, admin_key), engine)


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise TrimtabError("serving needs the extra serve: pip install 'trimtab[serve]'") from error


# -- what runs the model --------------------------------------------------------------------------

#: Arguments of vLLM's engine that are given by other options, or are trimtab's own.
_GIVEN = ("model", "dtype", "additional_config", "max_num_seqs", "trust_remote_code", "tokenizer")


#: With --tier lora these are, too.
_ADAPTERS = ("enable_lora", "lora_target_modules")


#: Seconds between two looks whether an engine lives, and how long a server goes on answering, with
#: errors, after it has died.
_LOOK, _HEARD = 1.0, 5.0


def _arguments(
    running: Served, opened: Opened, serving: Serving, check: bool
) -> dict[str, Any] | None:
    """Arguments of vLLM's engine; None where transformers runs the model."""
    if running.engine == "transformers":
        if running.vllm or running.hook or running.tier != "auto":
            raise TrimtabError("--vllm, --hook and --tier are for --engine vllm")
        return None
    from trimtab.engines import untested, vllm_version

    if not check and vllm_version() is None:
        raise TrimtabError(f"{untested()}: or serve with --engine transformers")
    if not check and running.tier == "plugin" and (reason := untested()):
        raise TrimtabError(f"{reason}: serve with --tier lora, or with --engine transformers")
    if serving.tokens is not None:
        raise TrimtabError("vLLM divides its own memory: leave --tokens out")
    if opened.quantise or opened.device_map or opened.device != "auto":
        raise TrimtabError("vLLM places the model itself: leave --device and --quantise out")
    arguments = read_named("--vllm", running.vllm)
    own = (*_GIVEN, *(_ADAPTERS if _tier(running) == "lora" else ()))
    given = [name for name in own if name in arguments]
    if given:
        raise TrimtabError(f"--vllm {given[0]}: that is for trimtab's own options to say")
    return arguments


def _tier(running: Served) -> Literal["plugin", "lora"]:
    """How vLLM steers: by the plugin, unless it is not tested with the vLLM that is installed."""
    from trimtab.engines import untested, vllm_version

    if running.tier != "auto":
        return running.tier
    return "lora" if vllm_version() is not None and untested() else "plugin"


def _carried(
    tier: str, language_model: LanguageModel, arguments: dict[str, Any]
) -> Carried | Adapted:
    from trimtab.engines import captures
    from trimtab.serving import Adapted, Carried

    if tier == "lora":
        return Adapted(language_model)
    ranks, stages = (int(arguments.get(f"{of}_parallel_size", 1)) for of in ("tensor", "pipeline"))
    captured = captures(arguments)
    return Carried(language_model.anatomy, ranks, stages=stages, captured=captured)


def _way(
    carried: Carried | Adapted,
    library: Library,
    running: Served,
    language_model: LanguageModel,
    arguments: dict[str, Any],
) -> Any:
    """How vLLM steers, with all that is to be known before it starts."""
    from trimtab.serving import Adapters, Carried, Inside, sites_wanted

    steerings = [held.steering for held in library.held.values()]
    if isinstance(carried, Carried):
        carried.sites = sites_wanted(steerings, running.hook, language_model.anatomy)
        return Inside(language_model, carried.sites)
    rank = arguments.get("max_lora_rank")
    carried.start(steerings, running.hook, None if rank is None else int(rank))
    return Adapters(language_model, carried, running.variants)


@contextmanager
def _transformers(language_model: LanguageModel, serving: Serving, force: bool) -> Iterator[Any]:
    from trimtab.serving import Engine, Limits

    tokens = 65_536 if serving.tokens is None else serving.tokens
    limits = Limits(serving.rows, tokens, waiting=serving.waiting)
    yield Engine(language_model, limits, force=force)


@contextmanager
def _vllm(
    language_model: LanguageModel,
    opened: Opened,
    way: Callable[[], Any],
    arguments: dict[str, Any],
    serving: Serving,
) -> Iterator[Any]:
    """vLLM on the same weights, in a process of its own."""
    from trimtab.serving import Elsewhere, Limits

    for name, value in LOGS.items():
        os.environ.setdefault(name, value)
    with _checkpoint(language_model, opened) as directory:
        limits = Limits(serving.rows, waiting=serving.waiting)
        more = {"trust_remote_code": trusting.get(), "revision": opened.revision}
        yield Elsewhere(language_model, directory, way(), {**more, **arguments}, limits)


@contextmanager
def _checkpoint(language_model: LanguageModel, opened: Opened) -> Iterator[str]:
    """Where vLLM reads the weights: where they came from, or, where they are other ones now, a
    directory that lasts as long as the server."""
    from trimtab.model import directory_of, has_adapters

    source = directory_of(opened.model)
    if not (language_model.baked or has_adapters(language_model.model)):
        yield opened.model if source is None else str(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(language_model.save_pretrained(Path(folder) / "model"))


def _baked(language_model: LanguageModel, argument: str, force: bool) -> LanguageModel:
    from trimtab.model import bake
    from trimtab.steering import Steering

    return bake(language_model, Steering.read(argument), force=force)


def _say_what_is_served(
    name: str,
    library: Library,
    about: tuple[list[str], list[str]],
    carried: Carried | Adapted | None,
    as_json: bool,
) -> None:
    """What is served; `about` is what is baked in, and the flags of vLLM's own command."""
    from trimtab.serving import STOCK, STOCK_INSIDE, Adapted, described

    baked, flags = about
    every = [
        described(one, held) | ({} if carried is None else _in_vllm(held.steering, carried))
        for one, held in library.held.items()
    ]
    if as_json:
        more = {"vllm_serve": flags} if flags else {}
        print_json({"model": name, "baked": baked, "steerings": every, **more})
        return
    rows = [
        [
            f"{name}+{one['name']}",
            one["method"],
            f"{one['dial']['default']:.4g}",
            " to ".join(f"{end:.4g}" for end in one["dial"]["range"]),
            ", ".join(f"{word} {dial:.3g}" for word, dial in one["strengths"].items()),
            ", ".join(one["scopes"]) + (f", {one['gate']} gate" if one["gate"] else ""),
            *([] if carried is None else [one["runs"]]),
        ]
        for one in every
    ]
    heads = ["model", "method", "dial", "range", "strengths", "acts on"]
    heads += [] if carried is None else ["with vLLM"]
    notes = [f"baked in: {one}" for one in baked]
    show([Table(f"Served beside {name}", heads, rows)], notes, None)
    if flags:
        around = STOCK if isinstance(carried, Adapted) else STOCK_INSIDE
        print(f"{around} vllm serve MODEL {shlex.join(flags)}")


def _flags(
    carried: Carried | Adapted | None,
    library: Library,
    running: Served,
    language_model: LanguageModel,
) -> list[str]:
    """The arguments with which vLLM's own command carries what is served; none where it carries
    nothing."""
    from trimtab.engines import untested, vllm_version
    from trimtab.serving import Adapted, flags_of, inside_flags

    steerings = [held.steering for held in library.held.values()]
    if isinstance(carried, Adapted):
        return flags_of(language_model, steerings, running.hook)
    if carried is None or (vllm_version() is not None and untested()):
        return []
    return inside_flags(language_model, steerings, running.hook)


def _in_vllm(steering: Steering, carried: Carried | Adapted) -> dict[str, Any]:
    """How vLLM carries a steering here, and where it does not, why not and what does."""
    from trimtab.engines import untested, vllm_version
    from trimtab.serving import Carried

    plugin = isinstance(carried, Carried)
    reason = ""
    if vllm_version() is None or plugin:
        reason = untested()
    reason = reason or carried(steering)
    if not reason:
        tier, runs = (2, "steered in the engine") if plugin else (1, "by LoRA adapters")
        return {"tier": tier, "runs": f"tier {tier}: {runs}"}
    return {"tier": None, "runs": f"refused: {reason}"}


def _run(
    language_model: LanguageModel,
    name: str,
    library: Library,
    serving: Serving,
    keys: tuple[str | None, str | None],
    engine: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    from trimtab.serving import Access, Desk, application

    hosts: tuple[str, ...] | None = (*LOOPBACK, *serving.allow_host)
    if serving.host not in LOOPBACK and not serving.allow_host:
        hosts = None  # whoever has the key may use any name
    bound = bound_to(serving.host, serving.port)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    with engine() as opened:
        desk = Desk(language_model, name, library, opened, serving.timeout)
        app = application(desk, Access(*keys, hosts))
        address = f"http://{as_address(serving.host)}:{bound.getsockname()[1]}/v1"
        console.print(f"{name} with {len(library.held)} steerings at {address} (Ctrl-C ends it)")
        sys.stdout.flush()
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        server = uvicorn.Server(config)
        watching = Thread(target=_end_with, args=(opened, server), daemon=True)
        watching.start()
        # What a client asks for may be worth a warning, but the log never says what was asked.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)
            server.run(sockets=[bound])
        died = getattr(server, "engine_died", False)
    if died:
        raise TrimtabError("the engine has died, and the server ended: start it again")


def _end_with(engine: Any, server: Any) -> None:
    """End a server whose engine has died, so that whoever watches over it starts it again; clients
    hear of it first."""
    while not server.should_exit:
        time.sleep(_LOOK)
        if not engine.alive and not server.should_exit:
            server.engine_died = True
            time.sleep(_HEARD)
            server.should_exit = True
