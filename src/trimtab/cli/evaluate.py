"""`trimtab evaluate`: tasks, unsteered and steered, with intervals and what flipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trimtab.cli.common import (
    Data,
    Device,
    Dtype,
    Force,
    Json,
    Overwrite,
    Steer,
    console,
    in_float32,
    open_model,
    print_json,
    read_steerings,
)
from trimtab.cli.judging import (
    JudgeConcurrency,
    JudgeKeyEnv,
    JudgeOptions,
    JudgePrices,
    Judges,
    JudgeTemplate,
    JudgeTimeout,
    JudgeUrl,
    Toxicity,
    say_costs,
)
from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import PROTOCOLS, TASKS, evaluate
from trimtab.figures import Difference, Evaluation, Result
from trimtab.steering import Steering, Steerings
from trimtab.terminal import CleanConsole, write_text

#: Tables keep their columns in a pipe, which has no width of its own.
_wide = console if console.is_terminal else CleanConsole(width=120)
#: More dials than this are a mistake in a range.
_MOST_DIALS = 1000


def evaluate_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A pack, directory, .gguf file or hub id.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="A task (--list shows them), refusal:FILE, coherence:FILE, perplexity:FILE, "
            "contrast:SOURCE (a file or builtin:NAME), or lm-eval:NAME; repeat for several.",
        ),
    ] = None,
    list_tasks: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
    steer: Steer = None,
    dial: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluate the steering at this dial, or at each of START:STOP:STEP; repeat."
        ),
    ] = None,
    unsteered: Annotated[
        bool, typer.Option("--unsteered/--no-unsteered", help="Evaluate the unsteered model too.")
    ] = True,
    data: Data = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="trimtab (default) or paper, which follows the authors; repeat."),
    ] = None,
    part: Annotated[
        str, typer.Option(help="test, or validation or train rows of the train set.")
    ] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first examples of a task.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, where a task writes texts.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that are written together.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="For tasks that sample.")] = 0,
    few_shot: Annotated[int | None, typer.Option(help="Examples in lm-eval's prompts.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="lm-eval's prompts through the chat template.")
    ] = False,
    lm_eval_tasks: Annotated[
        list[str] | None, typer.Option(help="Directory of lm-eval task files; repeat.")
    ] = None,
    toxicity: Toxicity = "offline",
    judge: Judges = None,
    judge_url: JudgeUrl = None,
    judge_key_env: JudgeKeyEnv = "OPENAI_API_KEY",
    judge_concurrency: JudgeConcurrency = 8,
    judge_timeout: JudgeTimeout = 60.0,
    judge_prices: JudgePrices = None,
    judge_template: JudgeTemplate = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Run directory; a run that was interrupted goes on there."
        ),
    ] = None,
    show: Annotated[
        str | None, typer.Option(help="flips: print the examples whose rating changed.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on tasks, unsteered and steered, with 95 % intervals.

    Example: `trimtab evaluate --model smollm2-135m-instruct --steer formal.safetensors --task copa
    --limit 100 --data DIR -o runs/copa --show flips`
    """
    if list_tasks:
        _list_tasks(as_json)
        return
    if model is None or not task:
        raise TrimtabError("name a --model and a --task (--list shows the tasks)")
    if show not in (None, "flips"):
        raise TrimtabError(f"--show {show}: it can show flips")
    if part not in ("test", "validation", "train"):
        raise TrimtabError(f"--part {part}: known are test, validation, train")
    steerings = _alternatives(steer or [], dial or [])
    judging = JudgeOptions(
        judge,
        judge_url,
        judge_key_env,
        judge_concurrency,
        judge_timeout,
        judge_prices,
        judge_template,
    )
    judges, preference = judging.judges(dtype, device)
    language_model = open_model(model, dtype, device)
    evaluation = evaluate(
        language_model,
        task,
        steering=steerings or None,
        unsteered=unsteered,
        data=data,
        protocol=protocol or "trimtab",  # type: ignore[arg-type]
        part=part,  # type: ignore[arg-type]
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        few_shot=few_shot,
        chat=chat,
        task_files=lm_eval_tasks or [],
        toxicity=toxicity,
        judges=judges,
        preference=preference,
        output=output,
        overwrite=overwrite,
        force=force,
    )
    if as_json:
        shown = {"flips": _flips_as_json(evaluation)} if show else {}
        print_json(evaluation.as_json() | {"judges": judging.costs()} | shown)
        return
    _print_results(evaluation)
    for note in evaluation.notes:
        console.print(note, style="dim")
    say_costs(judging)
    where = f"; records in {output}" if output else ""
    console.print(f"{evaluation.seconds:g} s of evaluation{where}", style="dim")
    if show:
        _print_flips(evaluation)


