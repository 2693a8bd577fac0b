"""SAE: features named and chosen, against plain hidden states, sklearn and numpy.

What needs the library sae-lens is skipped where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import trimtab as tt
from autoencoders import (
    CONTRAST,
    FEATURES,
    PAIRS,
    autoencoder,
    library,
    tiny_lm,
    vector_of,
    with_weights,
)
from helpers import PROMPTS, refused_in_one_line, relative
from tiny import tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting import Aurocs, Correlation, Sides
from trimtab.methods import describe, explain
from trimtab.reading import log_odds
from trimtab.steering import SetFeatures

__all__ = ["autoencoder"]  # fixtures, which pytest finds by their names here


def _texts() -> list[tuple[list[int], int]]:
    """All texts, of each pair the positive side first: tokens, and where the answer begins."""
    ids = tiny_tokenizer()
    return [
        (ids(pair[0] + answer)["input_ids"], len(ids(pair[0])["input_ids"]))
        for pair in PAIRS
        for answer in pair[1:]
    ]


def _active(sae: Any, ids: list[int], state: int = 2, name: str = "llama") -> Tensor:
    """Every feature at every token of a text, [tokens, features], from transformers' states."""
    model: Any = tiny_lm(name).model
    with torch.no_grad():
        states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return sae.encode(states.hidden_states[state][0]).double()


def _pooled(sae: Any, pool: str = "max") -> Tensor:
    """Of each text what stands for it, [texts, features]."""
    found = [_active(sae, ids)[start:] for ids, start in _texts()]
    return torch.stack([x.amax(0) if pool == "max" else x.mean(0) for x in found])


def _peaks(sae: Any) -> Tensor:
    return torch.stack([_active(sae, ids)[1:].amax(0) for ids, _ in _texts()]).amax(0)


def _fitted(path: Path, **options: Any) -> tt.Steering:
    return tt.SAE(sae=str(path), **options).fit(tiny_lm(), CONTRAST, measure=False)


# -- statistics -----------------------------------------------------------------------------------


def _sides(x: Tensor, positive: Tensor) -> Sides:
    rows = torch.arange(len(x))
    return Sides(x[positive], x[~positive], rows[positive], rows[~positive])


def _random(texts: int = 60, units: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 6, (texts, units), generator=generator).clamp(min=0) / 2  # with ties
    positive = torch.rand(texts, generator=generator) < 0.3
    x[:, 0] = 0.0  # never active
    x[:, 1] = 0.1  # the same at every text
    x[positive, 2] += 3
    x[:, 6] -= 1.0  # below 0, too
    return x, positive


def test_aurocs_are_sklearns() -> None:
    x, positive = _random()
    found = Aurocs()
    for part in torch.arange(len(x)).split(7):  # the last batches may have one side only
        found.update(_sides(x[part], positive[part]))
    expected = [roc_auc_score(positive, x[:, unit]) for unit in range(x.shape[1])]
    assert found.auroc.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.auroc[:2].tolist() == [0.5, 0.5]


def test_streamed_correlations_are_numpys_and_rank_as_cohens_d() -> None:
    x, positive = _random()
    x[:, 3] = 1e6 + x[:, 3]  # far from 0
    found = Correlation()
    for part in torch.arange(len(x)).split(7):
        found.update(_sides(x[part], positive[part]))
    y = positive.double().numpy()
    expected = [np.corrcoef(x[:, unit].double().numpy(), y)[0, 1] for unit in range(2, 7)]
    assert found.r[2:].tolist() == pytest.approx(expected, abs=1e-9)
    assert found.r[:2].tolist() == [0.0, 0.0]
    # With Cohen's d, of the spread within both sides, r is d / sqrt(d^2 + 1 / (p q)).
    wide, p = x.double(), y.mean()
    one, other = wide[positive], wide[~positive]
    within = p * one.var(0, correction=0) + (1 - p) * other.var(0, correction=0)
    d = ((one.mean(0) - other.mean(0)) / within.sqrt())[2:]
    assert found.r[2:].tolist() == pytest.approx((d / (d**2 + 1 / (p * (1 - p))).sqrt()).tolist())


