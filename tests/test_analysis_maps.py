"""Maps of scores, shared units and the number of pairs: against counts made by hand, and scipy."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, read_last, refused_in_one_line, side_texts
from trimtab.contrasts import Contrast
from trimtab.evaluation.tasks import load_contrast
from trimtab.methods.austeer import AUSteer
from trimtab.methods.sadi import SADI
from trimtab.papers.analyses import overlap, pairs, scores
from trimtab.papers.austeer.amounts import fit_subsets
from trimtab.papers.austeer.ranking import chance_maximum, chance_overlap
from trimtab.reports.charts import rendered

WHO = ("king", "mother", "captain", "daughter", "fire")
WHAT = ("ship", "map", "table", "house")


def _pairs(positive: str, negative: str) -> list[tuple[str, str, str]]:
    return [
        (f"The {who} looked at the {what} and said that it was", positive, negative)
        for who in WHO
        for what in WHAT
    ]


RIGHT, SAD = _pairs(" right.", " wrong!"), _pairs(" good", " sad")
CONTRASTS = {"right": Contrast.from_pairs(RIGHT), "sad": Contrast.from_pairs(SAD)}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


def _rates(model: Any, kind: str, some: list[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """r_pos and r_neg, [layers, units], from plain passes."""
    positive, negative = (read_last(model, kind, texts) for texts in side_texts(some))
    momentum = positive - negative
    return (momentum > 0).double().mean(0), (momentum < 0).double().mean(0)


def _top(score: Tensor, k: int) -> list[tuple[int, int]]:
    places = itertools.product(range(score.shape[0]), range(score.shape[1]))
    return sorted(places, key=lambda place: (-float(score[place]), *place))[:k]


def _svg(picture: Any) -> str:
    return rendered(picture.figure, "svg", picture.name).decode()


# -- scores -----------------------------------------------------------------------------------


def test_scores_are_counted_signs(lm: tt.LanguageModel) -> None:
    found = scores(lm, CONTRASTS["right"], sites=("heads", "ffn_out"), k=20)
    for kind, width in (("heads", 64), ("ffn_out", 48)):
        entry = found.data["sites"][kind]
        r_pos, r_neg = _rates(lm.model, kind, RIGHT)
        score = torch.maximum(r_pos, r_neg)
        assert np.array(entry["scores"]) == pytest.approx(score.numpy(), abs=1e-4)
        assert entry["layer_max"] == pytest.approx(score.amax(1).tolist())
        assert entry["layer_mean"] == pytest.approx(score.mean(1).tolist())
        assert (entry["pairs"], entry["units"]) == (20, 3 * width)
        top = _top(score, 20)
        assert [(unit["layer"], unit["unit"]) for unit in entry["top"]] == top
        by_layer = [sum(layer == place[0] for place in top) for layer in range(3)]
        assert entry["top_by_layer"] == by_layer
        for unit in entry["top"]:
            place = unit["layer"], unit["unit"]
            up, down = float(r_pos[place]), float(r_neg[place])
            assert unit["gamma"] == pytest.approx(up if up > down else -down)
        above = int((score > entry["chance_maximum"]["q95"]).sum())
        assert entry["above_chance"] == above
        assert any(f"{kind}: {above:,} of" in note for note in found.notes)
    # Four heads of 16 units each.
    r_pos, r_neg = _rates(lm.model, "heads", RIGHT)
    by_head = torch.maximum(r_pos, r_neg).reshape(3, 4, 16)
    entry = found.data["sites"]["heads"]
    assert np.array(entry["head_max"]) == pytest.approx(by_head.amax(-1).numpy())
    assert np.array(entry["head_mean"]) == pytest.approx(by_head.mean(-1).numpy())
    drawn = {picture.name: _svg(picture) for picture in found.pictures}
    assert set(drawn) == {"scores-heads", "scores-by-head", "scores-ffn_out"}
    for text in ("discriminative score s", "head (16 units each)", "chance's largest, 95 %"):
        assert text in drawn["scores-heads"]
    assert "unit of ffn_out" in drawn["scores-ffn_out"]
    json.dumps(found.as_json(), allow_nan=False)


def test_scores_of_the_train_part_only(lm: tt.LanguageModel, tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "positive": a, "negative": b, "part": "train" if i < 15 else "test"}
        for i, (p, a, b) in enumerate(RIGHT)
    ]
    path = tmp_path / "parts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = scores(lm, str(path), sites=("resid",)).data["sites"]["resid"]
    r_pos, r_neg = _rates(lm.model, "resid", RIGHT[:15])
    assert entry["pairs"] == 15
    assert np.array(entry["scores"]) == pytest.approx(torch.maximum(r_pos, r_neg).numpy(), abs=1e-4)


def _at_most(pairs_compared: int, units: int, m: int) -> Fraction:
    """P(the largest of independent units' max(K, N - K) is at most m), counted exactly."""
    inside = sum(
        math.comb(pairs_compared, k)
        for k in range(pairs_compared + 1)
        if max(k, pairs_compared - k) <= m
    )
    return Fraction(inside, 2**pairs_compared) ** units


@pytest.mark.parametrize(("n", "units"), [(10, 5), (11, 40), (7, 1), (4, 1000), (30, 300)])
@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_chance_s_largest_score_is_counted_exactly(n: int, units: int, quantile: float) -> None:
    expected = next(m for m in range(n + 1) if _at_most(n, units, m) >= Fraction(quantile))
    assert chance_maximum(n, units, quantile) == pytest.approx(expected / n)


def test_chance_s_largest_score_is_what_coins_reach() -> None:
    coins = np.random.default_rng(0).binomial(100, 0.5, size=(4000, 200))
    largest = np.maximum(coins, 100 - coins).max(1) / 100
    assert chance_maximum(100, 200) == pytest.approx(np.median(largest), abs=0.011)
    assert chance_maximum(100, 200, 0.95) == pytest.approx(np.quantile(largest, 0.95), abs=0.011)
    # 240 pairs and 43,008 units, which is about what a 1.5B model has at one kind of site.
    assert chance_maximum(240, 43_008) == pytest.approx(0.64, abs=0.005)


# -- overlap ----------------------------------------------------------------------------------


def test_overlap_counts_shared_units(lm: tt.LanguageModel) -> None:
    contrasts = {**CONTRASTS, "mixed": Contrast.from_pairs(RIGHT[:10] + SAD[10:])}
    found = overlap(lm, contrasts, site="heads", k=12)
    texts = {"right": RIGHT, "sad": SAD, "mixed": RIGHT[:10] + SAD[10:]}
    tops = {}
    for name, some in texts.items():
        tops[name] = set(_top(torch.maximum(*_rates(lm.model, "heads", some)), 12))
        assert {tuple(each) for each in found.data["contrasts"][name]["top"]} == tops[name]
    assert len(found.data["shared"]) == 3
    for entry in found.data["shared"]:
        one, other = tops[entry["first"]], tops[entry["second"]]
        both = one & other
        assert entry["shared"] == len(both)
        assert {tuple(each) for each in entry["units"]} == both
        assert entry["jaccard"] == pytest.approx(len(both) / len(one | other))
        # 12 of 192 units each.
        assert entry["chance"] == pytest.approx(12 * 12 / 192)
        p = sum(
            Fraction(math.comb(12, i) * math.comb(180, 12 - i), math.comb(192, 12))
            for i in range(len(both), 13)
        )
        assert entry["p"] == pytest.approx(float(p))
        layers = [
            [sum(place[0] == layer for place in top) for layer in range(3)] for top in (one, other)
        ]
        expected = sum(a * b / 64 for a, b in zip(*layers, strict=True))
        assert entry["chance_same_layers"] == pytest.approx(expected)
    assert max(entry["shared"] for entry in found.data["shared"]) > 0
    drawn = _svg(found.pictures[0])
    for text in ("right", "sad", "mixed", "units that are among both"):
        assert text in drawn
    json.dumps(found.as_json(), allow_nan=False)


def test_the_same_contrast_shares_all(lm: tt.LanguageModel) -> None:
    twice = {"one": CONTRASTS["sad"], "two": CONTRASTS["sad"]}
    entry = overlap(lm, twice, site="ffn_out", k=5).data["shared"][0]
    assert (entry["shared"], entry["jaccard"]) == (5, 1.0)
    assert entry["p"] == pytest.approx(1 / math.comb(144, 5))


def test_random_choices_share_what_chance_says() -> None:
    draw = np.random.default_rng(0)
    shared = np.array(
        [
            len(set(draw.choice(60, 12, replace=False)) & set(draw.choice(60, 20, replace=False)))
            for _ in range(4000)
        ]
    )
    mean, p = chance_overlap(60, 12, 20, 6)
    assert mean == pytest.approx(shared.mean(), abs=0.1)
    assert p == pytest.approx((shared >= 6).mean(), abs=0.03)


def test_overlap_refuses_what_it_cannot_compare(lm: tt.LanguageModel) -> None:
    refused_in_one_line(lambda: overlap(lm, {"one": CONTRASTS["sad"]}), "two or more")
    refused_in_one_line(lambda: overlap(lm, CONTRASTS, k=145), "has 1 to 144 units")
    refused_in_one_line(lambda: scores(lm, CONTRASTS["sad"], sites=("knees",)), "unknown site kind")


def test_layers_of_different_widths_are_refused() -> None:
    refused_in_one_line(
        lambda: scores(language_model("qwen3_moe"), CONTRASTS["sad"], sites=("ffn_in",)),
        "different numbers of units",
    )


# -- fewer pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AUSteer(site="heads", k=9, direction="paper"), SADI(k=3)])
def test_subsets_of_one_pass_are_fits_of_their_own(lm: tt.LanguageModel, method: Any) -> None:
    subsets = [frozenset(range(20)), frozenset((3, 4, 11)), frozenset((0, 19))]
    found = fit_subsets(lm, method, CONTRASTS["right"], subsets)
    for subset in subsets:
        own = method.fit(lm, Contrast.from_pairs([RIGHT[i] for i in sorted(subset)]))
        assert found[subset].digest == own.digest
        assert found[subset].contrast["rows"] == len(subset)


def test_pairs_says_how_units_and_effect_settle(lm: tt.LanguageModel, tmp_path: Path) -> None:
    parts = ["train"] * 14 + ["validation"] * 4 + ["test"] * 2
    rows = [
        {"prompt": p, "positive": a, "negative": b, "part": part}
        for (p, a, b), part in zip(RIGHT, parts, strict=True)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    contrast = load_contrast(str(path))
    found = pairs(
        lm, f"contrast:{path}", counts=(4, 10, 1000), resamples=3, site="heads", k=8, alpha=9.0
    )
    entries = found.data["counts"]
    assert [entry["pairs"] for entry in entries] == [4, 10, 14]
    assert [len(entry["overlap"]) for entry in entries] == [3, 3, 1]
    # Two disjoint subsets of 4 fit into 14 pairs, two of 10 do not.
    assert [len(entry["overlap_disjoint"]) for entry in entries] == [3, 0, 0]
    assert entries[-1]["overlap"] == [1.0]
    whole = AUSteer(site="heads", k=8, alpha=9.0, direction="paper").fit(lm, contrast)
    # The log-odds of the four validation pairs, read off plain logits.
    validation = RIGHT[14:18]
    assert entries[-1]["values"]["log_odds"][0] == pytest.approx(
        _steered_odds(lm, whole, validation), abs=1e-3
    )
    for entry in entries[:2]:
        assert all(0 <= share <= 1 and (8 * share).is_integer() for share in entry["overlap"])
        assert len(set(entry["values"]["log_odds"])) > 1
    assert any("1000 were left out" in note for note in found.notes)
    drawn = _svg(found.pictures[0])
    for text in ("of two disjoint subsets", "share of the 8 units", "unsteered", "log-odds, nats"):
        assert text in drawn
    json.dumps(found.as_json(), allow_nan=False)


def _steered_odds(lm: tt.LanguageModel, steering: Any, some: list[tuple[str, str, str]]) -> float:
    total = 0.0
    for prompt, *answers in some:
        sums = []
        for answer in answers:
            ids = lm.tokenizer(prompt + answer).input_ids
            start = len(lm.tokenizer(prompt).input_ids)
            with lm.steered(steering), torch.no_grad():
                logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0].double()
            log_p = logits.log_softmax(-1)
            sums.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
        total += sums[0] - sums[1]
    return total / len(some)


def test_pairs_counts_the_units_that_agree(lm: tt.LanguageModel, tmp_path: Path) -> None:
    parts = ["train"] * 16 + ["validation"] * 2 + ["test"] * 2
    rows = [
        {"prompt": p, "positive": a, "negative": b, "part": part}
        for (p, a, b), part in zip(RIGHT, parts, strict=True)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pairs(lm, f"contrast:{path}", counts=(8,), resamples=3, site="heads", k=10, seed=5)
    whole = set(_top(torch.maximum(*_rates(lm.model, "heads", RIGHT[:16])), 10))
    generator = torch.Generator().manual_seed(5)
    with_all, of_halves = [], []
    for _ in range(3):
        order = torch.randperm(16, generator=generator).tolist()
        halves = [[RIGHT[i] for i in sorted(half)] for half in (order[:8], order[8:])]
        first, second = (
            set(_top(torch.maximum(*_rates(lm.model, "heads", half)), 10)) for half in halves
        )
        with_all.append(len(first & whole) / 10)
        of_halves.append(len(first & second) / 10)
    entry = found.data["counts"][0]
    assert entry["overlap"] == with_all
    assert entry["overlap_disjoint"] == of_halves
    assert with_all != of_halves
