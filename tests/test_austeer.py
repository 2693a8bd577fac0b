"""AUSteer: its units, gammas and effect against the paper's formulas, written out by hand."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trimtab as tt
from helpers import (
    PROMPTS,
    plain_logits,
    read_last,
    read_sites,
    refused_in_one_line,
    relative,
    side_texts,
    token_ids,
)
from reference import reference
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Statistics, Want
from trimtab.fitting.statistics import Means, Sides, SignCounts
from trimtab.steering.operators import Add, Scale

KINDS = ("heads", "ffn_out", "ffn_in", "resid")
PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")
# Two pairs give many ties: each score is 0, a half or one.
TWO = Contrast.from_pairs(PAIRS[:2])


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


# -- activations, scores and changes without trimtab -------------------------------------------


def _last(
    model: Any, kind: str, pairs: list[tuple[str, str, str]] = PAIRS
) -> tuple[Tensor, Tensor]:
    """Last-token activations of both sides, [pairs, layers, units]."""
    positive, negative = (read_last(model, kind, texts) for texts in side_texts(pairs))
    return positive, negative


def _by_hand(positive: Tensor, negative: Tensor) -> list[tuple[float, int, int, float, float]]:
    """(score, layer, unit, r_pos, r_neg) of all units, ranked; from [pairs, layers, units]."""
    pairs, layers, units = positive.shape
    momentum = (positive - negative).tolist()
    rows = []
    for layer, unit in itertools.product(range(layers), range(units)):
        differences = [momentum[pair][layer][unit] for pair in range(pairs)]
        r_pos = sum(m > 0 for m in differences) / pairs
        r_neg = sum(m < 0 for m in differences) / pairs
        rows.append((max(r_pos, r_neg), layer, unit, r_pos, r_neg))
    return sorted(rows, key=lambda row: (-row[0], row[1], row[2]))


#: (layer, unit) of a steered unit -> what becomes of its activation, in rank order.
Changes = dict[tuple[int, int], Callable[[Tensor], Tensor]]


def _changes(
    positive: Tensor,
    negative: Tensor,
    options: dict[str, Any],
    drawn: list[tuple[int, int]],
) -> Changes:
    """What AUSteer with these options has to do; `drawn` are the units of a random draw."""
    alpha, k = options["alpha"], options["k"]
    least = options.get("choose") == "least"
    _, layers, units = positive.shape
    found = []
    for layer, unit in itertools.product(range(layers), range(units)):
        plus, minus = positive[:, layer, unit].tolist(), negative[:, layer, unit].tolist()
        momentum = [a - b for a, b in zip(plus, minus, strict=True)]
        r_pos = sum(m > 0 for m in momentum) / len(momentum)
        r_neg = sum(m < 0 for m in momentum) / len(momentum)
        shift = sum(momentum) / len(momentum)
        gamma = r_pos if r_pos > r_neg else -r_neg
        if options.get("strength") == "fixed":
            gamma = 1.0 if r_pos > r_neg else -1.0
        if options.get("direction") == "signed":
            gamma *= math.copysign(1, sum(plus) + sum(minus))
        if least:
            gamma = -1.0
        score = abs(shift) if options.get("locate") == "difference" else max(r_pos, r_neg)
        change = _change(options, alpha * gamma, alpha * shift)
        found.append((score if least else -score, layer, unit, change))
    if options.get("locate") == "random":
        of = {(layer, unit): change for _, layer, unit, change in found}
        return {place: of[place] for place in drawn}
    found.sort(key=lambda row: row[:3])
    return {(layer, unit): change for _, layer, unit, change in found[: k if k != "all" else None]}


def _change(options: dict[str, Any], gamma: float, shift: float) -> Callable[[Tensor], Tensor]:
    if options.get("change") == "vector":
        return lambda x: x + shift
    if options.get("change") == "absolute":
        return lambda x: x + gamma * x.abs()
    factor = 1 + gamma
    if options.get("clamp_sign") and factor < 0:
        factor = 0.0
    return lambda x: factor * x


def _edits(kind: str, changes: Changes) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same for a whole site, one unit at a time."""

    def edit(layer: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:  # [tokens, units]
            x = x.clone()
            for (of, unit), own in changes.items():
                if of == layer:
                    x[:, unit] = own(x[:, unit])
            return x

        return change

    return {f"layers.{layer}.{kind}": edit(layer) for layer in {layer for layer, _ in changes}}


def _gammas(steering: tt.Steering) -> dict[tuple[int, int], float]:
    """(layer, unit) -> gamma at the steering's dial, from its interventions."""
    gammas = {}
    for intervention in steering.interventions:
        operator: Any = intervention.operator
        assert isinstance(operator, Scale)
        layer = int(intervention.site.split(".")[1])
        for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
            assert (layer, unit) not in gammas
            gammas[layer, unit] = steering.setting * gain
    return gammas


def _ranked(steering: tt.Steering) -> list[tuple[int, int]]:
    tables = steering.tables
    return list(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True))


