"""AUSteer: its units, gammas and effect against the paper's formulas, written out by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab as tt
from austeer_by_hand import CONTRAST, PAIRS, TWO, VARIANTS, gammas_of, last_of, ranked, tiny_lm
from helpers import PROMPTS
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Statistics, Want
from trimtab.fitting.statistics import Means, Sides, SignCounts
from trimtab.steering.operators import Add, Scale

KINDS = ("heads", "ffn_out", "ffn_in", "resid")


# -- activations, scores and changes without trimtab -------------------------------------------


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


def _from_activations(method: tt.AUSteer, positive: Tensor, negative: Tensor) -> tt.Steering:
    """What AUSteer makes of given last-token activations, [pairs, layers, units]."""
    statistics, rows = Statistics(), torch.arange(len(positive))
    for layer in range(positive.shape[1]):
        for kind in (SignCounts, Means):
            gathered: Any = kind()
            sides = positive[:, layer].float(), negative[:, layer].float()
            gathered.update(Sides(*sides, rows, rows))
            statistics[Want(f"layers.{layer}.{method.site}", "last", kind)] = gathered
    return method.build(tiny_lm(), TWO, statistics)


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
    lm, k, alpha = tiny_lm(name), 30, 6.0
    positive, negative = last_of(lm.model, kind)
    steering = tt.AUSteer(site=kind, k=k, alpha=alpha, direction="paper").fit(lm, CONTRAST)
    expected = _by_hand(positive, negative)[:k]
    # Exact ranks can be compared, because no pair hangs on a rounding.
    scale = torch.cat([positive, negative]).abs().amax(0)
    assert ((positive - negative).abs() > 3e-6 * scale).all()
    assert ranked(steering) == [(layer, unit) for _, layer, unit, _, _ in expected]
    for column, name_of in ((0, "score"), (3, "r_pos"), (4, "r_neg")):
        values = torch.tensor([row[column] for row in expected])
        assert torch.allclose(steering.tables[name_of], values, atol=1e-6)
    gammas = gammas_of(steering)
    assert len(gammas) == k
    for _, layer, unit, r_pos, r_neg in expected:
        gamma = alpha * r_pos if r_pos > r_neg else -alpha * r_neg
        assert gammas[layer, unit] == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 17, 100])
def test_exactly_k_gammas(kind: str, k: int) -> None:
    steering = tt.AUSteer(site=kind, k=k, alpha=3, direction="paper").fit(tiny_lm(), CONTRAST)
    gammas = gammas_of(steering)
    assert len(gammas) == k
    assert all(gammas.values())
    assert sum(i.operator.size for i in steering.interventions) == k
    assert {i.site.split(".")[2] for i in steering.interventions} == {kind}
    assert all(len(column) == k for column in steering.tables.values())
    assert ranked(steering) == list(dict.fromkeys(ranked(steering)))
    assert set(ranked(steering)) == set(gammas)


@pytest.mark.parametrize("kind", KINDS)
def test_without_units_or_at_alpha_zero_nothing_changes(kind: str) -> None:
    lm = tiny_lm()
    nothing = tt.AUSteer(site=kind, k=0, direction="paper").fit(lm, CONTRAST)
    assert nothing.interventions == ()
    base = lm.logits(PROMPTS)
    assert torch.equal(lm.logits(PROMPTS, steering=nothing), base)
    for change in ("scale", "absolute", "vector"):
        steering = tt.AUSteer(site=kind, k=40, change=change, direction="paper").fit(lm, CONTRAST)  # type: ignore[arg-type]
        assert torch.equal(lm.logits(PROMPTS, steering=steering.at(0)), base)
        assert not torch.equal(lm.logits(PROMPTS, steering=steering), base)


def test_as_many_units_as_there_are() -> None:
    lm = tiny_lm()
    everything = tt.AUSteer(site="heads", k=3 * 64, direction="paper").fit(lm, CONTRAST)
    assert len(gammas_of(everything)) == 3 * 64
    named = tt.AUSteer(site="heads", k="all", direction="paper").fit(lm, CONTRAST)
    assert ranked(named) == ranked(everything)
    assert gammas_of(named) == gammas_of(everything)
    assert (
        len(
            gammas_of(
                tt.AUSteer(k="all", layers=(1,), site="ffn_out", direction="paper").fit(
                    lm, CONTRAST
                )
            )
        )
        == 48
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 144))
@settings(max_examples=25, deadline=None)
def test_ranking_rates_and_gammas(seed: int, pairs: int, k: int) -> None:
    positive, negative = _random(seed, pairs)
    expected = [row for row in _by_hand(positive, negative)[:k] if row[0] > 0]
    method = tt.AUSteer(k=len(expected), alpha=2.0, site="ffn_out", direction="paper")
    steering = _from_activations(method, positive, negative)
    assert ranked(steering) == [(layer, unit) for _, layer, unit, _, _ in expected]
    r_pos, r_neg = steering.tables["r_pos"], steering.tables["r_neg"]
    assert ((r_pos + r_neg) <= 1 + 1e-6).all()
    assert torch.equal(steering.tables["score"], torch.maximum(r_pos, r_neg))
    # A tie between r_pos and r_neg takes the minus, as the paper has it.
    gammas = gammas_of(steering)
    for _, layer, unit, share_pos, share_neg in expected:
        gamma = 2 * share_pos if share_pos > share_neg else -2 * share_neg
        assert gammas[layer, unit] == pytest.approx(gamma, rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 143), st.sampled_from(["momentum", "difference"]))
@settings(max_examples=25, deadline=None)
def test_the_least_are_the_other_end_of_the_ranking(seed: int, k: int, locate: Any) -> None:
    positive, negative = _random(seed, pairs=4)  # four: means are exact, and so are their ties
    method = tt.AUSteer(
        k=k, alpha=0.5, choose="least", locate=locate, site="ffn_out", direction="paper"
    )
    steering = _from_activations(method, positive, negative)
    score = {
        (layer, unit): (s if locate == "momentum" else (positive - negative)[:, layer, unit].sum())
        for s, layer, unit, _, _ in _by_hand(positive, negative)
    }
    # Of equal scores the lower layer, then the lower unit goes first, here too.
    assert ranked(steering) == sorted(score, key=lambda place: (abs(score[place]), place))[:k]
    assert set(gammas_of(steering).values()) == {-0.5}


def test_tied_rates_take_the_minus() -> None:
    for strength, gain_of_ties in (("adaptive", -0.5), ("fixed", -1.0)):
        method = tt.AUSteer(k=144, alpha=4, strength=strength, site="ffn_out", direction="paper")  # type: ignore[arg-type]
        steering = method.fit(tiny_lm(), TWO)
        r_pos, r_neg, gain = (steering.tables[name] for name in ("r_pos", "r_neg", "gain"))
        tied = r_pos == r_neg
        assert tied.sum() > 10
        assert (gain[tied] == gain_of_ties).all()
        gammas = gammas_of(steering)
        ties = {gammas[place] for place, tie in zip(ranked(steering), tied, strict=True) if tie}
        assert ties == {4 * gain_of_ties}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_swapped_sides_flip_signs_and_keep_scores(seed: int) -> None:
    positive, negative = _random(seed)
    one = _from_activations(tt.AUSteer(k=60, site="ffn_out", direction="paper"), positive, negative)
    other = _from_activations(
        tt.AUSteer(k=60, site="ffn_out", direction="paper"), negative, positive
    )
    assert ranked(one) == ranked(other)
    assert torch.equal(one.tables["score"], other.tables["score"])
    assert torch.equal(one.tables["r_pos"], other.tables["r_neg"])
    tied = one.tables["r_pos"] == one.tables["r_neg"]
    assert torch.equal(one.tables["gain"][~tied], -other.tables["gain"][~tied])


def test_swapped_texts() -> None:
    swapped = Contrast.from_pairs([(prompt, no, yes) for prompt, yes, no in PAIRS])
    for options in ({}, {"direction": "signed"}, {"change": "absolute"}, {"change": "vector"}):
        one = tt.AUSteer(k=40, **options).fit(tiny_lm(), CONTRAST)  # type: ignore[arg-type]
        other = tt.AUSteer(k=40, **options).fit(tiny_lm(), swapped)  # type: ignore[arg-type]
        assert ranked(one) == ranked(other)
        # A pair whose sides are swapped is laid out in another order, and rounds otherwise.
        assert torch.allclose(one.tables["gain"], -other.tables["gain"], rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_scales(seed: int) -> None:
    positive, negative = _random(seed)
    base = _from_activations(
        tt.AUSteer(k=100, site="ffn_out", direction="paper"), positive, negative
    )
    generator = torch.Generator().manual_seed(seed)
    of_units = torch.rand(1, 3, 48, generator=generator) * 10 + 0.01
    of_samples = torch.rand(5, 1, 1, generator=generator) * 10 + 0.01
    for factor in (of_units, of_samples, of_units * of_samples):
        scaled = _from_activations(
            tt.AUSteer(k=100, site="ffn_out", direction="paper"),
            positive * factor,
            negative * factor,
        )
        assert ranked(scaled) == ranked(base)
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
    assert torch.allclose(rescaled.logits(["The king"]), tiny_lm().logits(["The king"]), rtol=1e-5)
    for kind in ("ffn_in", "heads"):
        before = last_of(tiny_lm().model, kind)[0]
        after = last_of(model, kind)[0]
        assert not torch.allclose(before, after, rtol=0.5)
        one, other = (
            tt.AUSteer(site=kind, k=20, direction="paper").fit(lm, CONTRAST)
            for lm in (tiny_lm(), rescaled)
        )
        assert ranked(one) == ranked(other)
        assert torch.equal(one.tables["gain"], other.tables["gain"])


def test_equal_sides_are_never_chosen() -> None:
    positive, negative = _random(3)
    negative[:, :, 7:] = positive[:, :, 7:]
    for locate in ("momentum", "difference"):
        method = tt.AUSteer(k=40, locate=locate, site="ffn_out", direction="paper")  # type: ignore[arg-type]
        with pytest.warns(tt.TrimtabWarning, match=r"k is 40, but only \d+ units differ"):
            steering = _from_activations(method, positive, negative)
        assert 15 < len(gammas_of(steering)) <= 21
        assert all(unit < 7 for _, unit in ranked(steering))
        assert all(gammas_of(steering).values())
    # Asked for all of them, the rest is left alone without a word.
    everything = _from_activations(
        tt.AUSteer(k="all", site="ffn_out", direction="paper"), positive, negative
    )
    assert {unit for _, unit in ranked(everything)} == set(range(7))
    # Where none differs there is nothing to steer.
    for k in (5, "all"):
        with pytest.raises(tt.TrimtabError, match="no unit of ffn_out differs"):
            _from_activations(
                tt.AUSteer(k=k, site="ffn_out", direction="paper"), positive, positive
            )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_heads_may_be_wider_than_the_model(name: str) -> None:
    lm = tiny_lm(name)
    steering = tt.AUSteer(site="heads", k=100, direction="paper").fit(lm, CONTRAST)
    assert {i.operator.width for i in steering.interventions} == {64}
    assert lm.anatomy.hidden_size == 48
    assert max(unit for _, unit in ranked(steering)) >= 48


def test_the_last_token_is_the_last_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 3 to 60 tokens in one batch, and each in a batch of its own."""
    pairs = [
        ("Yes", ".", " and no, and then nothing more was said about it."),
        *[("The king said " * n, "yes, and the day was long", "no") for n in (1, 3, 7)],
        *PAIRS[:5],
    ]
    lm, contrast = tiny_lm("gpt2"), Contrast.from_pairs(pairs)
    positive, negative = last_of(lm.model, "ffn_out", pairs)
    expected = [(layer, unit) for _, layer, unit, _, _ in _by_hand(positive, negative)[:60]]
    for tokens in (1, 10_000):
        monkeypatch.setattr(tt.LanguageModel, "batch_tokens", tokens)
        assert (
            ranked(tt.AUSteer(k=60, site="ffn_out", direction="paper").fit(lm, contrast))
            == expected
        )