def _list_tasks(as_json: bool) -> None:
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


def _alternatives(steer: list[str], dials: list[str]) -> dict[str, Steering | Steerings]:
    """By name: all --steer together, or the one steering at each dial."""
    steerings = read_steerings(steer)
    if not dials:
        together = steerings[0] if len(steerings) == 1 else Steerings(steerings)
        return {" + ".join(steer): together} if steerings else {}
    if len(steerings) != 1:
        raise TrimtabError("--dial turns one steering: give exactly one --steer")
    values = dict.fromkeys(value for text in dials for value in _dials(text))
    if len(values) > _MOST_DIALS:
        raise TrimtabError(f"--dial names {len(values)} dials; {_MOST_DIALS} are the most")
    (argument,), (steering,) = steer, steerings
    path = argument if Path(argument).exists() else argument.rpartition("@")[0] or argument
    return {f"{path}@{value:.12g}": steering.at(value) for value in values}


def _dials(text: str) -> list[float]:
    """A number, or START:STOP:STEP with both ends."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError as error:
        raise TrimtabError(f"--dial {text}: write a number, or START:STOP:STEP") from error
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


def _print_results(evaluation: Evaluation) -> None:
    """A table for each task; steered figures stand under the unsteered one, with the difference."""
    compared = bool(evaluation.comparisons)
    for title, rows in evaluation.tables():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("metric")
        table.add_column("steering", overflow="fold")
        table.add_column("value [95 %]", no_wrap=True)
        table.add_column("n", no_wrap=True, justify="right")
        if compared:
            table.add_column("difference [95 %]", no_wrap=True)
            table.add_column("flipped", no_wrap=True)
        unclear = any(result.unclear for result, _ in rows)
        if unclear:
            table.add_column("unclear", no_wrap=True)
        for result, comparison in rows:
            name = "unsteered" if result.steering is None else _short(result.steering)
            cells = [result.metric, name, _value(result), str(result.n)]
            if compared:
                cells += _difference(comparison)
            if unclear:
                cells.append(str(result.unclear or ""))
            table.add_row(*cells)
        _wide.print(table)


def _short(steering: str) -> str:
    """Names of files without their directories."""
    return " + ".join(part.rpartition("/")[2] for part in steering.split(" + "))


def _value(result: Result) -> str:
    if result.value is None:
        return "none is clear"
    if result.ci95 is None:
        return f"{result.value:.3f}"
    return f"{result.value:.3f} [{result.ci95[0]:.3f}, {result.ci95[1]:.3f}]"


def _difference(comparison: Difference | None) -> list[str]:
    if comparison is None:
        return ["", ""]
    low, high = comparison.ci95
    flipped = ""
    if comparison.p is not None:
        flipped = f"+{comparison.gained} -{comparison.lost} (p {comparison.p:.2g})"
    return [f"{comparison.difference:+.3f} [{low:+.3f}, {high:+.3f}]", flipped]


def _print_flips(evaluation: Evaluation) -> None:
    flips = evaluation.flips()
    console.print(f"{len(flips)} flipped", style="bold")
    for before, after in flips:
        metric = next(iter(after["values"]))
        old, new = before["values"][metric], after["values"][metric]
        console.print(
            f"{after['task']} {after['id']} with {after['steering']}: {metric} {old:g} -> {new:g}",
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
