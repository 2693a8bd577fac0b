"""`trimtab analyse NAME`: one command for each analysis, its options the arguments of the
function; what it finds is shown, or left in a run directory with a page and pictures."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from trimtab.cli.common import console, open_model, print_json, read_prompts
from trimtab.cli.judging import Measuring, costs_as_json, say_costs
from trimtab.cli.making import argument_option, prepared, rows_or_all
from trimtab.cli.options import Data, Json, Opened, Task
from trimtab.cli.tables import show
from trimtab.cli.values import flags_of, list_in
from trimtab.errors import TrimtabError
from trimtab.options import MAX_COST, Keep, ValidationRows, flat_values

#: What the options say, by the name of the argument; `NAME.ARGUMENT` is that of one analysis.
_HELP = {
    "norms.limit": "Pairs, or texts of each side; 0 takes all.",
    "seed": "For whatever is drawn.",
    "oracle": "Run everything on the test rows too, for the best that is possible there.",
    "ss_compat": "Steer all norms of a block, also those on the branches.",
    "site": "A kind of site: ffn_out, heads, ffn_in, resid ...",
    "sites": "Kinds of sites, as in heads,ffn_out.",
    "kinds": "Kinds of sites, as in resid,attn_norm.",
    "layer": "A block, from 0.",
    "count": "How many units.",
    "k": "How many units.",
    "ks": "Numbers of units, as in 4,16,64.",
    "alpha": "Strength.",
    "alphas": "Strengths, as in 1,4,16.",
    "gamma": "How a unit is scaled.",
    "units": "Units, as in 3,17,40-44.",
    "strengths": "Strengths, as in -10,1,10.",
    "top": "How many of the highest are shown.",
    "seeds": "Seeds, as in 42,43.",
    "masks.seeds": "Seeds of the random halves, as in 42,43.",
    "method": "Whose way is taken.",
    "methods": "Methods, as in ss,sas,aas.",
    "theta": "The angle in degrees for all masks (default: each its best on validation rows).",
    "part": "Rows of the circle; on test rows nothing is chosen.",
    "candidates_from": "Directions from norms' outputs, or from their inputs at unit length.",
    "selection": "b1: the candidate with the largest mean cosine, or the longest (norm).",
    "token": "A text's last token, or the mean over its tokens.",
    "counts": "Numbers of pairs, as in 50,100,300.",
    "resamples": "How often so many pairs are drawn.",
    "shares": "Shares of all units, as in 0.001,0.01.",
    "shrink": "How much units shrink: they are multiplied by 1 minus it, as in 0.25,0.9.",
    "close": "Settings this close to the best count as equal to it.",
    "direction": "AUSteer's own direction, or toward the positive side.",
    "locate": "How units are ranked: momentum (the paper's), difference, effect, effect_per_nat.",
    "ablations.seeds": "How many random choices of units.",
    "massive": "A token is massive that is so many times as long as the median one.",
}

#: Options whose digests stand for them in a run's configuration.
_NOT_KEPT = ("data", "split")
#: Options that came later, which the configuration of a run has where they are not what they were.
_CAME_LATER = {"locate": "momentum"}

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
    "effect": "--task contrast:builtin:formality --k 4,16 --kl 0.1 --pairs 48 -o runs/effect",
    "dial": "--task contrast:builtin:formality --methods ss,sas --step 30 -o runs/dial",
    "masks": "--task contrast:builtin:formality --seeds 42,43 -o runs/masks",
}


def commands(app: App) -> None:
    """Look into a model and what steers it: `trimtab analyse NAME --help` for an analysis."""
    from trimtab.papers import ANALYSES

    for name, function in ANALYSES.items():
        app.command(prepared(_command(name, function)), name=name)


# -- options from a function's arguments ----------------------------------------------------------

_SOURCE = "A .jsonl, .json, .csv or .tsv file, builtin:NAME, task:NAME or answers:FILE"
_NOT_NAMED = " (default: the task's train rows, where there is a task)."
_SPECIAL: dict[str, Any] = {
    "contrasts": Annotated[
        tuple[str, ...],
        Parameter(
            name=("--contrast", "-c"),
            help="Repeat for each: SOURCE or NAME=SOURCE, a source as in builtin:formality, "
            "task:copa.",
        ),
    ],
    "data": Data,
    "prompts": Annotated[
        Path | None, Parameter(help="File of prompts: text lines, or JSONL with `prompt`.")
    ],
    "chat": Annotated[
        bool | None,
        Parameter(
            name="--chat",
            negative="--raw",
            help="Prompts through the chat template, or as they are.",
        ),
    ],
}


@cache
def _command(name: str, function: Callable[..., Any]) -> Callable[..., None]:
    """A function whose arguments are those of the analysis and what every analysis takes."""
    grouped = inspect.unwrap(function)
    hints = typing.get_type_hints(grouped)
    parameters = []
    for argument in list(inspect.signature(grouped).parameters.values())[1:]:
        if argument.name != "run":
            hint = _hint(name, argument, hints)
            default = argument.default
            if hint is Measuring:
                default = Measuring(answering=default.answering, choosing=default.choosing)
            elif list_in(hints[argument.name]) and isinstance(default, float):
                default = (default,)  # one value of several
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(argument.replace(kind=kind, annotation=hint, default=default))

    def command(
        *, opened: Opened, keep: Keep = Keep(), as_json: Json = False, **given: Any
    ) -> None:
        _run(name, function, given, opened, keep, as_json)

    own = inspect.signature(command)
    kept = [each for each in own.parameters.values() if each.name != "given"]
    command.__signature__ = own.replace(parameters=[*parameters, *kept])  # type: ignore[attr-defined]
    command.__annotations__ |= {each.name: each.annotation for each in parameters}
    example = _EXAMPLES.get(name) or _example(name, parameters)
    command.__doc__ = (
        f"{inspect.cleandoc(function.__doc__ or '')}\n\nExample: `trimtab analyse {name} --model "
        f"smollm2-135m-instruct {example}`"
    )
    return command


def _hint(analysis: str, argument: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    """The type of an option, with its words."""
    from trimtab.sweeps import Measured

    name, hint = argument.name, hints[argument.name]
    required = argument.default is argument.empty
    if hint is Measured:
        return Measuring
    if is_dataclass(hint):
        return hint
    if name == "task":
        return Task
    if name == "contrast":
        words = f"{_SOURCE}." if required else _SOURCE + _NOT_NAMED
        kind: Any = str if required else str | None
        return Annotated[kind, Parameter(name=("--contrast", "-c"), help=words)]
    if name in _SPECIAL:
        return _SPECIAL[name]
    words = _HELP.get(f"{analysis}.{name}", _HELP.get(name, ""))
    if name == "limit":
        return Annotated[hint, Parameter(help=words, converter=rows_or_all)]
    return argument_option(hint, words, flags_of(name, hints))


def _example(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    """For an analysis without an example of its own."""
    needed = {each.name for each in parameters if each.default is each.empty}
    task = "--task copa --data DIR " if "task" in needed else ""
    contrast = "--contrast builtin:formality " if "contrast" in needed else ""
    return f"{task}{contrast}-o runs/{name}"


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


# -- what a command runs --------------------------------------------------------------------------


def _run(
    name: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    opened: Opened,
    keep: Keep,
    as_json: bool,
) -> None:
    from trimtab.papers import write
    from trimtab.reports import Run
    from trimtab.sweeps import DEFAULTS, begun_before

    taken = inspect.signature(inspect.unwrap(function)).parameters
    arguments = {key: given[key] for key in taken if key in given}
    if "contrasts" in arguments:
        arguments["contrasts"] = _named(arguments["contrasts"])
    if arguments.get("prompts") is not None:
        arguments["prompts"] = read_prompts([], arguments["prompts"])
    measuring = next((each for each in arguments.values() if isinstance(each, Measuring)), None)
    plain = flat_of(arguments)
    judging = None
    if measuring is not None:
        measured = arguments["measured"] = measuring.measured(opened)
        judging = measured.judging
    limited = "max_cost" in plain
    before = limited and begun_before(keep)
    if before and plain["max_cost"] == MAX_COST:
        arguments["max_cost"] = plain["max_cost"] = None
    source = _describe(plain, judging)  # before the model is loaded: what is missing is said
    language_model = open_model(opened)
    config = {
        "analysis": name,
        "options": {
            key: value
            for key, value in plain.items()
            if key not in _NOT_KEPT and (key, value) not in _CAME_LATER.items()
        },
        **source,
        "model": language_model.described,
        **(DEFAULTS if limited and not before else {}),
    }
    run = Run(keep.output, config, keep.overwrite)
    if "run" in inspect.signature(function).parameters:
        arguments["run"] = run
    found = function(language_model, **arguments)
    write(found, run)
    if as_json:
        print_json(found.as_json() | (costs_as_json(judging) if judging else {}))
        return
    console.print(found.title, style="bold")
    show(found.tables, found.notes, keep.output, summary=found.summary)
    if judging is not None:
        say_costs(judging)


def flat_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of groups too; of who judges only the scorer of toxicity."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        plain |= flat_values([value]) if is_dataclass(value) else {name: value}
    return {name: value for name, value in plain.items() if not name.startswith("judge")}


def _describe(arguments: Mapping[str, Any], judging: Any) -> dict[str, Any]:
    """The rows and texts that an analysis is asked to run on, with their digests."""
    from trimtab.evaluation import load_contrast
    from trimtab.sweeps import contrast_for

    data, task = arguments.get("data"), arguments.get("task")
    described: dict[str, Any] = {}
    if task is not None:
        described["task"] = _describe_task(arguments, judging)
    contrasts = dict(arguments.get("contrasts") or {})
    if "contrast" in arguments and (task is not None or arguments["contrast"] is not None):
        rows = ValidationRows(data=data, split=arguments.get("split"))
        contrasts["contrast"] = contrast_for(task or "", arguments["contrast"], rows)
    for name, given in contrasts.items():
        texts = load_contrast(given, data=data)
        described.setdefault("contrasts", {})[name] = {"name": texts.name, "digest": texts.digest}
    return described


def _describe_task(arguments: Mapping[str, Any], judging: Any) -> dict[str, Any]:
    """The test rows, and the validation rows where the task has them."""
    from trimtab.evaluation import Judging, Wanted, find_job

    protocol = arguments.get("protocol", "trimtab")
    data, other = arguments.get("data"), arguments.get("validation_task")

    def job(name: str, part: Any, limit: str) -> dict[str, Any]:
        split = arguments.get("split")
        wanted = Wanted((protocol,), part, arguments.get(limit), data, split)
        return find_job(name, wanted, judging or Judging()).describe()

    described = {"test": job(arguments["task"], "test", "test_limit")}
    if other is not None:
        described["validation"] = job(other, "test", "limit")
    else:
        with suppress(TrimtabError):  # whether it is missed the analysis will say
            described["validation"] = job(arguments["task"], "validation", "limit")
    return described
