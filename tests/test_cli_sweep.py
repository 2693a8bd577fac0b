"""`trimtab sweep` on a tiny model: what it prints, writes, searches and refuses."""

from __future__ import annotations

import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, home, listing, refused, trimtab, work
from helpers import write_pairs
from trimtab.cli.values import read_values
from trimtab.methods import METHODS
from trimtab.sweeps.space import Range
from trimtab.sweeps.sweep_method import sweep

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

QUICK = "--model model --task contrast:parts.jsonl --limit 4 --test-limit 4"


@pytest.fixture
def parts(work: Path) -> None:
    write_pairs(work / "parts.jsonl")


pytestmark = pytest.mark.usefixtures("parts", "undrawn")


def test_help_has_examples_and_the_methods_options(trimtab: Command) -> None:
    said = " ".join(trimtab("sweep austeer --help").text.split())
    assert "trimtab sweep austeer --model smollm2-135m-instruct --task copa --data DIR" in said
    for option in ("--k", "--alpha", "--site", "--no-oracle", "--workers", "--storage", "--seed"):
        assert option in said
    assert set(METHODS) <= set(trimtab("sweep --help").text.split())


def test_as_json(trimtab: Command) -> None:
    found = trimtab(
        f"sweep austeer {QUICK} --k 2,5 --alpha 1,8 --site heads --seed 0 -o r --json"
    ).json
    assert set(found["best"]) >= {"params", "validation", "test", "ci95"}
    assert set(found["oracle"]) == {"params", "test"}
    assert all(set(trial) >= {"params", "value", "n", "state"} for trial in found["trials"])
    lm = tt.load("model", device="cpu")
    expected = sweep(
        lm,
        "austeer",
        "contrast:parts.jsonl",
        {"k": (2, 5), "alpha": (1.0, 8.0)},
        fixed={"site": "heads"},
        limit=4,
        test_limit=4,
    ).as_json()
    for name in ("best", "oracle", "unsteered", "difference"):
        assert found[name] == json.loads(json.dumps(expected[name]))
    assert [t["params"] for t in found["trials"]] == [t["params"] for t in expected["trials"]]
    assert found == json.loads(Path("r/results.json").read_text())
    assert {path.name for path in Path("r").iterdir()} >= {
        "config.json",
        "environment.json",
        "records",
        "report.html",
        "best.safetensors",
    }
    steering = tt.Steering.load("r/best.safetensors")
    assert steering.hyperparameters["site"] == "heads"


def test_the_model_as_it_is_may_be_the_best(trimtab: Command) -> None:
    """k = 0 is a baseline that may be chosen, and no steering that could be kept."""
    said = trimtab(f"sweep austeer {QUICK} --k 0 --alpha 2 -o r").text
    assert said.endswith("r: report.html, results.json, pictures/, tables/\n")
    assert not Path("r/best.safetensors").exists()


def test_for_people_and_again(trimtab: Command) -> None:
    command = f"sweep caa {QUICK} --layer 0,1,-1 --alpha 2 -o r"
    said = trimtab(command).text
    assert "chosen on validation" in said
    assert "oracle: best on the test rows" in said
    assert "layer=" in said
    assert "r: report.html, results.json, best.safetensors" in said
    assert "[bold]" not in said
    assert trimtab(command).text == said  # nothing is run twice


@pytest.mark.slow
def test_draws_and_halving(trimtab: Command) -> None:
    drawn = f"sweep caa {QUICK} --layer 0:2 --alpha 0.1:10:log --search tpe --trials 5 --json"
    found = trimtab(drawn).json
    assert len(found["trials"]) == 5
    for trial in found["trials"]:
        assert trial["params"]["layer"] in (0, 1, 2)
        assert isinstance(trial["params"]["alpha"], float)
        assert 0.1 <= trial["params"]["alpha"] <= 10
    assert trimtab(f"{drawn} --no-oracle").json["oracle"] is None
    rows = "--model model --task contrast:parts.jsonl --limit 0 --test-limit 2"
    halved = trimtab(f"sweep caa {rows} --layer 0,1,2 --alpha -9,1,9 --search halving --json").json
    assert {trial["n"] for trial in halved["trials"]} <= {16, 20}


