"""Analyses that steer units: against weights that are edited by hand, and plain loops."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from torch import Tensor

import trimtab as tt
from helpers import (
    PROMPTS,
    language_model,
    plain_logits,
    read_last,
    refused_in_one_line,
    side_texts,
    steer,
    token_ids,
)
from trimtab.figures.significance import holm
from trimtab.papers.analyses import ANALYSES, ablations, count, heatmap, suppression, tokens, units
from trimtab.papers.austeer.tokens import unit_direction
from trimtab.papers.austeer.units import _agreement
from trimtab.papers.settings import rows_of
from trimtab.reports.charts import rendered
from trimtab.steering.operators import Scale
from trimtab.sweeps.values import difference_of, mean_of

WHO = ("king", "mother", "captain", "daughter")
WHAT = ("ship", "map", "fire", "table", "house", "day")
PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong!")
    for what in WHAT
    for who in WHO
]
PARTS = {"train": PAIRS[:12], "validation": PAIRS[12:18], "test": PAIRS[18:]}
#: (layer, unit) -> what the unit is multiplied by.
Factors = Mapping[tuple[int, int], float]


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A contrast with parts, as a task whose metric is the log-odds."""
    path = tmp_path_factory.mktemp("contrast") / "pairs.jsonl"
    rows = [
        {"prompt": prompt, "positive": positive, "negative": negative, "part": part}
        for part, pairs in PARTS.items()
        for prompt, positive, negative in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"contrast:{path}"


# -- by hand ----------------------------------------------------------------------------------


def _scores(model: Any) -> tuple[Tensor, Tensor]:
    """r_pos and r_neg at the heads, [layers, units], from the train pairs."""
    positive, negative = (read_last(model, "heads", texts) for texts in side_texts(PARTS["train"]))
    momentum = positive - negative
    return (momentum > 0).double().mean(0), (momentum < 0).double().mean(0)


def _gain(r_pos: Tensor, r_neg: Tensor) -> Tensor:
    return torch.where(r_pos > r_neg, r_pos, -r_neg)


def _ranked(score: Tensor, descending: bool = True) -> list[tuple[int, int]]:
    """(layer, unit) by score; of equal ones the lower layer and unit first."""
    sign = -1 if descending else 1
    places = itertools.product(range(score.shape[0]), range(score.shape[1]))
    return sorted(places, key=lambda place: (sign * float(score[place]), *place))


@contextmanager
def _edited(model: Any, factors: Factors) -> Iterator[None]:
    """The output projections with these columns multiplied."""
    weights = [block.self_attn.o_proj.weight for block in model.model.layers]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for (layer, unit), factor in factors.items():
            weights[layer][:, unit] *= factor
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def _log_odds(model: Any, part: str, factors: Factors) -> np.ndarray:
    """log p(positive) - log p(negative) of each pair, with weights edited."""
    found = []
    with _edited(model, factors):
        for prompt, *answers in PARTS[part]:
            sums = []
            for answer in answers:
                ids, start = token_ids(prompt + answer), len(token_ids(prompt))
                log_p = plain_logits(model, ids).double().log_softmax(-1)
                sums.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
            found.append(sums[0] - sums[1])
    return np.array(found)


def _svg(picture: Any) -> str:
    return rendered(picture.figure, "svg", picture.name).decode()


# -- single units -----------------------------------------------------------------------------


def test_units_alone_and_together_do_what_edited_weights_do(
    lm: tt.LanguageModel, task: str
) -> None:
    found = units(lm, task, site="heads", count=8, alpha=20.0, limit=None, positives=2, negatives=1)
    r_pos, r_neg = _scores(lm.model)
    gain, order = _gain(r_pos, r_neg), _ranked(torch.maximum(r_pos, r_neg))
    base = _log_odds(lm.model, "validation", {})
    changes = {}
    for entry in found.data["units"]:
        place = entry["layer"], entry["unit"]
        assert order[entry["rank"] - 1] == place
        by_hand = _log_odds(lm.model, "validation", {place: 1 + 20.0 * float(gain[place])}) - base
        change = entry["changes"]["log_odds"]
        assert change["difference"] == pytest.approx(by_hand.mean(), abs=1e-4)
        assert change["p"] == pytest.approx(stats.wilcoxon(by_hand).pvalue)
        flips = entry["changes"]["prefers"]
        signs = (by_hand + base > 0).astype(int) - (base > 0)
        assert (flips["gained"], flips["lost"]) == ((signs > 0).sum(), (signs < 0).sum())
        changes[place] = by_hand.mean()
    ranked = [(e["layer"], e["unit"]) for e in found.data["units"] if e["chosen"] == "ranked"]
    assert ranked == order[:4]
    assert len(changes) == 8
    # The two that gain most on the validation rows, together on the test rows.
    best = sorted(changes, key=lambda place: -changes[place])[:2]
    assert found.data["positive"] == [f"{layer}.{unit}" for layer, unit in best]
    worst = min(changes, key=lambda place: changes[place])
    assert found.data["harmful"] == [f"{worst[0]}.{worst[1]}"]
    together = {entry["name"]: entry["test"]["log_odds"] for entry in found.data["combinations"]}
    for name, places in (("2 positive", best), ("2 positive and 1 harmful", [*best, worst])):
        factors = {place: 1 + 20.0 * float(gain[place]) for place in places}
        by_hand = _log_odds(lm.model, "test", factors)
        assert together[name]["value"] == pytest.approx(by_hand.mean(), abs=1e-4)
    assert together["unsteered"]["value"] == pytest.approx(
        _log_odds(lm.model, "test", {}).mean(), abs=1e-4
    )


def test_units_of_one_head_and_the_whole_of_it(lm: tt.LanguageModel, task: str) -> None:
    found = units(
        lm, task, site="heads", layer=1, head=2, count=5, alpha=3.0, gamma="same", limit=None
    )
    # 16 units a head, the third of them, at even distances.
    assert [entry["unit"] for entry in found.data["units"]] == [32, 36, 40, 43, 47]
    whole = found.data["combinations"][-1]
    assert whole["name"] == "all 16 of the head"
    by_hand = _log_odds(lm.model, "test", {(1, unit): 4.0 for unit in range(32, 48)})
    assert whole["test"]["log_odds"]["value"] == pytest.approx(by_hand.mean(), abs=1e-4)
    alone, together = (_svg(picture) for picture in found.pictures)
    for text in ("unit, steered alone", "log-odds, nats", "neutral", "head 2"):
        assert text in alone
    for text in ("unsteered", "all 16 of the head", "log-odds, nats", "test, n = 6"):
        assert text in together
    assert any("corrected for their number" in note for note in found.notes)


def test_an_effect_that_no_luck_explains_is_beneficial_or_harmful(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    # 40 validation rows and units so strong that all of them move.
    pairs = [
        (f"{what} {n} {who} is", " right", " wrong")
        for n in range(2)
        for what in WHAT
        for who in WHO
    ]
    rows = [
        {"prompt": p, "positive": a, "negative": b, "part": part}
        for part, some in (("train", pairs[:6]), ("validation", pairs[6:46]), ("test", pairs[46:]))
        for p, a, b in some
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = units(lm, f"contrast:{path}", site="ffn_out", layer=2, count=6, alpha=60.0, limit=None)
    changes = [entry["changes"]["log_odds"] for entry in found.data["units"]]
    expected = multipletests([change["p"] for change in changes], 0.05, "holm")
    verdicts = []
    for change, p, clear in zip(changes, expected[1], expected[0], strict=True):
        assert change["p_corrected"] == pytest.approx(p)
        word = "beneficial" if change["difference"] > 0 else "harmful"
        assert change["verdict"] == (word if clear else "neutral")
        verdicts.append(change["verdict"])
    assert set(verdicts) - {"neutral"}
    counted = found.data["counts"]["log_odds"]
    assert counted == {name: verdicts.count(name) for name in ("beneficial", "neutral", "harmful")}


def test_units_refuses_what_it_cannot_do(lm: tt.LanguageModel, task: str) -> None:
    refused_in_one_line(lambda: units(lm, task, head=1), "a head is one of")
    refused_in_one_line(lambda: units(lm, task, site="heads", layer=9), "layer 9 is out of range")
    refused_in_one_line(
        lambda: units(lm, task, site="heads", layer=0, head=4), "head 4 is out of range"
    )
    refused_in_one_line(lambda: units(lm, task, count=1), "2 units or more")


def test_halves_of_the_rows_have_their_share_of_every_answer() -> None:
    targets = ["A", "B"] * 10
    sign = torch.tensor([1.0 if target == "A" else -1.0 for target in targets]).double()
    own = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    letter = torch.tensor([5.0, -5.0, 9.0, -9.0]).double()
    # Each unit gains as much on every row, and makes A or B more probable.
    after = list(own[:, None] + letter[:, None] * sign)
    for seed in range(5):
        assert _agreement(torch.zeros(20).double(), after, targets, seed) == pytest.approx(1)
    assert _agreement(torch.zeros(20).double(), [torch.zeros(20)] * 4, targets, 0) is None


# -- how rows are compared --------------------------------------------------------------------


def test_flips_are_tested_as_statsmodels_does() -> None:
    before = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0.0])
    after = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0, math.nan])
    found = difference_of(before, after, more=True)
    table = [[2, 1], [5, 1]]  # right and wrong before, right and wrong after
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (found.gained, found.lost, found.n) == (5, 1, 9)
    assert found.difference == pytest.approx(4 / 9)