def _from_activations(method: tt.AUSteer, positive: Tensor, negative: Tensor) -> tt.Steering:
    """What AUSteer makes of given last-token activations, [pairs, layers, units]."""
    statistics, rows = Statistics(), torch.arange(len(positive))
    for layer in range(positive.shape[1]):
        for kind in (SignCounts, Means):
            gathered: Any = kind()
            sides = positive[:, layer].float(), negative[:, layer].float()
            gathered.update(Sides(*sides, rows, rows))
            statistics[Want(f"layers.{layer}.{method.site}", "last", kind)] = gathered
    return method.build(_lm(), TWO, statistics)


def _random(seed: int, pairs: int = 5, width: int = 48) -> tuple[Tensor, Tensor]:
    """Activations in [pairs, 3 layers, units], with ties and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randint(-3, 4, (2, pairs, 3, width), generator=generator).double()
    return positive, negative


# -- units, scores and gammas ------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", KINDS)
def test_austeer_is_the_paper_by_hand(name: str, kind: str) -> None:
    if (name, kind) == ("qwen3_moe", "ffn_in"):
        pytest.skip("no module shows the inner activations of fused experts")
    lm, k, alpha = _lm(name), 30, 6.0
    positive, negative = _last(lm.model, kind)
    steering = tt.AUSteer(site=kind, k=k, alpha=alpha).fit(lm, CONTRAST)
    expected = _by_hand(positive, negative)[:k]
    # Exact ranks can be compared, because no pair hangs on a rounding.
    scale = torch.cat([positive, negative]).abs().amax(0)
    assert ((positive - negative).abs() > 3e-6 * scale).all()
    assert _ranked(steering) == [(layer, unit) for _, layer, unit, _, _ in expected]
    for column, name_of in ((0, "score"), (3, "r_pos"), (4, "r_neg")):
        values = torch.tensor([row[column] for row in expected])
        assert torch.allclose(steering.tables[name_of], values, atol=1e-6)
    gammas = _gammas(steering)
    assert len(gammas) == k
    for _, layer, unit, r_pos, r_neg in expected:
        gamma = alpha * r_pos if r_pos > r_neg else -alpha * r_neg
        assert gammas[layer, unit] == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 17, 100])
def test_exactly_k_gammas(kind: str, k: int) -> None:
    steering = tt.AUSteer(site=kind, k=k, alpha=3).fit(_lm(), CONTRAST)
    gammas = _gammas(steering)
    assert len(gammas) == k
    assert all(gammas.values())
    assert sum(i.operator.size for i in steering.interventions) == k
    assert {i.site.split(".")[2] for i in steering.interventions} == {kind}
    assert all(len(column) == k for column in steering.tables.values())
    assert _ranked(steering) == list(dict.fromkeys(_ranked(steering)))
    assert set(_ranked(steering)) == set(gammas)


@pytest.mark.parametrize("kind", KINDS)
def test_without_units_or_at_alpha_zero_nothing_changes(kind: str) -> None:
    lm = _lm()
    nothing = tt.AUSteer(site=kind, k=0).fit(lm, CONTRAST)
    assert nothing.interventions == ()
    base = lm.logits(PROMPTS)
    assert torch.equal(lm.logits(PROMPTS, steering=nothing), base)
    for change in ("scale", "absolute", "vector"):
        steering = tt.AUSteer(site=kind, k=40, change=change).fit(lm, CONTRAST)  # type: ignore[arg-type]
        assert torch.equal(lm.logits(PROMPTS, steering=steering.at(0)), base)
        assert not torch.equal(lm.logits(PROMPTS, steering=steering), base)


def test_as_many_units_as_there_are() -> None:
    lm = _lm()
    everything = tt.AUSteer(site="heads", k=3 * 64).fit(lm, CONTRAST)
    assert len(_gammas(everything)) == 3 * 64
    named = tt.AUSteer(site="heads", k="all").fit(lm, CONTRAST)
    assert _ranked(named) == _ranked(everything)
    assert _gammas(named) == _gammas(everything)
    assert len(_gammas(tt.AUSteer(k="all", layers=(1,)).fit(lm, CONTRAST))) == 48


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 144))
@settings(max_examples=25, deadline=None)
def test_ranking_rates_and_gammas(seed: int, pairs: int, k: int) -> None:
    positive, negative = _random(seed, pairs)
    expected = [row for row in _by_hand(positive, negative)[:k] if row[0] > 0]
    method = tt.AUSteer(k=len(expected), alpha=2.0)
    steering = _from_activations(method, positive, negative)
    assert _ranked(steering) == [(layer, unit) for _, layer, unit, _, _ in expected]
    r_pos, r_neg = steering.tables["r_pos"], steering.tables["r_neg"]
    assert ((r_pos + r_neg) <= 1 + 1e-6).all()
    assert torch.equal(steering.tables["score"], torch.maximum(r_pos, r_neg))
    # A tie between r_pos and r_neg takes the minus, as the paper has it.
    gammas = _gammas(steering)
    for _, layer, unit, share_pos, share_neg in expected:
        gamma = 2 * share_pos if share_pos > share_neg else -2 * share_neg
        assert gammas[layer, unit] == pytest.approx(gamma, rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 143), st.sampled_from(["momentum", "difference"]))
@settings(max_examples=25, deadline=None)
def test_the_least_are_the_other_end_of_the_ranking(seed: int, k: int, locate: Any) -> None:
    positive, negative = _random(seed, pairs=4)  # four: means are exact, and so are their ties
    method = tt.AUSteer(k=k, alpha=0.5, choose="least", locate=locate)
    steering = _from_activations(method, positive, negative)
    score = {
        (layer, unit): (s if locate == "momentum" else (positive - negative)[:, layer, unit].sum())
        for s, layer, unit, _, _ in _by_hand(positive, negative)
    }
    # Of equal scores the lower layer, then the lower unit goes first, here too.
    assert _ranked(steering) == sorted(score, key=lambda place: (abs(score[place]), place))[:k]
    assert set(_gammas(steering).values()) == {-0.5}


def test_tied_rates_take_the_minus() -> None:
    for strength, gain_of_ties in (("adaptive", -0.5), ("fixed", -1.0)):
        method = tt.AUSteer(k=144, alpha=4, strength=strength)  # type: ignore[arg-type]
        steering = method.fit(_lm(), TWO)
        r_pos, r_neg, gain = (steering.tables[name] for name in ("r_pos", "r_neg", "gain"))
        tied = r_pos == r_neg
        assert tied.sum() > 10
        assert (gain[tied] == gain_of_ties).all()
        gammas = _gammas(steering)
        ties = {gammas[place] for place, tie in zip(_ranked(steering), tied, strict=True) if tie}
        assert ties == {4 * gain_of_ties}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_swapped_sides_flip_signs_and_keep_scores(seed: int) -> None:
    positive, negative = _random(seed)
    one = _from_activations(tt.AUSteer(k=60), positive, negative)
    other = _from_activations(tt.AUSteer(k=60), negative, positive)
    assert _ranked(one) == _ranked(other)
    assert torch.equal(one.tables["score"], other.tables["score"])
    assert torch.equal(one.tables["r_pos"], other.tables["r_neg"])
    tied = one.tables["r_pos"] == one.tables["r_neg"]
    assert torch.equal(one.tables["gain"][~tied], -other.tables["gain"][~tied])


def test_swapped_texts() -> None:
    swapped = Contrast.from_pairs([(prompt, no, yes) for prompt, yes, no in PAIRS])
    for options in ({}, {"direction": "signed"}, {"change": "absolute"}, {"change": "vector"}):
        one = tt.AUSteer(k=40, **options).fit(_lm(), CONTRAST)  # type: ignore[arg-type]
        other = tt.AUSteer(k=40, **options).fit(_lm(), swapped)  # type: ignore[arg-type]
        assert _ranked(one) == _ranked(other)
        # A pair whose sides are swapped is laid out in another order, and rounds otherwise.
        assert torch.allclose(one.tables["gain"], -other.tables["gain"], rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_scales(seed: int) -> None:
    positive, negative = _random(seed)
    base = _from_activations(tt.AUSteer(k=100), positive, negative)
    generator = torch.Generator().manual_seed(seed)
    of_units = torch.rand(1, 3, 48, generator=generator) * 10 + 0.01
    of_samples = torch.rand(5, 1, 1, generator=generator) * 10 + 0.01
    for factor in (of_units, of_samples, of_units * of_samples):
        scaled = _from_activations(tt.AUSteer(k=100), positive * factor, negative * factor)
        assert _ranked(scaled) == _ranked(base)
        for name in ("score", "r_pos", "r_neg", "gain"):
            assert torch.equal(scaled.tables[name], base.tables[name])


def test_a_rescaled_model_has_the_same_units() -> None:
    # Powers of two are exact: the model computes the same function with other activations.
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            inner = 2.0 ** torch.randint(-4, 5, (80,), generator=generator)
            layer.mlp.up_proj.weight *= inner[:, None]
            layer.mlp.down_proj.weight /= inner
            values = 2.0 ** torch.randint(-4, 5, (2, 16), generator=generator)
            layer.self_attn.v_proj.weight *= values.flatten()[:, None]
            # Each value head serves two query heads.
            layer.self_attn.o_proj.weight /= values.repeat_interleave(2, 0).flatten()
    rescaled = tt.wrap(model, tiny_tokenizer())
    assert torch.allclose(rescaled.logits(["The king"]), _lm().logits(["The king"]), rtol=1e-5)
    for kind in ("ffn_in", "heads"):
        before = _last(_lm().model, kind)[0]
        after = _last(model, kind)[0]
        assert not torch.allclose(before, after, rtol=0.5)
        one, other = (tt.AUSteer(site=kind, k=20).fit(lm, CONTRAST) for lm in (_lm(), rescaled))
        assert _ranked(one) == _ranked(other)
        assert torch.equal(one.tables["gain"], other.tables["gain"])


def test_equal_sides_are_never_chosen() -> None:
    positive, negative = _random(3)
    negative[:, :, 7:] = positive[:, :, 7:]
    for locate in ("momentum", "difference"):
        method = tt.AUSteer(k=40, locate=locate)  # type: ignore[arg-type]
        with pytest.warns(tt.TrimtabWarning, match=r"k is 40, but only \d+ units differ"):
            steering = _from_activations(method, positive, negative)
        assert 15 < len(_gammas(steering)) <= 21
        assert all(unit < 7 for _, unit in _ranked(steering))
        assert all(_gammas(steering).values())
    # Asked for all of them, the rest is left alone without a word.
    everything = _from_activations(tt.AUSteer(k="all"), positive, negative)
    assert {unit for _, unit in _ranked(everything)} == set(range(7))
    # Where none differs there is nothing to steer.
    for k in (5, "all"):
        with pytest.raises(tt.TrimtabError, match="no unit of ffn_out differs"):
            _from_activations(tt.AUSteer(k=k), positive, positive)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_heads_may_be_wider_than_the_model(name: str) -> None:
    lm = _lm(name)
    steering = tt.AUSteer(site="heads", k=100).fit(lm, CONTRAST)
    assert {i.operator.width for i in steering.interventions} == {64}
    assert lm.anatomy.hidden_size == 48
    assert max(unit for _, unit in _ranked(steering)) >= 48


def test_the_last_token_is_the_last_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 3 to 60 tokens in one batch, and each in a batch of its own."""
    pairs = [
        ("Yes", ".", " and no, and then nothing more was said about it."),
        *[("The king said " * n, "yes, and the day was long", "no") for n in (1, 3, 7)],
        *PAIRS[:5],
    ]
    lm, contrast = _lm("gpt2"), Contrast.from_pairs(pairs)
    positive, negative = _last(lm.model, "ffn_out", pairs)
    expected = [(layer, unit) for _, layer, unit, _, _ in _by_hand(positive, negative)[:60]]
    for tokens in (1, 10_000):
        monkeypatch.setattr(tt.LanguageModel, "batch_tokens", tokens)
        assert _ranked(tt.AUSteer(k=60).fit(lm, contrast)) == expected


