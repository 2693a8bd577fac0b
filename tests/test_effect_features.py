"""Features of an autoencoder chosen by what scaling them does: against central differences of
adding each one's activation times its decoder's row, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from autoencoders import CONTRAST, FEATURES, PAIRS, autoencoder, library, vector_of, with_weights
from helpers import language_model, refused_in_one_line, relative, token_ids
from plain_sites import plain_edit
from trimtab.methods import describe, explain
from trimtab.reading import log_odds

__all__ = ["autoencoder"]  # fixtures, which pytest finds by their names here

SITE, STEP = "layers.1.resid", 1e-4


@cache
def _lm() -> tt.LanguageModel:
    return language_model("gpt2", dtype=torch.float64)


def _fitted(path: Path, **options: Any) -> tt.Steering:
    method = tt.STA(sae=str(path), locate="effect", **options)
    return method.fit(_lm(), CONTRAST, measure=False)


def _texts() -> list[tuple[list[int], int, float]]:
    """Both sides of each pair: tokens, where the answer begins, and its sign in the log-odds."""
    return [
        (token_ids(pair[0] + answer), len(token_ids(pair[0])), sign)
        for pair in PAIRS
        for answer, sign in zip(pair[1:], (1.0, -1.0), strict=True)
    ]


def _slope(sae: Any, rows: Tensor, feature: int) -> Tensor:
    """How each pair's log-odds change when what a feature adds is scaled, [pairs]."""
    model: Any = _lm().model

    def scaled(gamma: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            active = sae.encode(x.float())[..., feature, None].to(x)
            return x + gamma * active * rows[feature].to(x)

        return change

    odds = torch.zeros(2, len(PAIRS), dtype=torch.float64)
    for number, (ids, start, sign) in enumerate(_texts()):
        for side, gamma in enumerate((-STEP, STEP)):
            with torch.no_grad(), plain_edit(model, "gpt2", SITE, scaled(gamma)):
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            answer = sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))
            odds[side, number // 2] += sign * answer
    return (odds[1] - odds[0]) / (2 * STEP)


def _active(sae: Any) -> Tensor:
    """Every feature's activation in every text, [texts, features]: its mean over all tokens."""
    seen: list[Tensor] = []
    model: Any = _lm().model
    for ids, _, _ in _texts():

        def keep(x: Tensor) -> Tensor:
            seen.append(sae.encode(x[0].float()).double().mean(0))
            return x

        with torch.no_grad(), plain_edit(model, "gpt2", SITE, keep):
            model(torch.tensor([ids]))
    return torch.stack(seen)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk_raw"])
def test_a_feature_has_the_effect_of_scaling_what_it_adds(
    autoencoder: Callable[..., Path], kind: str
) -> None:
    path = autoencoder(kind)
    sae = library(path)
    lengths = sae.W_dec.norm(dim=-1, keepdim=True)
    rows = sae.W_dec / lengths if kind == "topk_raw" else sae.W_dec
    records = describe(_fitted(path, k=8))["features"]
    for record in records:
        slopes = _slope(sae, rows.detach(), record["feature"])
        assert record["effect"] == pytest.approx(float(slopes.mean()), rel=1e-5, abs=1e-7)
        error = float(slopes.std() / len(slopes) ** 0.5)
        assert record["error"] == pytest.approx(error, rel=1e-4)
    certain = [abs(record["effect"]) / record["error"] for record in records]
    assert certain == sorted(certain, reverse=True)


def test_a_feature_that_is_off_has_no_effect(autoencoder: Callable[..., Path]) -> None:
    path = with_weights(autoencoder("jumprelu"), lambda each: each["threshold"][::3].fill_(1e6))
    with pytest.warns(tt.TrimtabWarning, match="have an effect on the answers"):
        steering = _fitted(path, k=FEATURES)
    active = (_active(library(path)) > 0).any(0)
    assert 0 < int(active.sum()) < FEATURES
    assert sorted(steering.tables["feature"].tolist()) == active.nonzero().flatten().tolist()


def test_what_is_added_is_the_sum_of_what_they_add_by_their_signs(
    autoencoder: Callable[..., Path],
) -> None:
    path = autoencoder("standard")
    sae, steering = library(path), _fitted(path, k=5)
    kept, signs = steering.tables["feature"], steering.tables["effect"].sign().double()
    # A mean over the texts of each side.
    weights = _active(sae).mean(0)[kept] * signs
    expected = weights @ sae.W_dec.detach()[kept].double()
    (caa,) = tt.CAA(layer=1, token="answer").fit(_lm(), CONTRAST, measure=False).interventions
    expected *= caa.operator.added.double().norm() / expected.norm()  # type: ignore[union-attr]
    assert relative(vector_of(steering).double(), expected) < 1e-5
    assert steering.findings["kept"] == 5
    assert "whose effects are most certain" in " ".join(explain(steering))


def test_what_the_sum_gains_is_predicted(autoencoder: Callable[..., Path]) -> None:
    steering = _fitted(autoencoder("standard"), k=5)
    gain = (log_odds(_lm(), CONTRAST, steering.at(1e-3)) - log_odds(_lm(), CONTRAST)).mean()
    assert float(gain) == pytest.approx(1e-3 * steering.findings["predicted"]["gain"], rel=0.1)


def test_what_does_not_go_together_is_refused(autoencoder: Callable[..., Path]) -> None:
    refused_in_one_line(
        lambda: tt.STA(sae="x", locate="effect", p=0.1), "p is for locate difference"
    )
    refused_in_one_line(lambda: tt.STA(sae="x", k=3), "k is for locate effect")
    rescaling = autoencoder("standard", normalize_activations="layer_norm")
    refused_in_one_line(lambda: _fitted(rescaling), "reads activations as they are")
