"""Dials that are measured when a steering is made, against plain passes at the dials found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from helpers import PROMPTS, kl_at, language_model, refused_in_one_line, steer_at, with_range
from trimtab.cli.evaluate import Alternatives, _alternatives
from trimtab.dials.measuring import (
    BREAKS,
    MOST,
    Probe,
    _cost,
    _ladder,
    _median,
    _solution,
    measured,
)
from trimtab.methods import explain
from trimtab.reading import plain_texts
from trimtab.steering import STRENGTHS, Scope

TEXTS = PROMPTS[:3]  # of an odd number one is the median
PAIRS = [(prompt, " glad and warm", " cold and dull") for prompt in TEXTS]
CONTRAST = tt.Contrast.from_pairs(PAIRS, "tone")


def plain_cost(lm: tt.LanguageModel, steering: tt.Steering, dial: float) -> float:
    """Nats per token that a dial adds to the beginnings of the plain texts, by whole passes."""
    texts = [lm.tokenizer.decode(ids[:32]) for ids in lm.encode(plain_texts()[:4])]
    texts = [text.removeprefix(lm.tokenizer.bos_token or "\0") for text in texts]

    def nll(steered: tt.Steering | None) -> Any:
        logits = lm.logits(texts, steering=steered, at="all")
        rows = [
            row.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])
            for row, ids in zip(logits, lm.encode(texts), strict=True)
        ]
        return -torch.cat(rows).mean()

    return float(nll(replace(steering, value=dial)) - nll(None))


def sure(name: str) -> tt.LanguageModel:
    """A tiny model that is sure of its next tokens, so that there is something to lose."""
    lm = language_model(name)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(8)
    return tt.wrap(lm.model, lm.tokenizer)


def check_strengths(lm: tt.LanguageModel, found: tt.Steering, prompts: Sequence[Any]) -> None:
    """Each strength moves half of the prompts so far."""
    assert found.calibration is not None
    for name, kl in STRENGTHS.items():
        at = found.at(name).setting
        here = statistics.median(kl_at(lm, found, prompt, at) for prompt in prompts)
        assert here == pytest.approx(kl, rel=0.4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_strengths_are_those_of_plain_passes(name: str) -> None:
    lm = sure(name)
    steering = with_range(steer_at(lm, "resid", "Add", layer=1), -50, 50)
    check_strengths(lm, measured(lm, steering, CONTRAST, default=True), TEXTS)


@pytest.mark.slow
def test_on_a_real_model_range_and_default_are_those_of_plain_passes(smollm2: Any) -> None:
    contrast = tt.Contrast.builtin("formality").train.take(7)
    found = measured(
        smollm2,
        tt.CAA(layer=12).fit(smollm2, contrast, measure=False),
        contrast,
        default=True,
    )
    check_strengths(smollm2, found, [pair.prompt for pair in contrast.pairs])
    for end in found.dial.range:
        assert plain_cost(smollm2, found, end) == pytest.approx(BREAKS, rel=0.3)
    cost = plain_cost(smollm2, found, found.dial.default)
    assert found.findings["measured"]["cost"] == pytest.approx(cost, abs=0.02)
    assert cost <= MOST * 1.2
    strong = found.at("strong").setting
    assert found.dial.default == pytest.approx(strong, rel=0.01) or cost >= MOST * 0.8


@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("end", [2.0, 1e4])
def test_dials_on_a_power_law_are_exact(start: float, end: float) -> None:
    sizes: list[float] = []

    def run(size: float) -> Probe:
        sizes.append(size)
        return Probe((size**2 / 9,) * 3, size**3 / 125)

    goals = [(_median, 0.1), (_median, 1.0), (_cost, 1.0)]
    known = _ladder(run, goals, start, end)
    for figure, limit in goals:
        exact = {0.1: 0.9**0.5, 1.0: 3.0}[limit] if figure is _median else 5.0
        found = _solution(known, figure, limit)
        assert found.reached is (exact <= end)
        assert found.dial == pytest.approx(min(exact, end))
    assert max(sizes) <= end
    assert len(sizes) == len(set(sizes)) <= 10


def test_overflow_ends_the_range_below_it() -> None:
    def run(size: float) -> Probe:
        return Probe((size,), 0.1 if size < 7 else math.inf)

    found = _solution(_ladder(run, [(_cost, 1.0)], 1.0, 1e6), _cost, 1.0)
    assert 3.5 <= found.dial < 7


def test_fit_stands_on_what_is_measured_unless_told(measuring: None) -> None:
    lm = sure("llama")
    free = tt.CAA(layer=1).fit(lm, CONTRAST)
    assert free.calibration is not None
    assert free.setting == free.dial.default != 1.0
    told = tt.CAA(layer=1, alpha=0.01).fit(lm, CONTRAST)
    assert told.setting == 0.01
    assert told.dial.range == free.dial.range
    with pytest.warns(tt.TrimtabWarning, match="alpha = 1e\\+09 is outside the sensible range"):
        tt.CAA(layer=1, alpha=1e9).fit(lm, CONTRAST)
    own = tt.CAA(layer=1).fit(lm, CONTRAST, measure=False)
    assert (own.setting, own.dial.range, own.calibration) == (1.0, (-20.0, 20.0), None)


def test_generated_tokens_are_measured_as_the_prompts_last() -> None:
    lm = language_model("llama")
    steering = with_range(steer_at(lm, "resid", "Add", layer=1), -50, 50)

    def at(positions: str) -> tt.Steering:
        changed = [replace(one, scope=Scope.parse(positions)) for one in steering.interventions]
        return measured(lm, replace(steering, interventions=tuple(changed)), CONTRAST, default=True)

    generated, last = at("generated"), at("last")
    assert generated.dial == last.dial
    assert generated.calibration == last.calibration
    assert list(map(str, generated.scopes)) == ["generated"]


def test_what_sets_an_angle_is_left_as_it_is(measuring: None) -> None:
    lm = language_model("llama")
    found = tt.SAS(theta=30).fit(lm, CONTRAST)
    assert found.dial.range == (-360.0, 360.0)
    assert found.calibration is None


@pytest.mark.parametrize(
    "contrast",
    [
        tt.Contrast.from_texts(["a fine day", "so glad"], ["a dull day", "so cold"]),
        tt.Contrast.from_pairs([("", "a fine day out", "a dull day in"), ("", "glad", "sad")]),
        tt.Contrast.from_pairs([("Tell me " * 300, " glad", " sad")]),
    ],
    ids=["unpaired", "no prompt", "long"],
)
def test_any_contrast_has_prompts_to_measure_on(contrast: tt.Contrast, measuring: None) -> None:
    found = tt.CAA(layer=1).fit(language_model("llama"), contrast)
    assert found.calibration is not None
    assert found.calibration.prompts >= 1


def test_strengths_by_name_wherever_a_dial_is(tmp_path: Path, measuring: None) -> None:
    lm = language_model("llama")
    path = tt.CAA(layer=1).fit(lm, CONTRAST).save(tmp_path / "a.safetensors")
    loaded = tt.Steering.load(path)
    assert tt.Steering.read(f"{path}@gentle").setting == loaded.at("gentle").setting
    assert loaded.at("gentle").setting == loaded.at(kl=0.1, median=True).setting
    refused_in_one_line(lambda: loaded.at("mild"), "gentle, clear, strong")
    refused_in_one_line(lambda: tt.Steering.read(f"{path}@mild"), "gentle, clear, strong")
    refused_in_one_line(lambda: loaded.at("-gentle"), "no dials of the negative side")
    by_dial = _alternatives(Alternatives(steer=[str(path)], dial=["gentle", "0.5"]))
    assert [one.setting for one in by_dial.values()] == [loaded.at("gentle").setting, 0.5]
    assert list(by_dial) == [f"{path}@gentle", f"{path}@0.5"]
    bare = replace(loaded, calibration=None)
    refused_in_one_line(lambda: bare.at("clear"), "is not calibrated")
    assert any("gentle" in line for line in explain(loaded))