# -- the comparisons of the paper --------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"alpha": 1.5},
    "clamped": {"alpha": 1.5, "clamp_sign": True},
    "signed": {"alpha": 1.5, "direction": "signed"},
    "signed, clamped": {"alpha": 1.5, "direction": "signed", "clamp_sign": True},
    "by difference": {"alpha": 1.5, "locate": "difference"},
    "at random": {"alpha": 1.5, "locate": "random", "seed": 3},
    "absolute": {"alpha": 1.5, "change": "absolute"},
    "absolute, fixed": {"alpha": 0.7, "change": "absolute", "strength": "fixed"},
    "vector": {"alpha": 1.5, "change": "vector"},
    "vector by difference": {"alpha": -1.5, "change": "vector", "locate": "difference"},
    "vector at random": {"alpha": 1.5, "change": "vector", "locate": "random"},
    "fixed": {"alpha": 1.5, "strength": "fixed"},
    "fixed, signed": {"alpha": 0.7, "strength": "fixed", "direction": "signed"},
    "fixed by difference": {"alpha": 0.7, "strength": "fixed", "locate": "difference"},
    "least": {"alpha": 0.75, "choose": "least"},
    "least by difference": {"alpha": 1.0, "choose": "least", "locate": "difference"},
    "least at random": {"alpha": 1.0, "choose": "least", "locate": "random"},
    "all": {"alpha": 0.3, "k": "all"},
    "all by difference": {"alpha": 0.3, "k": "all", "locate": "difference"},
    "all of least": {"alpha": 0.3, "k": "all", "choose": "least"},
}


