"""What commands share: opening models, reading steerings and prompts, refusing outputs, printing.

Commands import the package's doors where they run, so that `--help` and mistakes need not wait.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.cli.options import Opened, Prompting, Read, Steered
from trimtab.cli.values import flag_of, read_named
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.files import check_directory, check_output, parse_json
from trimtab.terminal import CleanConsole, is_terminal

if TYPE_CHECKING:
    from trimtab.model import LanguageModel
    from trimtab.steering import Steering

T = TypeVar("T")

#: Whether `--trust-remote-code` is on the command line, where every command takes it.
trusting: ContextVar[bool] = ContextVar("trusting", default=False)

#: For people; long lines wrap at the terminal's width, and are left whole in a pipe. Text stays as
#: it is: in names and texts `:smile:` is no emoji and `[bold]` no style.
console = CleanConsole(soft_wrap=not is_terminal(sys.stdout))


def print_json(value: dict[str, Any]) -> None:
    """Exactly one JSON object on standard output."""
    unicode = str(getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode, allow_nan=False))


def as_chats(prompting: Prompting, opened: Opened) -> bool | None:
    """What --raw and --chat say together; None is the model's own way."""
    if prompting.raw and prompting.chat:
        raise TrimtabError("choose one of --raw and --chat")
    if prompting.raw and opened.system is not None:
        raise TrimtabError("--system is for conversations, and --raw takes prompts as they are")
    return True if prompting.chat else False if prompting.raw else None


def read_steerings(steered: Steered) -> list[Steering]:
    """Steerings from `FILE` or `FILE@DIAL`, on the tokens that --scope names, under the condition
    that --gate names."""
    from trimtab.steering import Scope, Steering, read_gate

    files = steered.steer
    scopes = one_for_each("--scope", [Scope.parse(text) for text in steered.scope], len(files))
    gates = one_for_each(
        "--gate", [None if text == "none" else read_gate(text) for text in steered.gate], len(files)
    )
    steerings = [Steering.read(argument) for argument in files]
    if gates:  # the file's own gate may not allow the new scope
        steerings = [one.gated(None) for one in steerings]
    if scopes:
        steerings = [one.scoped(scope) for one, scope in zip(steerings, scopes, strict=True)]
    if gates:
        steerings = [one.gated(gate) for one, gate in zip(steerings, gates, strict=True)]
    return steerings


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE ...` of --option as a dictionary; a value that is no JSON is text."""
    options = read_named("--option", given)
    own = next((name for name in options if name in _own_options()), None)
    if own:
        raise TrimtabError(f"--option {own}: it is an option by itself, {flag_of(own)}")
    return options


def _own_options() -> set[str]:
    """What has an option of its own on the command line."""
    from trimtab.model import SAMPLING, LanguageModel

    named = inspect.signature(LanguageModel.generate).parameters
    return {*named, *SAMPLING, "min_new_tokens", "kl"} - {"options", "on_text", "kept"}


def say_what_is_left_aside(language_model: LanguageModel, chosen: dict[str, Any]) -> None:
    """One line where the checkpoint comes with settings that are not used."""
    from trimtab.model import left_aside

    found = left_aside(language_model.model, chosen)
    if not found:
        return
    shown = [f"{name}={json.dumps(value, default=str)}" for name, value in found.items()]
    shown = [text if len(text) <= 60 else text[:57] + "..." for text in shown]
    warnings.warn(
        f"the checkpoint asks for {', '.join(shown)}: not used; --option NAME=VALUE, "
        "--temperature, --top-k and --top-p say how tokens are chosen",
        TrimtabWarning,
        stacklevel=2,
    )


def one_for_each(option: str, given: list[T], files: int) -> list[T]:
    """What an option says of each steering, given once for all of them or as often as they are."""
    if given and not files:
        raise TrimtabError(f"{option} says how a steering acts: name one with --steer")
    if len(given) > 1 and len(given) != files:
        raise TrimtabError(
            f"{len(given)} times {option} for {files} times --steer: give one for all, or one for "
            "each"
        )
    return given * files if len(given) == 1 else given


def one_steering(steerings: Sequence[Steering]) -> Steering:
    """The one that a command is about."""
    if len(steerings) != 1:
        raise TrimtabError(f"name one steering with --steer, not {len(steerings)}")
    return steerings[0]


def open_model(opened: Read) -> LanguageModel:
    """Load a model as the options say."""
    from trimtab.model import load

    asked: dict[str, Any] = {"revision": opened.revision, **_held_as(opened)}
    if isinstance(opened, Opened):
        asked["chat_options"] = read_named("--chat-option", opened.chat_option)
        asked["system"] = opened.system
    return load(opened.model, **asked, trust_remote_code=trusting.get())


def open_beside(opened: Opened, name: str) -> LanguageModel:
    """Load another model, one that judges or writes: held as the model is, with its own revision
    and chats. Its code is never run."""
    from trimtab.model import load

    return load(name, **_held_as(opened))


def _held_as(opened: Read) -> dict[str, Any]:
    """How a model is held, as arguments of `load`."""
    held: dict[str, Any] = {"dtype": opened.dtype, "device": opened.device}
    if isinstance(opened, Opened):
        held["quantise"] = opened.quantise
        if opened.device_map is not None:
            held["device_map"] = _device_map(opened.device_map)
        if opened.attn_implementation is not None:
            held["attn_implementation"] = opened.attn_implementation
    return held


def _device_map(text: str) -> Any:
    """A word, or a JSON object."""
    return parse_json(text, "--device-map") if text.lstrip().startswith("{") else text


def refuse_steering_path(path: Path, overwrite: bool) -> None:
    """Before the work: a steering replaces no other file than a steering."""
    from trimtab.steering import refuse_other_file

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
    from trimtab.reports import object_in

    found = object_in(file)
    return found is not None and keys <= found.keys()


def read_prompts(given: Sequence[Any], file: Path | None) -> list[Any]:
    """Prompts from the command line, from standard input, from a file."""
    texts: list[Any] = []
    for text in given:
        if not isinstance(text, str):
            texts.append(text)
        elif text.strip() == "-":
            texts += [line for _, line in _lines(sys.stdin, "standard input")]
        elif text.strip():
            texts.append(text)
        else:
            raise TrimtabError(f"prompt {len(texts) + 1} is empty")
    if file is not None:
        texts += _prompts_in(file)
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


def _prompts_in(file: Path) -> list[Any]:
    """The column `prompt` of a table, or the lines of a text."""
    from trimtab.contrasts import TABLES, meant_file, read_table

    if file.suffix.lower() in TABLES:
        rows = read_table(file, "prompts from", ("prompt",))
        for number, row in enumerate(rows, 1):
            if "prompt" not in row:
                raise TrimtabError(f'{file}, row {number}: write {{"prompt": TEXT}}')
        return [row["prompt"] for row in rows]
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return [line for _, line in _lines(opened, str(file))]
    except OSError as error:
        meant = meant_file(file) if isinstance(error, FileNotFoundError) else ""
        raise TrimtabError(f"cannot read prompts from {file}: {error.strerror}{meant}") from error