def test_correlations_do_not_see_units_of_measure() -> None:
    x, positive = _random()
    plain, other = Correlation(), Correlation()
    plain.add(x, positive.double())
    other.add(3.5 * x.double() + 2, 10 * positive.double() - 4)
    assert other.r.tolist() == pytest.approx(plain.r.tolist(), abs=1e-12)


# -- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_features_are_chosen_by_how_well_they_tell_sides_apart(
    autoencoder: Callable[..., Path], kind: str
) -> None:
    path = autoencoder(kind)
    sae, steering = library(path), _fitted(path, k=3)
    pooled, sides = _pooled(sae), np.array([True, False] * len(PAIRS))
    aurocs = [roc_auc_score(sides, pooled[:, i]) for i in range(FEATURES)]
    order = sorted(range(FEATURES), key=lambda i: (-round(aurocs[i], 9), i))[:3]
    table = steering.tables
    assert table["feature"].tolist() == order
    assert table["auroc"].tolist() == pytest.approx([aurocs[i] for i in order], abs=1e-6)
    peaks = _peaks(sae)[order]
    assert table["a_max"].tolist() == pytest.approx(peaks.tolist(), rel=1e-4)
    assert relative(vector_of(steering), peaks @ sae.W_dec.detach()[order].double()) < 1e-4


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_pairs_are_outcomes_of_their_sides(autoencoder: Callable[..., Path], pool: str) -> None:
    path = autoencoder("jumprelu")
    sae, steering = library(path), _fitted(path, k=2, by="correlation", pool=pool)
    pooled, y = _pooled(sae, pool).numpy(), np.array([1.0, 0.0] * len(PAIRS))
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num([np.corrcoef(pooled[:, i], y)[0, 1] for i in range(FEATURES)])
    best = np.argsort(-r, kind="stable")[:2]
    assert steering.tables["feature"].tolist() == best.tolist()
    assert steering.tables["r"].tolist() == pytest.approx(r[best].tolist(), abs=1e-5)
    # Strength 1 is the mean over the positive side.
    expected = torch.from_numpy(pooled[::2, best].mean(0)) @ sae.W_dec.detach()[best].double()
    assert relative(vector_of(steering), expected) < 1e-4


