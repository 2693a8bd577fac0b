"""Heads, layers and what SADI scales, chosen by what they do to the answers: against central
differences in a plain loop over transformers, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import language_model, refused_in_one_line, token_ids
from plain_sites import Change, plain_edit
from reference import reference
from tiny import tiny_tokenizer
from tiny_curated import curated_model
from trimtab.contrasts import Contrast
from trimtab.methods import describe, explain
from trimtab.reading import log_odds

PAIRS = [
    ("The king looked at the ship and said that it was", " right, and he was happy.", " wrong!"),
    ("The mother looked at the old map and said it was", " good.", " bad, and not to be liked!"),
    ("The captain looked at the fire and said that it was", " true and warm.", " false!"),
    ("The daughter said that the door was", " kind to her.", " old."),
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")
SWAPPED = Contrast.from_pairs([(prompt, bad, good) for prompt, good, bad in PAIRS], "swapped")
HEADS = 4  # of every tiny model
STEP = 1e-4


@cache
def _lm(name: str = "gpt2") -> tt.LanguageModel:
    # GPT-2 computes in float64 throughout; the others keep norms in float32.
    return language_model(name, dtype=torch.float64)


# -- the oracle --------------------------------------------------------------------------------


def _logits(name: str, ids: list[int], site: str, change: Change) -> Tensor:
    """transformers' own, where they are float64 throughout, and else those by hand."""
    model: Any = _lm(name).model
    with torch.no_grad():
        if name != "gpt2":
            return reference(name, model, ids, {site: change})[1]
        with plain_edit(model, name, site, change):
            logits: Tensor = model(torch.tensor([ids])).logits[0]
            return logits


def _odds(name: str, pair: tuple[str, str, str], site: str, change: Change) -> float:
    """log p(positive) - log p(negative) of a pair, with a site changed."""
    start, found = len(token_ids(pair[0])), []
    for answer in pair[1:]:
        ids = token_ids(pair[0] + answer)
        log_p = _logits(name, ids, site, change).log_softmax(-1)
        found.append(sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids))))
    return found[0] - found[1]


def _by_hand(name: str, site: str, move: Change, pairs: Any = PAIRS) -> tuple[float, float]:
    """Mean and standard error over pairs of how the log-odds change along x <- x + d move(x)."""
    slopes = torch.tensor(
        [
            (
                _odds(name, pair, site, lambda x: x + STEP * move(x))
                - _odds(name, pair, site, lambda x: x - STEP * move(x))
            )
            / (2 * STEP)
            for pair in pairs
        ],
        dtype=torch.float64,
    )
    return float(slopes.mean()), float(slopes.std() / len(slopes) ** 0.5)


def _adds(vector: Tensor) -> Change:
    return lambda x: vector.to(x).expand_as(x)


def _steps(vector: Tensor) -> Change:
    return lambda x: x + vector


def _scales(units: slice) -> Change:
    def move(x: Tensor) -> Tensor:
        moved = torch.zeros_like(x)
        moved[..., units] = x[..., units]
        return moved

    return move


def _vectors(steering: tt.Steering) -> dict[tuple[int, int], Tensor]:
    """(layer, head) -> what ITI adds to it, [units of the site]."""
    found = {}
    for intervention in steering.interventions:
        vector: Tensor = intervention.operator.added  # type: ignore[assignment]
        for head, own in enumerate(vector.unflatten(0, (HEADS, -1))):
            alone = torch.zeros(HEADS, len(own), dtype=torch.float64)
            alone[head] = own
            found[int(intervention.site.split(".")[1]), head] = alone.flatten()
    return found


def _fitted(method: Any, name: str = "gpt2", contrast: Contrast = CONTRAST) -> tt.Steering:
    steering: tt.Steering = method.fit(_lm(name), contrast, measure=False)
    return steering


# -- ITI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_heads_have_the_effect_of_adding_their_vectors(name: str) -> None:
    every = _lm(name).anatomy.layers * HEADS
    plain = _vectors(_fitted(tt.ITI(k=every), name))  # what is added is tested elsewhere
    steering = _fitted(tt.ITI(k=every, locate="effect"), name)
    turned = _vectors(steering)
    heads = describe(steering)["heads"]
    rough = 1e-6 if name == "gpt2" else 1e-3
    for head in heads:
        place = head["layer"], head["head"]
        mean, error = _by_hand(name, f"layers.{place[0]}.heads", _adds(plain[place]))
        assert head["effect"] == pytest.approx(mean, rel=rough, abs=1e-3 * rough)
        # Pairs are kept in half precision.
        assert head["error"] == pytest.approx(error, rel=2e-3)
        # A head that lowers the log-odds is moved the other way.
        sign = 1.0 if mean > 0 else -1.0
        assert torch.allclose(turned[place], sign * plain[place], rtol=1e-6)
    certain = [abs(head["effect"]) / head["error"] for head in heads]
    assert all(a >= b for a, b in pairwise(certain))
    assert {head["effect"] > 0 for head in heads} == {True, False}


