"""`trimtab compare`: many methods on one task, each with its own sweep, in one table."""

from __future__ import annotations

import shlex
import typing
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

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
)
from trimtab.cli.fit import Cache
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
from trimtab.cli.sweep import Better, Protocol, read_values, row_limits
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.methods import METHODS
from trimtab.model import LanguageModel
from trimtab.sweeps import FAST, Candidate, Range, compare, default_candidate


def compare_command(
    methods: Annotated[
        list[str],
        typer.Argument(
            help='Methods with settings to try, as in "caa layer=7,12 alpha=1,2"; a method alone '
            "tries the grid of its paper. NAME: before a method gives it a name."
        ),
    ],
    model: Model,
    task: Annotated[
        str,
        typer.Option("--task", "-t", help="copa, boolq ...; contrast:SOURCE; or refusal:FILE."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run directory; interrupted runs go on there."),
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option("--contrast", "-c", help="What to fit on (default: the task's train rows)."),
    ] = None,
    data: Data = None,
    cache: Cache = None,
    trials: Annotated[int, typer.Option(help="Trials of each method, at most.")] = 20,
    limit: Annotated[int, typer.Option(help="Validation rows; 0 takes all.")] = FAST,
    test_limit: Annotated[int, typer.Option(help="Test rows; 0 takes all.")] = 0,
    protocol: Protocol = "trimtab",
    validation_task: Annotated[
        str | None,
        typer.Option(help="Another task whose rows stand in for the validation rows."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What counts (default: the task's first).")
    ] = None,
    better: Better = None,
    max_cost: Annotated[
        float | None,
        typer.Option(help="Leave out what costs more nats per token of plain text."),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(help="Compare once more at an equal budget of so many nats."),
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(help="A task for side effects, as lm-eval:tinyMMLU; repeat."),
    ] = None,
    capability_limit: Annotated[int | None, typer.Option(help="Rows of each of those.")] = None,
    timed: Annotated[
        bool, typer.Option("--timed/--untimed", help="Measure the time of generation.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="For whatever is drawn.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer (default: the task's).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered at once.")] = 16,
    toxicity: Toxicity = "offline",
    judge: Judges = None,
    judge_url: JudgeUrl = None,
    judge_key_env: JudgeKeyEnv = "OPENAI_API_KEY",
    judge_concurrency: JudgeConcurrency = 8,
    judge_timeout: JudgeTimeout = 60.0,
    judge_prices: JudgePrices = None,
    judge_template: JudgeTemplate = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare methods: one pass fits them, each gets a sweep of equal budget, one table.

    Example: `trimtab compare "caa token=mean layer=7,12 alpha=1,2" "iti k=16 alpha=1,2" --model
    smollm2-135m-instruct --task contrast:builtin:formality --max-cost 0.1 --kl 0.1 -o runs/formal`
    """
    read = [read_candidate(text) for text in methods]
    rows = row_limits(limit, test_limit)
    judging = JudgeOptions(
        judge,
        judge_url,
        judge_key_env,
        judge_concurrency,
        judge_timeout,
        judge_prices,
        judge_template,
    )
    judges, _ = judging.judges(dtype, device)
    language_model = open_model(model, dtype, device)
    found = compare(
        language_model,
        [_with_default(language_model, one) for one in read],
        task,
        trials=trials,
        contrast=contrast,
        data=data,
        protocol=protocol,  # type: ignore[arg-type]
        limit=rows["limit"],
        test_limit=rows["test_limit"],
        validation_task=validation_task,
        metric=metric,
        better=better,  # type: ignore[arg-type]
        max_cost=max_cost,
        kl=kl,
        capability=capability or (),
        capability_limit=capability_limit,
        timed=timed,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        toxicity=toxicity,
        judges=judges,
        output=output,
        cache=cache,
        overwrite=overwrite,
    )
    if as_json:
        print_json(found.as_json() | judging.as_json())
        return
    show(found.tables(), found.notes, output, ["report.html", "results.json"])
    say_costs(judging)


def read_candidate(text: str) -> Candidate:
    """`NAME: caa layer=7,12 alpha=1` -> its values to try, and those that are fixed."""
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
    space: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for option in words[1:]:
        key, equals, value = option.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals or key not in own:
            raise TrimtabError(
                f"{method.name}: {option!r} is no OPTION=VALUES of it: it has {', '.join(own)}"
            )
        values = read_values(key, value, hints[key])
        if isinstance(values, Range) or len(values) > 1:
            space[key] = values
        else:
            fixed[key] = values[0]
    return Candidate(method.name, space, fixed, name)


def _with_default(language_model: LanguageModel, one: Candidate) -> Candidate:
    """The grid of the paper where nothing is varied."""
    return one if one.space else default_candidate(language_model, one.method, one.fixed, one.name)
