"""`trimtab fit METHOD`: one command per method, its options the method's own fields; and
`trimtab fit many`, several methods from one pass."""

from __future__ import annotations

import inspect
import re
import shlex
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
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
    console,
    in_float32,
    open_model,
    print_json,
    refuse_steering_path,
)
from trimtab.errors import TrimtabError
from trimtab.evaluation import load_contrast
from trimtab.fitting import Method, fit
from trimtab.methods import METHODS, describe, explain
from trimtab.steering import Steering

app = typer.Typer(
    help="Make a steering from a contrast: `trimtab fit METHOD --help` for a method's options, "
    "`trimtab fit many` for several methods at once.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

ContrastSource = Annotated[
    str,
    typer.Option(
        "--contrast", "-c", help="A .jsonl or .csv file, builtin:NAME, task:NAME or answers:FILE."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Longest text in tokens; prompts are cut on the left.")
]
TaskProtocol = Annotated[
    str, typer.Option("--protocol", help="Of task:NAME: trimtab, or paper as the authors have it.")
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Directory that keeps the activations that were read: an interrupted fit goes on "
        "there, and a later one need not run the model again."
    ),
]
#: What typer reads itself; every other kind of option is text that `read_value` reads.
_PLAIN = (int, float, str, bool, int | None, float | None, str | None)


def many(
    methods: Annotated[
        list[str],
        typer.Argument(help='Methods with their options, as in "caa layer=12 alpha=2".'),
    ],
    model: Model,
    contrast: ContrastSource,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A directory: one file per method.")
    ],
    data: Data = None,
    protocol: TaskProtocol = "trimtab",
    max_length: MaxLength = None,
    cache: Cache = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit several methods on one contrast, from one pass of the model.

    Example: `trimtab fit many "caa layer=12" "austeer k=96 site=heads" sadi --model
    smollm2-135m-instruct --contrast builtin:warmth -o steerings/`
    """
    parsed = [read_method(text) for text in methods]
    if output.exists() and not output.is_dir():
        raise TrimtabError(f"{output} is a file: name a directory, which gets a file per method")
    paths = [output / name for name in _file_names(parsed)]
    for path in paths:
        if output.is_dir():
            refuse_steering_path(path, overwrite)
    if not output.is_dir():
        refuse_steering_path(output, overwrite)
    steerings = _fit(parsed, model, contrast, data, protocol, max_length, cache, dtype, device)
    output.mkdir(exist_ok=True)
    for steering, path in zip(steerings, paths, strict=True):
        steering.save(path, overwrite)
    if as_json:
        records = [
            {**describe(steering), "output": str(path)}
            for steering, path in zip(steerings, paths, strict=True)
        ]
        print_json({"steerings": records})
        return
    for steering, path in zip(steerings, paths, strict=True):
        console.print(str(path), style="bold")
        for line in explain(steering):
            console.print(f"  {line}")


def _one(
    method: Method,
    model: str,
    contrast: str,
    output: Path,
    data: str | None,
    protocol: str,
    max_length: int | None,
    cache: Path | None,
    dtype: str,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    refuse_steering_path(output, overwrite)
    if output.is_dir():
        raise TrimtabError(f"{output} is a directory: name a file")
    (steering,) = _fit([method], model, contrast, data, protocol, max_length, cache, dtype, device)
    steering.save(output, overwrite)
    if as_json:
        print_json({**describe(steering), "output": str(output)})
        return
    for line in explain(steering):
        console.print(line)
    console.print(f"Saved as {output}. Try: trimtab generate --model {model} --steer {output} ...")


def _fit(
    methods: Sequence[Method],
    model: str,
    contrast: str,
    data: str | None,
    protocol: str,
    max_length: int | None,
    cache: Path | None,
    dtype: str,
    device: str,
) -> list[Steering]:
    if max_length is not None and max_length < 2:
        raise TrimtabError(f"--max-length must be 2 or more, not {max_length}")
    texts = load_contrast(contrast, data=data, protocol=protocol)
    language_model = open_model(model, dtype, device)
    return fit(methods, language_model, texts, max_length=max_length, cache=cache)


def _file_names(methods: Sequence[Method]) -> list[str]:
    """`caa.safetensors`, and `caa-2.safetensors` for a second one."""
    names: list[str] = []
    for method in methods:
        count = sum(other.name == method.name for other in methods[: len(names)])
        names.append(f"{method.name}{f'-{count + 1}' if count else ''}.safetensors")
    return names


# -- a method's fields as options -----------------------------------------------------------------


def _command(method_type: type[Method]) -> Callable[..., None]:
    """A function whose signature is the method's fields and what every fit takes."""
    hints = typing.get_type_hints(method_type)
    own = []
    for item in fields(method_type):  # type: ignore[arg-type]
        plain = hints[item.name] in _PLAIN
        kind = hints[item.name] if plain else str | None
        option = typer.Option(help=item.metadata.get("help"))
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        if not plain and default is not None:
            default = str(default)
        own.append((item.name, Annotated[kind, option], default))
    shared: list[tuple[str, Any, Any]] = [
        ("model", Model, inspect.Parameter.empty),
        ("contrast", ContrastSource, inspect.Parameter.empty),
        ("output", Output, inspect.Parameter.empty),
        ("data", Data, None),
        ("protocol", TaskProtocol, "trimtab"),
        ("max_length", MaxLength, None),
        ("cache", Cache, None),
        ("dtype", Dtype, "float32"),
        ("device", Device, "auto"),
        ("overwrite", Overwrite, False),
        ("as_json", Json, False),
    ]

    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name, _, _ in own}
        for name, value in options.items():
            if isinstance(value, str):
                options[name] = read_value(f"--{name.replace('_', '-')}", value, hints[name])
            if isinstance(value, float):
                in_float32(f"--{name.replace('_', '-')}", value)
        _one(method_type(**options), **given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in [*shared[:3], *own, *shared[3:]]
    ]
    # Those that must be given come first, or Python refuses the signature.
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    about = inspect.cleandoc(method_type.__doc__ or "")
    more = " --sae my-sae/" if "sae" in hints else ""
    command.__doc__ = (
        f"{about}\n\nExample: `trimtab fit {method_type.name} --model "
        f"smollm2-135m-instruct --contrast builtin:warmth{more} -o warm.safetensors`"
    )
    return command


