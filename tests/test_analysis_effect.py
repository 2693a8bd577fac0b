"""Rankings of units held against each other: a plain loop over log-odds is the oracle."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

import trimtab as tt
from helpers import language_model, refused_in_one_line
from trimtab.anatomy import parse_site
from trimtab.contrasts import Contrast, Pair
from trimtab.figures.significance import paired_difference
from trimtab.papers.analyses import effect
from trimtab.papers.austeer.effect.within import largest_within
from trimtab.papers.result import StudyResult
from trimtab.reading import log_odds
from trimtab.reports import Run
from trimtab.steering.operators import Scale
from trimtab.steering.parts import Dial, Intervention

WHO = ("king", "mother", "captain", "daughter")
WHAT = ("ship", "map", "fire", "table", "house", "day")
PARTS = ["train"] * 12 + ["validation"] * 6 + ["test"] * 6
CONTRAST = Contrast(
    tuple(
        Pair(f"The {who} looked at the {what} and said that it was", " right.", " wrong!", part)  # type: ignore[arg-type]
        for (what, who), part in zip(itertools.product(WHAT, WHO), PARTS, strict=True)
    ),
    "pairs",
)
ASKED: dict[str, Any] = {"k": (1, 4), "kl": (0.02, 0.1), "draws": 2, "alone": 3}
NAMES = ["momentum", "signed momentum", "mean difference", "effect size", "effect z"]
NAMES += ["effect per nat", "random"]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def found(lm: tt.LanguageModel) -> StudyResult:
    return effect(lm, CONTRAST, **ASKED)


# -- by hand ----------------------------------------------------------------------------------


def _steering(lm: tt.LanguageModel, factors: dict[tuple[int, int], float]) -> tt.Steering:
    """Multiplies units of the heads, by (layer, unit); its dial stands at 1."""
    made = []
    for layer in sorted({layer for layer, _ in factors}):
        own = sorted((unit, factor) for (at, unit), factor in factors.items() if at == layer)
        units, gains = (torch.tensor(each) for each in zip(*own, strict=True))
        made.append(Intervention(f"layers.{layer}.heads", Scale(units, gains.float() - 1, 64)))
    return tt.Steering("austeer", {}, tuple(made), Dial("alpha", 1.0, (0, 100)), lm.identity)


def _gains(lm: tt.LanguageModel, part: Any, steering: tt.Steering) -> torch.Tensor:
    pairs = CONTRAST.part(part)
    return log_odds(lm, pairs, steering) - log_odds(lm, pairs)


def _kl(lm: tt.LanguageModel, steering: tt.Steering) -> float:
    """The median over validation prompts, one prompt at a time."""
    costs = []
    for pair in CONTRAST.part("validation").pairs:
        assert isinstance(pair.prompt, str)
        before = lm.logits([pair.prompt])[0].double().log_softmax(-1)
        after = lm.logits([pair.prompt], steering=steering)[0].double().log_softmax(-1)
        costs.append(float((before.exp() * (before - after)).sum()))
    return float(torch.tensor(costs).quantile(0.5))


def _factors(found: StudyResult, name: str, k: int, dial: float) -> dict[tuple[int, int], float]:
    ranking = next(one for one in found.data["rankings"] if one["name"] == name)
    return {(one["layer"], one["unit"]): 1 + dial * one["gain"] for one in ranking["top"][:k]}


# -- rankings ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_rankings_are_those_of_the_methods_with_so_many_units(
    lm: tt.LanguageModel, found: StudyResult
) -> None:
    options: dict[str, dict[str, Any]] = {
        "momentum": {"direction": "paper"},
        "signed momentum": {"direction": "signed"},
        "mean difference": {"locate": "difference"},
        "effect z": {"locate": "effect"},
        "effect per nat": {"locate": "effect_per_nat"},
        "random": {"locate": "random"},
    }
    for name, own in options.items():
        for k in (1, 4):
            tables = tt.AUSteer(k=k, alpha=1, **own).fit(lm, CONTRAST).tables
            columns = (tables[key].tolist() for key in ("layer", "unit", "gain"))
            expected = {(layer, unit): 1 + gain for layer, unit, gain in zip(*columns, strict=True)}
            assert _factors(found, name, k, 1.0) == pytest.approx(expected), name
    every = tt.AUSteer(k="all", alpha=1, locate="effect").fit(lm, CONTRAST).tables
    rows = zip(*(every[key].tolist() for key in ("effect", "layer", "unit")), strict=True)
    first = sorted(rows, key=lambda row: (-abs(row[0]), row[1], row[2]))[:4]
    by_size = {(layer, unit): 1 + math.copysign(1, e) for e, layer, unit in first}
    assert _factors(found, "effect size", 4, 1.0) == pytest.approx(by_size)
    draws = [one["top"] for one in found.data["rankings"] if one["name"] == "random"]
    assert len(draws) == 2
    assert draws[0] != draws[1]


def test_overlap_is_counted(found: StudyResult) -> None:
    for entry in found.data["overlap"]:
        assert entry["names"] == [
            name for name in NAMES if name not in ("signed momentum", "random")
        ]
        for (i, one), (j, other) in itertools.product(enumerate(entry["names"]), repeat=2):
            a, b = (set(_factors(found, name, entry["k"], 1.0)) for name in (one, other))
            assert entry["jaccard"][i][j] == pytest.approx(len(a & b) / len(a | b))


# -- gain within a budget ---------------------------------------------------------------------


def test_gains_are_those_of_a_plain_loop_at_dials_within_the_budget(
    lm: tt.LanguageModel, found: StudyResult
) -> None:
    for one in found.data["settings"]:
        if one["name"] not in NAMES[:6]:
            continue
        steering = _steering(lm, _factors(found, one["name"], one["params"]["k"], one["dial"]))
        assert _kl(lm, steering) == pytest.approx(one["measured_kl"], rel=1e-3)
        assert one["measured_kl"] <= one["kl"]
        assert one["measured_kl"] >= 0.9 * one["kl"] or one["dial"] == 10_000
        test, validation = (_gains(lm, part, steering) for part in ("test", "validation"))
        assert one["validation"] == pytest.approx(float(validation.mean()), abs=1e-3)
        assert one["test"]["difference"] == pytest.approx(float(test.mean()), abs=1e-3)
        assert one["test"]["n"] == 6
        low, high = one["test"]["ci95"]
        assert low <= one["test"]["difference"] <= high


def test_random_is_the_mean_over_draws(lm: tt.LanguageModel, found: StudyResult) -> None:
    one = next(
        one
        for one in found.data["settings"]
        if (one["name"], one["params"], one["kl"]) == ("random", {"k": 4}, 0.1)
    )
    tops = [each["top"][:4] for each in found.data["rankings"] if each["name"] == "random"]
    gains = []
    for top, draw in zip(tops, one["draws"], strict=True):
        factors = {(u["layer"], u["unit"]): 1 + draw["dial"] * u["gain"] for u in top}
        gains.append(_gains(lm, "test", _steering(lm, factors)))
    assert one["test"]["difference"] == pytest.approx(float(torch.stack(gains).mean()), abs=1e-3)
    means = sorted(float(each.mean()) for each in gains)
    assert one["spread"] == pytest.approx(means, abs=1e-3)


def test_what_is_best_on_validation_is_held_against_signed_momentum(
    lm: tt.LanguageModel, found: StudyResult
) -> None:
    for budget in (0.02, 0.1):
        p, values = {}, {}
        chosen = {one["name"]: one for one in found.data["chosen"] if one["kl"] == budget}
        assert set(chosen) == {*NAMES, "caa", "iti", "sadi"}
        for name, one in chosen.items():
            own = [s for s in found.data["settings"] if (s["name"], s["kl"]) == (name, budget)]
            best = max(own, key=lambda each: each["validation"])
            assert one["params"] == best["params"]
            assert one["test"] == best["test"]
            assert (one["against_signed_momentum"] is None) == (name == "signed momentum")
            if name in NAMES[:6]:
                factors = _factors(found, name, best["params"]["k"], best["dial"])
                values[name] = _gains(lm, "test", _steering(lm, factors))
        for name in values:
            if name == "signed momentum":
                continue
            against = chosen[name]["against_signed_momentum"]
            change = values[name] - values["signed momentum"]
            assert against["difference"] == pytest.approx(float(change.mean()), abs=1e-3)
            assert against["p"] == pytest.approx(paired_difference(change, flips=False).p)
        others = [one["against_signed_momentum"] for one in chosen.values()]
        tested = [one for one in others if one is not None]
        p = multipletests([one["p"] for one in tested], method="holm")[1]
        assert [one["p_corrected"] for one in tested] == pytest.approx(list(p))


def test_references_are_the_methods_themselves(lm: tt.LanguageModel, found: StudyResult) -> None:
    names = {"caa": tt.CAA, "iti": tt.ITI, "sadi": tt.SADI}
    for one in found.data["settings"]:
        if one["name"] in names and one["kl"] == 0.1:
            steering = names[one["name"]](**one["params"]).fit(lm, CONTRAST)
            turned = replace(steering, value=one["dial"])
            gain = float(_gains(lm, "test", turned).mean())
            assert one["test"]["difference"] == pytest.approx(gain, abs=1e-3)
            assert one["predicted"] is None


# -- one by one -------------------------------------------------------------------------------


def test_units_alone_do_what_a_plain_loop_says(lm: tt.LanguageModel, found: StudyResult) -> None:
    alone = found.data["alone"]
    effects = tt.AUSteer(k="all", locate="effect", alpha=1).fit(lm, CONTRAST).tables
    places = list(zip(effects["layer"].tolist(), effects["unit"].tolist(), strict=True))
    for one in alone["units"]:
        place = one["layer"], one["unit"]
        up, down = (
            float(_gains(lm, "validation", _steering(lm, {place: 1 + gamma})).mean())
            for gamma in (0.5, -0.5)
        )
        assert (one["up"], one["down"]) == pytest.approx((up, down), abs=1e-4)
        assert one["real"] == pytest.approx((up - down) / 2, abs=1e-4)
        expected = 0.5 * float(effects["effect"][places.index(place)])
        assert one["predicted"] == pytest.approx(expected, rel=1e-5)
    predicted, real = ([one[key] for one in alone["units"]] for key in ("predicted", "real"))
    line = stats.linregress(predicted, real)
    assert alone["slope"]["value"] == pytest.approx(line.slope)
    assert alone["slope"]["ci95"][0] == pytest.approx(
        line.slope - stats.t.ppf(0.975, len(real) - 2) * line.stderr
    )
    assert alone["pearson"] == pytest.approx(stats.pearsonr(predicted, real).statistic)
    assert alone["same_sign"]["value"] == pytest.approx(
        sum(a * b > 0 for a, b in zip(predicted, real, strict=True)) / len(real)
    )
    for one in alone["rankings"]:
        gains = _factors(found, one["name"], 3, 1.0)
        own = [unit for unit in alone["units"] if one["name"] in unit["rankings"]]
        assert len(own) == one["units"] == 3
        real = [u["up"] if gains[u["layer"], u["unit"]] > 1 else u["down"] for u in own]
        assert one["real"]["value"] == pytest.approx(sum(real) / 3, abs=1e-4)


def test_small_changes_of_single_units_are_as_predicted(lm: tt.LanguageModel) -> None:
    """On the pairs that effects were read on, which stand for validation rows here."""
    pairs = CONTRAST.train.pairs
    doubled = [
        replace(pair, part=part) for part in ("train", "validation", "test") for pair in pairs
    ]
    found = effect(
        lm, Contrast(tuple(doubled), "thrice"), k=(1,), kl=(0.02,), draws=1, alone=4, gamma=0.01
    )
    alone = found.data["alone"]
    large = [one for one in alone["units"] if abs(one["predicted"]) > 1e-4]
    assert len(large) >= 4
    for one in large:
        assert one["real"] == pytest.approx(one["predicted"], rel=0.1)
    assert alone["slope"]["value"] == pytest.approx(1, abs=0.02)


# -- dials within budgets ---------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [1e-6, 1e-2, 1.0, 1e4])
def test_the_largest_dial_within_each_budget_takes_few_tries(curvature: float) -> None:
    tried = []

    def cost(dial: float) -> float:
        tried.append(dial)
        return curvature * dial * dial

    found = largest_within(cost, (0.3, 0.02, 0.1), 100.0)
    assert list(found) == [0.02, 0.1, 0.3]
    assert len(tried) <= 10
    for budget, one in found.items():
        assert one.kl == pytest.approx(curvature * one.dial**2)
        assert one.kl <= budget
        assert one.reached == (curvature * 100**2 > budget)
        assert one.kl >= 0.95 * budget if one.reached else one.dial == 100


def test_a_cost_that_overflows_or_jumps_is_kept_below() -> None:
    for budget, one in largest_within(
        lambda dial: math.inf if dial > 3 else 1e-4 * dial, (0.01, 0.1), 100.0
    ).items():
        assert one.dial <= 3
        assert one.kl <= budget
        assert one.dial > 2.5
        assert one.reached


# -- what comes of it -------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_study_goes_on(lm: tt.LanguageModel, tmp_path: Path) -> None:
    whole = effect(lm, CONTRAST, **ASKED, run=Run(tmp_path / "one", {"model": {}}))
    files = sorted((tmp_path / "one" / "records").iterdir())
    assert len(files) > 20
    for file in files[::2]:
        file.unlink()
    again = effect(lm, CONTRAST, **ASKED, run=Run(tmp_path / "one", {"model": {}}))
    assert json.dumps(again.data) == json.dumps(whole.data)
    kept = {file.name: file.stat().st_mtime_ns for file in files}
    effect(lm, CONTRAST, **ASKED, run=Run(tmp_path / "one", {"model": {}}))
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "one" / "records").iterdir()}
    assert now.keys() == kept.keys()


def test_it_is_said_in_words_tables_and_pictures(found: StudyResult) -> None:
    assert found.summary.startswith("Of 7 rankings of units of heads within 0.02 nats at the next ")
    assert "signed momentum" in found.summary
    titles = [table.title for table in found.tables]
    assert "Gain within 0.1 nats" in titles
    assert "Units scaled one by one" in titles
    assert [picture.name for picture in found.pictures] == ["gain-by-k", "overlap", "predicted"]
    panels = found.pictures[0].figure.axes
    assert [axes.get_title() for axes in panels] == ["within 0.02 nats", "within 0.1 nats"]
    labels = panels[0].get_legend_handles_labels()[1]
    assert set(labels) == {*NAMES, "caa", "iti", "sadi"}
    assert json.dumps(found.as_json(), allow_nan=False)


def test_units_of_the_site_that_is_named(lm: tt.LanguageModel) -> None:
    found = effect(lm, CONTRAST, site="ffn_in", k=(2, 100_000), kl=(0.05,), draws=1, alone=0)
    assert found.data["units"] == 3 * 80
    assert found.data["k"] == [2]
    assert any("240 units, so k 100,000 was left out" in note for note in found.notes)
    assert found.data["alone"] is None
    assert parse_site("layers.0.ffn_in")[1] == found.data["site"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": (1000,)}, "heads has 1 to 192 units here"),
        ({"kl": (0.0,)}, "budgets"),
        ({"kl": ()}, "budgets"),
        ({"draws": 0}, "1 random draw"),
        ({"pairs": 1}, "2 pairs"),
        ({"gamma": 0.0}, "gamma"),
        ({"site": "nose"}, "nose"),
    ],
)
def test_mistakes_are_refused(lm: tt.LanguageModel, options: dict[str, Any], words: str) -> None:
    refused_in_one_line(lambda: effect(lm, CONTRAST, **options), words)


def test_fewer_pairs_make_other_rankings(lm: tt.LanguageModel) -> None:
    few = effect(lm, CONTRAST, k=(2,), kl=(0.05,), draws=1, alone=0, pairs=4).data
    assert few["contrast"]["pairs"] == 4
    tables = tt.AUSteer(k=2, alpha=1, locate="effect").fit(lm, CONTRAST.train.take(4)).tables
    top = next(one for one in few["rankings"] if one["name"] == "effect z")["top"][:2]
    expected = list(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True))
    assert [(one["layer"], one["unit"]) for one in top] == expected
