"""Groups of options: as arguments in Python, in records of runs, on the command line."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import few_quick
from trimtab.cli.app import COMMANDS, build
from trimtab.cli.making import prepared
from trimtab.options import (
    Answering,
    Choosing,
    Comparing,
    Evaluated,
    Rows,
    Search,
    flat,
    option,
    record,
)
from trimtab.papers.analyses import ANALYSES
from trimtab.papers.studies import STUDIES
from trimtab.strength import concept_curve, curve, generate_contrast

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "trimtab"
#: Every command.
PAGES = [
    name
    for name in json.loads((HERE / "golden" / "help.json").read_text())
    if name not in ("trimtab", "fit", "sweep", "strength", "analyse")  # which only lead on
]


# -- in Python ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    metric: str | None = option("What counts.", None)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner(metric="accuracy")
    answering: Answering = Answering(seed=5)


@flat
def work(
    task: str, rows: Rows = Rows(test_limit=100), *, outer: Outer = Outer(), k: int = 1
) -> Any:
    return task, rows, outer, k


def test_fields_are_keywords() -> None:
    """Fields that are not given are those of the group that stands in the signature."""
    assert work("copa") == ("copa", Rows(test_limit=100), Outer(), 1)
    _, rows, outer, k = work("copa", limit=4, seed=2, k=3)
    assert rows == Rows(limit=4, test_limit=100)
    assert outer == Outer(answering=Answering(seed=2))
    assert k == 3
    assert work("copa", rows=Rows(limit=2), test_limit=7)[1] == Rows(limit=2, test_limit=7)
    assert work("copa", Rows(limit=2), test_limit=7)[1] == Rows(limit=2, test_limit=7)
    assert work("copa", outer=Outer(inner=Inner(metric="f1")), seed=1)[2].inner.metric == "f1"
    with pytest.raises(TypeError, match="unexpected keyword argument 'limt'"):
        work("copa", limt=3)
    assert {"rows", "outer", "limit", "test_limit", "metric", "seed"} <= set(
        inspect.signature(work).parameters
    )


@dataclass
class Judge:
    """A live object that happens to be a dataclass with a field that a group has too."""

    limit: int = 0


@dataclass(frozen=True, kw_only=True)
class Judged:
    judge: Any = None


@flat
def judge(judged: Judged = Judged(), rows: Rows = Rows()) -> Any:
    return judged.judge, rows


def test_what_is_in_a_group_is_handed_over_as_it_is() -> None:
    wise = Judge()
    given, rows = judge(judge=wise, limit=3)
    assert given is wise
    assert (wise.limit, rows.limit) == (0, 3)
    assert judge(judged=Judged(judge=wise), limit=3)[0] is wise


def test_a_path_is_text_and_a_protocol_alone_is_one_of_several() -> None:
    assert Rows(data=Path("sets")).data == "sets"  # type: ignore[arg-type]
    assert Evaluated(protocol="paper").protocol == ("paper",)  # type: ignore[arg-type]
    with pytest.raises(tt.TrimtabError, match="limit of test rows must be 1 or more, not 0"):
        Rows(test_limit=0)


@pytest.mark.parametrize(
    "function",
    [tt.sweep, tt.compare, tt.evaluate, curve, concept_curve, generate_contrast,
     *ANALYSES.values(), *STUDIES.values()],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_no_field_stands_twice_in_a_signature(function: Any) -> None:
    names: list[str] = []

    def add(group: Any) -> None:
        for item in fields(group):
            value = getattr(group, item.name)
            names.append(item.name)
            if is_dataclass(value):
                add(value)

    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        names.append(parameter.name)
        if is_dataclass(parameter.default):
            add(parameter.default)
    assert len(names) == len(set(names))


def test_records_have_the_keys_that_runs_always_had() -> None:
    choosing = {"protocol", "metric", "better", "max_cost"}
    answering = {"seed", "batch_size", "max_new_tokens"}
    assert record(Rows()) == {}
    assert record(Choosing()).keys() == choosing
    assert record(Answering()).keys() == answering
    assert record(Search()).keys() == {"search", "trials", "oracle"}
    compared = {"trials", "kl", "capability", "capability_limit", "timed"}
    assert record(Comparing()).keys() == compared
    assert record(Evaluated()).keys() == {"part", "limit"}


def test_no_function_takes_more_than_ten_parameters() -> None:
    """A group counts as one; what makes a function of another counts as the other does."""
    many = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [each.arg for each in given.posonlyargs + given.args + given.kwonlyargs]
                names += ["*"] * bool(given.vararg) + ["**"] * bool(given.kwarg)
                if len([name for name in names if name not in ("self", "cls")]) > 10:
                    many.append(f"{path.name}:{node.lineno} {node.name}")
    assert many == []


# -- on the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("command", PAGES)
def test_every_page_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = page(command, capsys)
    assert f"Usage: trimtab {command}" in said
    assert f"Example: trimtab {command}" in said


def page(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    build(command.split())([*command.split(), "--help"])
    return " ".join(capsys.readouterr().out.split())


def command(first: str = "", /, *, rows: Rows = Rows(test_limit=7), outer: Outer = Outer()) -> Any:
    """Says what it was given."""
    return first, rows, outer


def run(*words: str) -> Any:
    app = build([])
    app.command(prepared(command), name="command")
    return app(["command", *words])


def test_defaults_are_those_of_the_object_in_the_signature() -> None:
    from cyclopts import RepeatArgumentError

    assert run() == ("", Rows(test_limit=7), Outer())
    assert run("--limit", "3", "--metric", "f1", "x") == (
        "x",
        Rows(limit=3, test_limit=7),
        Outer(inner=Inner(metric="f1")),
    )
    assert isinstance(run("--limit=3")[1], Rows)
    with pytest.raises(RepeatArgumentError):
        run("--limit", "3", "--limit", "4")
    assert run("--test-limit", "0")[1].test_limit is None


@pytest.mark.parametrize("words", ["--limit 1.5", "--seed -1", "--first x", "--rows.limit 3"])
def test_what_is_no_such_value_or_option_is_refused(words: str) -> None:
    from cyclopts import CycloptsError

    with pytest.raises(CycloptsError):
        run(*words.split())


#: What a command line may load of these, which take long.
HEAVY = ("torch", "transformers", "matplotlib", "sklearn", "optuna")
LOADED = {
    "--help": "",
    **{f"{name} --help": "" for name in COMMANDS if name not in ("fit", "sweep", "analyse")},
    **{f"strength {name} --help": "" for name in ("curve", "budget", "theory", "contrast")},
    "models": "",
    "evaluate --nosuch": "",
    "dance": "",
    "fit --help": "torch transformers sklearn",
    "fit caa --help": "torch transformers sklearn",
    "sweep caa --help": "torch transformers sklearn",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", few_quick(LOADED, "--help", "evaluate --help", "models", "dance", "fit caa --help")
)
def test_a_page_loads_no_more_than_it_needs(words: str) -> None:
    code = (
        "import sys\nfrom trimtab.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        f"print('loaded', *[name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True
    )
    loaded = ran.stdout.rpartition("loaded")[2].split()
    assert set(loaded) <= set(LOADED[words].split())


@pytest.mark.slow
@pytest.mark.parametrize("shell", few_quick(["bash", "zsh", "fish"], "bash"))
def test_completion_knows_commands_and_options(shell: Any) -> None:
    script = build(None).generate_completion(shell=shell)
    for word in (*COMMANDS, "austeer", "heatmap", "budget", "clamp-sign", "test-limit"):
        assert word in script
