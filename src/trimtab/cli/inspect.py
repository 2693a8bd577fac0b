"""`trimtab inspect`: what is in a steering file."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import Json, console, print_json, read_steering
from trimtab.describe import describe, explain


def inspect(
    file: Annotated[str, typer.Argument(help="A steering: FILE or FILE@DIAL.")],
    top: Annotated[int, typer.Option(help="How many units to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Say what a steering does, in words, and list its units.

    Example: `trimtab inspect joy.safetensors`
    """
    steering = read_steering(file)
    described = describe(steering)
    if as_json:
        print_json(described)
        return
    for line in explain(steering):
        console.print(line)
    units = described.get("units", [])[: max(0, top)]
    if units:
        table = Table("rank", "layer", "unit", "score", "r_pos", "r_neg", "gamma", box=None)
        for rank, unit in enumerate(units, 1):
            table.add_row(
                str(rank),
                str(unit["layer"]),
                str(unit["unit"]),
                *(f"{unit[name]:.3f}" for name in ("score", "r_pos", "r_neg")),
                f"{unit['gamma']:+.2f}",
            )
        console.print(table)
        if len(described["units"]) > len(units):
            console.print(f"... and {len(described['units']) - len(units)} more (--top)")
