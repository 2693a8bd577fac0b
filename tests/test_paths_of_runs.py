"""Run directories by any name: each is made where it was asked for, or refused in one line with
nothing half-made. And a password in a storage's URL goes nowhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import add, few_quick, language_model, refused_in_one_line, steer
from trimtab.evaluation.evaluation import evaluate
from trimtab.reports.run import Run
from trimtab.sweeps.storage import open_storage
from trimtab.sweeps.sweep_method import sweep

SECRET = "s3cr3t"


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    words, draw = ["happy", "sad", "map", "ship", "rain", "wheel"], random.Random(0)
    lines = []
    for i in range(12):
        positive, negative = draw.sample(words, 2)
        row = {"prompt": f"Today {i}", "positive": f" {positive}", "negative": f" {negative}"}
        lines.append(json.dumps(row | {"part": ("train", "validation", "test")[i % 3]}))
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return f"contrast:{path}"


def swept(lm: tt.LanguageModel, task: str, output: Path | None, **more: Any) -> Any:
    found = sweep(lm, "caa", task, {"layer": (0, 1)}, output=output, **more).as_json()
    return found["best"]


#: Names in which a URL, a format or a shell would read something else.
NAMES = [
    "a?b=1",
    "100%41",
    "run{b}",
    "{}",
    "{SCHEMA_VERSION}",
    "a#b",
    "a b",
    "a&mode=memory",
    "file:a",
    ":memory:",
    "é中",
    "a@b:c",
    "%2e%2e",
    "a'b\"c",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", few_quick(NAMES, "a?b=1", ":memory:"))
def test_a_sweep_lies_where_it_was_asked_for(
    lm: tt.LanguageModel, task: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = swept(lm, task, Path(name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "study.db").stat().st_size > 0
    assert swept(lm, task, Path(name)) == first
    assert [path.name for path in tmp_path.iterdir()] == [name]


#: Names that cannot be those of a run, or that no file system takes.
WRONG = ["a\udce9b", "a\0b", "x" * 300, "/".join(["y" * 200] * 25)]


@pytest.mark.parametrize("name", WRONG, ids=["surrogate", "nul", "long name", "long path"])
def test_a_name_that_cannot_be_is_refused_with_nothing_made(
    lm: tt.LanguageModel, task: str, name: str, tmp_path: Path
) -> None:
    output = Path(f"{tmp_path}/{name}")
    for make in (
        lambda: Run(output, {}, alone=True),
        lambda: Run(output, {}),
        lambda: swept(lm, task, output),
        lambda: evaluate(lm, task, output=output),
    ):
        refused_in_one_line(make, "name another directory|too long")
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_the_configuration_that_is_no_text(lm: tt.LanguageModel, tmp_path: Path) -> None:
    file = Path(f"{tmp_path}/a\udce9b.txt")
    file.write_text("The ship left the harbour.")
    output = tmp_path / "run"
    refused_in_one_line(lambda: evaluate(lm, f"perplexity:{file}", output=output), "not UTF-8 text")
    assert not (output / "records.jsonl").exists()
    assert evaluate(lm, f"perplexity:{file}").results  # without a run nothing is written
    steering = {"a\udce9": steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size)))}
    (tmp_path / "text.txt").write_text("The ship left the harbour.")
    refused_in_one_line(
        lambda: evaluate(
            lm, f"perplexity:{tmp_path / 'text.txt'}", steering=steering, output=tmp_path / "other"
        ),
        "not UTF-8 text",
    )


# -- what is interrupted --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, tt.TrimtabError, MemoryError])
def test_what_ends_before_it_begins_leaves_nothing(
    lm: tt.LanguageModel, task: str, error: type[BaseException], tmp_path: Path
) -> None:
    def end(*arguments: Any) -> None:
        raise error

    handle = lm.anatomy.body.register_forward_pre_hook(end)
    try:
        with pytest.raises(error):
            evaluate(lm, task, output=tmp_path / "run")
        with pytest.raises(error):
            swept(lm, task, tmp_path / "run")
    finally:
        handle.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_empty_directory_is_begun(lm: tt.LanguageModel, task: str, tmp_path: Path) -> None:
    for names in ([], [".lock"], [".lock", "environment.json"]):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        assert swept(lm, task, folder) == swept(lm, task, None)


# -- passwords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://user:{SECRET}@127.0.0.1:1/name",
        f"mysql+pymysql://user:{SECRET}@127.0.0.1:1/name",
        f"nosuch://user:{SECRET}@host/name",
        f"postgresql+psycopg://user:{SECRET}{{b}}@127.0.0.1:1/name",
        f"postgresql+psycopg://127.0.0.1:1/name?password={SECRET}",
        f"sqlite:////nowhere/at/all.db?key={SECRET}",
        f"://user:{SECRET}@host",
        f"postgresql://user:{SECRET}@host:port/name",
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(
    lm: tt.LanguageModel, task: str, url: str, tmp_path: Path
) -> None:
    refused_in_one_line(lambda: open_storage(url), f"^(?!.*{SECRET}).*cannot open the storage")
    refused_in_one_line(
        lambda: swept(lm, task, tmp_path / "run", storage=url),
        f"^(?!.*{SECRET}).*cannot open the storage",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_storage_with_a_secret_is_written_nowhere(
    lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}?timeout=60&cached_statements=12345"
    swept(lm, task, tmp_path / "run", storage=url)
    assert (tmp_path / "study.db").exists()
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert b"12345" not in file.read_bytes() or file.suffix == ".safetensors", file
            assert b"sqlite" not in file.read_bytes(), file