def _check_effect(name: str, kind: str, options: dict[str, Any]) -> None:
    """Units in rank order, and logits, equal those of the loop over units."""
    lm, options = _lm(name), {"k": 25, **options}
    steering = tt.AUSteer(site=kind, **options).fit(lm, CONTRAST)
    positive, negative = _last(lm.model, kind)
    changes = _changes(positive, negative, options, _ranked(steering))
    assert _ranked(steering) == list(changes)
    edits = _edits(kind, changes)
    assert [i.site for i in steering.interventions] == sorted(edits)
    found = lm.logits(PROMPTS, steering=steering, at="all")[1]  # a text that others pad
    ids = token_ids(PROMPTS[1])
    _, expected = reference(name, lm.model, ids, edits)
    assert relative(found, expected) < 2e-4
    assert relative(plain_logits(lm.model, ids), expected) > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["heads", "ffn_out"])
def test_every_variant_does_what_the_loop_does(kind: str, variant: str) -> None:
    _check_effect("llama", kind, VARIANTS[variant])


@pytest.mark.parametrize("name", TINY)
def test_variants_on_every_architecture(name: str) -> None:
    for kind, variant in (("ffn_out", "fixed, signed"), ("heads", "vector"), ("resid", "least")):
        _check_effect(name, kind, VARIANTS[variant])


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_positions_reach_the_interventions(positions: Any) -> None:
    for options in ({}, {"change": "vector"}):
        steering = tt.AUSteer(k=3, positions=positions, **options).fit(_lm(), CONTRAST)  # type: ignore[arg-type]
        assert {intervention.positions for intervention in steering.interventions} == {positions}


