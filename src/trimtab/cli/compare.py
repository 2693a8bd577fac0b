"""`trimtab compare`: many methods on one task, each with its own sweep, in one table."""

from __future__ import annotations

import shlex
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.engines import Hooked, opened_engine
from trimtab.cli.judging import Asked, Measuring, costs_as_json, say_costs
from trimtab.cli.options import Json, Opened, Task
from trimtab.cli.sweep import read_settings
from trimtab.cli.tables import show, show_files
from trimtab.cli.values import field_named
from trimtab.errors import TrimtabError
from trimtab.options import Comparing, FitOn, Keep, Rows

if TYPE_CHECKING:
    from trimtab.model import LanguageModel
    from trimtab.sweeps import Candidate, Comparison


@dataclass(frozen=True, kw_only=True)
class MeasuredBy(Measuring):
    """The same, and what runs the model."""

    running: Hooked = Hooked()


def compare(
    *methods: Annotated[
        str,
        Parameter(
            help='Methods with settings to try, as in "caa layer=7,12 alpha=1,2"; a method alone '
            "tries the grid of its paper. NAME: before a method gives it a name."
        ),
    ],
    opened: Opened,
    task: Task,
    comparing: Comparing = Comparing(),
    on: FitOn = FitOn(),
    rows: Rows = Rows(),
    measuring: MeasuredBy = MeasuredBy(),
    prompting: Asked = Asked(),
    keep: Keep = Keep(),
    as_json: Json = False,
) -> None:
    """Compare methods: one pass fits them, each gets a sweep of equal budget, one table.

    Example: `trimtab compare "caa token=mean layer=7,12 alpha=1,2" "iti k=16 alpha=1,2" --model
    smollm2-135m-instruct --task contrast:builtin:formality --max-cost 0.1 --kl 0.1 -o runs/formal`
    """
    from trimtab import sweeps
    from trimtab.evaluation import check_task

    if not methods:
        raise TrimtabError('name methods to compare, as in "caa layer=7,12" "iti k=16"')
    read = [read_candidate(text) for text in methods]
    check_task(task, rows.data)
    _ = measuring.running.elsewhere  # what is said for nothing is refused before anything is loaded
    prompted = prompting.with_writer(opened, measuring.judges)
    language_model = open_model(opened)  # on which methods are fitted, whatever answers
    with opened_engine(measuring.running, language_model, opened, measuring.running.hook) as engine:
        measured = measuring.measured(opened, engine)
        found = sweeps.compare(
            language_model,
            [_with_default(language_model, candidate) for candidate in read],
            task,
            comparing=comparing,
            on=on,
            rows=rows,
            measured=measured,
            prompting=prompted,
            keep=keep,
        )
    if as_json:
        print_json(found.as_json() | costs_as_json(measured.judging))
        return
    _show(found, keep.output)
    say_costs(measured.judging)


def read_candidate(text: str) -> Candidate:
    """`NAME: caa layer=7,12 alpha=1` -> its values to try, and those that are fixed."""
    from trimtab.methods import METHODS
    from trimtab.sweeps import Candidate

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise TrimtabError(
            f'{text!r}: write METHOD OPTION=VALUES, as in "caa layer=7,12"'
        ) from error
    name = ""
    if words and words[0].endswith(":"):
        name, words = words[0][:-1], words[1:]
    if not words or words[0] not in METHODS:
        known = ", ".join(METHODS)
        raise TrimtabError(f"unknown method {(words or [text])[0]!r}: known are {known}")
    method = METHODS[words[0]]
    hints = typing.get_type_hints(method)
    own = [item.name for item in fields(method)]  # type: ignore[arg-type]
    texts = {}
    for option in words[1:]:
        key, equals, value = option.partition("=")
        key = field_named(key.removeprefix("--").replace("-", "_"), own)
        if not equals or key not in own:
            raise TrimtabError(
                f"{method.name}: {option!r} is no OPTION=VALUES of it: it has {', '.join(own)}"
            )
        if key in texts:
            raise TrimtabError(
                f"{method.name}: {key} is given twice: give its values with commas, as in 1,2"
            )
        texts[key] = value
    return Candidate(method.name, *read_settings(texts, hints), name)


def _with_default(language_model: LanguageModel, one: Candidate) -> Candidate:
    """The grid of the paper where nothing is varied."""
    from trimtab.sweeps import default_candidate

    return one if one.space else default_candidate(language_model, one.method, one.fixed, one.name)


def _show(found: Comparison, output: Path | str | None) -> None:
    from rich.table import Table

    from trimtab.figures import on_task
    from trimtab.reports import cell, difference_cell, number_cell
    from trimtab.sweeps import prompt_tables, setting

    console.print(found.summary)
    base = found.unsteered["test"]
    table = Table("method", "setting", "test", "against unsteered", "p, corrected", "cost", "time")
    table.add_row("unsteered", "", cell(base, found.metric), "", "", "", "")
    for row in found.rows:
        best = None if row.sweep is None else row.sweep.best
        if best is None or row.test is None or row.test.value is None:
            table.add_row(row.name, row.why, "", "", "", "", "")
            continue
        gain = row.against
        table.add_row(
            row.name,
            setting(best.params),
            cell(row.test, found.metric),
            difference_cell(gain, found.metric),
            "" if gain is None else number_cell(gain.corrected_p, ".2g"),
            "" if row.cost is None else f"{row.cost:+.3f}",
            "" if row.overhead is None else f"{row.overhead.ratio:.3f}",
        )
    table.caption = (
        f"{on_task(found.metric, found.task)}, n = {base.n}; cost in nats per token of plain "
        "text; time to generate, times unsteered"
    )
    console.print(table)
    show(found.budget_tables(), (), None)
    if found.prompts is not None:
        show(prompt_tables(found.prompts, found.metric, found.task), (), None)
    beside = () if found.drift is None else found.drift.tables()
    receipts = () if found.capability is None else found.capability.tables()
    show([*beside, *receipts], (), None)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
    if output is not None:
        show_files(output)