def test_the_surest_heads_are_moved_and_the_probes_say_what_they_said() -> None:
    every, few = (_fitted(tt.ITI(k=k, locate="effect")) for k in (12, 3))
    assert describe(few)["heads"] == describe(every)["heads"][:3]
    accuracy = {(h["layer"], h["head"]): h["accuracy"] for h in describe(every)["heads"]}
    probed = describe(_fitted(tt.ITI(k=12)))["heads"]
    assert accuracy == {(h["layer"], h["head"]): h["accuracy"] for h in probed}
    assert "standard errors" in " ".join(explain(few))


# -- SADI --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("variant", ["head", "neuron", "hidden", "resid"])
def test_what_is_scaled_has_the_effect_of_scaling_it(variant: Any, name: str) -> None:
    kind = {"head": "heads", "neuron": "ffn_in", "hidden": "ffn_out", "resid": "resid"}[variant]
    steering = _fitted(tt.SADI(variant, k=6, locate="effect"), name)
    records = describe(steering)["heads" if variant == "head" else "units"]
    size = _lm(name).anatomy.width(f"layers.0.{kind}") // HEADS
    rough = 1e-6 if name == "gpt2" else 1e-3
    gains = {each.site: each.operator.factors(1.0) - 1 for each in steering.interventions}  # type: ignore[attr-defined]
    for record in records:
        place = record["head"] * size if variant == "head" else record["unit"]
        units = slice(place, place + (size if variant == "head" else 1))
        mean, error = _by_hand(name, record["site"], _scales(units))
        assert record["effect"] == pytest.approx(mean, rel=rough, abs=1e-3 * rough)
        assert record["error"] == pytest.approx(error, rel=10 * rough)
        assert record["score"] == pytest.approx(abs(mean) / error, rel=10 * rough)
        assert (gains[record["site"]][units] == (1 if mean > 0 else -1)).all()
    assert sum(int(gain.count_nonzero()) for gain in gains.values()) == (
        6 * size if variant == "head" else 6
    )


def test_the_most_certain_are_chosen_among_all() -> None:
    every = _fitted(tt.SADI(k=12, locate="effect"))
    certain = torch.stack([every.tables["effect"].abs() / every.tables["error"]]).flatten()
    assert torch.equal(certain.sort(descending=True).values, certain)
    assert describe(_fitted(tt.SADI(k=2, locate="effect")))["heads"] == describe(every)["heads"][:2]


# -- CAA and ActAdd ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("kind", [tt.CAA, tt.ActAdd])
def test_a_layer_has_the_effect_of_adding_its_vector(kind: Any, name: str) -> None:
    steering = _fitted(kind(layer="effect"), name)
    found = steering.findings
    rough = 1e-6 if name == "gpt2" else 1e-3
    plain = {}
    for layer in range(_lm(name).anatomy.layers):
        (intervention,) = _fitted(kind(layer=layer), name).interventions
        plain[intervention.site] = intervention.operator.added
        mean, error = _by_hand(name, intervention.site, _adds(intervention.operator.added))  # type: ignore[arg-type]
        assert found["effect"][intervention.site] == pytest.approx(mean, rel=rough, abs=rough)
        assert found["error"][intervention.site] == pytest.approx(error, rel=2e-3)
    certain = {site: abs(found["effect"][site]) / found["error"][site] for site in plain}
    (added,) = steering.interventions
    assert added.site == found["site"] == max(certain, key=certain.__getitem__)
    sign = 1 if found["effect"][added.site] > 0 else -1
    assert torch.equal(added.operator.added, sign * plain[added.site])  # type: ignore[arg-type,operator]
    assert "most certain" in " ".join(explain(steering))


def test_a_vector_that_lowers_the_log_odds_is_turned_round() -> None:
    """Whichever way the texts that make the vector are told apart, what is added raises them."""
    lm = _lm()
    for seed in range(3):
        pairs = [PAIRS[(i + seed) % 4] for i in range(2)]
        contrast = Contrast.from_pairs(pairs, "two")
        steering = _fitted(tt.ActAdd(layer="effect"), contrast=contrast)
        gain = log_odds(lm, contrast, steering.at(0.01)) - log_odds(lm, contrast)
        assert gain.mean() > 0


def test_what_a_layer_costs_is_what_adding_its_vector_costs() -> None:
    """The Fisher information along the vector, from all tokens of the vocabulary at every place."""
    from trimtab.fitting.costs import _FROM, _neutral

    lm = _lm()
    steering = _fitted(tt.CAA(layer="effect"))
    site = steering.findings["site"]
    vector: Any = steering.interventions[0].operator.added
    model: Any = lm.model
    exact = []
    for row in _neutral(lm)[::4]:
        logs = []
        for side in (-1, 1):
            with torch.no_grad(), plain_edit(model, "gpt2", site, _steps(side * STEP * vector)):
                logs.append(model(torch.tensor([row.tokens])).logits[0].log_softmax(-1))
        slope, p = (logs[1] - logs[0]) / (2 * STEP), ((logs[0] + logs[1]) / 2).exp()
        exact.append((p * slope.square()).sum(-1)[_FROM:])
    mean = float(torch.cat(exact).mean())
    assert steering.findings["cost"][site] == pytest.approx(mean, rel=0.25)
    assert steering.findings["predicted"]["kl"] == pytest.approx(
        steering.findings["cost"][site] / 2, rel=1e-5
    )


