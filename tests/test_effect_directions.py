"""Singular directions of weights as units: against central differences of scaling what lies along
them, in float64, and the same attached and baked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, logits_of, refused_in_one_line, relative, token_ids
from method_settings import PAIRED
from plain_sites import plain_edit
from tiny import tiny_tokenizer
from tiny_curated import curated_model
from trimtab.methods import describe, explain
from trimtab.reading import log_odds

STEP = 1e-4
PAIRS = [row for row in PAIRED.rows if row.part == "train"]
KINDS = ["heads", "attn_out", "ffn_in", "ffn_out"]


@cache
def _lm() -> tt.LanguageModel:
    return language_model("gpt2", dtype=torch.float64)


@cache
def _fitted(kind: str, locate: Any = "effect") -> tt.Steering:
    method = tt.AUSteer(kind, k=6, locate=locate, basis="svd")
    return method.fit(_lm(), PAIRED, measure=False)


def _direction(site: str, number: int) -> Tensor:
    """The singular vector by numpy, from transformers' weights: GPT-2 stores [in, out]."""
    _, layer, kind = site.split(".")
    model: Any = _lm().model
    block = model.transformer.h[int(layer)]
    owner = block.attn.c_proj if kind in ("heads", "attn_out") else block.mlp.c_proj
    into, _, out = np.linalg.svd(owner.weight.detach().numpy(), full_matrices=False)
    vectors = into.T if kind in ("heads", "ffn_in") else out
    return torch.from_numpy(vectors[number].copy())


def _slopes(site: str, vector: Tensor) -> Tensor:
    """How each pair's log-odds change when what lies along a vector is scaled, [pairs]."""
    model: Any = _lm().model
    odds = torch.zeros(2, len(PAIRS), dtype=torch.float64)
    for number, pair in enumerate(PAIRS):
        start = len(token_ids(str(pair.prompt)))
        for answer, sign in ((pair.positive, 1), (pair.negative, -1)):
            ids = token_ids(str(pair.prompt) + answer)
            for side, gamma in enumerate((-STEP, STEP)):

                def scaled(x: Tensor, gamma: float = gamma) -> Tensor:
                    return x + gamma * (x @ vector)[..., None] * vector

                with torch.no_grad(), plain_edit(model, "gpt2", site, scaled):
                    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                answers = sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))
                odds[side, number] += sign * answers
    return (odds[1] - odds[0]) / (2 * STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_has_the_effect_of_scaling_what_lies_along_it(kind: str) -> None:
    steering = _fitted(kind)
    for unit in describe(steering)["units"][:3]:
        slopes = _slopes(unit["site"], _direction(unit["site"], unit["unit"]))
        assert unit["effect"] == pytest.approx(float(slopes.mean()), rel=1e-5, abs=1e-8)
        error = float(slopes.std() / len(slopes) ** 0.5)
        assert unit["error"] == pytest.approx(error, rel=1e-4)
        assert unit["score"] == pytest.approx(abs(unit["effect"]) / unit["error"], rel=1e-4)
    assert "singular directions" in " ".join(explain(steering))


@pytest.mark.parametrize("locate", ["effect", "effect_per_nat"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_is_gained(kind: str, locate: str) -> None:
    steering = _fitted(kind, locate)
    dial = 0.01
    gain = (log_odds(_lm(), PAIRED.train, steering.at(dial)) - log_odds(_lm(), PAIRED.train)).mean()
    assert float(gain) == pytest.approx(dial * steering.findings["predicted"]["gain"], rel=0.1)
    assert gain > 0
    gains = steering.tables["gain"]
    assert gains.abs().max() <= 1
    assert (gains.sign() == steering.tables["effect"].sign()).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_baked_is_attached(name: str, kind: str, tmp_path: Path) -> None:
    lm = language_model(name)
    steering = tt.AUSteer(kind, k=5, alpha=2, locate="effect", basis="svd").fit(
        lm, PAIRED, measure=False
    )
    path = steering.save(tmp_path / "along.safetensors")
    again = tt.Steering.load(path)
    with lm.steered(again):
        attached = logits_of(lm)
    assert relative(attached, logits_of(lm)) > 1e-3
    baked = tt.bake(lm, again)
    assert relative(logits_of(baked), attached) < 1e-4


def test_all_directions_together_are_the_whole_site() -> None:
    """Scaling along all of them is scaling all that the next map reads."""
    steering = tt.AUSteer("heads", k="all", locate="effect", basis="svd", layers=(1,)).fit(
        _lm(), PAIRED, measure=False
    )
    every = _lm().anatomy.width("layers.1.heads")
    assert len(steering.tables["unit"]) <= every
    along = steering.tables["effect"].double().sum()
    units = tt.AUSteer("heads", k="all", locate="effect", layers=(1,)).fit(
        _lm(), PAIRED, measure=False
    )
    assert float(along) == pytest.approx(float(units.tables["effect"].double().sum()), rel=1e-5)


def test_what_cannot_be_taken_apart_is_refused() -> None:
    for options, says in (
        ({"site": "resid"}, "site resid is for single units"),
        ({"choose": "least"}, "choose least is for single units"),
        ({"clamp_sign": True}, "clamp_sign is for single units"),
        ({"verify": 4}, r"choosing again \(verify, average, interaction\) is for single units"),
        ({"locate": "momentum"}, "basis is for units by effect"),
    ):
        options = {"locate": "effect", **options}
        refused_in_one_line(lambda: tt.AUSteer(basis="svd", **options), says)  # type: ignore[arg-type]
    lm = tt.wrap(curated_model("mixtral"), tiny_tokenizer(), "mixtral")
    method = tt.AUSteer("ffn_in", k=3, locate="effect", basis="svd")
    refused_in_one_line(lambda: method.fit(lm, PAIRED), "no single weight matrix at layers.")
    # Its attention has one.
    heads = tt.AUSteer("heads", k=3, locate="effect", basis="svd").fit(lm, PAIRED, measure=False)
    assert len(describe(heads)["units"]) == 3
