"""What a recipe does with what the user says: every option has a use, or is refused; inputs are
checked first, and a run that fails leaves nothing but what was done."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import trimtab as tt
from commands import Command, home, listing, refused, trimtab, work
from helpers import language_model
from trimtab.evaluation.tasks import data as task_data
from trimtab.papers import recipe as recipes_file
from trimtab.papers import studies
from trimtab.papers.recipe import SCALES, Recipe, check_data, find_recipe, read_recipe, recipes
from trimtab.papers.reproduction import check_ready, check_used, reproduce
from trimtab.papers.result import StudyResult
from trimtab.papers.studies import WITHOUT_MODEL, find_study

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

GIVEN = {"prompts": "p.jsonl", "contrast": "c.jsonl", "data": "d", "seed": 3, "force": True}
GIVEN |= {"model": "m", "judge": "chat:j"}


def uses(one: Recipe, scale: str) -> set[str]:
    """What a recipe has a use for, from its file and the signature of its study alone."""
    parts = json.dumps(one.parts(scale))
    used = {name for name in ("prompts", "contrast") if f"{{{name}}}" in parts}
    own = one.scale(scale).data
    if used or (one.data if own is None else own):
        used.add("data")
    takes = inspect.signature(find_study(one.study)).parameters
    used |= {name for name in ("seed", "judge") if name in takes}
    if one.study not in WITHOUT_MODEL:
        used.add("model")
    if one.study not in WITHOUT_MODEL and one.needs:
        used.add("force")
    return used


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [one.name for one in recipes()])
def test_every_option_is_used_or_refused(name: str, scale: str) -> None:
    one = find_recipe(name)
    for option, value in GIVEN.items():
        check_used(one, scale, {option: None})
        if option in uses(one, scale):
            check_used(one, scale, {option: value})
            continue
        with pytest.raises(tt.TrimtabError) as caught:
            check_used(one, scale, {option: value})
        said = str(caught.value)
        assert said.startswith(f"{name} at scale {scale} has no use for --{option}: ")
        assert "\n" not in said
    contrast = {"prompts": None, "contrast": "c.jsonl"}
    if "contrast" not in uses(one, scale):
        with pytest.raises(tt.TrimtabError, match="has no use for --contrast"):
            check_ready(one, scale, None, contrast)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "austeer-fig11 --model model --contrast pairs.jsonl",
            ["austeer-fig11 at scale smoke has no use for --contrast", "trimtab analyse scores"],
        ),
        (
            "ss-dial --model model --prompts p.jsonl",
            ["no use for --prompts", "scale full takes it"],
        ),
        ("strength-fig5 --model model", ["no use for --model"]),
        ("strength-fig5 --dtype bfloat16", ["no use for --dtype"]),
        ("strength-fig5 --data .", ["no use for --data"]),
        ("strength-fig5 --seed 1", ["no use for --seed"]),
        ("ss-norms --model model --data .", ["no use for --data"]),
        ("strength-figa4 --model model --force", ["no use for --force"]),
    ],
)
def test_the_command_refuses_in_one_line(
    trimtab: Command, work: Path, line: str, words: list[str]
) -> None:
    before = listing(work)
    refused(trimtab(f"reproduce {line} -o runs/one"), *words)
    assert listing(work) == before
    assert not Path("runs").exists()


# -- what is missing ------------------------------------------------------------------------------


def test_without_data_nothing_is_loaded_or_left(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)

    def unreachable(name: str, *rest: Any) -> None:
        raise tt.TrimtabError(f"{name} needs its file: name its directory with --data")

    monkeypatch.setattr(task_data, "_from_hub", unreachable)
    recipes_file._try_hub.cache_clear()
    for line in (
        "reproduce austeer-table12 --model nowhere.gguf -o runs/one",
        "reproduce strength-fig7 --scale small --model nowhere.gguf -o runs/one",
        "reproduce strength-figa4 --scale full --model nowhere.gguf -o runs/one",
    ):
        refused(trimtab(line), "--data")
        assert not Path("runs").exists()


def test_plain_text_that_suffices(tmp_path: Path) -> None:
    one = find_recipe("strength-fig7")
    check_data(one, "smoke", str(tmp_path))
    with pytest.raises(tt.TrimtabError, match="more plain text than comes with trimtab"):
        check_data(one, "small", str(tmp_path))
    (tmp_path / "webtext").mkdir()
    (tmp_path / "webtext" / "openwebtext_sentences.jsonl").write_text('{"text": "a"}\n')
    check_data(one, "small", str(tmp_path))


# -- a run that fails -----------------------------------------------------------------------------


def one_of(monkeypatch: pytest.MonkeyPatch, study: Callable[..., Any]) -> str:
    """A recipe of two parts that runs a study of ours."""
    about = {
        "name": "austeer-table0", "paper": "a paper", "item": "Table 0", "shows": "Something.",
        "study": "own", "each": {"first": {}, "second": {}},
        "scales": {"smoke": {}, "small": {}, "full": {}},
    }  # fmt: skip
    made = read_recipe(yaml.safe_dump(about), "table0.yaml")
    monkeypatch.setattr(recipes_file, "_every", lambda: {made.name: made})
    monkeypatch.setitem(studies.STUDIES, "own", study)
    return made.name


def test_a_run_that_did_nothing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(language_model: Any, *, output: Path | None = None) -> StudyResult:
        assert output is not None
        output.mkdir(parents=True)
        (output / ".lock").touch()
        raise tt.TrimtabError("no rows")

    name = one_of(monkeypatch, fails)
    lm = language_model("llama")
    for there in (False, True):
        target = tmp_path / str(there)
        if there:
            target.mkdir()
        for _ in range(2):  # the second try is as free as the first
            with pytest.raises(tt.TrimtabError, match="no rows"):
                reproduce(lm, name, output=target)
            assert target.exists() is there
            assert not there or not list(target.iterdir())


def test_a_run_with_some_work_done_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[bool] = []

    def written(language_model: Any, *, output: Path | None = None) -> StudyResult:
        assert output is not None
        output.mkdir(parents=True, exist_ok=True)
        (output / "contrast.jsonl").write_text("{}\n")
        if not ready:
            raise KeyboardInterrupt
        return StudyResult({})

    name, lm = one_of(monkeypatch, written), language_model("llama")
    with pytest.raises(KeyboardInterrupt):
        reproduce(lm, name, output=tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    assert (tmp_path / "run" / "parts" / "first" / "contrast.jsonl").exists()
    ready.append(True)
    assert set(reproduce(lm, name, output=tmp_path / "run").found) == {"first", "second"}
    reproduce(lm, name, output=tmp_path / "run", overwrite=True)
