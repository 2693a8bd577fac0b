"""A paper's table or figure on any model: `trimtab reproduce NAME`.

A recipe (`recipe.py`) says which study runs, how large, and what the paper found; what is
here runs it part by part, in a directory in which an interrupted run goes on, and puts the paper's
figures beside ours.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.options import Brought, flat
from trimtab.papers.analyses import ANALYSES
from trimtab.papers.recipe import (
    SCALES,
    Recipe,
    ScaleName,
    brought_at,
    check_brought,
    check_data,
    check_needs,
    described,
    find_recipe,
    recipes,
    resolve,
)
from trimtab.papers.studies import WITHOUT_MODEL, StudyResult, Value, find_study, run_study
from trimtab.papers.verdicts import verdicts
from trimtab.reports import Picture, Run, Table, model_line, run_page, tables_html
from trimtab.sweeps import Used, metered
from trimtab.terminal import progress

__all__ = ["Recipe", "Reproduction", "find_recipe", "recipes", "reproduce"]


@dataclass(frozen=True, repr=False)
class Reproduction:
    """What a recipe gave: for each of its parts what the study found and what it took."""

    recipe: Recipe
    scale: str
    model: dict[str, Any] | None
    found: dict[str, StudyResult]
    used: dict[str, Used]
    seconds: float

    def __repr__(self) -> str:
        where = "no model" if self.model is None else self.model["name"]
        return f"<Reproduction of {self.recipe.name} at scale {self.scale}, {where}>"

    def _repr_html_(self) -> str:
        """For notebooks: the paper's figures beside ours."""
        return tables_html(beside_paper(self), self.recipe.shows)

    @property
    def values(self) -> dict[str, dict[str, Value]]:
        """Our figures by the paper's row and column; a recipe without parts has one column."""
        table: dict[str, dict[str, Value]] = {}
        for column, found in self.found.items():
            for row, value in found.values.items():
                name = self.recipe.names.get(row, row)
                table.setdefault(name, {})[column or "value"] = value
        return table

    @property
    def notes(self) -> list[str]:
        """What a reader must know, each thing once."""
        own = self.recipe.scale(self.scale).note
        said = [own] if own else []
        # A size tells a model from words like "all".
        papers = [one.model for one in self.recipe.published if re.search(r"\d[bB]", one.model)]
        if self.model is not None and not any(_same(self.model["name"], one) for one in papers):
            names = ", ".join(dict.fromkeys(papers))
            if names:
                said.append(
                    f"the model is {self.model['name']}, the paper's are {names}: the figures show "
                    "whether the finding carries over, not whether the paper's numbers are right"
                )
        if self.recipe.parts(self.scale) != self.recipe.parts("full"):
            said.append(f"scale {self.scale}: fewer rows and settings than the paper's")
        said += [note for found in self.found.values() for note in found.notes]
        return list(dict.fromkeys([*said, *self.recipe.differences]))

    def as_json(self) -> dict[str, Any]:
        """What `trimtab reproduce --json` prints, and results.json."""
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "paper": recipe.paper,
            "item": recipe.item,
            "shows": recipe.shows,
            "scale": self.scale,
            "model": self.model,
            "values": {
                row: {column: value.as_json() for column, value in columns.items()}
                for row, columns in self.values.items()
            },
            "published": [one.model_dump() for one in recipe.published],
            "verdicts": [
                dict(zip(table.heads, row, strict=True))
                for table in verdicts(recipe, self.values, self.scale)
                for row in table.rows
            ],
            "parts": {name: found.as_json() for name, found in self.found.items()},
            "cost": {name: vars(used) for name, used in self.used.items()},
            "seconds": self.seconds,
            "notes": self.notes,
        }