def test_effects_are_those_of_sta(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder("standard")
    sta = tt.STA(sae=str(path), locate="effect", k=FEATURES)
    theirs = describe(sta.fit(tiny_lm(), CONTRAST, measure=False))["features"]
    known = {row["feature"]: row for row in theirs}
    ours = describe(_fitted(path, k=4, by="effect"))["features"]
    raising = [row for row in theirs if row["effect"] > 0][:4]
    assert [row["feature"] for row in ours] == [row["feature"] for row in raising]
    for row in ours:
        assert row["effect"] == pytest.approx(known[row["feature"]]["effect"], rel=1e-5)
        assert row["error"] == pytest.approx(known[row["feature"]]["error"], rel=1e-5)


def test_what_speaks_against_is_chosen_where_it_is_asked_for(
    autoencoder: Callable[..., Path],
) -> None:
    path = autoencoder("standard")
    sae, both = library(path), _fitted(path, k=12, by="difference", negative=True)
    signs = both.tables["difference"].sign().double()
    assert set(signs.tolist()) == {1.0, -1.0}
    kept = both.tables["feature"]
    expected = (_peaks(sae)[kept] * signs) @ sae.W_dec.detach()[kept].double()
    assert relative(vector_of(both), expected) < 1e-4
    assert bool((_fitted(path, k=6, by="difference").tables["difference"] > 0).all())


def test_of_several_autoencoders(autoencoder: Callable[..., Path]) -> None:
    paths = [autoencoder(seed=6 + i, hook=f"blocks.{i}.hook_resid_post") for i in range(3)]
    together = ",".join(map(str, paths))
    pairs = Contrast.from_pairs(PAIRS, "mine").split(0.34, 0.0)

    def fitted(**options: Any) -> tt.Steering:
        return tt.SAE(together, k=2, **options).fit(tiny_lm(), pairs, measure=False)

    alone = [tt.SAE(str(p), k=2).fit(tiny_lm(), pairs, measure=False) for p in paths]
    all_ = fitted(variant="all")
    sites = [f"layers.{i}.resid" for i in range(3)]
    assert [each.site for each in all_.interventions] == sites
    for each, one in zip(all_.interventions, alone, strict=True):
        assert torch.equal(each.operator.added, vector_of(one))  # type: ignore[arg-type]
    single = fitted()
    scores = torch.cat([one.tables["auroc"] for one in alone]).sort(descending=True).values
    assert single.tables["auroc"].tolist() == scores[:2].tolist()
    assert {row["site"] for row in describe(single)["features"]} == {
        each.site for each in single.interventions
    }
    validation = pairs.part("validation")
    base = log_odds(tiny_lm(), validation)
    gains = [float((log_odds(tiny_lm(), validation, one.at(1)) - base).mean()) for one in alone]
    pruned = fitted(variant="pruned")
    assert list(pruned.findings["validation_gain"].values()) == pytest.approx(gains, abs=1e-4)
    assert [e.site for e in pruned.interventions] == [
        site for site, gain in zip(sites, gains, strict=True) if gain > 0
    ]
    assert 0 < len(pruned.interventions) < 3


# -- what is done ---------------------------------------------------------------------------------


def test_a_file_holds_the_rows_of_its_features_alone(
    autoencoder: Callable[..., Path], tmp_path: Path
) -> None:
    steering = _fitted(autoencoder("jumprelu"), features=(5, 9), a_max=(2.0, 3.0), do="clamp")
    (one,) = steering.interventions
    assert isinstance(one.operator, SetFeatures)
    path = steering.save(tmp_path / "clamp.safetensors")
    assert path.stat().st_size < 4 * 2 * 2 * 48 + 5000
    again = tt.Steering.load(path)
    logits = tiny_lm().logits(PROMPTS[:1], steering=steering)
    assert torch.equal(tiny_lm().logits(PROMPTS[:1], steering=again), logits)
    assert describe(again)["interventions"][0]["mode"] == "clamp"
    assert [row["a_max"] for row in describe(again)["features"]] == [2.0, 3.0]
    assert "sets 2 features" in explain(again)[0]


def test_a_first_token_is_left_alone_where_features_are_read(
    autoencoder: Callable[..., Path],
) -> None:
    path, scopes = autoencoder("standard"), {}
    for do in ("add", "clamp", "at_least", "ablate", "scale"):
        (one,) = _fitted(path, do=do).interventions
        scopes[do] = str(one.scope)
    assert scopes.pop("add") == "all"
    assert set(scopes.values()) == {"all[1:]"}
    (one,) = _fitted(path, do="clamp", positions="last").interventions
    assert str(one.scope) == "last"


def test_where_the_dial_stands() -> None:
    clamp, ablate = (tt.SAE("x", do=do) for do in ("clamp", "ablate"))  # type: ignore[arg-type]
    assert (clamp.asks_for_dial, ablate.asks_for_dial) == (False, False)
    assert tt.SAE("x").asks_for_dial
    assert not ablate.looks_beyond


def test_rows_at_dials_of_their_own(autoencoder: Callable[..., Path]) -> None:
    lm, steering = tiny_lm(), _fitted(autoencoder("standard"), k=2, do="clamp")
    together = lm.generate(
        PROMPTS[:3], steering=[steering.at(0.5), None, steering.at(3)], max_new_tokens=5
    )
    for prompt, dial, found in zip(PROMPTS[:3], (0.5, None, 3), together, strict=True):
        one = None if dial is None else steering.at(dial)
        (alone,) = lm.generate([prompt], steering=one, max_new_tokens=5)
        assert found.tokens == alone.tokens


def test_a_rank_is_a_cutoff_and_how_often_that_is_right(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder("topk")
    sae, steering = library(path), _fitted(path, k=2, do="ablate")
    least = [
        _active(sae, ids)[1:].topk(6, dim=-1).values[:, -1].mean().tolist() for ids, _ in _texts()
    ]
    cutoff = sum(least) / len(least)
    assert steering.findings["cutoffs"]["layers.1.resid"] == pytest.approx(cutoff, rel=1e-4)
    assert 0 < steering.findings["agree"] <= 1
    assert "the two agree" in " ".join(explain(steering))
    assert "agree" not in _fitted(path, k=2).findings  # what is added need not be read


# -- labels ---------------------------------------------------------------------------------------

LABELS: dict[str, Any] = {
    "labels.json": {"5": "words of\njoy", "7": ""},
    "explanations.json": [
        {"modelId": "tiny", "index": "5", "description": "words of\njoy"},
        {"modelId": "tiny", "index": 5, "description": "another"},
    ],
}


@pytest.mark.parametrize("name", [*LABELS, "explanations.jsonl"])
def test_labels_beside_an_autoencoder_are_shown(
    autoencoder: Callable[..., Path], name: str
) -> None:
    path = autoencoder("standard")
    content = LABELS.get(name, LABELS["explanations.json"])
    lines = content if name.endswith("jsonl") else [content]
    (path / name).write_text("\n".join(map(json.dumps, lines)))
    steering = _fitted(path, features=(5, 7), a_max=(1.0, 1.0))
    assert [row["label"] for row in describe(steering)["features"]] == ["words of\\njoy", ""]
    assert "label" not in describe(_fitted(path, features=7, a_max=1.0))["features"][0]


def test_what_are_no_labels_is_refused(autoencoder: Callable[..., Path], tmp_path: Path) -> None:
    path = autoencoder("standard")
    for content in ("[1]", '{"a": "b"}', '{"1": 2}', "{"):
        (tmp_path / "own.json").write_text(content)
        refused_in_one_line(
            lambda: _fitted(path, labels=str(tmp_path / "own.json")), "labels of features|not JSON"
        )
    refused_in_one_line(lambda: _fitted(path, labels="nowhere.json"), "cannot read the labels")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sae": ""}, "name an autoencoder"),
        ({"sae": "a,"}, "name an autoencoder"),
        ({"sae": "a,b", "features": 1}, "numbers of one autoencoder"),
        ({"features": ()}, "features are empty"),
        ({"features": (1, 1)}, "one is there twice"),
        ({"features": 1, "k": 2}, "these are named"),
        ({"outcomes": "rows.jsonl"}, "say by correlation"),
        ({"negative": True, "do": "clamp"}, "negative is for add"),
        ({"sae": "a,b", "labels": "x"}, "a file of one autoencoder"),
        ({"a_max": 1.0}, "for each of the named"),
        ({"features": (1, 2), "a_max": (1.0, 0.0)}, "above 0"),
        ({"k": 0}, "must be 1 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given: dict[str, Any], says: str) -> None:
    refused_in_one_line(lambda: tt.SAE(**{"sae": "x", **given}), says)


def test_what_does_not_fit_is_refused(autoencoder: Callable[..., Path]) -> None:
    path = autoencoder("standard")
    refused_in_one_line(lambda: _fitted(path, features=FEATURES), "features 0 to 39")
    refused_in_one_line(
        lambda: tt.SAE(f"{path},{path}").fit(tiny_lm(), CONTRAST), "two autoencoders read"
    )
    never = with_weights(autoencoder("jumprelu"), lambda each: each["threshold"][3].fill_(1e6))
    refused_in_one_line(lambda: _fitted(never, features=3), "in none of the texts")
    assert _fitted(never, features=3, a_max=2.0).interventions
    dead = with_weights(autoencoder("standard"), lambda each: each["W_dec"][3].zero_())
    refused_in_one_line(lambda: _fitted(dead, features=3, do="clamp"), "feature 3 .* is dead")
    rescaling = autoencoder("standard", normalize_activations="layer_norm")
    refused_in_one_line(lambda: _fitted(rescaling), "rescales what it reads")
    with pytest.raises(tt.TrimtabError, match="is not linear in the activation"):
        tt.bake(tiny_lm(), _fitted(path, do="ablate", positions="all"))