def test_random_units() -> None:
    lm = _lm()
    drawn = [
        _ranked(tt.AUSteer(k=40, locate="random", seed=seed).fit(lm, CONTRAST)) for seed in range(9)
    ]
    again = tt.AUSteer(k=40, locate="random", seed=4).fit(lm, TWO)
    assert _ranked(again) == drawn[4]  # the texts have no say in it
    assert len({tuple(units) for units in drawn}) == 9
    assert all(len(set(units)) == 40 for units in drawn)
    # Neither layers nor units are favoured: 360 draws of 3 layers and of 2 halves.
    layers = torch.tensor([layer for units in drawn for layer, _ in units])
    assert (layers.bincount(minlength=3) > 90).all()
    upper = sum(unit >= 24 for units in drawn for _, unit in units)
    assert 140 < upper < 220
    assert tt.AUSteer(k=3, locate="random") == tt.AUSteer(k=3, locate="random", seed=0)


def test_random_draws_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tt.AUSteer(k=3, locate="random").fit(_lm(), TWO)
    assert torch.equal(torch.rand(3), expected)


def test_the_dial_of_the_least_is_a_share() -> None:
    lm = _lm()
    steering = tt.AUSteer(k=20, choose="least", alpha=0.5).fit(lm, CONTRAST)
    assert steering.dial == tt.Dial("alpha", 0.5, (0.0, 1.0))
    for value in (0.0, 1.0):
        steering.at(value)
    with pytest.warns(tt.TrimtabWarning, match="0 to 1"):
        steering.at(1.5)
    assert tt.AUSteer(k=3).fit(lm, TWO).dial == tt.Dial("alpha", 8.0, (0.0, 100.0))


# -- what it does to activations ---------------------------------------------------------------


def _steered_and_not(steering: tt.Steering, kind: str) -> tuple[Tensor, Tensor]:
    """Activations of one layer's site under a steering of that layer alone, and without."""
    model = _lm().model
    text = "The captain stood at the wheel"
    (before,) = read_sites(model, kind, [text])
    with _lm().steered(steering):
        (after,) = read_sites(model, kind, [text])
    return after, before


