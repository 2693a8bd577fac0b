"""Recipes of the papers' tables and figures: what each one runs, how large, and on what.

A recipe is a YAML file under data/recipes. It names a study (`studies.STUDIES`), its arguments at
three scales, what the paper found, and what ours does otherwise.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import TASKS, data_directory, source_file
from trimtab.files import user_path

ScaleName = Literal["smoke", "small", "full"]
SCALES: tuple[ScaleName, ...] = get_args(ScaleName)

#: `<27 of 32>` in an argument: the block as deep in the model at hand as block 27 of 32;
#: `<head 7 of 32>`: the head as far among its own.
_PLACE = re.compile(r"<(head )?(\d+) of (\d+)>")
#: `{prompts}` in an argument: a file that the user brings.
_BROUGHT = re.compile(r"{(\w+)}")
#: What a recipe that needs more plain text than trimtab has calls it among its data sets, and the
#: files that will do.
_PLAIN_TEXT = "plain text"
_TEXTS = ("wikitext2/raw_test_articles.jsonl", "webtext/openwebtext_sentences.jsonl")
#: Models that are this much smaller than a published one are not held to what it needs.
_NEARLY = 0.85


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Need(_Strict):
    """What a published model of so many billion parameters takes: GPU memory in GB."""

    model: str
    billions: float
    gpu_gb: float
    why: str = ""


class Published(_Strict):
    """What the paper found on one model: numbers by row and column, or a sentence."""

    model: str
    unit: Literal["", "%"] = ""
    rows: dict[str, dict[str, float | str]] = Field(default_factory=dict)
    says: str = ""


class Claim(_Strict):
    """A sentence of the paper, and how our figures tell whether it holds here.

    `ours` is the name of one of our rows (or a pattern of it), which is to lie `above` or `below`
    another one or a number, to be `like` it (within 10 % or its interval), or `between` two
    numbers. Rows of a part ("block 3, ...") are held against rows of the same part. It is held
    against ours at its `scales` alone: others may measure something else.
    """

    says: str
    ours: str
    above: float | str | None = None
    below: float | str | None = None
    like: float | str | None = None
    between: tuple[float, float] | None = None
    scales: tuple[ScaleName, ...] = SCALES


class Scale(_Strict):
    """Arguments of one scale; `only` takes some of the recipe's parts, `data` are other data sets
    than the recipe's, `note` is said in the report."""

    args: dict[str, Any] = Field(default_factory=dict)
    only: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    note: str = ""


class Scales(_Strict):
    smoke: Scale
    small: Scale
    full: Scale


class Recipe(_Strict):
    """One table or figure of a paper.

    `each` are parts that the study runs for one by one (tasks, methods), with what differs. `names`
    gives our rows the paper's names. `brings` says what the user brings, by the name that stands
    in braces in the arguments. `baseline` is the row of the unsteered model, from which figures
    that are held against the paper's are changes; `claims` are its findings in words.
    """

    name: str = Field(pattern=r"^[a-z]+-[a-z0-9-]+$")
    paper: str
    item: str
    shows: str
    study: str
    args: dict[str, Any] = Field(default_factory=dict)
    each: dict[str, dict[str, Any]] = Field(default_factory=dict)
    scales: Scales
    needs: tuple[Need, ...] = ()
    data: tuple[str, ...] = ()
    brings: dict[str, str] = Field(default_factory=dict)
    names: dict[str, str] = Field(default_factory=dict)
    published: tuple[Published, ...] = ()
    baseline: str | None = None
    claims: tuple[Claim, ...] = ()
    differences: tuple[str, ...] = ()

    def scale(self, name: str) -> Scale:
        """The arguments of a scale."""
        if name not in SCALES:
            raise TrimtabError(f"unknown scale {name!r}: known are {', '.join(SCALES)}")
        found: Scale = getattr(self.scales, name)
        return found

    def data_at(self, scale: str) -> tuple[str, ...]:
        """The data sets of a scale."""
        own = self.scale(scale).data
        return self.data if own is None else own

    def parts(self, scale: str) -> dict[str, dict[str, Any]]:
        """The arguments of each part at a scale, which has the last word; a recipe without parts
        has one, without a name."""
        chosen = self.scale(scale)
        every = self.each or {"": {}}
        unknown = [name for name in chosen.only or () if name not in every]
        if unknown:
            raise TrimtabError(f"{self.name}: scale {scale} has no part {unknown[0]!r} to take")
        return {
            name: {**self.args, **own, **chosen.args}
            for name, own in every.items()
            if chosen.only is None or name in chosen.only
        }


def recipes() -> list[Recipe]:
    """All recipes, AUSteer's first, tables and figures in the order of their numbers."""
    return list(_every().values())


