"""`trimtab compare` on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import Command, home, listing, refused, trimtab, work
from test_compare import rows
from trimtab.cli.compare import read_candidate
from trimtab.sweeps.compare_methods import Candidate
from trimtab.sweeps.space import Range

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

pytestmark = pytest.mark.usefixtures("undrawn")

BASIC = "compare 'caa layer=0,1 alpha=1,4' 'late: caa layer=1 alpha=2,8' --model model --untimed"


@pytest.fixture
def formal(work: Path) -> str:
    lines = [*rows("train", 0, 8), *rows("validation", 8, 5), *rows("test", 13, 6)]
    Path("formal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return "--task contrast:formal.jsonl"


def test_as_json_and_for_people(trimtab: Command, formal: str) -> None:
    found = trimtab(f"{BASIC} {formal} --kl 0.01 --max-cost 50 --json").json
    assert [row["name"] for row in found["methods"]] == ["caa", "late"]
    assert [row["trials"] for row in found["methods"]] == [4, 2]
    for row in found["methods"]:
        assert {"params", "validation", "test", "n", "ci95", "against_unsteered"} <= set(row)
        assert row["n"] == 6
        assert row["overhead"] is None
    (at_budget,) = found["at_budgets"]
    assert at_budget["kl"] == 0.01
    assert [pair["first"] for pair in found["between"]] == ["caa"]
    said = trimtab(f"{BASIC} {formal} -o out").text
    assert "unsteered" in said
    assert "layer=" in said
    assert "out: report.html, results.json" in said
    assert {path.name for path in Path("out").iterdir()} >= {
        "report.html", "results.json", "config.json", "caa", "late", "pictures",
    }  # fmt: skip


def test_one_method_by_two_rankings_is_two_rows(trimtab: Command, formal: str) -> None:
    line = (
        "compare 'austeer k=2,4 alpha=1' 'effect: austeer locate=effect k=2,4 alpha=1' --model "
        f"model --untimed --max-cost inf {formal} --json"
    )
    first, second = trimtab(line).json["methods"]
    assert (first["name"], second["name"]) == ("austeer", "effect")
    assert first["trials"] == second["trials"] == 2
    assert first["test"] != second["test"]


def test_the_pass_is_kept(trimtab: Command, formal: str) -> None:
    found = [trimtab(f"{BASIC} {formal} --cache kept --json").json for _ in range(2)]
    assert list(Path("kept").rglob("*.f32"))
    assert found[0]["methods"][0]["test"] == found[1]["methods"][0]["test"]
    assert found[0]["fit"]["tokens"] > 0
    assert found[1]["fit"]["tokens"] == 0


def test_a_run_of_another_configuration_is_refused(trimtab: Command, formal: str) -> None:
    trimtab(f"{BASIC} {formal} -o out").text  # noqa: B018
    before = listing(Path())
    refused(trimtab(f"{BASIC} {formal} --limit 3 -o out"), "another configuration", "task")
    assert listing(Path()) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caa", Candidate("caa", {}, {}, "caa")),
        ("caa layer=3", Candidate("caa", {}, {"layer": 3}, "caa")),
        (
            "deep: caa layer=3,4 alpha=0.5:2:log token=mean",
            Candidate(
                "caa", {"layer": [3, 4], "alpha": Range(0.5, 2, True)}, {"token": "mean"}, "deep"
            ),
        ),
        (
            "austeer k=1:8 site=heads layers=1-2",
            Candidate(
                "austeer", {"k": Range(1, 8)}, {"site": "heads", "layers": (1, 2)}, "austeer"
            ),
        ),
    ],
)  # fmt: skip
def test_reading_a_method_with_its_settings(text: str, expected: Candidate) -> None:
    assert read_candidate(text) == expected


def test_mistakes_get_one_line(trimtab: Command, formal: str) -> None:
    for arguments, *says in (
        (f"compare cab --model model {formal}", "unknown method 'cab'"),
        (f"compare 'caa depth=1' --model model {formal}", "'depth=1' is no OPTION=VALUES", "layer"),
        (f"compare 'caa layer=x,1' --model model {formal}", "layer x: write numbers"),
        (f"compare caa caa --model model {formal}", "two methods are called caa"),
        ("compare caa --model model --task copa --data nowhere", "nowhere"),
        (f"compare caa --model model {formal} --kl 0", "above 0 nats"),
        (f"compare caa --model model {formal} --max-cost nan", "finite number of nats"),
        (f"compare caa --model model {formal} --test-limit -1", "--test-limit must be 1 or more"),
        (f"compare caa --model model {formal} --protocol x", "'x' for --protocol"),
        (f"compare caa --model model {formal} --judge oracle", "--judge oracle: known are"),
        (f"compare caa --model model {formal} --metric taste", "no metric 'taste'"),
        (f"compare --model model {formal}", "name methods"),
    ):
        refused(trimtab(arguments), *says)


def test_help_has_an_example(trimtab: Command) -> None:
    said = trimtab("compare --help").text
    assert "Example:" in said
    assert "trimtab compare" in said