def test_corrections_are_those_of_statsmodels() -> None:
    p = [0.04, 0.001, 0.2, 0.01, 0.01, 0.9]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.5]) == [0.5]


def test_no_clear_answer_is_said() -> None:
    refused_in_one_line(lambda: mean_of("accuracy", torch.full((3,), math.nan)), "no answer was")


@pytest.mark.slow
def test_choices_are_measured_in_one_pass_as_a_plain_loop_does(
    smollm2: Any, data_dir: Path
) -> None:
    rows = rows_of(smollm2, "copa", data=str(data_dir), limit=3, test_limit=1)
    site = smollm2.anatomy.sites("ffn_out")[27]
    operator = Scale(torch.tensor([14, 300]), torch.ones(2), 576)
    steering = steer(smollm2, (site, operator), alpha=30.0)
    for attached in (None, steering):
        found = rows.values(attached)
        records = rows.records(attached, "validation")
        assert found["accuracy"].tolist() == [record["values"]["accuracy"] for record in records]
        letters = [smollm2.tokenizer(letter).input_ids[0] for letter in "AB"]
        with smollm2.steered(attached):
            for i, record in enumerate(records):
                ids = smollm2.tokenizer(record["prompt"], return_tensors="pt").input_ids
                with torch.no_grad():
                    logits = smollm2.model(ids, use_cache=False).logits[0, -1].double()
                a, b = (float(logits.log_softmax(-1)[letter]) for letter in letters)
                expected = a - b if record["target"] == "A" else b - a
                assert float(found["log_odds"][i]) == pytest.approx(expected, abs=1e-3)


