"""What --overwrite replaces: runs, and of those the files that a run makes; and what the lines of a
run must have."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import language_model, refused_in_one_line
from trimtab import TrimtabError
from trimtab.cli.common import refuse_holding
from trimtab.evaluation.evaluation import evaluate
from trimtab.reports import run as runs_module
from trimtab.reports.run import Run
from trimtab.sweeps.rows import TaskRows

#: A run that one process has alone.
alone = partial(Run, alone=True)
CONFIG: dict[str, Any] = {"tasks": ["copa"], "limit": 4}
OTHER: dict[str, Any] = {"tasks": ["copa"], "limit": 5}
BOTH = pytest.mark.parametrize("kind", [alone, Run])

FOREIGN: dict[str, dict[str, str]] = {
    "own files": {
        "config.json": '{"mine": 1}',
        "results.json": "{}",
        "report.html": "mine",
        "pictures/holiday.png": "mine",
        "records/vinyl.jsonl": '{"record": "vinyl"}\n',
    },
    "a model": {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
    "a model with an environment": {
        "config.json": '{"model_type": "llama"}',
        "environment.json": json.dumps(runs_module.environment()),
    },
    "no config": {"report.html": "mine"},
    "a note": {"notes.txt": "mine"},
    "another's environment": {"config.json": "{}", "environment.json": '{"PATH": "/bin"}'},
    "an environment alone": {"environment.json": '{"PATH": "/bin"}'},
    "a list": {"config.json": "[]", "environment.json": json.dumps(runs_module.environment())},
}


def record(index: int, **more: Any) -> dict[str, Any]:
    return {
        "steering": None, "task": "copa", "protocol": "", "index": index, "id": str(index),
        "values": {"accuracy": 1.0}, "seconds": 0.0,
    } | more  # fmt: skip


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work(kind: Any, folder: Path, config: dict[str, Any], overwrite: bool = False) -> None:
    """A small run of either kind."""
    run = kind(folder, config, overwrite)
    if kind is alone:
        with run:
            run.append([record(0)])
            run.finish({})
    else:
        run.keep("unsteered-test", [record(0)])
        run.finish({})


@BOTH
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_run_is_not_overwritten(
    kind: Any, files: dict[str, str], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "own", files)
    before = listing(folder)
    refused_in_one_line(
        lambda: kind(folder, CONFIG, True),
        "own is not a run's directory: overwriting replaces only those",
    )
    assert listing(folder) == before


@BOTH
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_nor_is_it_advised(kind: Any, files: dict[str, str], tmp_path: Path) -> None:
    folder = fill(tmp_path / "own", files)
    if list(files) == ["notes.txt"]:  # nothing in the way
        work(kind, folder, CONFIG)
        assert (folder / "notes.txt").read_text() == "mine"
        return
    before = listing(folder)
    with pytest.raises(TrimtabError) as caught:
        kind(folder, CONFIG)
    assert "--overwrite" not in str(caught.value)
    assert {k: v for k, v in listing(folder).items() if k != ".lock"} == before


@BOTH
def test_a_run_an_empty_and_an_absent_directory_are_overwritten(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        work(kind, tmp_path / name, CONFIG, overwrite=True)
        refused_in_one_line(lambda name=name: kind(tmp_path / name, OTHER), "--overwrite")
        work(kind, tmp_path / name, OTHER, overwrite=True)
        assert json.loads((tmp_path / name / "config.json").read_text()) == OTHER


@BOTH
def test_a_run_of_an_older_version_and_one_that_was_killed_as_it_began(
    kind: Any, tmp_path: Path
) -> None:
    environment = {"environment.json": json.dumps(runs_module.environment())}
    for name, files in (
        ("old", {**environment, "config.json": json.dumps(CONFIG)}),
        ("killed", environment),
    ):
        work(kind, fill(tmp_path / name, files), OTHER, overwrite=True)
        assert json.loads((tmp_path / name / "config.json").read_text()) == OTHER


def test_of_a_run_only_what_a_run_makes_goes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    work(Run, folder, CONFIG)
    own = {
        "pictures/holiday.png": "mine",
        "pictures/holiday.svg": "mine",
        "records/vinyl.jsonl": '{"record": "vinyl"}\n',
        "records/list.jsonl": "[1]\n",
        "records/empty.jsonl": "",
        "notes.txt": "mine",
    }
    made = ("pictures/heatmap.png", "pictures/scores-heads.svg", "pictures/a-part-tokens.png",
            "pictures/figure-b1.svg", "records/00003-validation.jsonl",
            "records/caa--30-plain-text.jsonl", "records/unsteered-test.jsonl")  # fmt: skip
    fill(folder, own | dict.fromkeys(made, "damaged"))
    Run(folder, OTHER, overwrite=True).begin()
    left = listing(folder)
    assert set(left) - {".lock"} == {*own, "config.json", "environment.json"}
    assert all(left[name] == text.encode() for name, text in own.items())


def test_every_picture_is_known_by_its_name() -> None:
    """Each name that a Picture is made with in the sources is one that overwriting takes away."""
    names = []
    for file in Path(tt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Picture":
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    names.append(name.value)
    assert len(names) > 20
    assert set(names) <= {*runs_module.PICTURES, "scores-by-head"}


def test_a_curve_is_overwritten_and_nothing_else(tmp_path: Path) -> None:
    def check(folder: Path, overwrite: bool) -> Callable[[], None]:
        return lambda: refuse_holding(folder, "curve.json", overwrite, {"curves", "model"})

    for name, files in FOREIGN.items():
        refused_in_one_line(check(fill(tmp_path / name, files), True), "not a run's directory")
    own = fill(tmp_path / "own", {"curve.json": "[]"})
    refused_in_one_line(check(own, True), "not a run's directory")
    refused_in_one_line(check(own, False), "choose another directory$")
    ours = fill(tmp_path / "ours", {"curve.json": '{"curves": [], "model": {}}'})
    refused_in_one_line(check(ours, False), "or pass --overwrite$")
    check(ours, True)()
    check(tmp_path / "absent", True)()


# -- lines without a checksum ---------------------------------------------------------------------


def edit(file: Path, number: int, **changes: Any) -> None:
    lines = file.read_text().splitlines()
    row = json.loads(lines[number])
    row.pop("checksum", None)
    lines[number] = json.dumps(row | changes)
    file.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_line_goes_without_its_checksum(tmp_path: Path, number: int) -> None:
    with alone(tmp_path / "run", CONFIG) as run:
        run.append([record(i) for i in range(3)])
    edit(tmp_path / "run" / "records.jsonl", number)
    refused_in_one_line(
        lambda: alone(tmp_path / "run", CONFIG), f"line {number + 1} is damaged: .*no"
    )


def test_no_part_goes_without_its_checksums(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", CONFIG)
    run.keep("unsteered-test", [record(0), record(1)])
    for number in (0, 1):
        edit(tmp_path / "run" / "records" / "unsteered-test.jsonl", number)
        refused_in_one_line(lambda: run.kept("unsteered-test"), "ha(s|ve) no checksum")


def test_old_runs_go_on_as_old_runs(tmp_path: Path) -> None:
    with alone(tmp_path / "run", CONFIG) as run:
        run.append([record(0), record(1)])
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(runs_module.environment()))
    edit(tmp_path / "run" / "records.jsonl", 0)
    for i in (2, 3):  # the second time after it has been gone on with by this version
        with alone(tmp_path / "run", CONFIG) as run:
            assert len(run.records) == i
            run.append([record(i)])
    file.write_text("{")
    refused_in_one_line(lambda: alone(tmp_path / "run", CONFIG), "environment.json is damaged")


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 1e308},
        {"figures": {"x": 1e308}},
        {"figures": {"x": 1.0}, "values": {}},
        {"figures": {"x": 1e308}, "values": {}, "n": 1},
        {"figures": {"x": 1.0}, "n": 1},
        {"values": {"refused": 1e308}},
    ],
)
def test_an_old_record_out_of_all_bounds(changes: dict[str, Any], tmp_path: Path) -> None:
    lm = language_model("llama")
    rows = fill(tmp_path, {"own.jsonl": "".join(f'{{"prompt": "Say {i}"}}\n' for i in range(3))})

    def evaluated() -> Any:
        return evaluate(
            lm, f"refusal:{rows / 'own.jsonl'}", output=tmp_path / "run", max_new_tokens=2
        )

    evaluated()
    (tmp_path / "run" / "environment.json").write_text(json.dumps(runs_module.environment()))
    if changes.get("values"):
        known = json.loads((tmp_path / "run" / "records.jsonl").read_text().splitlines()[0])
        changes = {"values": dict.fromkeys(known["values"], 1e308)}
    edit(tmp_path / "run" / "records.jsonl", 0, **changes)
    refused_in_one_line(evaluated, "line 1 is damaged")


# -- shared rows ----------------------------------------------------------------------------------


def test_rows_are_the_same_in_tasks_of_any_kind_and_with_any_blanks(tmp_path: Path) -> None:
    lm: tt.LanguageModel = language_model("llama")

    def asks(name: str, prompts: list[Any]) -> str:
        rows = "".join(json.dumps({"prompt": one}) + "\n" for one in prompts)
        return f"refusal:{fill(tmp_path, {name: rows}) / name}"

    def pairs(name: str, prompts: list[Any]) -> str:
        rows = [
            {"prompt": one, "positive": " yes", "negative": " no", "part": part}
            for one in prompts
            for part in ("train", "validation", "test")
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return f"contrast:{fill(tmp_path, {name: text}) / name}"

    def bench(task: str, other: str) -> TaskRows:
        return TaskRows(lm, task, validation_task=other, max_new_tokens=2)

    own = ["Say it", "Tell me more"]
    same = [" Say  it\n", "Another"]
    chat = [[{"role": "user", "content": "Say it "}], "Another"]
    for other in (same, chat):
        for task, validation in (
            (asks("a.jsonl", own), pairs("b.jsonl", other)),
            (pairs("c.jsonl", own), asks("d.jsonl", other)),
            (asks("e.jsonl", own), asks("f.jsonl", other)),
            (pairs("g.jsonl", own), pairs("h.jsonl", other)),
        ):
            refused_in_one_line(lambda t=task, v=validation: bench(t, v), "1 of the 2 rows of .*")
    assert bench(asks("i.jsonl", own), pairs("j.jsonl", ["Sayit", "x"])).rows("test") == 2
