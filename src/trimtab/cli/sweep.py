"""`trimtab sweep METHOD`: settings of a method on a task, chosen on validation, reported on test;
its options are the method's own fields, each with several values or a range."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from trimtab.cli.common import (
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Overwrite,
    open_model,
    print_json,
    rows_or_all,
)
from trimtab.cli.fit import Cache, read_value
from trimtab.cli.judging import JUDGE_OPTIONS, JudgeOptions, Toxicity, say_costs
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.fitting import Method
from trimtab.methods import METHODS
from trimtab.sweeps import FAST, Range, Sweep, sweep

app = typer.Typer(
    help="Try settings of a method on a task: `trimtab sweep METHOD --help` for its options.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
Protocol = Annotated[str, typer.Option(help="trimtab, or paper, which follows the authors.")]
Better = Annotated[
    str | None,
    typer.Option(
        help="more or less of the metric is better, where its name does not say (attack success: "
        "less)."
    ),
]
#: Trials that are listed in a terminal; the report has all.
_LISTED = 10


def _shared() -> list[tuple[str, Any, Any]]:
    """Options that every sweep takes: name, type, default."""
    empty = inspect.Parameter.empty
    return [
        ("model", Model, empty),
        (
            "task",
            Annotated[
                str,
                typer.Option(
                    "--task", "-t", help="copa, boolq ...; contrast:SOURCE; or refusal:FILE."
                ),
            ],
            empty,
        ),
        (
            "output",
            Annotated[
                Path | None,
                typer.Option("--output", "-o", help="Run directory; interrupted runs go on there."),
            ],
            None,
        ),
        (
            "contrast",
            Annotated[
                str | None,
                typer.Option(
                    "--contrast", "-c", help="What to fit on (default: the task's train rows)."
                ),
            ],
            None,
        ),
        ("data", Data, None),
        ("cache", Cache, None),
        (
            "search",
            Annotated[
                str,
                typer.Option(
                    help="grid; tpe (draws --trials settings); halving (stops poor ones early)."
                ),
            ],
            "grid",
        ),
        (
            "trials",
            Annotated[int | None, typer.Option(help="How many, where they are drawn.")],
            None,
        ),
        (
            "limit",
            Annotated[int, typer.Option(help="Validation rows; 0 takes all.")],
            FAST,
        ),
        (
            "test_limit",
            Annotated[int, typer.Option(help="Test rows; 0 takes all.")],
            0,
        ),
        ("protocol", Protocol, "trimtab"),
        (
            "validation_task",
            Annotated[
                str | None,
                typer.Option(help="Another task whose rows stand in for the validation rows."),
            ],
            None,
        ),
        (
            "metric",
            Annotated[str | None, typer.Option(help="What counts (default: the task's first).")],
            None,
        ),
        ("better", Better, None),
        (
            "max_cost",
            Annotated[
                float | None,
                typer.Option(help="Leave out what costs more nats per token of plain text."),
            ],
            None,
        ),
        (
            "oracle",
            Annotated[
                bool,
                typer.Option(
                    "--oracle/--no-oracle", help="Run every complete trial on the test rows too."
                ),
            ],
            True,
        ),
        ("seed", Annotated[int, typer.Option(min=0, help="For whatever is drawn.")], 0),
        (
            "storage",
            Annotated[
                str | None,
                typer.Option(help="An Optuna storage that several machines work on, as a URL."),
            ],
            None,
        ),
        (
            "workers",
            Annotated[int, typer.Option(min=1, help="Processes that share the trials.")],
            1,
        ),
        (
            "max_new_tokens",
            Annotated[int | None, typer.Option(help="Tokens of an answer (default: the task's).")],
            None,
        ),
        ("batch_size", Annotated[int, typer.Option(help="Prompts that are answered at once.")], 16),
        ("toxicity", Toxicity, "offline"),
        *JUDGE_OPTIONS,
        (
            "resumed",
            Annotated[
                bool,
                typer.Option(
                    "--resumed/--full", help="Run only the blocks that a setting changes, or all."
                ),
            ],
            True,
        ),
        ("dtype", Dtype, "float32"),
        ("device", Device, "auto"),
        ("overwrite", Overwrite, False),
        ("as_json", Json, False),
    ]


def _command(method: type[Method]) -> Callable[..., None]:
    """A function whose signature is the method's fields, as text, and what every sweep takes."""
    hints = typing.get_type_hints(method)
    shared = _shared()
    taken = {name for name, _, _ in shared}
    own = []
    for item in fields(method):  # type: ignore[arg-type]
        if item.name not in taken:  # the seed is that of the sweep
            option = typer.Option(help=item.metadata.get("help"), metavar="VALUES")
            own.append((item.name, Annotated[str | None, option], None))

    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name, _, _ in own}
        space: dict[str, Any] = {}
        fixed: dict[str, Any] = {}
        for name, text in options.items():
            if text is not None:
                values = read_values(name, text, hints[name])
                if isinstance(values, Range) or len(values) > 1:
                    space[name] = values
                else:
                    fixed[name] = values[0]
        if "seed" in hints:
            fixed["seed"] = given["seed"]
        _run(method, space or None, fixed, **given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in [*shared[:3], *own, *shared[3:]]
    ]
    # Those that must be given come first, or Python refuses the signature.
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    example = {"austeer": " --site ffn_out --k 4,16,64 --alpha 1,8", "sta": " --sae my-sae/"}
    command.__doc__ = (
        f"Settings of {method.name} on a task. An option takes one value; several, which are "
        "searched (4,16,64; lists of layers with / between them: 0-9/10-19); or for draws a range "
        "(1:100, 0.1:20:log). Without several values of anything, the grid of the method's paper "
        "is searched.\n\nThe best setting on the validation rows is run on the test rows; "
        "--no-oracle leaves it at that and saves running every setting there. What was finished is "
        "kept in --output: start the same again to go on.\n\nExample: `trimtab sweep "
        f"{method.name} --model smollm2-135m-instruct --task copa --data DIR"
        f"{example.get(method.name, '')} -o runs/copa`"
    )
    return command


