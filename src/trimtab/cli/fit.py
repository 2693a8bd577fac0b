"""`trimtab fit METHOD`: one command per method, its options the method's own fields."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.common import (
    Device,
    Dtype,
    Json,
    Model,
    Overwrite,
    console,
    open_model,
    print_json,
    refuse_existing,
)
from trimtab.contrasts import Contrast
from trimtab.describe import describe, explain
from trimtab.errors import TrimtabError
from trimtab.fitting import fit
from trimtab.methods import METHODS

app = typer.Typer(
    help="Make a steering from a contrast: `trimtab fit METHOD --help` for a method's options.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

ContrastSource = Annotated[
    str,
    typer.Option("--contrast", "-c", help="A .jsonl or .csv file, or builtin:NAME."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Longest text in tokens; prompts are cut on the left.")
]


def _run(
    method: Any,
    model: str,
    contrast: str,
    output: Path,
    max_length: int | None,
    dtype: str,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    refuse_existing(output, overwrite)
    if output.is_dir():
        raise TrimtabError(f"{output} is a directory: name a file")
    if max_length is not None and max_length < 2:
        raise TrimtabError(f"--max-length must be 2 or more, not {max_length}")
    texts = Contrast.load(contrast)
    language_model = open_model(model, dtype, device)
    steering = fit([method], language_model, texts, max_length=max_length)[0]
    steering.save(output, overwrite)
    if as_json:
        print_json({**describe(steering), "output": str(output)})
        return
    for line in explain(steering):
        console.print(line)
    console.print(f"Saved as {output}. Try: trimtab generate --model {model} --steer {output} ...")


def _command(method_type: type[Any]) -> Callable[..., None]:
    """A function whose signature is the method's fields and what every fit takes."""
    hints = typing.get_type_hints(method_type)
    own = []
    for item in fields(method_type):
        # Lists on a command line: several numbers in one argument, as in 4,5,8-12.
        kind = str | None if "tuple" in str(hints[item.name]) else _plain(hints[item.name])
        option = typer.Option(help=item.metadata.get("help"))
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        own.append((item.name, Annotated[kind, option], default))
    shared: list[tuple[str, Any, Any]] = [
        ("model", Model, inspect.Parameter.empty),
        ("contrast", ContrastSource, inspect.Parameter.empty),
        ("output", Output, inspect.Parameter.empty),
        ("max_length", MaxLength, None),
        ("dtype", Dtype, "float32"),
        ("device", Device, "auto"),
        ("overwrite", Overwrite, False),
        ("as_json", Json, False),
    ]

    def command(**given: Any) -> None:
        own_values = {name: given.pop(name) for name, _, _ in own}
        for name, value in own_values.items():
            if "tuple" in str(hints[name]) and value is not None:
                own_values[name] = read_numbers(name, value)
        _run(method_type(**own_values), **given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in [*shared[:3], *own, *shared[3:]]
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    summary = (method_type.__doc__ or "").splitlines()[0]
    module = inspect.getmodule(method_type)
    first = (module.__doc__ or "" if module else "").splitlines()[0]
    command.__doc__ = (
        f"{first}\n\n{summary}\n\nExample: `trimtab fit {method_type.name} --model "
        f"smollm2-135m-instruct --contrast builtin:warmth -o warm.safetensors`"
    )
    return command


def _plain(hint: Any) -> Any:
    """Choices are checked by the method, which says it in one line."""
    return str if typing.get_origin(hint) is typing.Literal else hint


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """`4,5,8-12` -> (4, 5, 8, 9, 10, 11, 12); a leading minus counts from the end."""
    numbers: list[int] = []
    for part in text.split(","):
        # Five digits at most, so that no slip of the finger fills the memory.
        match = re.fullmatch(r"\s*(-?\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first:
            raise TrimtabError(f"--{name} {text}: write numbers, as in 4,5,8-12")
        numbers += range(first, last + 1)
    return tuple(numbers)


for _name, _method in METHODS.items():
    app.command(_name)(_command(_method))
