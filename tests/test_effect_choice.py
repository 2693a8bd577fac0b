"""Which units a steering by effect takes: averaged over strengths, in blocks, by the full Fisher
information; where its dial stands, and what is predicted of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from austeer_by_hand import CONTRAST, PAIRS, gammas_of, ranked, tiny_lm
from commands import Command, home, trimtab, work
from helpers import CALIBRATION, refused_in_one_line, warned
from tiny import tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting import Effect, Samples, Statistics, Want, collect, unit_costs
from trimtab.methods import describe, explain
from trimtab.methods.choosing import Trials, in_blocks
from trimtab.methods.effects import Scoring, by_effect, effect_wants
from trimtab.methods.ranking import Scores
from trimtab.reading import ScaledUnit, log_odds, scaled_log_p, side_readings
from trimtab.steering.operators import Scale

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- units that work together, on paper -----------------------------------------------------------


class _Quadratic:
    """m(gamma) = b gamma + 1/2 gamma' A gamma, of which effects are the exact gradient."""

    def __init__(self, b: list[float], together: dict[tuple[int, int], float]) -> None:
        self.b = torch.tensor(b, dtype=torch.float64)
        self.a = torch.zeros(len(b), len(b), dtype=torch.float64)
        for (i, j), value in together.items():
            self.a[i, j] = self.a[j, i] = value

    def scores(self, gamma: Tensor) -> Scores:
        effect = self.b + self.a @ gamma
        one = torch.ones_like(effect)
        columns = {"effect": effect, "error": one, "cost": one}
        return Scoring("effect_per_nat", fixed=True)(["layers.0.heads"], columns, [])

    def chosen(self, k: int, size: int) -> list[int]:
        def again(found: Scores, picked: Tensor) -> Scores:
            gains = found.columns["gain"][picked]
            return self.scores(torch.zeros_like(self.b).index_copy(0, picked, gains))

        first = self.scores(torch.zeros_like(self.b))
        found, picked = in_blocks(first, k, size, again, None)
        assert picked.tolist() == list(dict.fromkeys(picked.tolist()))
        self.gamma = torch.zeros_like(self.b).index_copy(0, picked, found.columns["gain"][picked])
        return picked.tolist()

    def gain(self) -> float:
        """What those that were chosen gain together."""
        return float(self.b @ self.gamma + 0.5 * self.gamma @ self.a @ self.gamma)


def test_units_that_work_only_together_are_found() -> None:
    # Unit 3 does nothing by itself, and more than any other beside unit 0.
    toy = _Quadratic([1.0, 0.6, 0.5, 0.0], {(0, 3): 2.0})
    assert toy.chosen(2, size=2) == [0, 1]
    plain = toy.gain()
    assert toy.chosen(2, size=1) == [0, 3]
    assert toy.gain() == pytest.approx(3.0)
    assert toy.gain() > plain


def test_units_that_do_the_same_are_taken_once() -> None:
    # Unit 1 does what unit 0 did already; the sign of unit 2 is negative.
    toy = _Quadratic([1.0, 0.9, -0.5, 0.4], {(0, 1): -0.9})
    assert toy.chosen(2, size=2) == [0, 1]
    plain = toy.gain()
    assert toy.chosen(3, size=1) == [0, 2, 3]
    assert toy.chosen(2, size=1) == [0, 2]
    assert toy.gamma.tolist() == [1, 0, -1, 0]
    assert toy.gain() == pytest.approx(1.5)
    assert toy.gain() > plain


def test_blocks_end_where_nothing_has_an_effect() -> None:
    assert _Quadratic([1.0, 0.0, 2.0, 0.0], {}).chosen(4, size=3) == [2, 0]


# -- effects with units scaled, against differences -----------------------------------------------


@cache
def _wide() -> tt.LanguageModel:
    return tt.wrap(tiny_model("llama", dtype=torch.float64), tiny_tokenizer())


def _trials(lm: tt.LanguageModel, dial: float, clamp_sign: bool = False) -> tuple[Trials, Scores]:
    """Trials at a strength, and the scores that all begins with."""
    method = tt.AUSteer(locate="effect", clamp_sign=clamp_sign, strength="fixed")
    effect, scoring, sites = Effect(), Scoring("effect", True), lm.anatomy.sites("heads")
    statistics = collect(lm, CONTRAST, effect_wants(sites, effect, 0, 0))
    interventions = partial(method._interventions, lm)
    trials = Trials(lm, CONTRAST, effect, scoring, interventions, clamp_sign, dial)
    return trials, by_effect(lm, statistics, sites, effect, scoring)