def read_method(text: str) -> Method:
    """`caa layer=12 alpha=2` -> CAA(layer=12, alpha=2.0)."""
    try:
        name, *options = shlex.split(text)
    except ValueError as error:
        raise TrimtabError(
            f'{text!r}: write METHOD OPTION=VALUE ..., as in "caa layer=12"'
        ) from error
    if name not in METHODS:
        raise TrimtabError(f"unknown method {name!r}: known are {', '.join(METHODS)}")
    hints = typing.get_type_hints(METHODS[name])
    known = {item.name: item for item in fields(METHODS[name])}  # type: ignore[arg-type]
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals or key not in known:
            raise TrimtabError(
                f"{name}: {option!r} is no OPTION=VALUE of it: it has {', '.join(known)}"
            )
        values[key] = read_value(f"{name}: {key}", value, hints[key])
    missing = [key for key, item in known.items() if item.default is MISSING and key not in values]
    if missing:
        raise TrimtabError(f"{name} needs {missing[0]}: write {missing[0]}=...")
    return METHODS[name](**values)


def read_value(what: str, text: str, hint: Any) -> Any:
    """A field's value from text: a word, a number, yes or no, or a list, as the hint allows."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
    words = [word for literal in literals for word in typing.get_args(literal)]
    if text in words:
        return text
    lists = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if int in kinds and re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if lists and int in typing.get_args(lists[0]):
        return read_numbers(what, text, words)
    if lists:
        return tuple(part for part in text.split(",") if part)
    if float in kinds:
        return _number(what, text)
    if bool in kinds:
        if text.lower() not in _SWITCHES:
            raise TrimtabError(f"{what}: write yes or no, not {text!r}")
        return _SWITCHES[text.lower()]
    if int in kinds and not literals:
        raise TrimtabError(f"{what}: {text!r} is no whole number")
    return text  # the method says which words it knows


_UNIONS = (typing.Union, types.UnionType)
_SWITCHES = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def _number(what: str, text: str) -> float:
    try:
        return in_float32(what, float(text))
    except ValueError as error:
        raise TrimtabError(f"{what}: {text!r} is no number") from error


def read_numbers(what: str, text: str, words: Sequence[str] = ()) -> tuple[int, ...]:
    """`4,5,8-12` -> (4, 5, 8, 9, 10, 11, 12); a leading minus counts from the end.

    `words` are what may stand there instead.
    """
    numbers: list[int] = []
    for part in text.split(","):
        # Five digits at most, so that no slip of the finger fills the memory.
        match = re.fullmatch(r"\s*(-?\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first:
            instead = "".join(f", or {word}" for word in words)
            raise TrimtabError(f"{what} {text}: write numbers, as in 4,5,8-12{instead}")
        numbers += range(first, last + 1)
    return tuple(numbers)


app.command("many")(many)
for _name, _method in METHODS.items():
    app.command(_name)(_command(_method))
