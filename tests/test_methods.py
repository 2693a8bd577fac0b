"""AUSteer and CAA against their formulas, written out by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab as tt
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.activations import Means, SignCounts, Statistics, Want
from trimtab.contrasts import Contrast, Pair
from trimtab.methods import METHODS
from trimtab.operators import Add, Scale

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")
# Two pairs give many ties: each score is 0, a half or one.
TWO = Contrast.from_pairs(PAIRS[:2])

#: Module and side of a site in a block: by Llama's names, and by GPT-2's.
PLACES = {
    "heads": ("self_attn.o_proj", "attn.c_proj", "input"),
    "ffn_in": ("mlp.down_proj", "mlp.c_proj", "input"),
    "ffn_out": ("mlp", "mlp", "output"),
    "resid": ("", "", "output"),
}


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


# -- activations and scores without trimtab ---------------------------------------------------


def _activations(model: Any, kind: str, texts: Sequence[str]) -> list[Tensor]:
    """Every token's activations at a kind of site, [layers, tokens, units] per text."""
    gpt2 = model.config.model_type == "gpt2"
    path, side = PLACES[kind][1 if gpt2 else 0], PLACES[kind][2]
    seen: list[Tensor] = []
    handles = []
    for block in model.transformer.h if gpt2 else model.model.layers:
        module = block.get_submodule(path)
        if side == "input":
            handles.append(
                module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
            )
        else:
            handles.append(module.register_forward_hook(lambda m, args, out: seen.append(out[0])))
    found = []
    for text in texts:
        with torch.no_grad():
            model(**tiny_tokenizer()(text, return_tensors="pt"), use_cache=False)
        found.append(torch.stack(seen).double())
        seen.clear()
    for handle in handles:
        handle.remove()
    return found