def test_the_papers_grid_is_searched_where_nothing_is_named(trimtab: Command) -> None:
    found = trimtab(f"sweep actadd {QUICK} --layer 1 --no-oracle --json").json
    assert [t["params"] for t in found["trials"]] == [{"alpha": a} for a in (0.5, 1.0, 2.0)]
    one = trimtab(f"sweep caa {QUICK} --layer 1 --alpha 2 --json").json
    assert [t["params"] for t in one["trials"]] == [{}]


@pytest.mark.slow
def test_two_workers(trimtab: Command) -> None:
    found = trimtab(f"sweep caa {QUICK} --layer 0,1,2 --alpha 1,2 --workers 2 -o r --json").json
    alone = trimtab(f"sweep caa {QUICK} --layer 0,1,2 --alpha 1,2 --json").json
    assert found["best"] == alone["best"]
    assert found["oracle"] == alone["oracle"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--k 4,x", ["k must be 0 or more, or all, not x"]),
        ("--k 4,,16", ["--k '4,,16': a value is empty"]),
        ("--k 1:50", ["k is a range, 1:50", "search with tpe"]),
        ("--k 1.5:50 --search tpe", ["--k 1.5:50: write whole numbers"]),
        ("--alpha 1:50:exp --search tpe", ["write LOW:HIGH"]),
        ("--alpha 5:1 --search tpe", ["goes from a number to a larger one"]),
        ("--alpha 0:1:log --search tpe", ["begins above 0"]),
        ("--k 4 --search random", ["'random' for --search", "halving"]),
        ("--k 2,4,8 --trials 2", ["the grid has 3 settings"]),
        ("--k 4,5 --metric nosuch", ["no metric 'nosuch'", "log_odds"]),
        ("--k 4,5 --storage nosuch://me:hush@host/db", ["cannot open the storage", "nosuch"]),
        ("--k 1000000,2000000", ["k is 1000000"]),
        ("--site nowhere,there --k 1", ["site is 'nowhere'"]),
        ("--site heads,nowhere --k 1", ["site is 'nowhere'"]),
        ("--k 4,5 --limit -1", ["--limit must be 1 or more"]),
        ("--k 4,5 --workers 2 --overwrite", ["--overwrite is for one worker"]),
        ("--k 4,5 --max-cost nan", ["a finite number of nats"]),
        ("--k 4,5 --better worse", ["'worse' for --better", "less"]),
        ("--k 4,5 --protocol nosuch", ["'nosuch' for --protocol", "paper"]),
        ("--k 4,5 --judge oracle", ["--judge oracle: known are phrases"]),
        ("--k 4,5 --judge chat:wise", ["needs --judge-url"]),
        ("--kk 4", ["unknown option", "Did you mean --k"]),
    ],
)
def test_mistakes_in_one_line(trimtab: Command, work: Path, options: str, words: list[str]) -> None:
    before = listing(work)
    base = re.sub(r"--limit \S+", "", QUICK) if "--limit" in options else QUICK
    said = refused(trimtab(f"sweep austeer {base} {options} -o r"), *words)
    assert "hush" not in said
    assert listing(work) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sweep", []),
        ("sweep nosuch --model model --task copa", ["nosuch"]),
        ("sweep caa --model model", ["--task"]),
        ("sweep caa --model model --task nosuch", ["nosuch"]),
        ("sweep caa --model model --task contrast:pairs.jsonl", ["no validation rows", "split"]),
        ("sweep caa --model model --task contrast:parts.jsonl --workers 2", ["--output"]),
        ("sweep caa --model model --task contrast:parts.jsonl --layer 98,99", ["98"]),
        ("sweep sta --model model --task contrast:parts.jsonl --p 0.1,0.2", ["sta needs sae"]),
        ("sweep caa --model model --task lm-eval:boolq", ["no validation rows"]),
    ],
)
def test_commands_that_cannot_be(
    trimtab: Command, work: Path, command: str, words: list[str]
) -> None:
    before = listing(work)
    ran = trimtab(command)
    if words:
        refused(ran, *words)
    assert ran.status == 2
    assert listing(work) == before