@pytest.mark.parametrize("clamp", [False, True])
def test_suppressed_units_flip_unless_clamped(clamp: bool) -> None:
    method = tt.AUSteer(k=20, alpha=8, layers=(0,), clamp_sign=clamp)
    steering = method.fit(_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "ffn_out")
    gammas = _gammas(steering)
    down = [unit for (_, unit), gamma in gammas.items() if gamma < 0]
    up = [unit for (_, unit), gamma in gammas.items() if gamma > 0]
    assert down
    assert up
    for unit in range(48):
        gamma = gammas.get((0, unit), 0.0)
        factor = max(0.0, 1 + gamma) if clamp else 1 + gamma
        assert torch.allclose(after[0, :, unit], factor * before[0, :, unit], rtol=1e-5, atol=1e-6)
    for unit in down:
        # All of these have alpha r_neg > 1: the sign is lost, against what the paper says.
        assert gammas[0, unit] < -1
        if clamp:
            assert not after[0, :, unit].any()
        else:
            assert (after[0, :, unit] * before[0, :, unit] < 0).all()
            assert (after[0, :, unit].abs() > before[0, :, unit].abs()).all()
    assert (after[0, :, up] * before[0, :, up] > 0).all()


def test_a_weak_suppression_keeps_the_sign() -> None:
    steering = tt.AUSteer(k=20, alpha=0.5, layers=(0,)).fit(_lm(), CONTRAST)
    clamped = tt.AUSteer(k=20, alpha=0.5, layers=(0,), clamp_sign=True).fit(_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "ffn_out")
    assert (after[0] * before[0] > 0).all()
    assert torch.equal(_steered_and_not(clamped, "ffn_out")[0], after)


def test_signed_direction() -> None:
    positive, negative = _last(_lm().model, "ffn_out")
    paper = tt.AUSteer(k=60, alpha=2).fit(_lm(), CONTRAST)
    signed = tt.AUSteer(k=60, alpha=2, direction="signed").fit(_lm(), CONTRAST)
    assert _ranked(paper) == _ranked(signed)
    sign = torch.cat([positive, negative]).mean(0).sign()
    assert {-1.0, 1.0} == {sign[place].item() for place in _ranked(paper)}
    by_paper, by_sign = _gammas(paper), _gammas(signed)
    for place in _ranked(paper):
        assert by_sign[place] == by_paper[place] * sign[place]
    # What signed is for: a unit that is mostly of one sign moves toward the positive side.
    for layer, unit in _ranked(signed):
        x = torch.cat([positive, negative])[:, layer, unit]
        momentum = (positive - negative)[:, layer, unit]
        if (x.sign() == sign[layer, unit]).all() and (momentum.sign() == momentum[0].sign()).all():
            assert ((by_sign[layer, unit] * x).sign() == momentum[0].sign()).all()


def test_absolute_goes_toward_the_positive_side_at_every_token() -> None:
    steering = tt.AUSteer(k=20, layers=(0,), change="absolute").fit(_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "ffn_out")
    for (_, unit), r_pos, r_neg in zip(
        _ranked(steering), steering.tables["r_pos"], steering.tables["r_neg"], strict=True
    ):
        moved = (after - before)[0, :, unit]
        assert (moved > 0).all() if r_pos > r_neg else (moved < 0).all()
    # That is no linear map, so no weights have the same effect.
    with pytest.raises(tt.TrimtabError, match="linear"):
        tt.bake(_lm(), steering)


# -- the same as an edit of weights ------------------------------------------------------------