def find_recipe(name: str) -> Recipe:
    """A recipe by its name; an unknown name is answered with the nearest ones."""
    every = _every()
    if name not in every:
        near = difflib.get_close_matches(name, every, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "trimtab reproduce --list has all"
        raise TrimtabError(f"unknown recipe {name!r}: {hint}")
    return every[name]


def read_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML; what is wrong with it is said in one line."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrimtabError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise TrimtabError(f"{where} is not a mapping of names to values")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "recipe"
        raise TrimtabError(f"{where}: {place}: {first['msg']}") from error


@cache
def _every() -> dict[str, Recipe]:
    folder = files("trimtab") / "data" / "recipes"
    found = {}
    for file in folder.iterdir():
        if file.name.endswith(".yaml"):
            recipe = read_recipe(file.read_text(encoding="utf-8"), file.name)
            if file.name != f"{recipe.name}.yaml":
                raise TrimtabError(f"{file.name} holds the recipe {recipe.name}")
            found[recipe.name] = recipe
    return {name: found[name] for name in sorted(found, key=_order)}


def _order(name: str) -> list[tuple[int, int, str]]:
    """austeer-table2 before austeer-table10, tables before figures."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part.replace("table", "a"))
        for part in re.split(r"(\d+)", name)
    ]


# -- what a run needs -----------------------------------------------------------------------------


def resolve(
    value: Any, brought: Mapping[str, Any], layers: int | None = None, heads: int = 0
) -> Any:
    """An argument with what the user brings (`{prompts}`) put in, and with the blocks and heads of
    a model of so many."""
    if isinstance(value, Mapping):
        return {key: resolve(one, brought, layers, heads) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(one, brought, layers, heads) for one in value]
    if not isinstance(value, str):
        return value
    alone = _BROUGHT.fullmatch(value)
    if alone and isinstance(brought.get(alone[1]), Contrast):
        return brought[alone[1]]
    text = _BROUGHT.sub(lambda found: str(brought.get(found[1])), value)
    place = _PLACE.fullmatch(text)
    if place is None or layers is None:
        return text
    every = heads if place[1] else layers
    return min(every - 1, int(place[2]) * every // int(place[3]))


def described(value: Any) -> Any:
    """Arguments for a configuration: a contrast by its name and digest."""
    if isinstance(value, Contrast):
        return {"name": value.name, "digest": value.digest}
    if isinstance(value, Mapping):
        return {key: described(one) for key, one in value.items()}
    return [described(one) for one in value] if isinstance(value, list | tuple) else value


def brought_at(recipe: Recipe, scale: str) -> list[str]:
    """What the user brings at a scale, by the options' names."""
    return list(dict.fromkeys(_BROUGHT.findall(str(recipe.parts(scale)))))


def check_brought(recipe: Recipe, scale: str, brought: Mapping[str, Any]) -> None:
    """Stop where a file is wanted that only the user can bring."""
    for name in brought_at(recipe, scale):
        if not brought.get(name):
            what = recipe.brings.get(name, "a file")
            raise TrimtabError(
                f"{recipe.name} at scale {scale} runs on what you bring: give --{name} FILE, {what}"
            )
        if isinstance(brought[name], Contrast):
            continue
        file = str(brought[name])
        if ":" not in file and not user_path(file).is_file():
            raise TrimtabError(f"--{name} {file}: there is no such file")


def check_data(recipe: Recipe, scale: str, data: str | None) -> None:
    """Stop before hours of work where a data set is neither among the user's nor on the hub."""
    directory = data_directory(data)
    for name in recipe.data_at(scale):
        if name == _PLAIN_TEXT:
            plain_text_file(data)
        elif directory is not None:
            missing = _missing(name, directory, data)
            if missing:
                raise TrimtabError(f"{recipe.name} needs {missing}, which is not in {directory}")
        elif name in TASKS:  # what is no task of ours lm-eval looks for
            _try_hub(name)


def _missing(name: str, directory: Path, data: str | None) -> str | None:
    """What of a data set is not in the user's directory."""
    task = TASKS.get(name)
    if task is None:
        return None if (directory / name).is_dir() else name
    sources = [task.test] if task.train is None else [task.test, task.train]
    return next((s.file for s in sources if source_file(s, data) is None), None)


@cache
def _try_hub(name: str) -> None:
    """Read the rows of a task, which are kept for later, or say what stands against it."""
    task = TASKS[name]
    task.rows("test", "paper", None)
    if task.train is not None:
        task.rows("train", "paper", None)


def plain_text_file(data: str | None) -> Path:
    """Plain text beside trimtab's own, in the user's directory: the first that is there."""
    directory = data_directory(data)
    there = [directory / name for name in _TEXTS] if directory is not None else []
    for path in there:
        if path.is_file():
            return path
    raise TrimtabError(
        "this takes more plain text than comes with trimtab: name a directory with "
        f"{' or '.join(_TEXTS)} by --data"
    )


def check_needs(recipe: Recipe, model: str, billions: float | None, force: bool = False) -> None:
    """Stop where a model as large as a published one meets too little GPU memory."""
    fitting = [n for n in recipe.needs if billions and n.billions * _NEARLY <= billions]
    if force or not fitting:
        return
    need = max(fitting, key=lambda one: one.billions)
    have = gpu_memory()
    if have < need.gpu_gb:
        why = f" ({need.why})" if need.why else ""
        raise TrimtabError(
            f"{recipe.name} on {model} needs {need.gpu_gb:g} GB of GPU memory{why} as on "
            f"{need.model}, and here are {have:.0f} GB: take a smaller model or a larger machine, "
            "or pass --force"
        )


def gpu_memory() -> float:
    """GB of memory of all CUDA devices together."""
    if not torch.cuda.is_available():
        return 0.0
    count = torch.cuda.device_count()
    return sum(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / 1e9


def billions_in(model: str) -> float | None:
    """Parameters, in 10^9, as a model's name or directory says; None where neither does."""
    path = user_path(model)
    if path.is_dir():
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return stored / 2e9 or None  # as if of two bytes each
    sizes: Sequence[str] = re.findall(r"(?<![a-zA-Z])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", path.name)
    return max(map(float, sizes)) if sizes else None