def _slope(trials: Trials, found: Scores, picked: Tensor, unit: int, share: float) -> float:
    """d E[m] / d gamma of a unit with some scaled, by a central difference in float64."""
    step, odds = 1e-3, []
    gains = found.columns["gain"].clone()
    for sign in (1, -1):
        moved = gains.index_fill(0, torch.tensor([unit]), 0.0)
        own = gains[unit] if unit in picked.tolist() else 0.0
        moved[unit] = own + sign * step / (share * trials.dial)
        every = torch.cat([picked, torch.tensor([unit])]).unique()
        steering = trials.steering(found.with_columns(gain=moved), every, share)
        odds.append(log_odds(trials.language_model, CONTRAST, steering).mean())
    return float(odds[0] - odds[1]) / (2 * step)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_effects_are_measured_with_others_scaled(share: float) -> None:
    trials, first = _trials(_wide(), dial=1.4)
    picked = first.best(6)
    again = trials.again(first, picked, share)
    others = [int(unit) for unit in first.ranked()[[6, 9, 40, 150]]]
    for unit in [*picked.tolist(), *others]:
        expected = _slope(trials, first, picked, unit, share)
        # A steering holds its gains in float32.
        assert float(again.columns["effect"][unit]) == pytest.approx(expected, rel=5e-3, abs=1e-5)
    moved = (again.columns["effect"] - first.columns["effect"])[others].abs()
    assert (moved > 0.01 * first.columns["effect"][others].abs()).any()


def test_a_unit_that_is_scaled_to_nothing_is_read_beside_it() -> None:
    trials, first = _trials(_wide(), dial=1.0)  # gamma -1 of units with a negative effect
    picked = first.best(6)
    down = picked[first.columns["gain"][picked] < 0]
    assert len(down)
    again = trials.again(first, picked)
    for unit in down.tolist():
        expected = _slope(trials, first, picked, unit, 1.0)
        assert float(again.columns["effect"][unit]) == pytest.approx(expected, rel=0.1, abs=0.02)
        assert float(again.columns["effect"][unit]) != 0


def test_a_clamped_unit_has_no_effect_beyond() -> None:
    trials, first = _trials(_wide(), dial=3.0, clamp_sign=True)
    picked = first.best(6)
    down = picked[first.columns["gain"][picked] < 0]
    assert len(down)
    assert (trials.again(first, picked).columns["effect"][down] == 0).all()


# -- in AUSteer -----------------------------------------------------------------------------------


def test_blocks_are_chosen_with_those_before_scaled() -> None:
    lm, alpha = _wide(), 2.5
    trials, first = _trials(lm, alpha)
    steering = tt.AUSteer(k=4, alpha=alpha, locate="effect", interaction="blocks", block=2).fit(
        lm, CONTRAST
    )
    picked = first.best(2)
    found = trials.again(first, picked)
    score = found.score.index_fill(0, picked, 0.0)
    expected = [*picked.tolist(), *score.sort(descending=True, stable=True).indices[:2].tolist()]
    width = lm.anatomy.width("layers.0.heads")
    assert [layer * width + unit for layer, unit in ranked(steering)] == expected
    assert expected != first.best(4).tolist()
    effects = torch.cat(
        [first.columns["effect"][expected[:2]], found.columns["effect"][expected[2:]]]
    ).tolist()
    assert steering.tables["effect"].tolist() == pytest.approx(effects, rel=1e-5)
    assert steering.tables["gain"].tolist() == [math.copysign(1, effect) for effect in effects]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
def test_averaged_effects_predict_what_a_large_strength_gains(name: str, alpha: float) -> None:
    lm = tiny_lm(name)
    base = log_odds(lm, CONTRAST)
    errors = {}
    for average in (False, True):
        method = tt.AUSteer(k=12, alpha=alpha, locate="effect", average=average)
        steering = method.fit(lm, CONTRAST)
        real = float((log_odds(lm, CONTRAST, steering) - base).mean())
        errors[average] = abs(alpha * steering.findings["predicted"]["gain"] - real)
    assert errors[True] < 0.5 * errors[False]


