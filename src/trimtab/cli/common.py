"""What commands share: options, reading steerings and prompts, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from trimtab.errors import TrimtabError
from trimtab.files import check_directory, check_output
from trimtab.model import LanguageModel, load
from trimtab.reports import object_in
from trimtab.steering import Steering, refuse_other_file
from trimtab.terminal import CleanConsole, is_terminal

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A pack, a directory, a .gguf file or a hub id. Python code that comes with it runs "
        "only with `--trust-remote-code`.",
    ),
]
Steer = Annotated[
    list[str] | None,
    typer.Option("--steer", "-s", help="FILE or FILE@DIAL; repeat to combine, in order."),
]
Prompts = Annotated[
    list[str] | None, typer.Argument(help="Prompts; - reads one per line from standard input.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="File of prompts: text lines, or JSONL with `prompt`."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as they are.")]
AsChat = Annotated[
    bool, typer.Option("--chat", help="Use the chat template (the default where there is one).")
]
Data = Annotated[
    str | None,
    typer.Option(help="Directory of data sets (default: the environment's TRIMTAB_DATA)."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Force = Annotated[
    bool, typer.Option("--force", help="Allow a steering that was made for another model.")
]

#: Whether `--trust-remote-code` is on the command line, where every command takes it.
trusting: ContextVar[bool] = ContextVar("trusting", default=False)

#: For people; long lines wrap at the terminal's width, and are left whole in a pipe. Text stays as
#: it is: in names and texts `:smile:` is no emoji and `[bold]` no style.
console = CleanConsole(soft_wrap=not is_terminal(sys.stdout))


def print_json(value: dict[str, Any]) -> None:
    """Exactly one JSON object on standard output."""
    unicode = str(getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode, allow_nan=False))


def as_chats(raw: bool, chat: bool) -> bool | None:
    """What --raw and --chat say together; None is the model's own way."""
    if raw and chat:
        raise TrimtabError("choose one of --raw and --chat")
    return True if chat else False if raw else None


def read_steerings(arguments: Sequence[str] | None) -> list[Steering]:
    """Steerings from `FILE` or `FILE@DIAL`."""
    return [Steering.read(argument) for argument in arguments or ()]


def one_steering(steerings: Sequence[Steering]) -> Steering:
    """The one that a command is about."""
    if len(steerings) != 1:
        raise TrimtabError(f"name one steering with --steer, not {len(steerings)}")
    return steerings[0]


def open_model(model: str, dtype: str, device: str) -> LanguageModel:
    """Load a model as the options say."""
    return load(model, dtype=dtype, device=device, trust_remote_code=trusting.get())


def refuse_steering_path(path: Path, overwrite: bool) -> None:
    """Before the work: a steering replaces no other file than a steering."""
    check_output(path, overwrite)
    refuse_other_file(path)


def refuse_holding(directory: Path, file: str, overwrite: bool, keys: set[str]) -> None:
    """Before hours of work: a directory that has this file already, or cannot be written.

    Overwriting is for a directory whose `file` has the `keys` that this program writes there.
    """
    if not overwrite and (directory / file).exists():
        remedy = ", or pass --overwrite" if _has_keys(directory / file, keys) else ""
        raise TrimtabError(f"{directory} holds {file}: choose another directory{remedy}")
    if overwrite and _is_filled(directory) and not _has_keys(directory / file, keys):
        raise TrimtabError(f"{directory} is not a run's directory: overwriting replaces only those")
    check_directory(directory)


def _is_filled(directory: Path) -> bool:
    try:
        return directory.is_dir() and any(directory.iterdir())
    except OSError as error:
        raise TrimtabError(f"cannot read {directory}: {error.strerror or error}") from error


def _has_keys(file: Path, keys: set[str]) -> bool:
    found = object_in(file)
    return found is not None and keys <= found.keys()


def read_prompts(given: Sequence[str], file: Path | None) -> list[Any]:
    """Prompts from the command line, from standard input, from a file."""
    texts: list[Any] = []
    for text in given:
        if text == "-":
            texts += [line for _, line in _lines(sys.stdin, "standard input")]
        elif text.strip():
            texts.append(text)
        else:
            raise TrimtabError(f"prompt {len(texts) + 1} is empty")
    if file is not None:
        try:
            with file.open(encoding="utf-8-sig") as opened:
                lines = _lines(opened, str(file))
        except OSError as error:
            raise TrimtabError(f"cannot read prompts from {file}: {error.strerror}") from error
        texts += [_prompt(line, file, number) for number, line in lines]
    if not texts:
        raise TrimtabError("there is no prompt: give one on the command line, or --prompts FILE")
    for number, text in enumerate(texts, 1):
        try:
            json.dumps(text, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # bytes of the command line, or escapes in JSON
            raise TrimtabError(f"prompt {number} is not UTF-8 text") from error
    return texts


def _lines(stream: Iterable[str], name: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    # Iterating, not str.splitlines(): a prompt may hold U+2028 and the like.
    try:
        return [(i, line.rstrip("\n")) for i, line in enumerate(stream, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise TrimtabError(f"cannot read prompts from {name}: it is not UTF-8 text") from error


def _prompt(line: str, file: Path, number: int) -> Any:
    if file.suffix != ".jsonl":
        return line
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrimtabError(f'{file}, line {number}: write {{"prompt": TEXT}}') from error


def in_float32(what: str, value: float) -> float:
    """A number that steering, which runs in float32, can hold."""
    largest, smallest = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
    if not (value == 0 or smallest <= abs(value) <= largest):
        raise TrimtabError(
            f"{what}: {value!r} is beyond what float32 holds, {smallest:.2g} to {largest:.2g} on "
            "either side of 0"
        )
    return value


def rows_or_all(name: str, rows: int | None) -> int | None:
    """How many rows an option of this name takes; 0 is all."""
    if rows is not None and rows < 0:
        raise TrimtabError(
            f"--{name.replace('_', '-')} must be 1 or more, or 0 for all, not {rows}"
        )
    return rows or None
