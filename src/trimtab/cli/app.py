"""Puts the commands together, and turns mistakes into one line with exit status 2."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from typing import Any

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
#: The exit status of a program that Ctrl-C ended.
_INTERRUPTED = 130

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
    _quiet_libraries(debug)
    try:
        status = app(arguments, prog_name="trimtab", standalone_mode=False)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = _one_line(error)
        if not message:  # no arguments: the help has been shown
            sys.exit(2)
        _fail(message, 2)
    if status == _INTERRUPTED:  # which is also what typer makes of Ctrl-C
        _fail("interrupted", _INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"trimtab: {message}", file=sys.stderr)
    sys.exit(status)


def _one_line(error: Exception) -> str:
    """What went wrong and what to do, for a person; empty where all is said already."""
    if isinstance(error, TrimtabError):
        return " ".join(str(error).splitlines())
    if hasattr(error, "format_message"):  # the command line itself was wrong
        message = " ".join(error.format_message().split())
        return message and f"{message} (see --help)"
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
            print(f"trimtab: warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    warnings.simplefilter("always", TrimtabWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging as transformers_logging

        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