def test_graded_gains_of_blocks_are_on_one_scale() -> None:
    lm, alpha = _wide(), 2.0
    method = partial(tt.AUSteer, k=4, alpha=alpha, locate="effect", strength="graded")
    steering = method(interaction="blocks", block=2).fit(lm, CONTRAST)
    every = method(k="all").fit(lm, CONTRAST)
    scale = float(every.tables["effect"].abs().max())
    expected = (steering.tables["effect"] / scale).tolist()
    assert steering.tables["gain"].tolist() == pytest.approx(expected, rel=1e-5)
    assert steering.hyperparameters["block"] == 2


def test_units_are_looked_at_again_in_texts_as_long() -> None:
    lm = tiny_lm()
    long = Contrast.from_pairs([("Today I feel sad. " * 3 + p, a, b) for p, a, b in PAIRS])
    cut = max(len(lm.encode([p + a])[0]) for p, a, _ in PAIRS) + 2
    method = tt.AUSteer(k=4, alpha=2.0, locate="effect", verify=9, interaction="blocks", block=2)
    found: list[Any] = []
    said = warned(lambda: found.append(method.fit(lm, long, max_length=cut).tables))
    assert any("were cut on the left" in one for one in said)
    found.append(method.fit(lm, long).tables)
    assert all(found[0][name].tolist() != found[1][name].tolist() for name in ("real", "effect"))
    with pytest.warns(tt.TrimtabWarning, match="cut on the left"):
        tokens = side_readings(lm, long, cut)
    assert max(len(reading.tokens) for reading in tokens) < cut
    row = 0  # the first one is measured with no other scaled
    layer, unit = int(found[0]["layer"][row]), int(found[0]["unit"][row])
    gamma = 2.0 * float(found[0]["gain"][row])
    log_p = scaled_log_p(lm, tokens, [ScaledUnit(f"layers.{layer}.heads", unit, gamma)])
    gained = (log_p[1] - log_p[0]).unflatten(0, (-1, 2))
    real = float((gained[:, 0] - gained[:, 1]).mean())
    assert float(found[0]["real"][row]) == pytest.approx(real, abs=1e-5)


def test_averaged_effects_choose_anew() -> None:
    lm, alpha = _wide(), 2.0
    trials, first = _trials(lm, alpha)
    picked = first.best(5)
    passes = [first, *(trials.again(first, picked, share) for share in (0.5, 1.0))]
    mean, error = (sum(each.columns[name] for each in passes) / 3 for name in ("effect", "error"))
    expected = (mean.abs() / error).sort(descending=True, stable=True).indices[:5].tolist()
    assert expected != picked.tolist()
    steering = tt.AUSteer(k=5, alpha=alpha, locate="effect", average=True).fit(lm, CONTRAST)
    width = lm.anatomy.width("layers.0.heads")
    assert [layer * width + unit for layer, unit in ranked(steering)] == expected
    assert steering.tables["gain"].tolist() == mean[expected].sign().tolist()
    # Of what was chosen the effect is that on its own way, by Simpson's rule.
    own = first.with_columns(gain=mean.sign())
    way = [first, *(trials.again(own, torch.tensor(expected), share) for share in (0.5, 1.0))]
    effects = [each.columns["effect"][expected] for each in way]
    simpson = (effects[0] + 4 * effects[1] + effects[2]) / 6
    assert steering.tables["effect"].tolist() == pytest.approx(simpson.tolist(), rel=1e-5)


def _fisher(lm: tt.LanguageModel, places: list[tuple[int, int]]) -> tuple[Any, Any]:
    """The Fisher information of some units with the ridge, and their samples, in numpy."""
    costs = unit_costs(lm, lm.anatomy.sites("heads"))
    every = np.concatenate([each.samples.double().numpy() for each in costs], axis=1)
    width = costs[0].samples.shape[1]
    own = every[:, [layer * width + unit for layer, unit in places]]
    ridge = 0.1 * (every**2).mean()
    return own.T @ own / len(own) + ridge * np.eye(len(places)), own