def _map(block: nn.Module, kind: str) -> tuple[nn.Module, str]:
    """The linear map after `heads` or `ffn_in`, or before `ffn_out`, and its weight's name."""
    mixture = getattr(block, "mlp", None)
    if kind != "heads" and hasattr(mixture, "experts"):
        return mixture.experts, "down_proj"  # type: ignore[union-attr,return-value]
    llama, gpt2 = (
        ("self_attn.o_proj", "attn.c_proj") if kind == "heads" else ("mlp.down_proj", "mlp.c_proj")
    )
    return block.get_submodule(gpt2 if hasattr(block, "attn") else llama), "weight"


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["heads", "ffn_in", "ffn_out"])
def test_scaling_is_a_column_or_a_row_edit(name: str, kind: str) -> None:
    """W_o[:, i] and W_down[:, i] are columns; of the FFN's output it is W_down[i, :] and b[i]."""
    lm = _lm(name)
    steering = tt.AUSteer(site=kind, k=40, alpha=2).fit(lm, CONTRAST)
    edited = tiny_model(name)
    blocks: Any = edited.transformer.h if name == "gpt2" else edited.model.layers
    with torch.no_grad():
        for (layer, unit), gamma in _gammas(steering).items():
            owner, key = _map(blocks[layer], kind)
            weight = getattr(owner, key)
            if key == "down_proj":  # fused experts, [experts, hidden, units]
                expert, inner = divmod(unit, weight.shape[-1])
                part = weight[:, unit] if kind == "ffn_out" else weight[expert, :, inner]
            elif (kind == "ffn_out") == (name == "gpt2"):
                part = weight[:, unit]
            else:
                part = weight[unit]
            part *= 1 + gamma
            bias = getattr(owner, "bias", None)
            if kind == "ffn_out" and bias is not None:
                bias[unit] *= 1 + gamma
    for prompt, found in zip(PROMPTS, lm.logits(PROMPTS, steering=steering, at="all"), strict=True):
        expected = plain_logits(edited, token_ids(prompt))
        assert relative(found, expected) < 1e-4
        assert relative(plain_logits(lm.model, token_ids(prompt)), expected) > 0.01


# -- layers ------------------------------------------------------------------------------------


def test_layers() -> None:
    lm = _lm()
    everywhere = tt.AUSteer(k=144).fit(lm, CONTRAST)
    for layers, chosen in (
        ((1,), {1}),
        ((-1,), {2}),
        ((0, -1), {0, 2}),
        # Twice the same layer, and from the top: still each unit once, from the lowest layer up.
        ((2, -1, 0), {0, 2}),
    ):
        steering = tt.AUSteer(k=48 * len(chosen), layers=layers).fit(lm, CONTRAST)
        places = [place for place in _ranked(everywhere) if place[0] in chosen]
        assert _ranked(steering) == places
        sites = [intervention.site for intervention in steering.interventions]
        assert sites == [f"layers.{layer}.ffn_out" for layer in sorted(chosen)]


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_ties_go_to_the_lower_layer_and_unit(name: str) -> None:
    steering = tt.AUSteer(k=50).fit(_lm(name), TWO)
    assert (steering.tables["score"] == 1).all()
    assert _ranked(steering) == sorted(_ranked(steering))


# -- what is recorded --------------------------------------------------------------------------


