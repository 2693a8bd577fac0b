"""`trimtab analyse NAME`: one command for each analysis, its options the arguments of the
function; what it finds is shown, or left in a run directory with a page and pictures."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab.cli.common import (
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Overwrite,
    PromptFile,
    console,
    open_model,
    print_json,
    read_prompts,
    rows_or_all,
)
from trimtab.cli.fit import read_numbers
from trimtab.cli.judging import JUDGE_OPTIONS, JudgeOptions, Toxicity, say_costs
from trimtab.cli.tables import show
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import load_contrast
from trimtab.reports import SharedRun

_PLAIN = (int, float, str, bool, int | None, float | None, str | None)
_REQUIRED = inspect.Parameter.empty

#: What the options say, by the name of the argument; `NAME.ARGUMENT` is that of one analysis.
_HELP = {
    "limit": "Validation rows; 0 takes all.",
    "norms.limit": "Pairs, or texts of each side; 0 takes all.",
    "test_limit": "Test rows; 0 takes all.",
    "validation_task": "Another task whose rows stand in for the validation rows.",
    "metric": "What counts (default: the task's first).",
    "better": "Which way the metric counts, where its name does not say.",
    "seed": "For whatever is drawn.",
    "batch_size": "Prompts that are answered at once.",
    "max_new_tokens": "Tokens of an answer (default: the task's).",
    "protocol": "trimtab, or paper as the authors have it.",
    "oracle": "Run everything on the test rows too, for the best that is possible there.",
    "cost": "Measure what plain text costs, in nats per token.",
    "max_cost": "Leave angles out that cost more nats per token of plain text.",
    "site": "A kind of site: ffn_out, heads, ffn_in, resid ...",
    "sites": "Kinds of sites, as in heads,ffn_out.",
    "kinds": "Kinds of sites, as in resid,attn_norm.",
    "layer": "A block, from 0.",
    "head": "An attention head of the block, from 0.",
    "count": "How many units.",
    "k": "How many units.",
    "ks": "Numbers of units, as in 4,16,64.",
    "alpha": "Strength.",
    "alphas": "Strengths, as in 1,4,16.",
    "gamma": "How a unit is scaled.",
    "units": "Units, as in 3,17,40-44.",
    "strengths": "Strengths, as in -10,1,10.",
    "top": "How many of the highest are shown.",
    "far": "The strength that stands for the limit.",
    "positives": "Beneficial units that are combined.",
    "negatives": "Harmful units that are combined.",
    "seeds": "Seeds, as in 42,43.",
    "masks.seeds": "Seeds of the random halves, as in 42,43.",
    "method": "Whose way is taken.",
    "methods": "Methods, as in ss,sas,aas.",
    "step": "Degrees from one angle to the next; 10 in the paper.",
    "theta": "The angle in degrees for all masks (default: each its best on validation rows).",
    "part": "Rows of the circle; on test rows nothing is chosen.",
    "whole_blocks": "SS steers a block only if all of its norms discriminate.",
    "ss_compat": "Steer all norms of a block, also those on the branches.",
    "positions": "Tokens to steer.",
    "candidates_from": "Directions from norms' outputs, or from their inputs at unit length.",
    "selection": "b1: the candidate with the largest mean cosine, or the longest (norm).",
    "token": "A text's last token, or the mean over its tokens.",
    "counts": "Numbers of pairs, as in 50,100,300.",
    "resamples": "How often so many pairs are drawn.",
    "shares": "Shares of all units, as in 0.001,0.01.",
    "shrink": "How much units shrink: they are multiplied by 1 minus it, as in 0.25,0.9.",
    "close": "Settings this close to the best count as equal to it.",
    "direction": "AUSteer's own direction, or toward the positive side.",
    "ablations.seeds": "How many random choices of units.",
    "massive": "A token is massive that is so many times as long as the median one.",
}

#: What a person would type, after `trimtab analyse NAME --model smollm2-135m-instruct`.
_EXAMPLES = {
    "units": "--task copa --data DIR --site ffn_out --count 64 -o runs/units",
    "tokens": "--site ffn_in --layer 20 --strengths 1,10,100 -o runs/tokens",
    "scores": "--contrast builtin:formality --sites heads,ffn_out -o runs/scores",
    "overlap": "--contrast builtin:formality --contrast builtin:warmth -o runs/overlap",
    "plane": "--contrast builtin:formality --method ss -o runs/plane",
    "norms": "--contrast builtin:formality --kinds resid,attn_norm -o runs/norms",
    "pairs": "--task copa --data DIR --counts 50,100,300 --k 16 --alpha 8 -o runs/pairs",
    "count": "--task copa --data DIR --ks 1,100,1000,all --alpha 8 -o runs/count",
    "suppression": "--task copa --data DIR --limit 100 -o runs/suppression",
    "ablations": "--task copa --data DIR --ks 16,64 --alphas 1,8 -o runs/ablations",
    "heatmap": "--task copa --data DIR --ks 4,16,64 --alphas 1,8,32 -o runs/heatmap",
    "dial": "--task contrast:builtin:formality --methods ss,sas --step 30 -o runs/dial",
    "masks": "--task contrast:builtin:formality --seeds 42,43 -o runs/masks",
}


# -- options from a function's arguments ----------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option of a command: its type for typer, its default, and how its text is read."""

    name: str
    kind: Any
    default: Any
    read: Callable[[Any], Any] | None = None

    def value(self, given: Any) -> Any:
        """The argument, from what typer hands over."""
        return given if self.read is None else self.read(given)