def test_fisher_gains_are_the_closed_form() -> None:
    lm = tiny_lm("qwen2")
    settings: dict[str, Any] = {"k": 12, "locate": "effect"}
    plain = tt.AUSteer(**settings, strength="graded").fit(lm, CONTRAST)
    steering = tt.AUSteer(**settings, interaction="fisher").fit(lm, CONTRAST)
    assert ranked(steering) == ranked(plain)
    fisher, samples = _fisher(lm, ranked(steering))
    effect = steering.tables["effect"].double().numpy()
    expected = np.linalg.solve(fisher, effect)
    expected /= np.abs(expected).max()
    assert steering.tables["gain"].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert steering.hyperparameters["strength"] == "graded"
    # No other gammas gain more for what they cost, ridge included.
    for gains in (expected, plain.tables["gain"].numpy(), np.sign(effect)):
        ratio = gains @ effect / math.sqrt(gains @ fisher @ gains)
        assert ratio <= expected @ effect / math.sqrt(expected @ fisher @ expected) + 1e-9
    known = steering.findings["predicted"]
    draws = unit_costs(lm, ["layers.0.heads"])[0].draws
    each = (0.5 * (samples @ expected) ** 2).reshape(-1, draws).mean(1)  # of each text
    assert known["kl"] == pytest.approx(each.mean(), rel=1e-4)
    assert known["kl_error"] == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)), rel=1e-4)


def test_the_error_of_the_predicted_gain_is_that_over_pairs() -> None:
    lm = tiny_lm()
    steering = tt.AUSteer(k=6, locate="effect", alpha=1.0).fit(lm, CONTRAST)
    sites = [f"layers.{layer}.heads" for layer, _ in ranked(steering)]
    wants = [Want(site, Effect(), Samples) for site in sites]
    gathered: Statistics = collect(lm, CONTRAST, wants)
    per_pair = np.zeros(len(PAIRS))
    for want, (_, unit), gain in zip(
        wants, ranked(steering), steering.tables["gain"].tolist(), strict=True
    ):
        per_pair += gain * gathered[want].texts()[0][:, unit].double().numpy()
    known = steering.findings["predicted"]
    assert known["gain"] == pytest.approx(per_pair.mean(), rel=1e-3)
    error = per_pair.std(ddof=1) / math.sqrt(len(per_pair))
    assert known["gain_error"] == pytest.approx(error, rel=1e-3)


# -- the dial -------------------------------------------------------------------------------------


@pytest.mark.parametrize("locate", ["effect", "effect_per_nat"])
def test_unmeasured_the_dial_stands_where_a_budget_is_predicted(locate: Any) -> None:
    lm = tiny_lm()
    method = partial(tt.AUSteer, k=8, locate=locate)
    steering = method().fit(lm, CONTRAST, measure=False)
    kl = steering.findings["predicted"]["kl"]
    assert steering.setting**2 * kl == pytest.approx(1.0, rel=0.01)
    assert steering.dial.range[0] < steering.setting < steering.dial.range[1]
    assert method(alpha=3.0).fit(lm, CONTRAST, measure=False).setting == 3.0
    # What is steered elsewhere than at every token has no predicted cost.
    elsewhere = method(positions="generated").fit(lm, CONTRAST, measure=False)
    assert elsewhere.setting == tt.AUSteer.unmeasured
    assert "predicted" not in elsewhere.findings
    assert tt.AUSteer(k=8).fit(lm, CONTRAST, measure=False).setting == tt.AUSteer.unmeasured


# -- what is said of it ---------------------------------------------------------------------------


def test_what_is_predicted_is_said_at_the_dial_and_at_strengths(
    trimtab: Command, tmp_path: Path
) -> None:
    made = tt.AUSteer(k=6, locate="effect", verify=4).fit(tiny_lm(), CONTRAST)
    known = made.findings["predicted"]
    kl = (0.1, 0.5, 1.0)
    calibration = replace(
        CALIBRATION, kl=kl, positive=(0.5, 1.5, None), positive_worst5=(0.4, 1.2, None)
    )
    path = replace(made, calibration=calibration).at(2.0).save(tmp_path / "one.safetensors")
    shown = trimtab("inspect", f"{path}@2", "--json").json
    foreseen = shown["predicted"]
    assert foreseen["dial"] == 2
    assert foreseen["gain"] == pytest.approx(2 * known["gain"])
    assert foreseen["gain_error"] == pytest.approx(2 * known["gain_error"])
    assert foreseen["kl"] == pytest.approx(4 * known["kl"])
    assert foreseen["kl_error"] == pytest.approx(4 * known["kl_error"])
    gentle, clear = foreseen["strengths"]
    assert (gentle["name"], gentle["dial"], gentle["measured_kl"]) == ("gentle", 0.5, 0.1)
    assert clear["gain"] == pytest.approx(1.5 * known["gain"])
    assert clear["kl"] == pytest.approx(2.25 * known["kl"])
    assert {"real", "real_error", "predicted"} <= shown["units"][0].keys()
    words = " ".join(explain(tt.Steering.read(f"{path}@0.1")))
    assert f"Predicted at 0.1 from its effects: {0.1 * known['gain']:+.2f} ±" in words
    # Of a dial at which the cost is no longer small, words tell what is predicted before.
    small = math.sqrt(0.3 / known["kl"])
    assert f"Predicted at {small:.3g} from" in " ".join(explain(tt.Steering.read(f"{path}@2")))
    assert "4 rows" in words


