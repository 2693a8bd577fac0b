"""`trimtab evaluate`: tasks, unsteered and steered, with intervals and what flipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from trimtab.cli.common import console, open_model, print_json, read_steerings
from trimtab.cli.engines import Running, opened_engine, read_beside
from trimtab.cli.judging import Judges, costs, say_costs
from trimtab.cli.options import OpenedIfNamed, Steered
from trimtab.cli.tables import show
from trimtab.cli.values import in_float32
from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError
from trimtab.options import Answering, Evaluated, Harness, Keep, option
from trimtab.terminal import write_text

if TYPE_CHECKING:
    from trimtab.reports import Evaluation
    from trimtab.steering import Steering, Steerings

#: More dials than this are a mistake in a range.
_MOST_DIALS = 1000
Tasks = Annotated[
    tuple[str, ...],
    Parameter(
        name=("--task", "-t"),
        help="A task (--list shows them), refusal:FILE, coherence:FILE, perplexity:FILE, "
        "contrast:SOURCE (a file or builtin:NAME), or lm-eval:NAME; repeat for several.",
    ),
]
Listed = Annotated[bool, Parameter(name="--list", help="List the tasks and stop.", negative=())]


@dataclass(frozen=True, kw_only=True)
class Alternatives(Steered):
    """Under what the tasks are evaluated."""

    dial: Sequence[str] = option(
        "Evaluate the steering at this dial (a number, or gentle, clear, strong), or at each of "
        "START:STOP:STEP; repeat.",
        (),
    )
    unsteered: bool = option("Evaluate the unsteered model too.", True)
    force: bool = option("Allow a steering that was made for another model.", False, flag="--force")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is printed."""

    heading = "Output"

    show: Literal["flips"] | None = option("flips: print the examples whose rating changed.", None)
    as_json: bool = option("Print one JSON object on standard output.", False, flag="--json")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How the model answers, and what runs it."""

    answering: Answering = Answering()
    running: Running = Running()


def evaluate(
    *,
    opened: OpenedIfNamed = OpenedIfNamed(),
    task: Tasks = (),
    listed: Listed = False,
    steered: Alternatives = Alternatives(),
    rows: Evaluated = Evaluated(),
    answered: Answered = Answered(),
    judges: Judges = Judges(),
    harness: Harness = Harness(),
    keep: Keep = Keep(),
    shown: Shown = Shown(),
) -> None:
    """Evaluate a model on tasks, unsteered and steered, with 95 % intervals.

    Example: `trimtab evaluate --model smollm2-135m-instruct --steer formal.safetensors --task copa
    --limit 100 --data DIR -o runs/copa --show flips`
    """
    from trimtab import evaluation

    if listed:
        _list_tasks(shown.as_json)
        return
    if opened.model is None or not (task or rows.receipts or rows.drift):
        raise TrimtabError("name a --model and a --task (--list shows the tasks)")
    for name in task:
        evaluation.check_task(name, rows.data)
    steerings = _alternatives(steered)
    judging = judges.judging(opened)
    running = answered.running
    language_model = open_model(read_beside(opened) if running.elsewhere else opened)
    with opened_engine(running, language_model, opened) as engine:
        found = evaluation.evaluate(
            language_model,
            task,
            steering=steerings or None,
            unsteered=steered.unsteered,
            rows=rows,
            answering=evaluation.AnsweredBy(**vars(answered.answering), engine=engine),
            judging=judging,
            harness=harness,
            keep=keep,
            force=steered.force,
        )
    if shown.as_json:
        flips = {"flips": _flips_as_json(found)} if shown.show else {}
        print_json(found.as_json() | {"judges": costs(judging)} | flips)
        return
    show(found.tables(), found.notes, keep.output, summary=found.summary)
    say_costs(judging)
    console.print(f"{found.seconds:g} s of evaluation", style="dim")
    if shown.show:
        _print_flips(found)


def _list_tasks(as_json: bool) -> None:
    from rich.table import Table

    from trimtab.evaluation import PROTOCOLS, TASKS

    if as_json:
        print_json({"tasks": [{"name": one.name, "about": one.about} for one in TASKS.values()]})
        return
    table = Table("task", "what it measures", "where trimtab's protocol leaves the paper's")
    for one in TASKS.values():
        table.add_row(one.name, one.about, one.differences)
    table.add_row("refusal:FILE", "your prompts: refusal, attack success by --judge")
    table.add_row("coherence:FILE", "your prompts: perplexity, repetition, language of answers")
    table.add_row("perplexity:FILE", "cross-entropy and perplexity of a .txt or .jsonl file")
    table.add_row("contrast:SOURCE", "which side of its pairs is more probable, by how many nats")
    table.add_row("lm-eval:NAME", "any task of lm-evaluation-harness, on local rows where known")
    console.print(table)
    console.print(f"protocols: {', '.join(PROTOCOLS)}")


# -- what is evaluated, and who judges ------------------------------------------------------------


def _alternatives(steered: Alternatives) -> dict[str, Steering | Steerings]:
    """By name: all --steer together, or the one steering at each dial."""
    from trimtab.steering import STRENGTHS, Steerings

    steerings, dials = read_steerings(steered), steered.dial
    steer = _named(steered)
    if not dials:
        together = steerings[0] if len(steerings) == 1 else Steerings(steerings)
        return {" + ".join(steer): together} if steerings else {}
    if len(steerings) != 1:
        raise TrimtabError("--dial turns one steering: give exactly one --steer")
    named = [text for text in dials if text.removeprefix("-") in STRENGTHS]
    values = dict.fromkeys(value for text in dials if text not in named for value in _dials(text))
    if len(values) > _MOST_DIALS:
        raise TrimtabError(f"--dial names {len(values)} dials; {_MOST_DIALS} are the most")
    (argument,), (steering,) = steered.steer, steerings
    path = argument if Path(argument).exists() else argument.rpartition("@")[0] or argument
    path = f"{path}{steer[0].removeprefix(argument)}"
    found: dict[str, Any] = {f"{path}@{text}": steering.at(text) for text in named}
    return found | {f"{path}@{value:.12g}": steering.at(value) for value in values}


def _named(steered: Alternatives) -> list[str]:
    """The steerings as they were given, with the scopes that were given for them."""
    scopes = list(steered.scope)
    if len(scopes) == 1:
        scopes *= len(steered.steer)
    if not scopes:
        return list(steered.steer)
    return [f"{file} on {scope}" for file, scope in zip(steered.steer, scopes, strict=True)]


def _dials(text: str) -> list[float]:
    """A number, or START:STOP:STEP with both ends."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError as error:
        raise TrimtabError(f"--dial {text}: write a number, START:STOP:STEP, or clear") from error
    if not all(map(math.isfinite, numbers)):
        raise TrimtabError(f"--dial {text}: a dial is a finite number")
    for number in numbers:
        in_float32(f"--dial {text}", number)
    if len(numbers) == 1:
        return numbers
    if len(numbers) != 3 or numbers[2] == 0 or (numbers[1] - numbers[0]) / numbers[2] < 0:
        raise TrimtabError(f"--dial {text}: write a number, or START:STOP:STEP")
    start, stop, step = numbers
    steps = (stop - start) / step + 1e-9
    if steps >= _MOST_DIALS:
        raise TrimtabError(f"--dial {text} names {steps + 1:.7g} dials; {_MOST_DIALS} are the most")
    count = math.floor(steps) + 1
    return [start + i * step for i in range(count)]


# -- for people -----------------------------------------------------------------------------------


def _print_flips(evaluation: Evaluation) -> None:
    from trimtab.figures import words_for

    flips = evaluation.flips()
    console.print(f"{len(flips)} flipped", style="bold")
    for before, after in flips:
        metric = next(iter(after["values"]))
        old, new = before["values"][metric], after["values"][metric]
        console.print(
            f"{after['task']} {after['id']} with {after['steering']}: {words_for(metric)} "
            f"{old:g} -> {new:g}",
            style="bold",
        )
        write_text(_shortened(after.get("prompt", "")))
        if after.get("target") is not None:
            write_text(f"  target    {after['target']}")
        print(f"  unsteered {before.get('output')!r}")
        print(f"  steered   {after.get('output')!r}")


def _shortened(prompt: Any) -> str:
    """The end of a prompt, which is what an answer answers."""
    text = last_message(prompt)
    return text if len(text) <= 400 else "..." + text[-400:]


def _flips_as_json(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [{"unsteered": before, "steered": after} for before, after in evaluation.flips()]
