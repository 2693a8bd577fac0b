"""`trimtab inspect`: what is in a steering file, and what is baked into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import (
    as_chats,
    console,
    open_model,
    print_json,
    read_prompts,
    read_steerings,
)
from trimtab.cli.options import Json, OpenedIfNamed, Prompting, Prompts, Steered
from trimtab.errors import TrimtabError, one_line, shown
from trimtab.files import exists, user_path
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.model import Firing
    from trimtab.steering import Steering


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """On which tokens it acts."""

    heading = "Steerings"

    scope: str | None = option(
        "Look at this scope instead of the file's own.", None, flag="--scope"
    )
    max_new_tokens: int = option("Tokens that the model writes after a prompt.", 16, least=0)

    def steered(self, file: str) -> Steered:
        return Steered(steer=(file,), scope=() if self.scope is None else (self.scope,))


def inspect(
    file: Annotated[str, Parameter(help="A steering, FILE or FILE@DIAL, or a baked DIR.")],
    /,
    *prompts: Prompts,
    prompting: Prompting = Prompting(),
    reading: OpenedIfNamed = OpenedIfNamed(),
    tokens: Tokens = Tokens(),
    top: Annotated[int, Parameter(help="How many units, heads or features to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Say what a steering does, in words, and list the units, heads or features it chose; of a
    checkpoint's directory say which steerings are baked into its weights. With a model and prompts
    show on which of their tokens, and of those that the model writes after them, it acts.

    Example: `trimtab inspect joy.safetensors`

    Example: `trimtab inspect joy.safetensors --model smollm2-135m-instruct --scope "generated[:3]"
    "Today I feel"`
    """
    asked = bool(prompts) or prompting.file is not None
    if asked is not (reading.model is not None):
        given = f" ('{shown(prompts[0], 40)}' is taken for a prompt)" if prompts else ""
        raise TrimtabError(f"to see on which tokens it acts, give a --model and a prompt{given}")
    directory = user_path(file)
    if exists(directory) and directory.is_dir():
        if asked:
            raise TrimtabError(f"{directory} is a checkpoint, whose weights act on all tokens")
        _say_baked(directory, as_json)
        return
    from trimtab.methods import describe, explain

    (steering,) = read_steerings(tokens.steered(file))
    described = describe(steering)
    acting = _firings(steering, prompts, prompting, reading, tokens.max_new_tokens) if asked else []
    if as_json:
        fires = {"fires": [each.as_json() for each in acting]} if asked else {}
        print_json(described | fires)
        return
    for line in explain(steering):
        console.print(one_line(line))
    for kind in ("units", "heads", "features", "experts"):
        _list(described.get(kind, []), max(0, top))
    for each in acting:
        for line in str(each).splitlines():
            console.print(one_line(line))


def _firings(
    steering: Steering,
    prompts: Sequence[str],
    prompting: Prompting,
    reading: OpenedIfNamed,
    max_new_tokens: int,
) -> list[Firing]:
    """On which tokens it acts, prompt by prompt."""
    texts, chats = read_prompts(prompts, prompting.file), as_chats(prompting, reading)
    language_model = open_model(reading)
    return [
        language_model.explain(steering, text, chat=chats, max_new_tokens=max_new_tokens)
        for text in texts
    ]


def _say_baked(directory: Path, as_json: bool) -> None:
    """What was baked into the checkpoint in a directory."""
    from trimtab.checkpoints import RECORD, in_words, read_baked

    baked = read_baked(directory)
    if not baked:
        raise TrimtabError(
            f"{directory} does not say that something is baked into it: it has no {RECORD}, which "
            "trimtab bake writes; a steering is a .safetensors file"
        )
    if as_json:
        print_json({"baked": list(baked)})
        return
    console.print(f"{directory}: {one_line(baked[0]['base']['name'])}, into which were baked")
    for record in baked:
        console.print(f"  {in_words(record)}, {one_line(record.get('date', 'at an unknown date'))}")


def _list(records: list[dict[str, Any]], top: int) -> None:
    """The first records of what was chosen, as a table in rank order."""
    if not records[:top]:
        return
    columns = [name for name in records[0] if name != "site"]
    from rich.table import Table

    table = Table("rank", *map(one_line, columns), box=None)
    for rank, record in enumerate(records[:top], 1):
        cells = [record[name] for name in columns]
        table.add_row(
            str(rank),
            *(_cell(name, cell) for name, cell in zip(columns, cells, strict=True)),
        )
    console.print(table)
    if len(records) > top:
        console.print(f"... and {len(records) - top} more (--top)")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, int | str):
        return one_line(value)
    return f"{value:+.2f}" if name == "gamma" else f"{value:.3f}"
