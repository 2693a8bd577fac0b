"""`trimtab reproduce NAME`: a table or figure of the papers on any model; `--list` shows all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.common import Data, Device, Dtype, Json, Overwrite, console, open_model, print_json
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.papers import (
    SCALES,
    WITHOUT_MODEL,
    Reproduction,
    beside_paper,
    billions_in,
    check_needs,
    check_ready,
    find_recipe,
    recipes,
    reproduce,
)


def reproduce_command(
    name: Annotated[
        str | None, typer.Argument(help="austeer-table1, ss-dial, strength-fig6 ...; see --list.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A pack, a directory, a .gguf file or a hub id."),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="smoke (does it run), small, or full (as published).")
    ] = "smoke",
    data: Data = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run directory; interrupted runs go on there."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File of prompts, where a recipe runs on yours.")
    ] = None,
    contrast: Annotated[
        str | None, typer.Option(help="Contrast, where a recipe runs on yours.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="All recipes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="For whatever is drawn.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    overwrite: Overwrite = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run without the hardware that a recipe needs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the study behind a table or figure of the papers, with the paper's figures beside ours.

    Example: `trimtab reproduce austeer-table12 --model smollm2-135m-instruct --scale smoke --data
    DIR -o runs/table12`
    """
    if listed:
        _list(as_json)
        return
    if name is None:
        raise TrimtabError("name a recipe; trimtab reproduce --list has all")
    recipe = find_recipe(name)
    if scale not in SCALES:
        raise TrimtabError(f"unknown scale {scale!r}: known are {', '.join(SCALES)}")
    check_ready(recipe, scale, data, {"prompts": prompts, "contrast": contrast})
    language_model = None
    if recipe.study not in WITHOUT_MODEL:
        if model is None:
            raise TrimtabError(f"{name} runs on a model: name it with --model")
        check_needs(recipe, model, billions_in(model), force)
        language_model = open_model(model, dtype, device)
    done = reproduce(
        language_model,
        name,
        scale=scale,
        data=data,
        output=output,
        prompts=prompts,
        contrast=contrast,
        seed=seed,
        overwrite=overwrite,
        force=force,
    )
    if as_json:
        print_json(done.as_json())
        return
    _show(done, output)


def _list(as_json: bool) -> None:
    every = recipes()
    if as_json:
        rows = [{"name": one.name, "paper": one.paper, "item": one.item} for one in every]
        print_json({"recipes": rows})
        return
    for paper in dict.fromkeys(one.paper for one in every):
        table = Table(title=paper, title_justify="left", title_style="bold", box=None)
        table.add_column("recipe", no_wrap=True)
        table.add_column("item")
        table.add_column("shows")
        for one in every:
            if one.paper == paper:
                table.add_row(one.name, one.item, one.shows)
        console.print(table)


def _show(done: Reproduction, output: Path | None) -> None:
    """For people: the paper's figures beside ours, and what to know."""
    recipe = done.recipe
    console.print(f"{recipe.paper}, {recipe.item}: {recipe.shows}", style="bold")
    show(beside_paper(done), done.notes, output, ["report.html", "results.json", "pictures/"])
