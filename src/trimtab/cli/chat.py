"""`trimtab chat`: talk with a model in a terminal, and turn steerings while talking."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from trimtab.cli.common import (
    console,
    one_for_each,
    open_model,
    print_json,
    read_options,
    read_steerings,
    say_what_is_left_aside,
)
from trimtab.cli.options import Force, Json, Opened, Sampled, Steered
from trimtab.cli.values import flag_of, read_named
from trimtab.errors import TrimtabError
from trimtab.options import option
from trimtab.terminal import is_terminal, note

if TYPE_CHECKING:
    from trimtab.chat import Face, Session


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A server that answers in place of a model of this machine."""

    heading = "Server"

    endpoint: str | None = option(
        "The URL of an OpenAI-compatible server (http://127.0.0.1:8000/v1); --model and --steer "
        "are then names there.",
        None,
    )
    key_variable: str = option(
        "The environment variable that has the server's key.", "OPENAI_API_KEY"
    )


def chat(
    *,
    opened: Opened,
    steered: Steered = Steered(),
    kl: Annotated[
        float | None,
        Parameter(help="Turn the dial for each question, to so many nats at its next token."),
    ] = None,
    decoding: Sampled = Sampled(max_new_tokens=512),
    asked: Asked = Asked(),
    receipt: Annotated[
        bool | None,
        Parameter(
            name="--receipt",
            negative="--no-receipt",
            help="Say below each answer what acted (default: in a terminal).",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Talk with a model, and turn steerings while talking: /help lists the commands.

    Lines that are piped in are asked one after the other, and answers are printed plainly.

    Example: `trimtab chat --model smollm2-135m-instruct --steer warm.safetensors@2`
    """
    if asked.endpoint is None:
        session = _of_model(opened, steered, decoding, force)
    elif force:
        raise TrimtabError("--force is for a model of this machine: a server checks its own")
    else:
        session = _of_server(opened, steered, decoding, asked)
    if kl is not None:
        if len(session.stack) != 1:
            raise TrimtabError(f"--kl turns one dial: name one steering, not {len(session.stack)}")
        session.change(None, lambda put: put.turned(kl=kl))
    _talk(session, receipt, as_json)
    if as_json:
        print_json(session.as_json())


def _of_model(opened: Opened, steered: Steered, decoding: Sampled, force: bool) -> Session:
    """A chat with a model of this machine."""
    from trimtab.chat import Local, Session

    steerings = read_steerings(steered)
    options = asdict(decoding)
    options |= read_options(options.pop("more"))
    language_model = open_model(opened)
    speaker = Local(language_model, options, force=force)
    say_what_is_left_aside(language_model, options)
    session = Session(speaker, opened.system)
    for argument, steering in zip(steered.steer, steerings, strict=True):
        session.put_on(speaker.put_on(argument, steering))
    return session


def _of_server(opened: Opened, steered: Steered, decoding: Sampled, asked: Asked) -> Session:
    """A chat with a model behind an address."""
    from trimtab.chat import Put, Remote, Session

    for item in fields(opened):
        default = item.default
        if item.name not in ("model", "system") and getattr(opened, item.name) != default:
            raise TrimtabError(
                f"{flag_of(item.name)} is for a model of this machine: the server at --endpoint "
                "has its own"
            )
    if steered.gate:
        raise TrimtabError("--gate is for a model of this machine: a server has its own")
    body = {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p if decoding.top_p != 1 else None,
        "top_k": decoding.top_k or None,
        **read_named("--option", decoding.more),
    }
    speaker = Remote(
        str(asked.endpoint),
        opened.model,
        {name: value for name, value in body.items() if value is not None},
        key_variable=asked.key_variable,
        seed=decoding.seed,
    )
    session = Session(speaker, opened.system)
    scopes = one_for_each("--scope", list(steered.scope), len(steered.steer))
    for argument, scope in zip_longest(steered.steer, scopes):
        put = session.steer(argument)
        session.change(put.name, partial(Put.turned, scope=scope))
    return session


def _talk(session: Session, receipt: bool | None, as_json: bool) -> None:
    """Read lines and do what they say, until there are none."""
    from trimtab.chat import Plain, Screen, joined, typed_lines

    typing = is_terminal(sys.stdin) and is_terminal(sys.stdout) and not as_json
    if not typing:
        _obey_all(session, Plain(receipts=bool(receipt), quiet=as_json), joined(sys.stdin))
        return
    screen = Screen(console, receipts=receipt is not False)
    screen.say(f"{session.speaker.name}: /help lists the commands, Ctrl-D leaves")
    for put in session.stack:
        screen.say(str(put))
    _obey_typed(session, screen, typed_lines(session))


def _obey_all(session: Session, face: Face, lines: Iterable[str]) -> None:
    """Lines that were piped in; the first mistake ends it."""
    from trimtab.chat import LeaveError, obey

    for line in lines:
        try:
            obey(session, face, line)
        except LeaveError:
            return


def _obey_typed(session: Session, face: Face, lines: Iterable[str]) -> None:
    """Lines that a person types; a mistake is said, and the chat goes on."""
    from trimtab.chat import LeaveError, obey

    for line in lines:
        try:
            obey(session, face, line)
        except LeaveError:
            return
        except KeyboardInterrupt:
            face.say("stopped")
        except TrimtabError as error:
            note(" ".join(str(error).split()))
        except RuntimeError as error:  # the conversation is still there
            if "out of memory" not in str(error):
                raise
            note("out of memory: /undo takes the last turn back, /new begins again")
