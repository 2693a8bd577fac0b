"""`trimtab fit METHOD`: one command per method, its options the method's own fields; and
`trimtab fit many`, several methods from one pass."""

from __future__ import annotations

import inspect
import shlex
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from trimtab.cli.common import console, open_model, print_json, refuse_steering_path
from trimtab.cli.engines import Running, opened_engine, read_beside
from trimtab.cli.making import method_options, prepared
from trimtab.cli.options import Json, Opened, Overwrite
from trimtab.cli.values import field_named, read_value
from trimtab.contrasts import MISTAKES, Pair, Part, check, last_message
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.options import SPLIT, Split, option

if TYPE_CHECKING:
    from trimtab.contrasts import Contrast
    from trimtab.evaluation import Sample
    from trimtab.fitting import Method
    from trimtab.model import LanguageModel
    from trimtab.steering import Steering


#: Pairs that say what a steering gains: enough to see which way it pushes.
_PAIRS = 16


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What methods are fitted on."""

    heading = "Fitting"

    contrast: str = option(
        "A .jsonl, .json, .csv or .tsv file, builtin:NAME, task:NAME or answers:FILE.",
        flag=("--contrast", "-c"),
    )
    data: str | None = option(
        "Directory of data sets (default: the environment's TRIMTAB_DATA).", None
    )
    protocol: str = option("Of task:NAME: trimtab, or paper as the authors have it.", "trimtab")
    split: str = option(
        "Where rows name no part, TRAIN,VALIDATION,TEST of their prompts, with :SEED behind it for "
        "others: what is not for train is held out. none fits on all.",
        SPLIT,
    )
    on: Literal["all", "text", "image"] = option(
        "Which tokens are steered, of a model that sees images: all, text or image.", "all"
    )
    max_length: int | None = option("Longest text in tokens; prompts are cut on the left.", None)
    cache: Path | None = option(
        "Directory that keeps the activations that were read: an interrupted fit goes on there, "
        "and a later one need not run the model again.",
        None,
    )
    measure: bool = option(
        "Measure the dial on this model and contrast: its range, the strengths gentle, clear and "
        "strong, and its default where none is given.",
        True,
    )
    samples: int = option("Prompts to show texts for, unsteered beside steered.", 2, least=0)


def commands(app: App) -> None:
    """Make a steering from a contrast: `trimtab fit METHOD --help` for a method's options,
    `trimtab fit many` for several methods at once."""
    from trimtab.methods import METHODS

    app.command(prepared(many), name="many")
    for name, method in METHODS.items():
        app.command(prepared(_command(method)), name=name)


@cache
def _command(method: type[Method]) -> Callable[..., None]:
    """`trimtab fit METHOD`."""

    def command(
        *,
        opened: Opened,
        fitting: Fitting,
        output: Annotated[
            Path, Parameter(name=("--output", "-o"), help="The .safetensors file to write.")
        ],
        options: Any,
        running: Running = Running(),
        overwrite: Overwrite = False,
        as_json: Json = False,
    ) -> None:
        _one(method(**vars(options)), opened, fitting, running, output, overwrite, as_json)

    command.__annotations__["options"] = method_options(method)
    more = " --sae my-sae/" if "sae" in typing.get_type_hints(method) else ""
    about = inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0]
    command.__doc__ = (
        f"{about}\n\nExample: `trimtab fit {method.name} --model "
        f"smollm2-135m-instruct --contrast builtin:warmth{more} -o warm.safetensors`"
    )
    return command


def many(
    *methods: Annotated[
        str, Parameter(help='Methods with their options, as in "caa layer=12 alpha=2".')
    ],
    opened: Opened,
    fitting: Fitting,
    output: Annotated[
        Path, Parameter(name=("--output", "-o"), help="A directory: one file per method.")
    ],
    running: Running = Running(),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit several methods on one contrast, from one pass of the model.

    Example: `trimtab fit many "caa layer=12" "austeer k=96 site=heads" sadi --model
    smollm2-135m-instruct --contrast builtin:warmth -o steerings/`
    """
    from trimtab.methods import describe, explain

    if not methods:
        raise TrimtabError('name methods to fit, as in "caa layer=12" "iti k=16"')
    parsed = [read_method(text) for text in methods]
    if output.exists() and not output.is_dir():
        raise TrimtabError(f"{output} is a file: name a directory, which gets a file per method")
    paths = [output / name for name in _file_names(parsed)]
    for path in paths:
        if output.is_dir():
            refuse_steering_path(path, overwrite)
    if not output.is_dir():
        refuse_steering_path(output, overwrite)
    texts = _contrast(fitting)
    language_model, steerings = _fit(parsed, opened, running, fitting, texts)
    output.mkdir(exist_ok=True)
    for steering, path in zip(steerings, paths, strict=True):
        steering.save(path, overwrite)
    made = {path.name: steering for path, steering in zip(paths, steerings, strict=True)}
    shown = _samples(language_model, made, texts, fitting.samples)
    if as_json:
        records = [
            {**describe(steering), "output": str(path)}
            for steering, path in zip(steerings, paths, strict=True)
        ]
        print_json({"steerings": records, "samples": [sample.as_json() for sample in shown]})
        return
    _say_rows(texts)
    for steering, path in zip(steerings, paths, strict=True):
        console.print(str(path), style="bold")
        for line in explain(steering):
            console.print(f"  {line}")
    _say_samples(shown)


