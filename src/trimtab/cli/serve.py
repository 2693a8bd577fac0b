"""`trimtab serve`: a model behind OpenAI's API, with steerings by name."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.listening import LOOPBACK, as_address, bound_to
from trimtab.cli.options import Force, Json, Opened
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.options import option
from trimtab.reports import Table

if TYPE_CHECKING:
    from trimtab.model import LanguageModel
    from trimtab.serving import Library


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
    tokens: int = option("Tokens that these may come to, all together.", 65_536, least=1)
    waiting: int = option("Requests that may wait; the next is told to try again.", 256, least=1)


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
    from trimtab.serving import Library

    key, admin_key = (
        os.environ.get(name) or None for name in ("TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY")
    )
    if serving.host not in LOOPBACK and key is None:
        raise TrimtabError(
            f"{serving.host} can be reached by others: set TRIMTAB_API_KEY, or listen on 127.0.0.1"
        )
    _require_extra()
    language_model = open_model(opened)
    for argument in bake:
        language_model = _baked(language_model, argument, force)
    name = serving.name or language_model.name
    library = Library(language_model, force=force)
    for source in steer:
        library.read(source)
    if check or as_json:
        _say_what_is_served(name, library, list(bake), as_json)
    if not check:
        _run(language_model, name, library, serving, (key, admin_key))


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise TrimtabError("serving needs the extra serve: pip install 'trimtab[serve]'") from error


def _baked(language_model: LanguageModel, argument: str, force: bool) -> LanguageModel:
    from trimtab.model import bake
    from trimtab.steering import Steering

    return bake(language_model, Steering.read(argument), force=force)


def _say_what_is_served(name: str, library: Library, baked: list[str], as_json: bool) -> None:
    from trimtab.serving import described

    every = [described(one, held) for one, held in library.held.items()]
    if as_json:
        print_json({"model": name, "baked": baked, "steerings": every})
        return
    rows = [
        [
            f"{name}+{one['name']}",
            one["method"],
            f"{one['dial']['default']:.4g}",
            " to ".join(f"{end:.4g}" for end in one["dial"]["range"]),
            ", ".join(f"{word} {dial:.3g}" for word, dial in one["strengths"].items()),
            ", ".join(one["scopes"]) + (f", {one['gate']} gate" if one["gate"] else ""),
        ]
        for one in every
    ]
    heads = ["model", "method", "dial", "range", "strengths", "acts on"]
    show([Table(f"Served beside {name}", heads, rows)], [f"baked in: {one}" for one in baked], None)


def _run(
    language_model: LanguageModel,
    name: str,
    library: Library,
    serving: Serving,
    keys: tuple[str | None, str | None],
) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    from trimtab.serving import Access, Desk, Engine, Limits, application

    hosts: tuple[str, ...] | None = (*LOOPBACK, *serving.allow_host)
    if serving.host not in LOOPBACK and not serving.allow_host:
        hosts = None  # whoever has the key may use any name
    limits = Limits(serving.rows, serving.tokens, waiting=serving.waiting)
    bound = bound_to(serving.host, serving.port)
    desk = Desk(language_model, name, library, Engine(language_model, limits), serving.timeout)
    app = application(desk, Access(*keys, hosts))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    address = f"http://{as_address(serving.host)}:{bound.getsockname()[1]}/v1"
    console.print(f"{name} with {len(library.held)} steerings at {address} (Ctrl-C ends it)")
    sys.stdout.flush()
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
    )
    uvicorn.Server(config).run(sockets=[bound])