def _last(model: Any, kind: str, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Last-token activations of both sides, [pairs, layers, units]."""
    positive, negative = (
        torch.stack([x[:, -1] for x in _activations(model, kind, texts)])
        for texts in (
            [str(pair.prompt) + pair.positive for pair in contrast.pairs],
            [str(pair.prompt) + pair.negative for pair in contrast.pairs],
        )
    )
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
    statistics = Statistics()
    for layer in range(positive.shape[1]):
        for kind in (SignCounts, Means):
            gathered: Any = kind()
            gathered.update(positive[:, layer].float(), negative[:, layer].float())
            statistics[Want(f"layers.{layer}.{method.site}", "last", kind)] = gathered
    return method.build(_lm(), TWO, statistics)


def _random(seed: int, pairs: int = 5, width: int = 48) -> tuple[Tensor, Tensor]:
    """Activations in [pairs, 3 layers, units], with ties and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randint(-3, 4, (2, pairs, 3, width), generator=generator).double()
    return positive, negative


# -- AUSteer: units, scores and gammas --------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["heads", "ffn_out", "ffn_in", "resid"])
def test_austeer_is_the_paper_by_hand(name: str, kind: str) -> None:
    if (name, kind) == ("qwen3_moe", "ffn_in"):
        pytest.skip("no module shows the inner activations of fused experts")
    lm, k, alpha = _lm(name), 30, 6.0
    positive, negative = _last(lm.model, kind, CONTRAST)
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


@pytest.mark.parametrize("kind", ["heads", "ffn_out", "ffn_in", "resid"])
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


def test_no_units_and_all_units() -> None:
    lm = _lm()
    nothing = tt.AUSteer(k=0).fit(lm, CONTRAST)
    assert nothing.interventions == ()
    assert torch.equal(lm.logits(["The answer"], steering=nothing), lm.logits(["The answer"]))
    everything = tt.AUSteer(site="heads", k=3 * 64).fit(lm, CONTRAST)
    assert len(_gammas(everything)) == 3 * 64


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


def test_tied_rates_take_the_minus() -> None:
    steering = tt.AUSteer(k=144, alpha=4).fit(_lm(), TWO)
    r_pos, r_neg, gain = (steering.tables[name] for name in ("r_pos", "r_neg", "gain"))
    tied = r_pos == r_neg
    assert tied.sum() > 10
    assert (gain[tied] == -0.5).all()
    gammas = _gammas(steering)
    assert {gammas[place] for place, tie in zip(_ranked(steering), tied, strict=True) if tie} == {
        -2.0
    }


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
    for direction in ("paper", "signed"):
        one = tt.AUSteer(k=40, direction=direction).fit(_lm(), CONTRAST)
        other = tt.AUSteer(k=40, direction=direction).fit(_lm(), swapped)
        assert _ranked(one) == _ranked(other)
        assert torch.equal(one.tables["gain"], -other.tables["gain"])


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
        before = _last(_lm().model, kind, CONTRAST)[0]
        after = _last(model, kind, CONTRAST)[0]
        assert not torch.allclose(before, after, rtol=0.5)
        one, other = (tt.AUSteer(site=kind, k=20).fit(lm, CONTRAST) for lm in (_lm(), rescaled))
        assert _ranked(one) == _ranked(other)
        assert torch.equal(one.tables["gain"], other.tables["gain"])


def test_equal_sides_are_never_chosen() -> None:
    positive, negative = _random(3)
    negative[:, :, 7:] = positive[:, :, 7:]
    with pytest.warns(tt.TrimtabWarning, match="k is 40, but only 21 units differ"):
        steering = _from_activations(tt.AUSteer(k=40), positive, negative)
    assert len(_gammas(steering)) == 21
    assert all(unit < 7 for _, unit in _ranked(steering))
    assert all(_gammas(steering).values())
    # And through a model, where reading a file would have refused such pairs.
    equal = Contrast(tuple(Pair(prompt, yes, yes) for prompt, yes, _ in PAIRS))
    with pytest.warns(tt.TrimtabWarning, match="only 0 units differ"):
        assert tt.AUSteer(k=5).fit(_lm(), equal).interventions == ()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_heads_may_be_wider_than_the_model(name: str) -> None:
    lm = _lm(name)
    steering = tt.AUSteer(site="heads", k=100).fit(lm, CONTRAST)
    assert {i.operator.width for i in steering.interventions} == {64}
    assert lm.anatomy.hidden_size == 48
    assert max(unit for _, unit in _ranked(steering)) >= 48


# -- AUSteer: what it does to activations -----------------------------------------------------


def _steered_and_not(steering: tt.Steering, kind: str) -> tuple[Tensor, Tensor]:
    """Activations of one layer's site under a steering of that layer alone, and without."""
    model = _lm().model
    text = "The captain stood at the wheel"
    (before,) = _activations(model, kind, [text])
    with _lm().steered(steering):
        (after,) = _activations(model, kind, [text])
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
    positive, negative = _last(_lm().model, "ffn_out", CONTRAST)
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


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_positions_reach_the_interventions(positions: Any) -> None:
    for method in (tt.AUSteer(k=3, positions=positions), tt.CAA(positions=positions)):
        steering = method.fit(_lm(), CONTRAST)
        assert {intervention.positions for intervention in steering.interventions} == {positions}


# -- AUSteer: layers --------------------------------------------------------------------------


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


# -- CAA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("token", ["last", "mean", "answer"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_caa_is_the_mean_difference(name: str, token: Any, layer: int) -> None:
    lm = _lm(name)
    steering = tt.CAA(layer=layer, token=token, alpha=3).fit(lm, CONTRAST)
    means = []
    for side in (1, 2):
        texts = [pair[0] + pair[side] for pair in PAIRS]
        rows = []
        for x, pair in zip(_activations(lm.model, "resid", texts), PAIRS, strict=True):
            x = x[layer]
            start = {"last": len(x) - 1, "mean": 0}.get(
                token, len(tiny_tokenizer()(pair[0]).input_ids)
            )
            rows.append(x[start:].mean(0))
        means.append(torch.stack(rows).mean(0))
    (intervention,) = steering.interventions
    assert intervention.site == f"layers.{layer % len(lm.anatomy.blocks)}.resid"
    assert isinstance(intervention.operator, Add)
    vector = intervention.operator.vector
    assert vector.dtype is torch.float32
    scale = max(mean.abs().max() for mean in means)
    assert (vector - (means[0] - means[1])).abs().max() < 1e-5 * scale
    assert vector.norm() > 0.01 * scale
    assert (steering.dial.name, steering.setting) == ("alpha", 3)


def test_caa_adds_its_vector() -> None:
    steering = tt.CAA(layer=1, alpha=2.0).fit(_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "resid")
    vector: Tensor = steering.interventions[0].operator.vector  # type: ignore[attr-defined]
    assert torch.allclose(after[1], before[1] + 2 * vector, atol=1e-5)
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_caa_default_layer(layers: int) -> None:
    lm = tt.wrap(tiny_model("llama", num_hidden_layers=layers), tiny_tokenizer())
    site = tt.CAA().fit(lm, TWO).interventions[0].site
    assert site == f"layers.{[None, 0, 0, 1, None, 2, None, None, 3][layers]}.resid"


def test_caa_takes_texts_that_are_not_pairs() -> None:
    lm = _lm()
    texts = Contrast.from_texts(["I love this film", "It is true"], ["I hate it", "No.", "False"])
    for token in ("last", "mean"):
        steering = tt.CAA(layer=1, token=token).fit(lm, texts)
        means = []
        for label in ("positive", "negative"):
            own = [str(row.text) for row in texts.texts if row.label == label]
            rows = [x[1] for x in _activations(lm.model, "resid", own)]
            means.append(
                torch.stack([x[-1] if token == "last" else x.mean(0) for x in rows]).mean(0)
            )
        vector: Tensor = steering.interventions[0].operator.vector  # type: ignore[attr-defined]
        assert torch.allclose(vector.double(), means[0] - means[1], atol=1e-5)
        assert steering.contrast["rows"] == 5


# -- several methods --------------------------------------------------------------------------

SEVERAL = [
    tt.AUSteer(site="ffn_out", k=10),
    tt.AUSteer(site="heads", k=7, direction="signed", layers=(0, 1)),
    tt.CAA(layer=1),
    tt.CAA(layer=1, token="mean", alpha=2),
    tt.CAA(layer=0, token="answer"),
]


def _passes(lm: Any, action: Callable[[], Any]) -> tuple[Any, int]:
    """What an action returns, and how many forward passes of the model it took."""
    passes = []
    body = lm.model.get_submodule("transformer" if lm.anatomy.name == "gpt2" else "model")
    handle = body.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        return action(), len(passes)
    finally:
        handle.remove()


def _same(one: tt.Steering, other: tt.Steering) -> None:
    assert one.method == other.method
    assert one.hyperparameters == other.hyperparameters
    assert one.contrast == other.contrast
    assert [i.site for i in one.interventions] == [i.site for i in other.interventions]
    x = torch.randn(3, 64)
    for a, b in zip(one.interventions, other.interventions, strict=True):
        assert torch.equal(
            a.operator.bind(2.0, "cpu")(x[:, : a.operator.width]),
            b.operator.bind(2.0, "cpu")(x[:, : b.operator.width]),
        )
    assert one.tables.keys() == other.tables.keys()
    assert all(torch.equal(one.tables[name], other.tables[name]) for name in one.tables)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_many_methods_in_one_pass(name: str) -> None:
    lm = _lm(name)
    together, passes = _passes(lm, lambda: tt.fit(SEVERAL, lm, CONTRAST))
    assert [steering.method for steering in together] == [method.name for method in SEVERAL]
    for method, steering in zip(SEVERAL, together, strict=True):
        alone, alone_passes = _passes(lm, lambda method=method: method.fit(lm, CONTRAST))
        assert alone_passes == passes
        _same(steering, alone)
    assert tt.fit([], lm, CONTRAST) == []


def test_fit_uses_the_train_part_only() -> None:
    lm = _lm()
    parts = ["train", "test", "validation"] * 3
    rows = tuple(replace(row, part=part) for row, part in zip(CONTRAST.pairs, parts, strict=True))
    train = Contrast.from_pairs(PAIRS[::3], "mine")
    for method in (tt.AUSteer(k=20), tt.CAA()):
        found = method.fit(lm, Contrast(rows, "mine"))
        _same(found, method.fit(lm, train))
        assert found.contrast == {"name": "mine", "digest": train.digest, "rows": 3}
        everything = method.fit(lm, CONTRAST)
        assert everything.contrast["rows"] == 9
        assert everything.contrast["digest"] != train.digest
    with pytest.raises(tt.TrimtabError, match="mine has no train rows"):
        tt.CAA().fit(lm, Contrast((replace(CONTRAST.pairs[0], part="test"),), "mine"))


def test_fit_records_where_it_came_from() -> None:
    method = tt.AUSteer(site="heads", k=3, alpha=5, layers=(0, -1))
    steering = method.fit(_lm(), CONTRAST)
    assert steering.method == "austeer"
    assert steering.hyperparameters == {
        "site": "heads",
        "k": 3,
        "alpha": 5,
        "direction": "paper",
        "clamp_sign": False,
        "layers": [0, -1],
        "positions": "all",
    }
    assert steering.model == _lm().identity
    assert (steering.dial.name, steering.dial.default) == ("alpha", 5)


def test_long_texts_are_warned_about_once() -> None:
    long = Contrast.from_pairs([(PAIRS[0][0] * 3, " yes", " no"), *PAIRS])
    with pytest.warns(tt.TrimtabWarning, match="1 of 10 rows are longer than 40") as caught:
        tt.fit(SEVERAL, _lm(), long, max_length=40)
    assert len(caught) == 1


def test_methods_have_names_and_help() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        for option in method.__dataclass_fields__.values():
            assert option.metadata["help"].endswith("."), f"{name}: {option.name}"


# -- what bad input gets ----------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")
_UNPAIRED = Contrast.from_texts(["I love it"], ["I hate it"], "mine")

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "site": (lambda: tt.AUSteer(site="mlp"), "site is 'mlp': known are heads, ffn_out, ffn_in"),
    "site with layer": (lambda: tt.AUSteer(site="layers.1.ffn_out"), "known are heads"),
    "direction": (lambda: tt.AUSteer(direction="up"), "direction is 'up': known are paper, signed"),  # type: ignore[arg-type]
    "positions": (lambda: tt.AUSteer(positions="first"), "positions is 'first': known are all"),  # type: ignore[arg-type]
    "caa positions": (lambda: tt.CAA(positions="first"), "positions is 'first'"),  # type: ignore[arg-type]
    "token": (lambda: tt.CAA(token="first"), "token is 'first': known are last, mean, answer"),  # type: ignore[arg-type]
    "alpha nan": (lambda: tt.AUSteer(alpha=_NAN), "alpha must be a finite number"),
    "alpha inf": (lambda: tt.AUSteer(alpha=-_INF), "alpha must be a finite number"),
    "caa alpha": (lambda: tt.CAA(alpha=_INF), "alpha must be a finite number"),
    "k negative": (lambda: tt.AUSteer(k=-1), "k must be 0 or more, not -1"),
    "no layers": (lambda: tt.AUSteer(layers=()), "layers is empty"),
    "k too large": (lambda: tt.AUSteer(k=145).fit(_lm(), TWO), "k is 145, .* has 144 units"),
    "k too large for heads": (lambda: tt.AUSteer(site="heads", k=193).fit(_lm(), TWO), "192 units"),
    "k too large for ffn_in": (lambda: tt.AUSteer(site="ffn_in", k=241).fit(_lm(), TWO), "240"),
    "k too large for layers": (
        # A layer that is named twice has its units once.
        lambda: tt.AUSteer(k=97, layers=(1, 2, -1)).fit(_lm(), TWO),
        "k is 97, .* has 96 units",
    ),
    "layer": (lambda: tt.AUSteer(layers=(0, 3)).fit(_lm(), TWO), "layer 3 .* 0 to 2"),
    "negative layer": (lambda: tt.AUSteer(layers=(-4,)).fit(_lm(), TWO), "layer -4 .* 0 to 2"),
    "caa layer": (lambda: tt.CAA(layer=3).fit(_lm(), TWO), "layer 3 .* 0 to 2"),
    "caa negative layer": (lambda: tt.CAA(layer=-4).fit(_lm(), TWO), "layer -4 .* 0 to 2"),
    "unpaired": (lambda: tt.AUSteer().fit(_lm(), _UNPAIRED), "mine is unpaired"),
    "unpaired answer": (lambda: tt.CAA(token="answer").fit(_lm(), _UNPAIRED), "mine is unpaired"),
    "unpaired among others": (
        lambda: tt.fit([tt.CAA(), tt.AUSteer()], _lm(), _UNPAIRED),
        "mine is unpaired",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    action, says = BAD[name]
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        action()
    assert "\n" not in str(caught.value)