def options_of(name: str, function: Callable[..., Any]) -> list[Option]:
    """The options that the arguments of an analysis make, the model's and the run's aside."""
    hints = typing.get_type_hints(function)
    found = []
    for argument in list(inspect.signature(function).parameters.values())[1:]:
        option = _option(name, argument, hints[argument.name])
        if option is not None:
            found.append(option)
        elif argument.default is _REQUIRED:
            raise TypeError(f"{name}: no option can be made of {argument.name}")
    return found


def _option(analysis: str, argument: inspect.Parameter, hint: Any) -> Option | None:
    name, default = argument.name, argument.default
    help_text = _HELP.get(f"{analysis}.{name}", _HELP.get(name))
    if name in ("run", "output", "judges"):
        return None
    if name in _SPECIAL:
        return _SPECIAL[name](default)
    kinds = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    text: Any = str | None
    lists = [kind for kind in kinds if typing.get_origin(kind) in (Sequence, tuple, list)]
    if lists:
        item = typing.get_args(lists[0])[0]
        text = Annotated[text, typer.Option(help=help_text, metavar="VALUES")]
        return Option(name, text, _listed(default), lambda given: _values(name, given, item))
    words = _words(kinds)
    if words:
        text = Annotated[text, typer.Option(help=help_text, metavar="|".join(words))]
        return Option(name, text, default, lambda given: _word(name, given, words))
    if hint not in _PLAIN:
        return None
    rows = name in ("limit", "test_limit")
    if rows and default is None:
        help_text = f"{help_text} (default: all)"
    plain: Any = Annotated[hint, typer.Option(help=help_text)]
    return Option(name, plain, default, (lambda given: rows_or_all(name, given)) if rows else None)


def _words(kinds: Sequence[Any]) -> list[str]:
    """The words of the literals among some types."""
    literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
    return [word for literal in literals for word in typing.get_args(literal)]


def _listed(default: Any) -> Any:
    """Values as they are typed."""
    if default is None or default is _REQUIRED:
        return default
    values = default if isinstance(default, Sequence) else [default]
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


_UNIONS = (typing.Union, types.UnionType)


def _task(default: Any) -> Option:
    words = "copa, boolq ...; contrast:SOURCE; or refusal:FILE."
    kind: Any = str if default is _REQUIRED else str | None
    return Option("task", Annotated[kind, typer.Option("--task", "-t", help=words)], default)