# -- tokens -----------------------------------------------------------------------------------


def _plain_scaled(model: Any, layer: int, unit: int, factor: float, ids: list[int]) -> Tensor:
    """The next token's log-distribution with one head unit's column multiplied."""
    with _edited(model, {(layer, unit): factor}):
        return plain_logits(model, ids)[-1].double().log_softmax(-1)


def test_tokens_equal_a_plain_loop(lm: tt.LanguageModel) -> None:
    strengths, chosen = (1.0, 30.0), [5, 17]
    found = tokens(
        lm, site="heads", layer=1, units=chosen, strengths=strengths, prompts=PROMPTS[:2], far=1e4
    )
    texts = [token_ids(prompt) for prompt in PROMPTS[:2]]
    p = {
        (unit, s): torch.stack([_plain_scaled(lm.model, 1, unit, 1 + s, ids) for ids in texts])
        for unit in chosen
        for s in (*strengths, 1e4)
    }

    def kl(one: Tensor, other: Tensor) -> float:
        return float((one.exp() * (one - other)).sum(-1).mean())

    for entry in found.data["units"]:
        unit = entry["unit"]
        expected = [kl(p[unit, s], p[unit, 1e4]) for s in strengths]
        assert entry["kl_to_far"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        for each in entry["tokens"]:
            mean = p[unit, each["strength"]].exp().mean(0)
            best = mean.topk(5)
            assert [token["id"] for token in each["top"]] == best.indices.tolist()
            assert [token["p"] for token in each["top"]] == pytest.approx(
                best.values.tolist(), rel=1e-3
            )
    between = found.data["between"][0]
    assert between["units"] == chosen
    expected = [kl(p[5, s], p[17, s]) for s in (*strengths, 1e4)]
    assert between["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    drawn = _svg(found.pictures[0])
    for text in ("unit 5", "5 and 17", "nats", "strength s"):
        assert text in drawn


def test_units_end_where_proposition_4_1_says(lm: tt.LanguageModel) -> None:
    for kind in ("heads", "ffn_in", "ffn_out", "resid"):
        found = tokens(lm, site=kind, layer=1, units=[3, 7], prompts=PROMPTS, far=1e6)
        for entry in found.data["units"]:
            kl = entry["proposition"]["kl"]
            assert kl[-1] < 1e-3, kind  # at 1e6
            assert kl[-1] < 0.2 * kl[0] + 1e-6, kind  # it was far from there at 10
    # By hand, from the column of the output projection and the sign of the activation.
    found = tokens(lm, site="heads", layer=1, units=[3], prompts=PROMPTS[:1], far=1e6, top=3)
    model: Any = lm.model
    column = model.model.layers[1].self_attn.o_proj.weight[:, 3].detach().double()
    sign = math.copysign(1, float(read_last(model, "heads", PROMPTS[:1])[0, 1, 3]))
    weight = model.model.norm.weight.detach().double()
    end = (sign * column * weight / column.square().mean().sqrt()) @ model.lm_head.weight.double().T
    best = end.detach().softmax(-1).topk(3)
    shown = found.data["units"][0]["proposition"]["tokens"]
    assert [each["id"] for each in shown] == best.indices.tolist()
    assert [each["p"] for each in shown] == pytest.approx(best.values.tolist(), rel=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_after_the_branch_leaves_no_limit(name: str) -> None:
    model = language_model(name)
    for kind in ("heads", "ffn_out", "ffn_in"):
        assert unit_direction(model.anatomy, f"layers.1.{kind}", 3) is None
    found = tokens(model, site="heads", layer=1, units=[3], prompts=PROMPTS[:1])
    assert found.data["units"][0]["proposition"] is None
    assert any("a norm" in note for note in found.notes)
    direction = unit_direction(model.anatomy, "layers.1.resid", 3)
    assert direction is not None
    assert direction.nonzero().tolist() == [[3]]


def test_gpt2_keeps_its_weights_the_other_way() -> None:
    model: Any = language_model("gpt2")
    direction = unit_direction(model.anatomy, "layers.1.heads", 3)
    assert direction is not None
    row = model.model.transformer.h[1].attn.c_proj.weight[3].detach()
    assert torch.equal(direction, row)


def test_tokens_of_the_highest_units_of_a_contrast(lm: tt.LanguageModel) -> None:
    # Both sides end in the same word, so that layer 0 has no easy time.
    some = [
        (f"The {who} of the", f" {first} there", f" {second} there")
        for (first, second), who in zip(itertools.combinations(WHO, 2), WHO * 2, strict=False)
    ]
    positive, negative = (read_last(lm.model, "heads", texts) for texts in side_texts(some))
    momentum = positive - negative
    order = _ranked(torch.maximum(*((momentum * s > 0).double().mean(0) for s in (1, -1))))
    found = tokens(
        lm, contrast=tt.Contrast.from_pairs(some), prompts=PROMPTS[:1], strengths=(10.0,)
    )
    layer = order[0][0]
    assert layer > 0
    assert found.data["site"] == f"layers.{layer}.heads"
    expected = [unit for other, unit in order if other == layer][:3]
    assert [entry["unit"] for entry in found.data["units"]] == expected


def test_tokens_refuses_what_it_cannot_do(lm: tt.LanguageModel) -> None:
    refused_in_one_line(lambda: tokens(lm, units=[64]), "has units 0 to 63, not 64")
    refused_in_one_line(lambda: tokens(lm, units=[]), "no unit to scale")
    refused_in_one_line(lambda: tokens(lm, strengths=(1e6,)), "between 0 and 100000")
    refused_in_one_line(lambda: tokens(lm, strengths=(math.nan,)), "finite")
    refused_in_one_line(lambda: tokens(lm, top=0), "1 or more")


# -- more units, fewer units, other units -----------------------------------------------------


def test_count_goes_up_to_all_units(lm: tt.LanguageModel, task: str) -> None:
    found = count(lm, task, site="heads", ks=(2, 50, 10**6), alpha=(2.0, 9.0), limit=None)
    r_pos, r_neg = _scores(lm.model)
    gain, order = _gain(r_pos, r_neg), _ranked(torch.maximum(r_pos, r_neg))
    tried = [(entry["k"], entry["alpha"]) for entry in found.data["counts"]]
    assert tried == [(k, alpha) for alpha in (2.0, 9.0) for k in (2, 50, 192)]
    for entry in found.data["counts"]:
        places = order[: entry["k"]]
        factors = {place: 1 + entry["alpha"] * float(gain[place]) for place in places}
        by_hand = _log_odds(lm.model, "validation", factors).mean()
        assert entry["figures"]["log_odds"]["value"] == pytest.approx(by_hand, rel=1e-3, abs=1e-3)
    drawn = _svg(found.pictures[0])
    for text in ("units that are steered", "log-odds, nats", "α = 9", "unsteered"):
        assert text in drawn


def test_suppression_shrinks_the_least_and_the_most(lm: tt.LanguageModel, task: str) -> None:
    found = suppression(
        lm,
        task,
        site="heads",
        shares=(0.25,),
        shrink=(0.5, 0.9),
        ks=(4,),
        alphas=(8.0,),
        limit=None,
    )
    r_pos, r_neg = _scores(lm.model)
    score = torch.maximum(r_pos, r_neg)
    for name, descending in (("least", False), ("most", True)):
        places = _ranked(score, descending)[:48]  # a quarter of 192
        for entry in found.data["tried"][name]:
            factors = dict.fromkeys(places, 1 - entry["shrink"])
            by_hand = _log_odds(lm.model, "validation", factors).mean()
            assert entry["figures"]["log_odds"]["value"] == pytest.approx(by_hand, abs=1e-3)
        chosen = next(e for e in found.data["chosen"] if e["name"] == name)
        best = max(found.data["tried"][name], key=lambda e: e["figures"]["log_odds"]["value"])
        assert chosen["params"]["shrink"] == best["shrink"]
        factors = dict.fromkeys(places, 1 - best["shrink"])
        by_hand = _log_odds(lm.model, "test", factors).mean()
        assert chosen["test"]["log_odds"]["value"] == pytest.approx(by_hand, abs=1e-3)
    drawn = _svg(found.pictures[0])
    for text in ("the lowest scores shrink", "share of all units", "× 0.1", "log-odds, nats"):
        assert text in drawn
    refused_in_one_line(lambda: suppression(lm, task, shares=(1.5,)), "above 0 and up to 1")


def test_ablations_choose_on_validation_and_report_on_test(lm: tt.LanguageModel, task: str) -> None:
    alphas = (30.0, 8.0, 1.0)
    found = ablations(lm, task, site="heads", ks=(6,), alphas=alphas, seeds=2, limit=None)
    variants = {entry["name"]: entry for entry in found.data["variants"]}
    r_pos, r_neg = _scores(lm.model)
    order = _ranked(torch.maximum(r_pos, r_neg))[:6]
    gains = {
        "AUSteer": {place: float(_gain(r_pos, r_neg)[place]) for place in order},
        "fixed strength": {place: float(_gain(r_pos, r_neg)[place].sign()) for place in order},
    }
    tests, picks = {}, set()
    for name, gain in gains.items():
        factors = [{place: 1 + a * g for place, g in gain.items()} for a in alphas]
        on_validation = [_log_odds(lm.model, "validation", each).mean() for each in factors]
        best = int(np.argmax(on_validation))
        picks.add(best)
        assert variants[name]["draws"][0]["params"] == {"k": 6, "alpha": alphas[best]}
        tests[name] = _log_odds(lm.model, "test", factors[best])
        value = variants[name]["test"]["log_odds"]["value"]
        assert value == pytest.approx(tests[name].mean(), abs=1e-3)
    assert picks - {0}  # or the first setting that is tried would do
    difference = variants["fixed strength"]["against_austeer"]["log_odds"]["difference"]
    expected = (tests["fixed strength"] - tests["AUSteer"]).mean()
    assert difference == pytest.approx(expected, abs=1e-3)
    drawn = variants["random localisation"]["draws"]
    assert [draw["seed"] for draw in drawn] == [0, 1]
    mean = np.mean([draw["test"]["log_odds"]["value"] for draw in drawn])
    assert variants["random localisation"]["test"]["log_odds"]["value"] == pytest.approx(mean)
    p = [v["against_austeer"]["log_odds"] for n, v in variants.items() if n != "AUSteer"]
    corrected = multipletests([each["p"] for each in p], method="holm")[1]
    assert [each["p_corrected"] for each in p] == pytest.approx(list(corrected))
    text = _svg(found.pictures[0])
    for label in ("fixed vector", "mean difference localisation", "unsteered", "6 test rows"):
        assert label in text


def test_heatmap_counts_the_settings_near_the_best(lm: tt.LanguageModel, task: str) -> None:
    pytest.importorskip("optuna")
    found = heatmap(lm, task, site="heads", ks=(2, 8), alphas=(1.0, 9.0), limit=None, close=0.1)
    values = [trial["value"] for trial in found.data["trials"]]
    assert len(values) == 4
    robust = found.data["robustness"]
    assert robust["within_close_of_best"] == sum(max(values) - value <= 0.1 for value in values)
    base = _log_odds(lm.model, "validation", {}).mean()
    assert robust["better_than_unsteered"] == sum(value > base for value in values)
    text = _svg(found.pictures[0])
    for label in ("alpha", "k", "log-odds"):
        assert f">{label}" in text


def test_every_analysis_is_ready_for_json(lm: tt.LanguageModel, task: str) -> None:
    few: dict[str, Any] = {"site": "heads", "limit": 4}
    made = [
        units(lm, task, count=4, test_limit=4, **few),
        count(lm, task, ks=(2,), **few),
        tokens(lm, prompts=PROMPTS[:1], strengths=(10.0,)),
    ]
    for found in made:
        assert found.name in ANALYSES
        text = json.dumps(found.as_json(), allow_nan=False)
        assert json.loads(text)["analysis"] == found.name
        assert found.tables
        assert found.notes
