"""`trimtab playground`: a page in the browser to play with a model and its steerings."""

from __future__ import annotations

import secrets
import socket
import sys
import warnings
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.listening import LOOPBACK, as_address, bound_to
from trimtab.cli.options import Force, Json, Opened
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.files import user_path
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.playground import Playground


@dataclass(frozen=True, kw_only=True)
class Paged:
    """Where the page is, and who may open it."""

    heading = "Server"

    host: str = option(
        "The address to listen on; others than this machine's own make a key, which is printed.",
        "127.0.0.1",
    )
    port: int = option("0 takes a free one.", 7860, least=0, most=65535)
    allow_host: Sequence[str] = option(
        "A host name that the page is reached by, beside localhost (behind a proxy); repeat.", ()
    )
    open: bool = option("Open the page in this machine's browser.", False, flag="--open")


def playground(
    *,
    opened: Opened,
    steer: Annotated[
        Sequence[str],
        Parameter(
            name=("--steer", "-s"),
            help="A directory of steerings, FILE or FILE@DIAL, by the file's name; repeat.",
        ),
    ] = (),
    paged: Paged = Paged(),
    saves: Annotated[
        Path, Parameter(name="--save", help="Where steerings are saved that the page makes.")
    ] = Path("steerings"),
    runs: Annotated[
        Path | None, Parameter(name="--runs", help="A directory of runs, whose reports are shown.")
    ] = None,
    check: Annotated[
        bool,
        Parameter(name="--check", help="Say what would be shown, and end.", negative=()),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Play with a model and its steerings in a browser: chat with and without them side by side,
    see what each turn of the dial costs, make new ones. Nothing leaves this machine.

    Example: `trimtab playground --model smollm2-135m-instruct --steer warm.safetensors`
    """
    _require_extra()
    if runs is not None and not user_path(runs).is_dir():
        raise TrimtabError(f"--runs {runs}: there is no such directory")
    place = _place(opened, steer, saves, runs, force)
    if check or as_json:
        _say_what_is_shown(place, as_json)
    if not check:
        _run(place, paged)


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise TrimtabError(
            "the playground needs the extra playground: pip install 'trimtab[playground]'"
        ) from error


def _place(
    opened: Opened, steer: Sequence[str], saves: Path, runs: Path | None, force: bool
) -> Playground:
    from trimtab.playground import Playground, Shelf

    language_model = open_model(opened)
    shelf = Shelf(language_model, user_path(saves), force)
    for source in steer:
        shelf.read(source)
    return Playground(language_model, shelf, None if runs is None else user_path(runs))


def _say_what_is_shown(place: Playground, as_json: bool) -> None:
    every, refused = place.shelf.listed(), place.shelf.refused
    if as_json:
        print_json({"model": place.language_model.name, "steerings": every, "refused": refused})
        return
    for one in every:
        console.print(f"{one['name']}: {one['method']} at {one['where']}")
    for file, why in refused.items():
        console.print(f"left out {file}: {why}")


def _run(place: Playground, paged: Paged) -> None:
    """Show the page until Ctrl-C."""
    import uvicorn

    from trimtab.playground import Access, application

    # The page says it, at every turn of the dial.
    warnings.filterwarnings("ignore", ".*outside the sensible range", TrimtabWarning)

    others = paged.host not in LOOPBACK
    hosts: tuple[str, ...] | None = (*LOOPBACK, *paged.allow_host)
    if others and not paged.allow_host:
        hosts = None  # whoever has the key may use any name
    key = secrets.token_urlsafe(24) if others else None
    bound: socket.socket = bound_to(paged.host, paged.port)
    app = application(place, Access(hosts, key))
    address = f"http://{as_address(paged.host)}:{bound.getsockname()[1]}/"
    if key is not None:
        address += f"?key={key}"
    held = len(place.shelf.library.held)
    console.print(
        f"{place.language_model.name} with {held} steerings at {address} (Ctrl-C ends it)"
    )
    sys.stdout.flush()
    if paged.open:
        webbrowser.open(address)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False
    )
    uvicorn.Server(config).run(sockets=[bound])
