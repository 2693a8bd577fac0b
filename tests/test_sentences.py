"""What each analysis says it found: a sentence of the numbers that are in its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.papers.analyses import ANALYSES
from trimtab.papers.sentences import SENTENCES

GOLDEN = Path(__file__).parent / "golden" / "analyse.json"
CHANGE = {"difference": 0.25, "ci95": [0.1, 0.4], "n": 40, "p": 0.001}
NOTHING = {"difference": -0.025, "ci95": [-0.1, 0.05], "n": 40, "p": 1.0}


def chosen(value: float, change: dict[str, Any] | None) -> dict[str, Any]:
    return {"theta": 90.0, "test": value, "change": change}


DATA: dict[str, tuple[dict[str, Any], str]] = {
    "units": (
        {"task": "copa", "site": "heads", "metric": "accuracy", "units": [0] * 9,
         "counts": {"accuracy": {"beneficial": 2, "neutral": 6, "harmful": 1}}},
        "Steered alone, 2 of 9 units of heads clearly raise accuracy on copa, and 1 clearly lower "
        "it.",
    ),
    "tokens": (
        {"site": "layers.1.ffn_in", "strengths": [1, 100],
         "units": [{"unit": 7, "kl_to_far": [3.0, 0.0123],
                    "tokens": [{"top": [{"token": "a"}]}, {"top": [{"token": " b"}]}]}]},
        "Scaled 100-fold, unit 7 of layers.1.ffn_in makes ' b' the most probable next token, "
        "0.0123 nats from where it goes without end.",
    ),
    "scores": (
        {"sites": {"heads": {"above_chance": 3, "units": 1920, "layer_max": [0.7, 0.95],
                             "chance_maximum": {"q95": 0.8123}}}},
        "3 of 1,920 units of heads score higher than chance does in 95 % of cases (0.812), the "
        "highest 0.950.",
    ),
    "overlap": (
        {"k": 100, "site": "heads",
         "shared": [{"first": "a", "second": "b", "shared": 1, "chance": 0.5},
                    {"first": "a", "second": "c", "shared": 9, "chance": 0.5}]},
        "Of their 100 highest units of heads, a and c share 9; chance alone gives 0.5.",
    ),
    "pairs": (
        {"task": "copa", "metric": "accuracy",
         "counts": [{"pairs": 50, "overlap": [0.5, 0.7], "values": {"accuracy": [0.5, 0.6]}},
                    {"pairs": 300, "overlap": [1.0], "values": {"accuracy": [0.8]}}]},
        "From 50 pairs accuracy on copa is 55.0 %, from all 300 80.0 %; 60% of the units are the "
        "same.",
    ),
    "count": (
        {"task": "copa", "metric": "accuracy",
         "counts": [{"k": 1, "alpha": 1.0, "figures": {"accuracy": {"value": 0.5}}},
                    {"k": 1000, "alpha": 8.0,
                     "figures": {"accuracy": {"value": 0.75, "change": CHANGE}}}]},
        "Of 2 settings, 1,000 units at alpha 8 do best on copa: +25.0 points [10.0, 40.0], clear "
        "of chance.",
    ),
    "suppression": (
        {"task": "copa", "metric": "accuracy",
         "chosen": [{"name": "least", "p_corrected": 0.2, "test": {"accuracy": {"change": CHANGE}}},
                    {"name": "most", "p_corrected": 0.01,
                     "test": {"accuracy": {"change": CHANGE}}}]},
        "On the test rows of copa, accuracy changes by: least +25.0 points [10.0, 40.0], no more "
        "than chance makes; most +25.0 points [10.0, 40.0], clear of chance.",
    ),
    "ablations": (
        {"task": "copa", "metric": "toxicity",
         "variants": [{"name": "AUSteer", "test": {"toxicity": {"value": 0.5}},
                       "against_unsteered": {"toxicity": NOTHING}},
                      {"name": "random", "test": {"toxicity": {"value": 0.9}},
                       "against_unsteered": {"toxicity": CHANGE}}]},
        "Of 2 variants of AUSteer, AUSteer does best on the test rows of copa: -0.025 [-0.1, "
        "0.05], no more than chance makes.",
    ),
    "heatmap": (
        {"task": "copa", "metric": "accuracy", "unsteered": {"test": {"value": 0.5}},
         "best": {"params": {"k": 16, "alpha": 8.0}, "test": 0.75},
         "robustness": {"settings": 12, "better_than_unsteered": 7}},
        "Of 12 settings, k 16 and alpha 8 do best on validation: on the test rows accuracy is "
        "75.0 %, unsteered 50.0 %; 7 settings beat the unsteered model on validation.",
    ),
    "effect": (
        {"task": "copa", "site": "heads", "metric": "log_odds", "kl": [0.02, 0.1, 0.3],
         "rankings": [{"name": "signed momentum"}, {"name": "effect z"}],
         "chosen": [{"name": "signed momentum", "kl": 0.1, "params": {"k": 256}, "validation": 0.1,
                     "test": NOTHING},
                    {"name": "effect z", "kl": 0.1, "params": {"k": 4}, "validation": 0.9,
                     "test": CHANGE},
                    {"name": "effect z", "kl": 0.02, "params": {"k": 1}, "validation": 2.0,
                     "test": CHANGE},
                    {"name": "caa", "kl": 0.1, "params": {"layer": 3}, "validation": 5.0,
                     "test": CHANGE}]},
        "Of 2 rankings of units of heads within 0.1 nats at the next token, effect z gains most on "
        "validation; on the test rows of copa: effect z +0.25 nats [0.1, 0.4], clear of chance, "
        "with 4 units; signed momentum -0.025 nats [-0.1, 0.05], no more than chance makes, with "
        "256 units.",
    ),
    "plane": (
        {"method": "ss", "plane": {"source_site": "layers.1.attn_norm"}, "sites": [0] * 6,
         "discriminative": {"sites": ["a", "b"], "blocks": [1]}},
        "The plane of ss is taken from layers.1.attn_norm; 2 of 6 norms see the two sides on "
        "opposite sides of zero, and 1 blocks do at all of their norms.",
    ),
    "norms": (
        {"massive_above": 100.0,
         "sites": [{"kind": "resid", "site": "layers.0.resid", "median": 10.0, "massive": 2},
                   {"kind": "resid", "site": "layers.9.resid", "median": 1234.5, "massive": 3},
                   {"kind": "ffn_out", "site": "layers.0.ffn_out", "median": 1.0, "massive": 9}]},
        "The median activation is 10 long at layers.0.resid and 1,234 at layers.9.resid; 5 tokens "
        "are more than 100 times the median's length.",
    ),
    "dial": (
        {"task": "copa", "metric": "log_odds",
         "methods": [{"name": "sas", "chosen": chosen(-1.0, None)},
                     {"name": "ss", "chosen": chosen(2.5, {**CHANGE, "p": None})}]},
        "ss at 90° does best of 2 methods on copa: on the test rows log-odds is 2.5: +0.25 nats "
        "[0.1, 0.4], clear of chance.",
    ),
    "masks": (
        {"task": "copa", "metric": "log_odds", "masks": [{"name": "all", "chosen": None}]},
        "No angle could be chosen for 1 masks.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_says_what_it_found(name: str) -> None:
    data, says = DATA[name]
    assert SENTENCES[name](data) == says


def test_sentences_are_made_of_the_data_of_real_analyses() -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    said = {
        name: SENTENCES[each["out"]["analysis"]](each["out"])
        for name, each in recorded.items()
        if isinstance(each.get("out"), dict) and "analysis" in each["out"]
    }
    assert len(said) >= 9
    for name, sentence in said.items():
        assert sentence.endswith("."), name
        assert "nan" not in sentence