@flat
def reproduce(
    language_model: LanguageModel | None,
    name: str,
    *,
    scale: ScaleName = "smoke",
    data: str | Path | None = None,
    output: str | Path | None = None,
    own: Brought = Brought(),
    seed: int = 0,
    overwrite: bool = False,
    force: bool = False,
) -> Reproduction:
    """Run a recipe on a model (None for those that no model takes part in).

    `scale` is smoke (a look whether it runs), small (minutes to an hour on a small model) or full
    (as published). `data` names the directory of data sets; `prompts` (a file) and `contrast` (a
    contrast or its source) are what some recipes want the user to bring, and `judge` (an endpoint,
    or a model by LocalChat) rates texts where a recipe has them rated. `output` names a run
    directory, in which a run that was interrupted goes on. `force` runs a recipe also where the
    hardware is not what it needs.
    """
    recipe = find_recipe(name)
    brought = {"prompts": own.prompts, "contrast": own.contrast}
    check_used(recipe, scale, {"judge": own.judge})
    source = None if data is None else str(data)
    parts = recipe.parts(scale)
    check_ready(recipe, scale, source, brought)
    model, layers, heads = None, None, 0
    if language_model is None and recipe.study not in WITHOUT_MODEL:
        raise TrimtabError(f"{name} runs on a model: name one")
    if language_model is not None and recipe.study not in WITHOUT_MODEL:
        identity = language_model.identity
        size = sum(p.numel() for p in language_model.model.parameters()) / 1e9
        check_needs(recipe, identity.name, size, force)
        model = language_model.described
        layers, heads = language_model.anatomy.layers, language_model.anatomy.heads
    resolved = {part: resolve(args, brought, layers, heads) for part, args in parts.items()}
    config = {
        "recipe": recipe.name,
        "study": recipe.study,
        "scale": scale,
        "parts": described(resolved),
        "seed": seed,
        "model": model,
        **({} if own.judge is None else {"judge": own.judge.name}),
    }
    run = Run(output, config, overwrite)
    if overwrite and run.path is not None:
        run.begin()
        shutil.rmtree(run.path / "parts", ignore_errors=True)
    found, used = {}, {}
    with _left_in_order(run), progress(recipe.name, len(resolved)) as advance:
        for part, args in resolved.items():
            kept = None if run.path is None else run.path / "parts" / (_file(part) or "all")
            shared = {"data": source, "seed": seed, "output": kept, "judge": own.judge}
            if language_model is None:
                found[part], used[part] = run_study(recipe.study, None, args, **shared), Used()
            else:
                with metered(language_model) as took:
                    found[part] = run_study(recipe.study, language_model, args, **shared)
                used[part] = took
            run.begin()
            advance(1)
    seconds = round(sum(one.seconds for one in used.values()), 2)
    done = Reproduction(recipe, scale, model, found, used, seconds)
    if run.path is not None:
        run.finish(done.as_json(), lambda environment: reproduction_page(done, run, environment))
    return done


@contextmanager
def _left_in_order(run: Run) -> Iterator[None]:
    """A run that fails with nothing done leaves no directory; one with some work done, on which a
    later call goes on, is known as a run by its configuration."""
    made = run.path is not None and not run.path.exists()
    try:
        yield
    except BaseException:
        if run.path is not None:
            _remove_empty(run.path if made else run.path / "parts")
            with suppress(TrimtabError, OSError):  # what went wrong before is said
                if (run.path / "parts").exists():
                    run.begin()
        raise


def _remove_empty(path: Path) -> None:
    """Remove a directory if there are only such directories in it, and locks."""
    if not path.is_dir():
        return
    for inner in path.iterdir():
        _remove_empty(inner)
    if all(file.name == ".lock" for file in path.iterdir()):
        (path / ".lock").unlink(missing_ok=True)
        path.rmdir()


def check_used(recipe: Recipe, scale: str, given: Mapping[str, Any]) -> None:
    """Refuse options, those of `given` that are not None, that have no part in a recipe at a
    scale."""
    for name, value in given.items():
        if value is None or name in options_of(recipe, scale):
            continue
        elsewhere = [one for one in SCALES if name in options_of(recipe, one)]
        hint = "leave it out"
        if elsewhere:
            hint = f"scale {' and '.join(elsewhere)} takes it"
        elif name == "contrast" and recipe.study in ANALYSES:
            hint += f"; trimtab analyse {recipe.study} runs the same on yours"
        raise TrimtabError(
            f"{recipe.name} at scale {scale} has no use for --{name.replace('_', '-')}: {hint}"
        )