# -- layers ------------------------------------------------------------------------------------


def test_layers() -> None:
    lm = tiny_lm()
    everywhere = tt.AUSteer(k=144, site="ffn_out", direction="paper").fit(lm, CONTRAST)
    for layers, chosen in (
        ((1,), {1}),
        ((-1,), {2}),
        ((0, -1), {0, 2}),
        # Twice the same layer, and from the top: still each unit once, from the lowest layer up.
        ((2, -1, 0), {0, 2}),
    ):
        steering = tt.AUSteer(
            k=48 * len(chosen), layers=layers, site="ffn_out", direction="paper"
        ).fit(lm, CONTRAST)
        places = [place for place in ranked(everywhere) if place[0] in chosen]
        assert ranked(steering) == places
        sites = [intervention.site for intervention in steering.interventions]
        assert sites == [f"layers.{layer}.ffn_out" for layer in sorted(chosen)]


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_ties_go_to_the_lower_layer_and_unit(name: str) -> None:
    steering = tt.AUSteer(k=50, site="ffn_out", direction="paper").fit(tiny_lm(name), TWO)
    assert (steering.tables["score"] == 1).all()
    assert ranked(steering) == sorted(ranked(steering))


# -- what is recorded --------------------------------------------------------------------------


def test_fit_records_where_it_came_from() -> None:
    method = tt.AUSteer(site="heads", k=3, alpha=5, layers=(0, -1), direction="paper")
    steering = method.fit(tiny_lm(), CONTRAST)
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
        "per_token": False,
        "first_token": True,
        "verify": 0,
        "average": False,
        "interaction": "none",
        "block": None,
        "basis": "units",
        "clamp_sign": False,
        "layers": [0, -1],
        "seed": 0,
        "positions": "all",
    }
    assert steering.model == tiny_lm().identity
    assert (steering.dial.name, steering.dial.default) == ("alpha", 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_variant_is_the_same(variant: str, tmp_path: Path) -> None:
    options = {
        "site": "ffn_out",
        "k": 9,
        "layers": (0, 2),
        "positions": "last",
        **VARIANTS[variant],
    }
    made = tt.AUSteer(**options).fit(tiny_lm(), CONTRAST)
    loaded = tt.Steering.load(made.save(tmp_path / "a.safetensors"))
    given = {**options, "layers": [0, 2]}
    assert loaded.hyperparameters == made.hyperparameters
    assert loaded.hyperparameters | given == loaded.hyperparameters
    assert loaded.dial == made.dial
    assert loaded.tables.keys() == made.tables.keys()
    assert all(torch.equal(loaded.tables[name], made.tables[name]) for name in made.tables)
    assert [i.site for i in loaded.interventions] == [i.site for i in made.interventions]
    assert list(map(str, loaded.scopes)) == ["last"]
    kind = Add if options.get("change") == "vector" else Scale
    assert {type(i.operator) for i in loaded.interventions} == {kind}
    for one, other in zip(loaded.interventions, made.interventions, strict=True):
        x = torch.linspace(-2, 2, 48)
        assert torch.equal(one.operator.bind(0.7, "cpu")(x), other.operator.bind(0.7, "cpu")(x))