def test_fit_records_where_it_came_from() -> None:
    method = tt.AUSteer(site="heads", k=3, alpha=5, layers=(0, -1))
    steering = method.fit(_lm(), CONTRAST)
    assert steering.method == "austeer"
    assert steering.hyperparameters == {
        "site": "heads",
        "k": 3,
        "alpha": 5,
        "direction": "paper",
        "locate": "momentum",
        "choose": "most",
        "change": "scale",
        "strength": "adaptive",
        "clamp_sign": False,
        "layers": [0, -1],
        "seed": 0,
        "positions": "all",
    }
    assert steering.model == _lm().identity
    assert (steering.dial.name, steering.dial.default) == ("alpha", 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_variant_is_the_same(variant: str, tmp_path: Path) -> None:
    options = {"k": 9, "layers": (0, 2), "positions": "last", **VARIANTS[variant]}
    made = tt.AUSteer(**options).fit(_lm(), CONTRAST)
    loaded = tt.Steering.load(made.save(tmp_path / "a.safetensors"))
    given = {**options, "layers": [0, 2]}
    assert loaded.hyperparameters == made.hyperparameters
    assert loaded.hyperparameters | given == loaded.hyperparameters
    assert loaded.dial == made.dial
    assert loaded.tables.keys() == made.tables.keys()
    assert all(torch.equal(loaded.tables[name], made.tables[name]) for name in made.tables)
    assert [i.site for i in loaded.interventions] == [i.site for i in made.interventions]
    assert {i.positions for i in loaded.interventions} == {"last"}
    kind = Add if options.get("change") == "vector" else Scale
    assert {type(i.operator) for i in loaded.interventions} == {kind}
    for one, other in zip(loaded.interventions, made.interventions, strict=True):
        x = torch.linspace(-2, 2, 48)
        assert torch.equal(one.operator.bind(0.7, "cpu")(x), other.operator.bind(0.7, "cpu")(x))


# -- what bad input gets -----------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")
_UNPAIRED = Contrast.from_texts(["I love it"], ["I hate it"], "mine")


def _austeer(**options: Any) -> Callable[[], Any]:
    return lambda: tt.AUSteer(**options)


def _fit(contrast: Contrast = TWO, **options: Any) -> Callable[[], Any]:
    return lambda: tt.AUSteer(**options).fit(_lm(), contrast)


_LEAST = {"choose": "least", "alpha": 0.5}

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "site": (_austeer(site="mlp"), "site is 'mlp': known are heads, ffn_out, ffn_in"),
    "site with layer": (_austeer(site="layers.1.ffn_out"), "known are heads"),
    "direction": (_austeer(direction="up"), "direction is 'up': known are paper, signed"),
    "positions": (_austeer(positions="first"), "positions is 'first': known are all"),
    "locate": (_austeer(locate="here"), "locate is 'here': known are momentum, difference, random"),
    "choose": (_austeer(choose="best"), "choose is 'best': known are most, least"),
    "change": (_austeer(change="add"), "change is 'add': known are scale, absolute, vector"),
    "strength": (_austeer(strength="weak"), "strength is 'weak': known are adaptive, fixed"),
    "alpha nan": (_austeer(alpha=_NAN), "alpha must be a finite number"),
    "alpha inf": (_austeer(alpha=-_INF), "alpha must be a finite number"),
    "k negative": (_austeer(k=-1), "k must be 0 or more, or all, not -1"),
    "k in words": (_austeer(k="many"), "k must be 0 or more, or all, not many"),
    "k with a point": (_austeer(k=2.5), "k must be 0 or more, or all, not 2.5"),
    "no layers": (_austeer(layers=()), "layers is empty"),
    # What cannot be combined.
    "least signed": (_austeer(**_LEAST, direction="signed"), "by one factor.* leave direction out"),
    "least vector": (_austeer(**_LEAST, change="vector"), "by one factor.* leave change out"),
    "least absolute": (_austeer(**_LEAST, change="absolute"), "by one factor.* leave change out"),
    "least fixed": (_austeer(**_LEAST, strength="fixed"), "by one factor.* leave strength out"),
    "least alpha": (_austeer(choose="least"), "1 - alpha: alpha must be 0 to 1, not 8"),
    "least negative": (_austeer(choose="least", alpha=-0.1), "alpha must be 0 to 1, not -0.1"),
    "signed vector": (_austeer(direction="signed", change="vector"), "signed is for scaling"),
    "signed absolute": (_austeer(direction="signed", change="absolute"), "signed is for scaling"),
    "clamped vector": (_austeer(clamp_sign=True, change="vector"), "clamp_sign is for scaling"),
    "clamped absolute": (_austeer(clamp_sign=True, change="absolute"), "clamp_sign is for scaling"),
    "fixed vector": (_austeer(strength="fixed", change="vector"), "fixed is for gamma"),
    # What does not fit the model or the texts.
    "k too large": (_fit(k=145), "k is 145, .* has 144 units"),
    "k too large for heads": (_fit(site="heads", k=193), "192 units"),
    "k too large for ffn_in": (_fit(site="ffn_in", k=241), "240"),
    # A layer that is named twice has its units once.
    "k too large for layers": (_fit(k=97, layers=(1, 2, -1)), "k is 97, .* has 96 units"),
    "layer": (_fit(layers=(0, 3)), "layer 3 .* 0 to 2"),
    "negative layer": (_fit(layers=(-4,)), "layer -4 .* 0 to 2"),
    "unpaired": (_fit(_UNPAIRED), "mine is unpaired"),
    "unpaired and random": (_fit(_UNPAIRED, locate="random"), "mine is unpaired"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    refused_in_one_line(*BAD[name])


def test_everything_else_can_be_combined() -> None:
    """What BAD does not name is taken: all combinations of the options."""
    refused = 0
    for locate, choose, change, strength, direction, clamp in itertools.product(
        ("momentum", "difference", "random"),
        ("most", "least"),
        ("scale", "absolute", "vector"),
        ("adaptive", "fixed"),
        ("paper", "signed"),
        (False, True),
    ):
        scaling, plain = change == "scale", (change, strength, direction)
        allowed = (
            (choose == "most" or plain == ("scale", "adaptive", "paper"))
            and (scaling or (direction == "paper" and not clamp))
            and not (change == "vector" and strength == "fixed")
        )
        options: Any = {"locate": locate, "choose": choose, "change": change}
        options |= {"strength": strength, "direction": direction, "clamp_sign": clamp}
        if allowed:
            tt.AUSteer(alpha=0.5, **options)
        else:
            refused += 1
            with pytest.raises(tt.TrimtabError):
                tt.AUSteer(alpha=0.5, **options)
    assert refused == 3 * (24 - 11 + 24 - 2)