def read_values(name: str, text: str, hint: Any) -> list[Any] | Range:
    """`4,16,64` as values; where there are numbers `LOW:HIGH` or `LOW:HIGH:log` as a range; lists
    (of layers) are separated by /."""
    option = f"--{name.replace('_', '-')}"
    plain = typing.get_origin(hint) is tuple or not typing.get_args(hint)
    kinds = (hint,) if plain else typing.get_args(hint)
    if ":" in text and {int, float} & set(kinds):
        return _range(option, text, float in kinds)
    lists = any(typing.get_origin(kind) is tuple for kind in kinds)
    if lists and ("/" in text or int not in kinds):
        parts = text.split("/")
    else:
        parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise TrimtabError(f"{option} {text!r}: a value is empty")
    return [read_value(option, part.strip(), hint) for part in parts]


def _range(option: str, text: str, fractions: bool) -> Range:
    low, _, rest = text.partition(":")
    high, _, kind = rest.partition(":")
    try:
        ends = [float(end) if fractions else int(end) for end in (low, high)]
    except ValueError as error:
        what = "LOW:HIGH" if fractions else "whole numbers, LOW:HIGH"
        raise TrimtabError(f"{option} {text}: write {what}, or LOW:HIGH:log") from error
    if kind not in ("", "log"):
        raise TrimtabError(f"{option} {text}: write LOW:HIGH, or LOW:HIGH:log")
    return Range(ends[0], ends[1], kind == "log")


def _run(
    method: type[Method],
    space: Mapping[str, Any] | None,
    fixed: dict[str, Any],
    *,
    model: str,
    dtype: str,
    device: str,
    workers: int,
    as_json: bool,
    limit: int,
    test_limit: int,
    **options: Any,
) -> None:
    if workers > 1 and options["output"] is None:
        raise TrimtabError("several workers need a run directory: name it with --output")
    if workers > 1 and options["overwrite"]:
        raise TrimtabError("--overwrite is for one worker: clear the directory first")
    options |= row_limits(limit, test_limit)
    judging = JudgeOptions.taken_from(options)
    work = partial(_sweep, method, space, fixed, (model, dtype, device), judging, options)
    with _helped(work, workers):
        found = work()
    if as_json:
        print_json(found.as_json() | judging.as_json())
        return
    files = ["report.html", "results.json", "best.safetensors"]
    show(found.tables(), found.notes, options["output"], files)
    say_costs(judging)


def row_limits(limit: int, test_limit: int) -> dict[str, int | None]:
    """How many rows of each part, where 0 means all of them."""
    return {
        "limit": rows_or_all("limit", limit),
        "test_limit": rows_or_all("test_limit", test_limit),
    }


def _sweep(
    method: type[Method],
    space: Mapping[str, Any] | None,
    fixed: dict[str, Any],
    model: tuple[str, str, str],
    judging: JudgeOptions,
    options: dict[str, Any],
) -> Sweep:
    judges, _ = judging.judges(*model[1:])
    return sweep(open_model(*model), method, space=space, fixed=fixed, judges=judges, **options)


@contextmanager
def _helped(work: Callable[[], Any], workers: int) -> Iterator[None]:
    """Other processes do the same meanwhile, which take trials from the same storage.

    They share the processor's cores, and say nothing: what they find is in the storage.
    """
    if workers == 1:
        yield
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=_help, args=(work, threads), daemon=True) for _ in range(workers - 1)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, before))
    for helper in helpers:
        helper.start()
    try:
        yield
        for helper in helpers:
            helper.join()
    finally:
        torch.set_num_threads(before)
        for helper in helpers:
            if sys.exc_info()[0] is not None:
                helper.join(2)  # one that was interrupted with this one gives its trial back
                helper.terminate()


def _help(work: Callable[[], Any], threads: int) -> None:
    """What a helper runs; its faults are those of the first process, which says them."""
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        with suppress(TrimtabError, KeyboardInterrupt):
            work()


for _name, _method in METHODS.items():
    app.command(_name)(_command(_method))