# -- all ---------------------------------------------------------------------------------------

METHODS = {
    "iti": tt.ITI(k=4, locate="effect"),
    "sadi": tt.SADI(k=4, locate="effect"),
    "neuron": tt.SADI("neuron", k=10, locate="effect"),
    "caa": tt.CAA(layer="effect"),
    "pca": tt.CAA(layer="effect", variant="pca", unit_norm=True),
    "actadd": tt.ActAdd(layer="effect", pairs=2),
}


@pytest.mark.parametrize("case", METHODS)
def test_the_predicted_gain_is_had_at_a_small_dial(case: str) -> None:
    lm = _lm()
    steering = _fitted(METHODS[case])
    gain = (log_odds(lm, CONTRAST, steering.at(0.01)) - log_odds(lm, CONTRAST)).mean()
    assert float(gain) == pytest.approx(0.01 * steering.findings["predicted"]["gain"], rel=0.1)
    assert gain > 0
    assert "Predicted at " in " ".join(explain(steering))


@pytest.mark.parametrize("case", ["iti", "sadi", "caa"])
def test_sides_that_are_swapped_turn_everything_round(case: str) -> None:
    """Scaling then helps the other side; a vector leads to the other side, and helps it as much."""
    one, other = (_fitted(METHODS[case], contrast=texts) for texts in (CONTRAST, SWAPPED))
    if case == "sadi":
        assert torch.allclose(one.tables["effect"], -other.tables["effect"], rtol=1e-5)
    elif case == "iti":
        assert torch.allclose(one.tables["effect"], other.tables["effect"], rtol=1e-5)
    else:
        assert one.findings["effect"] == pytest.approx(other.findings["effect"], rel=1e-5)
    for mine, theirs in zip(one.interventions, other.interventions, strict=True):
        assert mine.site == theirs.site
        if case != "sadi":
            assert torch.allclose(mine.operator.added, -theirs.operator.added, rtol=1e-5)  # type: ignore[arg-type,operator]


def _like(one: tt.Steering, other: tt.Steering) -> None:
    assert one.digest == other.digest
    assert one.findings == other.findings
    assert {n: x.tolist() for n, x in one.tables.items()} == {
        n: x.tolist() for n, x in other.tables.items()
    }


def test_what_was_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _lm()
    fresh = tt.fit(list(METHODS.values()), lm, CONTRAST, measure=False, cache=tmp_path)

    def no_pass(*args: Any, **options: Any) -> None:
        raise AssertionError("the model runs again")

    monkeypatch.setattr("trimtab.fitting.activations._run", no_pass)
    again = tt.fit(list(METHODS.values()), lm, CONTRAST, measure=False, cache=tmp_path)
    for one, other in zip(fresh, again, strict=True):
        _like(one, other)


@pytest.mark.parametrize("case", sorted(METHODS.keys() - {"pca"}))  # which compares pairs
def test_texts_without_partners_do(case: str) -> None:
    texts = Contrast.from_texts([p + a for p, a, _ in PAIRS], [p + b for p, _, b in PAIRS], "texts")
    steering = _fitted(METHODS[case], contrast=texts)
    assert steering.findings["predicted"]["gain"] > 0


@pytest.mark.parametrize("case", ["iti", "sadi"])
def test_positions_are_those_at_which_it_will_act(case: str) -> None:
    """Of a token that is not steered no effect counts, and no prediction is made of plain text."""
    everywhere, there = (
        _fitted(replace(METHODS[case], positions=positions)) for positions in ("all", "generated")
    )
    assert "predicted" not in there.findings
    assert everywhere.tables["effect"].tolist() != there.tables["effect"].tolist()
    assert (there.tables["first"] == 0).all()


def test_heads_of_several_widths() -> None:
    lm = tt.wrap(curated_model("gemma4"), tiny_tokenizer(), "gemma4")
    for method in (METHODS["iti"], METHODS["sadi"]):
        steering = method.fit(lm, CONTRAST, measure=False)
        assert len(describe(steering)["heads"]) == 4


ONE = Contrast.from_pairs(PAIRS[:1], "one")


def test_one_pair_has_no_standard_error() -> None:
    for method in METHODS.values():
        if getattr(method, "pairs", 1) > 1:
            continue
        refused = pytest.warns(tt.TrimtabWarning, match="one pair")
        with refused:
            refused_in_one_line(
                lambda: _fitted(method, contrast=ONE),
                "too few to train probes|standard errors: give it 2 or more pairs",
            )
