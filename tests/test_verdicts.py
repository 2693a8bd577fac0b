"""Whether a paper's findings are found here, on figures whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from trimtab.figures import Difference
from trimtab.papers.recipe import Recipe, read_recipe, recipes
from trimtab.papers.reproduction import Reproduction, beside_paper
from trimtab.papers.result import StudyResult, Value
from trimtab.papers.verdicts import verdicts
from trimtab.sweeps.metering import Used


def recipe(**changed: Any) -> Recipe:
    about = {
        "name": "austeer-table0", "paper": "a paper", "item": "Table 0", "shows": "Something.",
        "study": "theory", "scales": {"smoke": {}, "small": {}, "full": {}},
        "published": [{"model": "any", "says": "something"}],
    }  # fmt: skip
    return read_recipe(yaml.safe_dump({**about, **changed}, sort_keys=False), "table0.yaml")


def lines(one: Recipe, ours: dict[str, dict[str, Value]], scale: str = "full") -> list[list[Any]]:
    return [list(row) for table in verdicts(one, ours, scale) for row in table.rows]


PAPER = [
    {"model": "A-7B", "unit": "%", "rows": {"Vanilla": {"COPA": 70}, "Ours": {"COPA": 80}}},
    {"model": "B-9B", "unit": "%", "rows": {"Vanilla": {"COPA": 50}, "Ours": {"COPA": 70}}},
]


@pytest.mark.parametrize(
    ("value", "ci95", "verdict"),
    [
        (0.62, (0.6, 0.64), "same direction, alike"),  # +12, between +10 and +20
        (0.53, (0.525, 0.535), "same direction, smaller"),
        (0.80, (0.7, 0.9), "same direction, larger"),
        (0.51, (0.4, 0.6), "no clear change"),
        (0.30, (0.2, 0.4), "contradicts"),
    ],
)
def test_a_change_from_the_unsteered_model(value: float, ci95: Any, verdict: str) -> None:
    one = recipe(published=PAPER, baseline="Vanilla")
    ours = {
        "Vanilla": {"COPA": Value(0.5, (0.48, 0.52), 100, True)},
        "Ours": {"COPA": Value(value, ci95, 100, True)},
    }
    assert lines(one, ours) == [["Ours", "+10 to +20", f"{100 * (value - 0.5):+.3g}", verdict]]


def test_several_columns_are_counted() -> None:
    rows = {"Vanilla": {"a": 10, "b": 10, "c": 10}, "Ours": {"a": 20, "b": 20, "c": 20}}
    one = recipe(published=[{"model": "A", "rows": rows}], baseline="Vanilla")
    ours = {
        "Vanilla": {"a": Value(1), "b": Value(1), "c": Value(1)},
        "Ours": {"a": Value(11), "b": Value(11), "c": Value(0.5)},
    }
    ((label, *_, said),) = lines(one, ours)
    assert (label, said) == ("Ours", "same direction, alike (2 of 3), contradicts (1 of 3)")


def test_a_figure_without_a_baseline_and_one_in_words() -> None:
    rows = {"loss": {"value": 1.3}, "share": {"value": 0.1}, "time": {"value": "18 min"}}
    one = recipe(published=[{"model": "A", "rows": rows}])
    ours = {"loss": {"value": Value("1.3001")}, "share": {"value": Value(0.3)}}
    ours["time"] = {"value": Value("3 s")}
    assert [line[-1] for line in lines(one, ours)] == ["alike", "higher than the paper's"]


CLAIMS = [
    {"says": "most have a bump", "ours": "bumps", "above": "risers"},
    {"says": "the coefficient is the theorem's", "ours": "fitted", "like": "theorem"},
    {"says": "the angle is in the middle", "ours": "ss, θ", "between": [150, 230]},
    {"says": "few units", "ours": r"\d+ units", "below": 5},
]


def test_claims_are_held_against_ours() -> None:
    one = recipe(claims=CLAIMS)
    ours = {
        "block 0, bumps": {"value": Value(6)},
        "block 0, risers": {"value": Value(2)},
        "block 9, bumps": {"value": Value(1)},
        "block 9, risers": {"value": Value(7)},
        "fitted": {"value": Value(0.52)},
        "theorem": {"value": Value(0.5)},
        "ss, θ": {"COPA": Value(20.0)},
        "12 units": {"value": Value(3.0)},
    }
    assert [[line[0], line[2], line[3]] for line in lines(one, ours)] == [
        ["most have a bump (block 0)", "6 against 2", "agrees"],
        ["most have a bump (block 9)", "1 against 7", "contradicts"],
        ["the coefficient is the theorem's", "0.52 against 0.5", "agrees"],
        ["the angle is in the middle (COPA)", "20", "contradicts"],
        ["few units", "3 against 5", "agrees"],
    ]
    clear = {
        "bumps": {"value": Value(0.6, (0.5, 0.7))},
        "risers": {"value": Value(0.5, (0.4, 0.6))},
    }
    assert lines(one, clear)[0][-1] == "no clear difference"
    even = {name: {"value": Value(4)} for name in clear}
    assert lines(one, even)[0][-1] == "no clear difference"


def test_a_claim_that_nothing_is_held_against_is_told() -> None:
    one = recipe(claims=CLAIMS)
    alone = lines(one, {"bumps": {"value": Value(3)}})
    assert [line[0] for line in alone] == [claim["says"] for claim in CLAIMS]
    assert {line[-1] for line in alone} == {"not measured here"}


def test_no_heading_promises_what_is_not_there() -> None:
    found = {"": StudyResult({}, {"tokens": Value(3)})}
    used = {"": Used()}
    words = Reproduction(recipe(), "full", {"name": "tiny"}, found, used, 0.0)
    assert [table.title for table in beside_paper(words)] == ["Our figures", "What the paper says"]
    figures = recipe(published=[{"model": "A", "rows": {"tokens": {"value": 3}}}])
    both = Reproduction(figures, "full", {"name": "tiny"}, found, used, 0.0)
    titles = [table.title for table in beside_paper(both)]
    assert titles == ["The paper's figures and ours", "Is it found here?"]
    assert both.as_json()["verdicts"][0]["verdict"] == "alike"


def test_of_a_single_example_nothing_is_said() -> None:
    one = recipe(claims=[{"says": "A is above B", "ours": "A", "above": "B"}])
    for n, verdict in ((1, "no clear difference"), (2, "agrees")):
        ours = {name: {"figure": Value(v, (v, v), n)} for name, v in (("A", 0.6), ("B", 0.0))}
        assert lines(one, ours)[0][-1] == verdict
    assert Value(0.6, (0.6, 0.6), 1).shown("") == "0.6"
    assert not Difference(0.6, (0.6, 0.6), 1).is_clear


def test_a_claim_is_held_against_the_scales_that_measure_it() -> None:
    claim = {"says": "A is high", "ours": "A", "above": 0.5, "scales": ["full"]}
    one, ours = recipe(claims=[claim]), {"A": {"figure": Value(0.7)}}
    assert [row[-1] for row in lines(one, ours)] != ["not measured here"]
    assert lines(one, ours, "small") == [["A is high", "says so", "", "not measured here"]]


def test_each_claim_of_a_recipe_says_how_it_is_checked() -> None:
    for one in recipes():
        if one.baseline is not None:
            assert all(one.baseline in each.rows for each in one.published if each.rows), one.name
        for claim in one.claims:
            ways = (claim.above, claim.below, claim.like, claim.between)
            assert sum(way is not None for way in ways) == 1, claim
    named = {one.name for one in recipes() if one.claims}
    assert {"austeer-fig6", "strength-fig5", "strength-fig6", "ss-dial"} <= named