def _contrast(default: Any) -> Option:
    required = default is _REQUIRED
    words = "A .jsonl or .csv file, builtin:NAME, task:NAME or answers:FILE"
    words += "." if required else " (default: the task's train rows, where there is a task)."
    kind: Any = str if required else str | None
    return Option(
        "contrast", Annotated[kind, typer.Option("--contrast", "-c", help=words)], default
    )


def _contrasts(default: Any) -> Option:
    words = "Repeat for each: SOURCE or NAME=SOURCE, a source as in builtin:formality, task:copa."
    kind = Annotated[list[str], typer.Option("--contrast", "-c", help=words)]
    return Option("contrasts", kind, default, _named)


_SPECIAL: dict[str, Callable[[Any], Option]] = {
    "task": _task,
    "contrast": _contrast,
    "contrasts": _contrasts,
    "data": lambda default: Option("data", Data, None),
    "toxicity": lambda default: Option("toxicity", Toxicity, default),
    "prompts": lambda default: Option(
        "prompts", PromptFile, None, lambda file: None if file is None else read_prompts([], file)
    ),
    "chat": lambda default: Option(
        "chat",
        Annotated[
            bool | None,
            typer.Option("--chat/--raw", help="Prompts through the chat template, or as they are."),
        ],
        default,
    ),
}


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Contrasts by name: `NAME=SOURCE`, or the source's own last part."""
    found: dict[str, str] = {}
    for text in sources:
        name, equals, source = text.partition("=")
        if not equals:
            source = text
            name = text.partition(":")[2] or Path(text).stem
        if name in found:
            raise TrimtabError(f"two contrasts are called {name}: write NAME=SOURCE")
        found[name] = source
    return found


def _word(name: str, text: str | None, words: Sequence[str]) -> str | None:
    """One of some words."""
    if text is not None and text not in words:
        known = ", ".join(words)
        raise TrimtabError(f"--{name.replace('_', '-')} is {text!r}: known are {known}")
    return text


def _values(name: str, text: str | None, item: Any) -> tuple[Any, ...] | None:
    """Several values from text."""
    if text is None:
        return None
    option = f"--{name.replace('_', '-')}"
    kinds = typing.get_args(item) if typing.get_origin(item) in _UNIONS else (item,)
    words = _words(kinds)
    found: list[Any] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if part in words or str in kinds:
            found.append(part)
        elif int in kinds:
            found += read_numbers(option, part, words)
        else:
            try:
                found.append(float(part))
            except ValueError as error:
                raise TrimtabError(f"{option} {text}: write numbers, as in 1,2.5,10") from error
    return tuple(found)


# -- the commands ---------------------------------------------------------------------------------


def _command(name: str, function: Callable[..., Any]) -> Callable[..., None]:
    """A function whose signature is the analysis' arguments and what every analysis takes."""
    own = options_of(name, function)
    judged = JUDGE_OPTIONS if "judges" in inspect.signature(function).parameters else []
    empty = inspect.Parameter.empty
    shared: list[tuple[str, Any, Any]] = [
        ("model", Model, empty),
        (
            "output",
            Annotated[
                Path | None,
                typer.Option("--output", "-o", help="Run directory: a page, pictures, results."),
            ],
            None,
        ),
        ("dtype", Dtype, "float32"),
        ("device", Device, "auto"),
        ("overwrite", Overwrite, False),
        ("as_json", Json, False),
        *judged,
    ]

    def command(**given: Any) -> None:
        arguments = {option.name: option.value(given.pop(option.name)) for option in own}
        judging = JudgeOptions.taken_from(given) if judged else None
        _run(name, function, arguments, judging, **given)

    listed = [
        *shared[:1],
        *((option.name, option.kind, option.default) for option in own),
        *shared[1:],
    ]
    parameters = [
        inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for each, kind, default in listed
    ]
    # Those that must be given come first, or Python refuses the signature.
    parameters.sort(key=lambda parameter: parameter.default is not empty)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    about = inspect.cleandoc(function.__doc__ or "")
    command.__doc__ = (
        f"{about}\n\nExample: `trimtab analyse {name} --model smollm2-135m-instruct "
        f"{_EXAMPLES.get(name) or _example(name, own)}`"
    )
    return command


