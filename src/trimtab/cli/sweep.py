"""`trimtab sweep METHOD`: settings of a method on a task, chosen on validation, reported on test;
its options are the method's own fields, each with several values or a range."""

from __future__ import annotations

import multiprocessing
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from cyclopts import App

from trimtab.cli.common import open_model, print_json
from trimtab.cli.engines import Hooked, opened_engine
from trimtab.cli.judging import Asked, Measuring, costs_as_json, say_costs
from trimtab.cli.making import method_options, prepared
from trimtab.cli.options import Json, Opened, Task
from trimtab.cli.tables import show
from trimtab.cli.values import read_values
from trimtab.errors import TrimtabError
from trimtab.options import FitOn, Keep, Prompting, Rows, Search, option

if TYPE_CHECKING:
    from trimtab.evaluation import Judging
    from trimtab.fitting import Method
    from trimtab.sweeps import Sweep

#: Trials that are listed in a terminal; the report has all.
_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Searching(Search):
    """How settings are searched, and by how many processes."""

    workers: int = option("Processes that share the trials.", 1, record=False, least=1)
    prompting: Asked = Asked()


def commands(app: App) -> None:
    """Try settings of a method on a task: `trimtab sweep METHOD --help` for its options."""
    from trimtab.methods import METHODS

    for name, method in METHODS.items():
        app.command(prepared(_command(method)), name=name)


@cache
def _command(method: type[Method]) -> Callable[..., None]:
    """`trimtab sweep METHOD`: each field of the method takes several values, or a range."""
    hints = typing.get_type_hints(method)

    def command(
        *,
        opened: Opened,
        task: Task,
        settings: Any,
        on: FitOn = FitOn(),
        rows: Rows = Rows(),
        searching: Searching = Searching(),
        measuring: Measuring = Measuring(),
        running: Hooked = Hooked(),
        keep: Keep = Keep(),
        as_json: Json = False,
    ) -> None:
        from trimtab.evaluation import check_task

        space, fixed = read_settings(
            {name: text for name, text in vars(settings).items() if text is not None}, hints
        )
        if "seed" in hints:  # the seed is that of the sweep
            fixed["seed"] = measuring.answering.seed
        _check_workers(searching, keep)
        if running.elsewhere and searching.workers > 1:
            raise TrimtabError("vLLM takes all trials at once: leave --workers out")
        check_task(task, rows.data)
        given = {
            "space": space or None, "fixed": fixed, "on": on, "rows": rows,
            "searching": searching, "keep": keep,
        }  # fmt: skip
        work = partial(_sweep, opened, method, task, measuring, running, given)
        with _helped(work, searching.workers):
            found, judging = work()
        if as_json:
            print_json(found.as_json() | costs_as_json(judging))
            return
        show(found.tables(), found.notes, keep.output, summary=found.summary)
        say_costs(judging)

    command.__annotations__["settings"] = method_options(method, as_text=True)
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


def read_settings(
    texts: Mapping[str, str], hints: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyperparameters that are searched, with their values, and those that are fixed."""
    space: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for name, text in texts.items():
        values = read_values(f"--{name.replace('_', '-')}", text, hints[name])
        if not isinstance(values, list) or len(values) > 1:
            space[name] = values
        else:
            fixed[name] = values[0]
    return space, fixed


def _check_workers(searching: Searching, keep: Keep) -> None:
    if searching.workers > 1 and keep.output is None:
        raise TrimtabError("several workers need a run directory: name it with --output")
    if searching.workers > 1 and keep.overwrite:
        raise TrimtabError("--overwrite is for one worker: clear the directory first")


def _sweep(
    opened: Opened,
    method: type[Method],
    task: str,
    measuring: Measuring,
    running: Hooked,
    given: Mapping[str, Any],
) -> tuple[Sweep, Judging]:
    """What each process runs: judges and models are opened in it."""
    from trimtab.sweeps import sweep

    searching: Searching = given["searching"]
    prompting = searching.prompting.with_writer(opened, measuring.judges)
    own = {**given, "searching": _as_python_has_it(searching, prompting)}
    language_model = open_model(opened)  # on which methods are fitted, whatever answers
    with opened_engine(running, language_model, opened, running.hook) as engine:
        measured = measuring.measured(opened, engine)
        found = sweep(language_model, method, task, measured=measured, **own)
    return found, measured.judging


def _as_python_has_it(searching: Searching, prompting: Prompting) -> Search:
    values = {item.name: getattr(searching, item.name) for item in fields(Search)}
    return Search(**{**values, "prompting": prompting})


@contextmanager
def _helped(work: Callable[[], Any], workers: int) -> Iterator[None]:
    """Other processes do the same meanwhile, which take trials from the same storage.

    They share the processor's cores, and say nothing: what they find is in the storage.
    """
    if workers == 1:
        yield
        return
    import torch

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
    import torch

    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        with suppress(TrimtabError, KeyboardInterrupt):
            work()