def test_others_have_nothing_predicted() -> None:
    assert "predicted" not in describe(tt.AUSteer(k=6, alpha=1.0).fit(tiny_lm(), CONTRAST))


# -- what does not go -----------------------------------------------------------------------------

_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "verify by rates": ({"locate": "momentum", "verify": 8}, "verify is for units by effect"),
    "average by rates": ({"locate": "momentum", "average": True}, "average is for units by effect"),
    "blocks by rates": (
        {"locate": "momentum", "interaction": "blocks"},
        "interaction is for units by effect",
    ),
    "one pair": ({"verify": 1}, "2 or more, or 0 for none"),
    "no strength": ({"verify": 8, "alpha": 0.0}, "above 0, not 0"),
    "all units": ({"verify": 8, "k": "all"}, "give k a number"),
    "the least": ({"average": True, "choose": "least", "alpha": 0.5}, "leave choose out"),
    "fixed fisher": ({"interaction": "fisher", "strength": "fixed"}, "leave strength out"),
    "a block alone": ({"block": 4}, "block is for interaction blocks"),
    "no block": ({"interaction": "blocks", "block": 0}, "must be 1 or more"),
    "average in blocks": ({"interaction": "blocks", "average": True}, "take one"),
    "some positions": ({"interaction": "blocks", "positions": "last"}, "leave positions out"),
    "another word": ({"interaction": "both"}, "known are none, blocks, fisher"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    options, says = _REFUSED[case]
    refused_in_one_line(lambda: tt.AUSteer(**{"locate": "effect", **options}), says)


def test_units_that_gain_nothing_are_left_out() -> None:
    lm = tiny_lm()
    method = tt.AUSteer(k=60, locate="effect", verify=9, alpha=30.0, layers=(2,))
    made: list[tt.Steering] = []
    said = warned(lambda: made.append(method.fit(lm, CONTRAST)))
    assert any("units gain anything at a strength of 30" in one for one in said)
    assert 0 < len(ranked(made[0])) < 60


@pytest.mark.parametrize("positions", ["all", "last"])  # written texts are all answer
def test_unpaired_texts(positions: Any) -> None:
    lm = tiny_lm()
    plus, minus = ([row[0] + row[side] for row in PAIRS] for side in (1, 2))
    contrast = Contrast.from_texts(plus, minus)
    method = tt.AUSteer(k=3, locate="effect", verify=9, alpha=2.0, positions=positions)
    steering = method.fit(lm, contrast)
    base, _ = tt.cross_entropy(lm, [*plus, *minus])
    for place, gamma in gammas_of(steering).items():
        row = ranked(steering).index(place)
        alone = tt.AUSteer(k="all", locate="effect", alpha=1.0).fit(lm, contrast)
        own = _only(alone, place, gamma)
        nll, _ = tt.cross_entropy(lm, [*plus, *minus], own)
        gained = base - nll
        real = float(gained[: len(plus)].mean() - gained[len(plus) :].mean())
        assert float(steering.tables["real"][row]) == pytest.approx(real, abs=1e-5)


def _only(steering: tt.Steering, place: tuple[int, int], gamma: float) -> tt.Steering:
    """A steering of one unit."""
    layer, unit = place
    (one,) = [i for i in steering.interventions if i.site == f"layers.{layer}.heads"]
    operator: Any = one.operator
    scale = Scale(torch.tensor([unit]), torch.tensor([1.0]), operator.width)
    return replace(steering, interventions=(replace(one, operator=scale),)).at(gamma)
