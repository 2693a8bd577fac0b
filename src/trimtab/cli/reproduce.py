"""`trimtab reproduce NAME`: a table or figure of the papers on any model; `--list` shows all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from trimtab.cli.common import console, open_model, print_json
from trimtab.cli.judging import ChatJudge, say_cost
from trimtab.cli.options import Json, OpenedIfNamed
from trimtab.cli.tables import show
from trimtab.errors import TrimtabError
from trimtab.options import Keep, option

if TYPE_CHECKING:
    from trimtab.papers import Reproduction

#: How a model is held where nothing is said of it.
_AS_IT_IS = vars(OpenedIfNamed())


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What a recipe runs on, and what it wants the user to bring."""

    heading = "Rows"

    data: str | None = option(
        "Directory of data sets (default: the environment's TRIMTAB_DATA).", None
    )
    prompts: str | None = option("File of prompts, where a recipe runs on yours.", None)
    contrast: str | None = option("Contrast, where a recipe runs on yours.", None)


def reproduce(
    name: Annotated[
        str | None, Parameter(help="austeer-table1, ss-dial, strength-fig6 ...; see --list.")
    ] = None,
    /,
    *,
    opened: OpenedIfNamed = OpenedIfNamed(),
    scale: Annotated[
        str, Parameter(help="smoke (does it run), small, or full (as published).")
    ] = "smoke",
    brought: Brought = Brought(),
    judging: ChatJudge = ChatJudge(),
    listed: Annotated[bool, Parameter(name="--list", help="All recipes.", negative=())] = False,
    seed: Annotated[
        int | None,
        Parameter(help="For whatever is drawn (default: 0).", validator=validators.Number(gte=0)),
    ] = None,
    keep: Keep = Keep(),
    force: Annotated[
        bool,
        Parameter(
            name="--force", help="Run without the hardware that a recipe needs.", negative=()
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the study behind a table or figure of the papers, with the paper's figures beside ours.

    Example: `trimtab reproduce austeer-table12 --model smollm2-135m-instruct --scale smoke --data
    DIR -o runs/table12`
    """
    from trimtab import papers

    if listed:
        _list(as_json)
        return
    if name is None:
        raise TrimtabError("name a recipe; trimtab reproduce --list has all")
    recipe = papers.find_recipe(name)
    if scale not in papers.SCALES:
        raise TrimtabError(f"unknown scale {scale!r}: known are {', '.join(papers.SCALES)}")
    said = {"data": brought.data, "seed": seed, "force": force or None, "judge": judging.judge}
    if recipe.study in papers.WITHOUT_MODEL:
        said |= {name: value for name, value in vars(opened).items() if value != _AS_IT_IS[name]}
    papers.check_used(recipe, scale, said)
    own = {"prompts": brought.prompts, "contrast": brought.contrast}
    papers.check_ready(recipe, scale, brought.data, own)
    language_model = None
    if recipe.study not in papers.WITHOUT_MODEL:
        if opened.model is None:
            raise TrimtabError(f"{name} runs on a model: name it with --model")
        papers.check_needs(recipe, opened.model, papers.billions_in(opened.model), force)
        language_model = open_model(opened)
    judge = judging.chat(opened)
    done = papers.reproduce(
        language_model,
        name,
        scale=scale,
        data=brought.data,
        output=keep.output,
        **own,
        judge=judge,
        seed=seed or 0,
        overwrite=keep.overwrite,
        force=force,
    )
    if as_json:
        print_json(done.as_json())
        return
    _show(done, keep.output)
    say_cost(judge)


def _list(as_json: bool) -> None:
    from rich.table import Table

    from trimtab.papers import recipes

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


def _show(done: Reproduction, output: Path | str | None) -> None:
    """For people: the paper's figures beside ours, and what to know."""
    from trimtab.papers import beside_paper

    recipe = done.recipe
    console.print(f"{recipe.paper}, {recipe.item}: {recipe.shows}", style="bold")
    show(beside_paper(done), done.notes, output)
