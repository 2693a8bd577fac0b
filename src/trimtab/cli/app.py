"""Puts the commands together, and turns mistakes into one line with exit status 2."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import typer

from trimtab.cli import (
    analyse,
    bake,
    compare,
    demo,
    evaluate,
    fit,
    generate,
    inspect,
    models,
    reproduce,
    strength,
    sweep,
)
from trimtab.cli.common import trusting
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.terminal import printable

app = typer.Typer(
    name="trimtab",
    help="Steer open-weight language models at inference time. With `--debug` errors show where "
    "they come from; with `--trust-remote-code` Python code that comes with a model is run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
#: The exit status of a program that Ctrl-C ended, and of one whose output nobody reads.
_INTERRUPTED = 130
_NOT_READ = 1

app.command()(demo.demo)
app.add_typer(models.app, name="models")
app.add_typer(fit.app, name="fit")
app.command()(generate.generate)
app.command()(inspect.inspect)
app.command()(bake.bake)
app.command("evaluate")(evaluate.evaluate_command)
app.add_typer(strength.app, name="strength")
app.add_typer(sweep.app, name="sweep")
app.command("reproduce")(reproduce.reproduce_command)
app.command("compare")(compare.compare_command)
app.add_typer(analyse.app, name="analyse")


def main(arguments: list[str] | None = None) -> None:
    """Run one command; the entry point of `trimtab`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    # What follows `--` is a prompt, whatever it says.
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    trusting.set("--trust-remote-code" in options)
    if trusting.get():
        arguments.remove("--trust-remote-code")
    _open_streams()
    outputs = sys.stdout, sys.stderr  # typer wraps a broken one
    _quiet_libraries(debug)
    sys.exit(_written_out(_run(arguments, debug), outputs))


def _run(arguments: list[str], debug: bool) -> int:
    """The exit status of one command; what went wrong is said."""
    try:
        status = app(arguments, prog_name="trimtab", standalone_mode=False)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except BrokenPipeError:
        status = _NOT_READ
    except SystemExit as exit_now:  # typer leaves so when nobody reads its output
        status = exit_now.code
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = _one_line(error)
        if message:  # or no arguments: the help has been shown
            _say(message)
        return 2
    if status == _INTERRUPTED:  # which is also what typer makes of Ctrl-C
        _say("interrupted")
    return status if isinstance(status, int) else 0


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
    """What went wrong and what to do, for a person; empty where all is said already."""
    if isinstance(error, TrimtabError):
        return " ".join(str(error).splitlines())
    if hasattr(error, "format_message"):  # the command line itself was wrong
        message = " ".join(error.format_message().split())
        return message and f"{message} (see --help)"
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


def _quiet_libraries(debug: bool) -> None:
    """Our own warnings as one line each; those of libraries only on request."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if debug or issubclass(category, TrimtabWarning):
            _say(f"warning: {message}")

    warnings.showwarning = show
    warnings.simplefilter("always", TrimtabWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging as transformers_logging

        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
