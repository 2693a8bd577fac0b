"""Puts the commands together, and turns mistakes into one line with exit status 2."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from typing import Any, TextIO

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    RepeatArgumentError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from trimtab import __version__
from trimtab.cli.common import trusting
from trimtab.cli.making import as_typed, given_twice, prepared, strict, summary
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.terminal import CleanConsole, printable

#: The commands in the order of the list, and the groups of commands among them. A module of the
#: same name has each (of a Python keyword with _ behind it): the function that is the command, or
#: `commands`, which makes the group.
COMMANDS = (
    "demo", "make", "models", "contrast", "fit", "gate", "monitor", "generate", "chat", "inspect",
    "bake", "serve", "playground", "export", "import", "push", "pull", "search", "audit",
    "evaluate", "strength", "sweep", "reproduce", "compare", "analyse",
)  # fmt: skip
GROUPS = ("models", "contrast", "fit", "gate", "monitor", "strength", "sweep", "analyse")
_ABOUT = (
    "Steer open-weight language models at inference time. With `--debug` errors show where they "
    "come from; with `--trust-remote-code` Python code that comes with a model is run. "
    "`--install-completion` lets bash, zsh or fish complete commands and options: it writes to the "
    "files of the shell that runs it, or `--shell fish` says which."
)
#: What a steering's dial is called where it is no option.
_DIALS = ("--alpha", "--dial", "--strength", "--theta", "--scale", "--coeff", "--multiplier")
#: Options of every command, which may stand anywhere.
_EVERYWHERE = ("--debug", "--trust-remote-code")
#: The exit status of a program that Ctrl-C ended, and of one whose output nobody reads.
_INTERRUPTED = 130
_NOT_READ = 1


def build(words: Sequence[str] | None) -> App:
    """The commands for some words of a command line: the command that they name is imported, the
    others are there by name and summary. None imports all, for completion."""
    app = App(
        name="trimtab",
        help=_ABOUT,
        help_epilogue="`--help` after any command shows its page.",
        version=__version__,
        help_format="markdown",
        console=CleanConsole(),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(
            negative_iterable=(),
            negative_none=(),
            allow_leading_hyphen=True,
            show_default=as_typed,
            converter=strict,
        ),
    )
    first = next((word for word in words or () if not word.startswith("-")), None)
    for order, name in enumerate(COMMANDS):
        function = f"{name}_" if iskeyword(name) else name
        module, function = f"trimtab.cli.{function}", "commands" if name in GROUPS else function
        if words is not None and name != first:
            app.command(App(name=name, help=summary(module, function), sort_key=order))
        elif name in GROUPS:
            commands = import_module(module).commands
            group = App(name=name, help=inspect.getdoc(commands), sort_key=order)
            commands(group)
            app.command(group)
        else:
            command = getattr(import_module(module), function)
            app.command(prepared(command), name=name, sort_key=order)
    if words is None:
        app.register_install_completion_command()
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run one command; the entry point of `trimtab`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What follows `--` is a prompt, whatever it says.
    ends = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = arguments[:ends], arguments[ends:]
    debug = "--debug" in options
    trusting.set("--trust-remote-code" in options)
    arguments = [word for word in options if word not in _EVERYWHERE] + rest
    _open_streams()
    _quiet_libraries(debug)
    sys.exit(_written_out(_run(arguments, debug), (sys.stdout, sys.stderr)))


def _run(arguments: list[str], debug: bool) -> int:
    """The exit status of one command; what went wrong is said."""
    try:
        _called(arguments)
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        return _NOT_READ
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(_one_line(error))
        return 2
    # Nothing to do but to show what there is: a command is missing.
    return 2 if arguments in ([], *([group] for group in GROUPS if group != "models")) else 0


def _called(arguments: Sequence[str]) -> None:
    app = build(None if "--install-completion" in arguments else arguments)
    # cyclopts takes a lone - for an option; a prompt it is.
    app([" -" if word == "-" else word for word in arguments])


def _say(message: str) -> None:
    """One line on standard error, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(f"trimtab: {printable(message)}", file=sys.stderr, flush=True)


def _open_streams() -> None:
    """Standard streams that can be used: those that are closed read and write nothing, and what a
    stream's encoding does not have is written as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file to be opened would take the stream's place
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _written_out(status: int, outputs: Sequence[TextIO]) -> int:
    """The status, once all output is handed over: when Python does it later, it fails loudly."""
    for stream in outputs:
        try:
            stream.flush()
        except OSError as error:
            # What is still held goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                status = status or _NOT_READ
            else:
                _say(_one_line(error))
                status = status or 2
    return status


def _one_line(error: Exception) -> str:
    """What went wrong and what to do, for a person."""
    if isinstance(error, TrimtabError):
        return " ".join(str(error).splitlines())
    if isinstance(error, CycloptsError):  # the command line itself was wrong
        return f"{' '.join(_mistake(error).split())} (see --help)"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # as pathlib says it
        return "a path begins with ~ and the name of no user: write it in full"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space and run the command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and "out of memory" in str(error):
        return "out of memory: try --dtype bfloat16 or a smaller --batch-size"
    first = next(iter(str(error).splitlines()), "")
    return f"internal error, {type(error).__name__}: {first} (run again with --debug)"


def _mistake(error: CycloptsError) -> str:
    if isinstance(error, MissingArgumentError) and error.argument and not error.tokens_so_far:
        argument = error.argument
        if not argument.name.startswith("-"):
            return f"missing argument {argument.name}"
        return f"missing option {argument.name}"
    if isinstance(error, RepeatArgumentError):
        return given_twice(error.token.keyword or "an option")
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}"
    if isinstance(error, UnknownOptionError) and _is_a_dial(error):
        return (
            f"unknown option {error.token.keyword or error.token.value}: the dial is said with the "
            "steering, as in --steer FILE@3"
        )
    said = str(error).replace('"', "'")
    return said[:1].lower() + said[1:]


def _is_a_dial(error: UnknownOptionError) -> bool:
    """Whether an option that is not there is how people call a steering's dial."""
    given = (error.token.keyword or error.token.value).partition("=")[0]
    takes = {name for argument in error.argument_collection for name in argument.names}
    return given in _DIALS and "--steer" in takes


def _quiet_libraries(debug: bool) -> None:
    """Our own warnings as one line each; those of libraries only on request."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if debug or issubclass(category, TrimtabWarning):
            _say(f"warning: {message}")

    warnings.showwarning = show
    warnings.simplefilter("always", TrimtabWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    # What is not imported yet reads the environment: a command imports it only to run a model.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
