"""Analyses of units with units ranked by effect: a plain loop over log-odds is the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from helpers import language_model, refused_in_one_line
from trimtab.contrasts import Contrast, Pair
from trimtab.papers.analyses import ablations, count, heatmap, overlap, pairs, scores, units
from trimtab.papers.austeer.ranking import chance_largest_z, rankings
from trimtab.reading import log_odds
from trimtab.steering.operators import Scale
from trimtab.steering.parts import Dial, Intervention

WHO = ("king", "mother", "captain", "daughter")
WHAT = ("ship", "map", "fire", "table", "house", "day")
PARTS = ["train"] * 12 + ["validation"] * 6 + ["test"] * 6


def _contrast(positive: str, negative: str) -> Contrast:
    rows = [
        Pair(f"The {who} looked at the {what} and said that it was", positive, negative, part)  # type: ignore[arg-type]
        for (what, who), part in zip(itertools.product(WHAT, WHO), PARTS, strict=True)
    ]
    return Contrast(tuple(rows), positive.strip())


CONTRAST = _contrast(" right.", " wrong!")


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def _scaled(lm: tt.LanguageModel, layer: int, unit: int, gamma: float) -> tt.Steering:
    scale = Scale(torch.tensor([unit]), torch.tensor([gamma]), 64)
    made = (Intervention(f"layers.{layer}.heads", scale),)
    return tt.Steering("austeer", {}, made, Dial("alpha", 1.0, (0, 100)), lm.identity)


def test_scores_by_effect_are_means_over_their_standard_errors() -> None:
    lm, step = language_model("llama", dtype=torch.float64), 1e-3
    found = scores(lm, CONTRAST, sites=("heads",), k=3, locate="effect").data
    entry = found["sites"]["heads"]
    assert entry["pairs"] == 12
    for one in entry["top"]:
        place = one["layer"], one["unit"]
        up, down = (
            log_odds(lm, CONTRAST.train, _scaled(lm, *place, gamma)) for gamma in (step, -step)
        )
        effects = ((up - down) / (2 * step)).numpy()
        error = effects.std(ddof=1) / np.sqrt(len(effects))
        assert one["effect"] == pytest.approx(effects.mean(), rel=1e-3)
        assert one["error"] == pytest.approx(error, rel=1e-3)
        assert one["score"] == pytest.approx(abs(effects.mean()) / error, rel=1e-3)
        assert one["gamma"] == np.sign(effects.mean())
    grid = np.array(entry["scores"])
    assert grid.shape == (3, 64)
    best = np.unravel_index(grid.argmax(), grid.shape)
    assert (entry["top"][0]["layer"], entry["top"][0]["unit"]) == best
    high = entry["chance_maximum"]["q95"]
    assert entry["above_chance"] == (grid > high).sum()


def test_the_largest_z_by_chance_is_that_of_simulated_units() -> None:
    drawn = np.random.default_rng(0).standard_normal((1000, 12, 100))
    z = drawn.mean(1) / (drawn.std(1, ddof=1) / np.sqrt(12))
    largest = np.abs(z).max(1)
    assert chance_largest_z(12, 100) == pytest.approx(np.median(largest), rel=0.03)
    assert chance_largest_z(12, 100, 0.95) == pytest.approx(np.quantile(largest, 0.95), rel=0.06)


def test_units_that_contrasts_share_by_effect(lm: tt.LanguageModel) -> None:
    both = {"right": CONTRAST, "good": _contrast(" good", " sad")}
    found = overlap(lm, both, site="heads", k=10, locate="effect").data
    places = []
    for contrast in both.values():
        tables = tt.AUSteer(k=10, locate="effect", alpha=1).fit(lm, contrast).tables
        places.append(set(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True)))
    assert found["shared"][0]["shared"] == len(places[0] & places[1])


def test_single_units_are_those_of_the_largest_z(lm: tt.LanguageModel) -> None:
    more: dict[str, Any] = {"alpha": 2.0, "limit": None, "positives": 1, "negatives": 1}
    found = units(lm, CONTRAST, site="heads", count=4, locate="effect", **more).data
    ranked = [one for one in found["units"] if one["chosen"] == "ranked"]
    tables = tt.AUSteer(k=2, locate="effect", alpha=1).fit(lm, CONTRAST).tables
    expected = list(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True))
    assert [(one["layer"], one["unit"]) for one in ranked] == expected
    held_out = CONTRAST.part("validation")
    for one, gain in zip(ranked, tables["gain"].tolist(), strict=True):
        steering = _scaled(lm, one["layer"], one["unit"], 2 * gain)
        change = log_odds(lm, held_out, steering) - log_odds(lm, held_out)
        difference = one["changes"]["log_odds"]["difference"]
        assert difference == pytest.approx(float(change.mean()), abs=1e-4)


@pytest.mark.parametrize("locate", ["effect", "effect_per_nat"])
def test_numbers_of_units_and_of_pairs_by_effect(lm: tt.LanguageModel, locate: Any) -> None:
    held_out = CONTRAST.part("validation")
    found = count(lm, CONTRAST, ks=(3, 20), alpha=2.0, site="heads", limit=None, locate=locate)
    for one in found.data["counts"]:
        steering = tt.AUSteer(k=one["k"], locate=locate, alpha=2).fit(lm, CONTRAST)
        value = float(log_odds(lm, held_out, steering).mean())
        assert one["figures"]["log_odds"]["value"] == pytest.approx(value, abs=1e-3)
    few = pairs(
        lm, CONTRAST, counts=(6,), resamples=1, site="heads", k=5, limit=None, locate=locate
    ).data
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    places = []
    for some in (order[:6], range(12)):
        rows = tuple(CONTRAST.train.rows[i] for i in sorted(some))
        part = replace(CONTRAST, rows=rows)
        tables = tt.AUSteer(k=5, locate=locate, alpha=1).fit(lm, part).tables
        places.append(set(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True)))
    assert few["counts"][0]["overlap"] == [len(places[0] & places[1]) / 5]


def test_ablations_have_units_by_effect_among_them(lm: tt.LanguageModel) -> None:
    found = ablations(lm, CONTRAST, site="heads", ks=(6,), alphas=(2.0,), seeds=1, limit=None).data
    variants = {one["name"]: one for one in found["variants"]}
    names = {"effect localisation": "effect", "effect per nat localisation": "effect_per_nat"}
    for name, locate in names.items():
        steering = tt.AUSteer(k=6, alpha=2, locate=locate).fit(lm, CONTRAST)  # type: ignore[arg-type]
        value = float(log_odds(lm, CONTRAST.part("test"), steering).mean())
        assert variants[name]["test"]["log_odds"]["value"] == pytest.approx(value, abs=1e-3)


def test_a_grid_of_units_by_effect(lm: tt.LanguageModel) -> None:
    pytest.importorskip("optuna")
    found = heatmap(
        lm, CONTRAST, site="heads", ks=(2,), alphas=(1.0, 2.0), limit=None, locate="effect"
    ).data
    for trial in found["trials"]:
        steering = tt.AUSteer(locate="effect", **trial["params"]).fit(lm, CONTRAST)
        value = float(log_odds(lm, CONTRAST.part("validation"), steering).mean())
        assert trial["value"] == pytest.approx(value, abs=1e-3)


def test_a_sweep_searches_rankings(lm: tt.LanguageModel) -> None:
    """Over locate and k; all from one pass over the contrast."""
    pytest.importorskip("optuna")
    located = ("momentum", "effect", "effect_per_nat")
    space = {"locate": located, "k": (2, 8)}
    more: dict[str, Any] = {"fixed": {"site": "heads", "alpha": 2.0}, "max_cost": None}
    found = tt.sweep(lm, "austeer", CONTRAST, space, oracle=False, **more)
    assert {trial.params["locate"] for trial in found.trials} == set(located)
    for trial in found.trials:
        steering = tt.AUSteer(alpha=2, **trial.params).fit(lm, CONTRAST)
        value = float(log_odds(lm, CONTRAST.part("validation"), steering).mean())
        assert trial.value == pytest.approx(value, abs=1e-3)


def test_units_by_effect_have_a_direction_of_their_own(lm: tt.LanguageModel) -> None:
    more: dict[str, Any] = {"ks": (2,), "site": "heads", "locate": "effect"}
    refused_in_one_line(
        lambda: count(lm, CONTRAST, direction="signed", **more), "leave direction out"
    )


def test_a_ranking_knows_units_that_do_nothing(lm: tt.LanguageModel) -> None:
    found = rankings(lm, CONTRAST, ["ffn_in"], "effect")["ffn_in"]
    assert found.effects is not None
    assert found.scores.shape == found.effects.shape == (3, 80)
    assert not found.scores.isnan().any()
    assert (found.scores[found.effects == 0] == 0).all()
