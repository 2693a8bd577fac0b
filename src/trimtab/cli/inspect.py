"""`trimtab inspect`: what is in a steering file, and what is baked into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trimtab.cli.common import console, print_json
from trimtab.cli.options import Json
from trimtab.errors import TrimtabError, one_line
from trimtab.files import exists, user_path


def inspect(
    file: Annotated[str, Parameter(help="A steering, FILE or FILE@DIAL, or a baked DIR.")],
    /,
    *,
    top: Annotated[int, Parameter(help="How many units, heads or features to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Say what a steering does, in words, and list the units, heads or features it chose; of a
    checkpoint's directory say which steerings are baked into its weights.

    Example: `trimtab inspect joy.safetensors`
    """
    directory = user_path(file)
    if exists(directory) and directory.is_dir():
        _say_baked(directory, as_json)
        return
    from trimtab.methods import describe, explain
    from trimtab.steering import Steering

    steering = Steering.read(file)
    described = describe(steering)
    if as_json:
        print_json(described)
        return
    for line in explain(steering):
        console.print(one_line(line))
    for kind in ("units", "heads", "features"):
        _list(described.get(kind, []), max(0, top))


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
    if isinstance(value, int):
        return str(value)
    return f"{value:+.2f}" if name == "gamma" else f"{value:.3f}"