def test_directories_that_hold_something_else(trimtab: Command, work: Path) -> None:
    trimtab(f"sweep caa {QUICK} --layer 0,1 -o r").text  # noqa: B018
    before = listing(work)
    refused(trimtab(f"sweep caa {QUICK} --layer 0,2 -o r"), "differs in space", "--overwrite")
    refused(trimtab(f"sweep caa {QUICK} --layer 0,2 -o pairs.jsonl"), "is a file")
    assert listing(work) == before
    assert len(trimtab(f"sweep caa {QUICK} --layer 2 -o r --overwrite --json").json["trials"]) == 3


def test_a_task_without_validation_rows(trimtab: Command) -> None:
    Path("ask.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(3))
    )
    command = (
        "sweep caa --model model --task refusal:ask.jsonl --contrast parts.jsonl --layer 0,1 "
        "--max-new-tokens 2"
    )
    refused(trimtab(command), "no validation rows", "--validation-task")
    Path("tell.jsonl").write_text(json.dumps({"prompt": "Tell me"}))
    found = trimtab(f"{command} --validation-task refusal:tell.jsonl --json").json
    assert found["metric"] == "refusal"
    assert found["best"]["n"] == 3


def test_the_pass_is_kept(trimtab: Command) -> None:
    found = [trimtab(f"sweep caa {QUICK} --layer 0,1 --cache kept --json").json for _ in range(2)]
    assert list(Path("kept").rglob("*.f32"))
    assert found[0]["best"] == found[1]["best"]


@pytest.mark.slow
def test_what_a_judge_says_can_be_what_counts(trimtab: Command) -> None:
    for verb in ("ask", "tell"):
        lines = (json.dumps({"prompt": f"{verb} {i}"}) + "\n" for i in (1, 2))
        Path(f"{verb}.jsonl").write_text("".join(lines))
    command = (
        "sweep caa --model model --task refusal:ask.jsonl --validation-task refusal:tell.jsonl "
        "--contrast parts.jsonl --layer 0,1 --max-new-tokens 2 --judge phrases --metric "
        "'attack_success (phrases)'"
    )
    found = trimtab(f"{command} --json").json
    assert found["metric"] == "attack_success (phrases)"
    short = command.replace("'attack_success (phrases)'", "attack_success")
    assert trimtab(f"{short} --json").json["best"] == found["best"]
    # A model of random words refuses nothing, which is the worst there is, or the best.
    assert found["best"]["validation"] == 1.0
    safe, harmful = (trimtab(f"{command} --better {way} -o {way}").text for way in ("less", "more"))
    assert "attack success (phrases)" in safe
    configs = [json.loads(Path(way, "config.json").read_text()) for way in ("less", "more")]
    assert [config["better"] for config in configs] == ["less", "more"]
    assert harmful


def test_optuna_is_an_extra(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused(trimtab(f"sweep caa {QUICK} --layer 0,1"), "pip install 'trimtab[sweep]'")


def hint(method: Any, name: str) -> Any:
    return typing.get_type_hints(method)[name]


@pytest.mark.parametrize(
    ("method", "name", "text", "expected"),
    [
        (tt.AUSteer, "k", "4, 16,all", [4, 16, "all"]),
        (tt.AUSteer, "k", "1:100", Range(1, 100)),
        (tt.AUSteer, "alpha", "1:100:log", Range(1.0, 100.0, True)),
        (tt.AUSteer, "alpha", "1e1", [10.0]),
        (tt.AUSteer, "layers", "0-2,5/7", [(0, 1, 2, 5), (7,)]),
        (tt.AUSteer, "layers", "4,5", [(4, 5)]),
        (tt.AUSteer, "clamp_sign", "yes,no", [True, False]),
        (tt.CAA, "layer", "4,10,-1", [4, 10, -1]),
        (tt.CAA, "layer", "4-6,validation", [(4, 5, 6), "validation"]),
        (tt.CAA, "layer", "4,5/6", [(4, 5), 6]),
        (tt.CAA, "token", "last,-2", ["last", -2]),
        (tt.STA, "sae", "release:layer_1/width", ["release:layer_1/width"]),
        (tt.SS, "theta", "0:360", Range(0.0, 360.0)),
    ],
)
def test_values_as_they_are_typed(method: Any, name: str, text: str, expected: Any) -> None:
    found = read_values(name, text, hint(method, name))
    assert found == expected
    assert (
        [type(v) for v in found] == [type(v) for v in expected]
        if isinstance(found, list)
        else (found.whole == expected.whole)
    )