def options_of(recipe: Recipe, scale: str) -> set[str]:
    """What a user may say of a recipe at a scale, beside how the model is held."""
    takes = inspect.signature(find_study(recipe.study)).parameters
    brought = brought_at(recipe, scale)
    used = {*brought, *(name for name in ("seed", "judge") if name in takes)}
    if recipe.data_at(scale) or brought:  # a contrast that is brought may be task:NAME
        used.add("data")
    if recipe.study not in WITHOUT_MODEL:
        used |= {"model", "force"} if recipe.needs else {"model"}
    return used


def check_ready(recipe: Recipe, scale: str, data: str | None, brought: Mapping[str, Any]) -> None:
    """Stop before a model is loaded where something is missing that the recipe runs on, or brought
    that it does not run on."""
    check_used(recipe, scale, brought)
    check_brought(recipe, scale, brought)
    check_data(recipe, scale, data)


def _same(ours: str, published: str) -> bool:
    """Whether two names mean one model: `meta-llama/Llama-2-7b-chat-hf` is LLaMA2-7B-Chat."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in (ours, published)]
    return plain[1] in plain[0]


def _file(part: str) -> str:
    """A part's name as that of a directory."""
    return re.sub(r"[^\w-]+", "-", part).strip("-")


# -- the page -------------------------------------------------------------------------------------


def reproduction_page(done: Reproduction, run: Run, environment: dict[str, Any]) -> str:
    """The paper's figures beside ours, pictures, tables of each part, cost, differences."""
    recipe, model = done.recipe, done.model
    where = "no model" if model is None else f"{model['name']}; {model_line(model)}"
    blocks: list[Table | Picture] = [*beside_paper(done), *_pictures(done)]
    for part, found in done.found.items():
        blocks += [_named(table, part) for table in found.tables]
    if model is not None:
        blocks.append(_cost(done))
    return run_page(
        run,
        environment,
        f"{recipe.paper}, {recipe.item}",
        f"{recipe.shows} {where}; scale {done.scale}; {done.seconds:g} seconds",
        blocks,
        notes=done.notes,
    )


def beside_paper(done: Reproduction) -> list[Table]:
    """The paper's figures and ours, row by row; what the paper says in words; and whether that is
    found here."""
    recipe, ours = done.recipe, done.values
    name = "theory" if done.model is None else done.model["name"]
    columns = list(dict.fromkeys(
        [column for one in recipe.published for row in one.rows.values() for column in row]
        + [column for row in ours.values() for column in row]
    ))  # fmt: skip
    unit = next((one.unit for one in recipe.published if one.rows), "")
    labels = dict.fromkeys([*(row for one in recipe.published for row in one.rows), *ours])
    rows: list[list[Any]] = []
    for label in labels:
        for one in recipe.published:
            if label in one.rows:
                cells = [one.rows[label].get(column, "") for column in columns]
                rows.append([label, f"paper, {one.model}", *cells])
        if label in ours:
            found = ours[label]
            shown = [found[c].shown(unit) if c in found else "" for c in columns]
            rows.append([label, f"ours, {name}", *shown])
    tables = []
    if rows:
        note = "In %." if unit else ""
        both = any(one.rows for one in recipe.published)
        title = "The paper's figures and ours" if both else "Our figures"
        tables.append(Table(title, ["", "whose", *columns], rows, note))
    says = [[one.model, one.says] for one in recipe.published if one.says]
    if says:
        tables.append(Table("What the paper says", ["model", "finding"], says))
    return [*tables, *verdicts(recipe, ours, done.scale)]


def _pictures(done: Reproduction) -> list[Picture]:
    """The pictures of all parts, told apart by their names."""
    return [
        replace(
            picture,
            name=f"{_file(part).lower()}-{picture.name}" if part else picture.name,
            title=f"{part}: {picture.title}" if part else picture.title,
        )
        for part, found in done.found.items()
        for picture in found.pictures
    ]


def _named(table: Table, part: str) -> Table:
    return replace(table, title=f"{part}: {table.title}") if part else table


def _cost(done: Reproduction) -> Table:
    rows: Sequence[Sequence[Any]] = [
        [
            part or "all",
            f"{used.seconds:.1f}",
            f"{used.tokens:,}",
            "" if used.peak_bytes is None else f"{used.peak_bytes / 1e9:.2f} GB",
        ]
        for part, used in done.used.items()
    ]
    note = "Tokens that ran through the whole model; memory above what was in use before."
    return Table("What it took", ["part", "seconds", "tokens", "peak memory"], rows, note)