def _one(
    method: Method,
    opened: Opened,
    fitting: Fitting,
    running: Running,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    from trimtab.methods import describe, explain

    refuse_steering_path(output, overwrite)
    if output.is_dir():
        raise TrimtabError(f"{output} is a directory: name a file")
    texts = _contrast(fitting)
    language_model, (steering,) = _fit([method], opened, running, fitting, texts)
    steering.save(output, overwrite)
    gain = _gain(language_model, steering, texts) if fitting.measure else None
    shown = _samples(language_model, {"steered": steering}, texts, fitting.samples)
    if as_json:
        written = [sample.as_json() for sample in shown]
        record = {"output": str(output), "gain": gain, "samples": written}
        print_json({**describe(steering), **record})
        return
    for line in explain(steering):
        console.print(line)
    _say_rows(texts)
    if gain is not None:
        console.print(_gain_in_words(gain))
    _say_samples(shown)
    model = opened.model
    console.print(f"Saved as {output}. Try: trimtab generate --model {model} --steer {output} ...")


def _contrast(fitting: Fitting) -> Contrast:
    """What is fitted on, with its parts; before the model is loaded, because it may be missing, or
    look like a mistake."""
    from trimtab.evaluation import load_contrast

    most = fitting.max_length
    if most is not None and most < 2:
        raise TrimtabError(f"--max-length must be 2 or more, not {most}")
    split = Split.read(fitting.split)
    texts = load_contrast(fitting.contrast, data=fitting.data, protocol=fitting.protocol)
    for finding in check(texts).warnings:
        if finding.kind in MISTAKES:
            about = f"(trimtab contrast check {texts.name} has more)"
            warnings.warn(f"{texts.name}, {finding.says} {about}", TrimtabWarning, stacklevel=2)
    return texts.with_parts(split)


def _fit(
    methods: Sequence[Method],
    opened: Opened,
    running: Running,
    fitting: Fitting,
    texts: Contrast,
) -> tuple[LanguageModel, list[Steering]]:
    """The model, and a steering of each method."""
    from trimtab.fitting import fit

    language_model = open_model(read_beside(opened) if running.elsewhere else opened)
    with opened_engine(running, language_model, opened) as engine:
        made = fit(
            methods,
            language_model,
            texts,
            max_length=fitting.max_length,
            cache=fitting.cache,
            measure=fitting.measure,
            on=fitting.on,
            engine=engine,
        )
    return language_model, made


def _gain(
    language_model: LanguageModel, steering: Steering, texts: Contrast
) -> dict[str, Any] | None:
    """How much more likely the positive side becomes where the dial stands, in nats per pair with
    a 95 % interval: on held-out pairs, or on those that were fitted on where none are held out.

    None of unpaired texts, and of what acts on generated tokens only, or where a text says so.
    """
    from trimtab.figures import mean_interval
    from trimtab.reading import log_odds

    scopes = steering.scopes
    if not texts.paired or any(scope.only_generated or scope.by_content for scope in scopes):
        return None
    part: Part = next((part for part in ("test", "validation") if part in texts.sizes), "train")
    pairs = (texts.part(part) if texts.has_parts else texts).take(_PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)  # of long rows, which the fit said already
        gains = log_odds(language_model, pairs, steering) - log_odds(language_model, pairs)
    found = mean_interval(gains)
    return {"value": found.value, "ci95": [found.low, found.high], "n": found.n, "part": part}


def _gain_in_words(gain: dict[str, Any]) -> str:
    low, high = gain["ci95"]
    which = "that it was fitted on" if gain["part"] == "train" else "that were held out"
    said = (
        f"On {gain['n']} pairs {which} the log-odds of the positive side change by "
        f"{gain['value']:+.1f} nats [{low:.1f}, {high:.1f}]."
    )
    if high < 0:
        return f"{said} It pushes the wrong way: take another method (caa), or a negative dial."
    return said if low > 0 else f"{said} That may be chance: look at the texts, or use more pairs."


def _samples(
    language_model: LanguageModel, steerings: dict[str, Steering], texts: Contrast, count: int
) -> Sequence[Sample]:
    """What the model writes on prompts of the contrast, on held-out ones where there are some."""
    from trimtab.evaluation import samples

    if not count:
        return ()
    rows = [row for row in texts.rows if row.part == "test"] or list(texts.rows)
    prompts = [row.prompt if isinstance(row, Pair) else row.text for row in rows]
    return samples(language_model, steerings, prompts, count=count)


def _say_samples(shown: Sequence[Sample]) -> None:
    for sample in shown:
        console.print(" ".join(last_message(sample.prompt).split()), style="bold")
        for name, text in {"unsteered": sample.unsteered, **sample.steered}.items():
            console.print(f"  {name:<9} {' '.join(text.split())}")


def _say_rows(texts: Contrast) -> None:
    """Which rows were fitted on, where the file does not say it."""
    rows = "pairs" if texts.paired else "texts"
    if texts.drawn is not None:
        sizes = texts.sizes
        held_out = [f"{sizes[part]} {part}" for part in ("validation", "test") if part in sizes]
        console.print(
            f"Fitted on {sizes['train']} of {len(texts)} {rows}; {' and '.join(held_out)} {rows} "
            f"are held out (split {texts.drawn}; --split none fits on all)."
        )
    elif not texts.has_parts and texts.too_few:
        console.print(f"Fitted on all {len(texts)} {rows}: {texts.too_few}.")


def _file_names(methods: Sequence[Method]) -> list[str]:
    """`caa.safetensors`, and `caa-2.safetensors` for a second one."""
    names: list[str] = []
    for method in methods:
        count = sum(other.name == method.name for other in methods[: len(names)])
        names.append(f"{method.name}{f'-{count + 1}' if count else ''}.safetensors")
    return names


def read_method(text: str) -> Method:
    """`caa layer=12 alpha=2` -> CAA(layer=12, alpha=2.0)."""
    from trimtab.methods import METHODS

    try:
        name, *given = shlex.split(text)
    except ValueError as error:
        raise TrimtabError(
            f'{text!r}: write METHOD OPTION=VALUE ..., as in "caa layer=12"'
        ) from error
    if name not in METHODS:
        raise TrimtabError(f"unknown method {name!r}: known are {', '.join(METHODS)}")
    hints = typing.get_type_hints(METHODS[name])
    known = {item.name: item for item in fields(METHODS[name])}  # type: ignore[arg-type]
    values = {}
    for each in given:
        key, equals, value = each.partition("=")
        key = field_named(key.removeprefix("--").replace("-", "_"), known)
        if not equals or key not in known:
            raise TrimtabError(
                f"{name}: {each!r} is no OPTION=VALUE of it: it has {', '.join(known)}"
            )
        if key in values:
            raise TrimtabError(f"{name}: {key} is given twice: give it once")
        values[key] = read_value(f"{name}: {key}", value, hints[key])
    missing = [key for key, item in known.items() if item.default is MISSING and key not in values]
    if missing:
        raise TrimtabError(f"{name} needs {missing[0]}: write {missing[0]}=...")
    return METHODS[name](**values)