def _example(name: str, own: Sequence[Option]) -> str:
    """For an analysis without an example of its own."""
    needed = {option.name for option in own if option.default is _REQUIRED}
    task = "--task copa --data DIR " if "task" in needed else ""
    contrast = "--contrast builtin:formality " if "contrast" in needed else ""
    return f"{task}{contrast}-o runs/{name}"


def _run(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    judging: JudgeOptions | None,
    *,
    model: str,
    output: Path | None,
    dtype: str,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    from trimtab.papers import write

    plain = {key: value for key, value in arguments.items() if key != "data"}
    if judging is not None:
        arguments["judges"], _ = judging.judges(dtype, device)
    source = _describe(arguments)  # before the model is loaded: what is missing is said at once
    language_model = open_model(model, dtype, device)
    config = {
        "analysis": name,
        "options": plain,
        **source,
        "model": language_model.described,
    }
    run = SharedRun(output, config, overwrite)
    if "run" in inspect.signature(function).parameters:
        arguments["run"] = run
    found = function(language_model, **arguments)
    write(found, run)
    if as_json:
        print_json(found.as_json() | (judging.as_json() if judging else {}))
        return
    console.print(found.title, style="bold")
    show(found.tables, found.notes, output, ["report.html", "results.json", "pictures/"])
    if judging is not None:
        say_costs(judging)


def _describe(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The rows and texts that an analysis is asked to run on, with their digests."""
    from trimtab.sweeps import contrast_for

    data, task = arguments.get("data"), arguments.get("task")
    described: dict[str, Any] = {}
    if task is not None:
        described["task"] = _describe_task(arguments)
    contrasts = dict(arguments.get("contrasts") or {})
    if "contrast" in arguments and (task is not None or arguments["contrast"] is not None):
        contrasts["contrast"] = contrast_for(task or "", arguments["contrast"], data)
    for name, given in contrasts.items():
        texts = given if isinstance(given, Contrast) else load_contrast(given, data=data)
        described.setdefault("contrasts", {})[name] = {"name": texts.name, "digest": texts.digest}
    return described


def _describe_task(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The test rows, and the validation rows where the task has them."""
    from trimtab.evaluation import Judging, Wanted, find_job

    protocol = arguments.get("protocol", "trimtab")
    data, other = arguments.get("data"), arguments.get("validation_task")
    judging = Judging(arguments.get("toxicity", "offline"), tuple(arguments.get("judges", ())))

    def job(name: str, part: Any, limit: str) -> dict[str, Any]:
        wanted = Wanted((protocol,), part, arguments.get(limit), data)
        return find_job(name, wanted, judging).describe()

    described = {"test": job(arguments["task"], "test", "test_limit")}
    if other is not None:
        described["validation"] = job(other, "test", "limit")
    else:
        with suppress(TrimtabError):  # whether it is missed the analysis will say
            described["validation"] = job(arguments["task"], "validation", "limit")
    return described


class _Analyses(TyperGroup):
    """Commands that are made when they are asked for: the analyses import matplotlib, which takes
    a second, and other commands need not wait for it."""

    def list_commands(self, ctx: Any) -> list[str]:
        from trimtab.papers import ANALYSES

        return list(ANALYSES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from trimtab.papers import ANALYSES

        if cmd_name not in ANALYSES:
            return None
        alone = typer.Typer(rich_markup_mode="markdown", add_completion=False)
        alone.command(cmd_name)(_command(cmd_name, ANALYSES[cmd_name]))
        made = typer.main.get_command(alone)
        made.context_settings = {"help_option_names": ["-h", "--help"]}
        return made


app = typer.Typer(
    cls=_Analyses,
    help="Look into a model and what steers it: `trimtab analyse NAME --help` for an analysis.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _analyse() -> None:
    """Look into a model and what steers it: `trimtab analyse NAME --help` for an analysis."""
