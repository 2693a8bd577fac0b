"""What effects are: sums over weights, signs, rules of norms, units that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from effects_by_hand import (
    PAIRS,
    all_sites,
    check_slopes,
    effects,
    fresh,
    in_float64,
    known,
    means,
    scored_from,
    slopes_by_hand,
    telling_units,
)
from helpers import refused_in_one_line, relative, steer, token_ids
from tiny import TINY
from trimtab.fitting import Effect, Effects, HeadSums, SignCounts, Slope, Want
from trimtab.fitting.activations import collect
from trimtab.reading import log_odds, preference
from trimtab.steering import Positions, Scale

SWAPPED = [(prompt, negative, positive) for prompt, positive, negative in PAIRS]


def linear(lm: tt.LanguageModel, site: str) -> Any:
    """The linear map that reads `heads` and `ffn_in`, and writes `attn_out` and `ffn_out`."""
    _, layer, kind = site.split(".")
    model: Any = lm.model
    if hasattr(model, "transformer"):
        block = model.transformer.h[int(layer)]
        return block.attn.c_proj if kind in ("heads", "attn_out") else block.mlp.c_proj
    block = model.model.layers[int(layer)]
    return block.self_attn.o_proj if kind in ("heads", "attn_out") else block.mlp.down_proj


def odds_by_hand(lm: tt.LanguageModel, pairs: Any = PAIRS) -> Tensor:
    """The mean log-odds of pairs, with its graph."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, *answers in pairs:
        start = scored_from(prompt, *answers)
        for sign, answer in zip((1, -1), answers, strict=True):
            ids = torch.tensor([token_ids(prompt + answer)])
            log_p = lm.model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total = total + sign * log_p.gather(-1, ids[0, 1:, None])[start - 1 :].sum()
    return total / len(pairs)


# -- other ways to the same numbers ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "olmo2", "qwen2"])
def test_effects_are_sums_over_weights(name: str) -> None:
    """e_i = <W_i, dm/dW_i> + b_i dm/db_i: rows of what writes a site, columns of what reads it."""
    lm = fresh(name)
    found = means(lm, PAIRS, [site for site in all_sites(lm) if not site.endswith("resid")])
    with torch.enable_grad():
        odds_by_hand(lm).backward()
    for site, mean in found.items():
        module = linear(lm, site)
        products = module.weight.detach() * module.weight.grad
        if type(module).__name__ == "Conv1D":  # which keeps its weight the other way around
            products = products.T
        if site.endswith(("heads", "ffn_in")):
            expected = products.sum(0)
        else:
            expected = products.sum(1)
            if module.bias is not None:
                expected = expected + module.bias.detach() * module.bias.grad
        assert relative(mean, expected) < 2e-6, site


@pytest.mark.parametrize(
    "positions",
    [
        "all",
        "prompt",
        "generated",
        "last",
        "all[2:9]",
        "prompt[-4:]",
        "generated[:2]",
        "text & !all[:3]",
    ],
)
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_effects_are_those_of_a_steering_there(name: str, positions: Positions) -> None:
    """Of the same positions, measured as log-odds are; packed and not."""
    lm, contrast = known(name), tt.Contrast.from_pairs(PAIRS)
    for kind in ("attn_out", "resid"):
        site = lm.anatomy.sites(kind)[1]
        units = torch.arange(0, lm.anatomy.width(site), 7)
        gain = torch.randn(len(units), generator=torch.Generator().manual_seed(1))
        operator = Scale(units, gain, lm.anatomy.width(site))
        steering = steer(lm, (site, operator), positions=positions)
        with in_float64():
            mean = means(lm, PAIRS, [site], Effect(positions))[site]
            up, down = (log_odds(lm, contrast, steering.at(at)).mean() for at in (1e-4, -1e-4))
        told, done = float(gain.double() @ mean[units]), float(up - down) / 2e-4
        assert abs(told - done) < 1e-5 * float(mean.abs().max())


@pytest.mark.parametrize("name", ["gemma2", "lfm2"])
def test_effects_per_token_are_slopes_of_the_mean_per_token(name: str) -> None:
    lm = known(name)
    sites = all_sites(lm)[::3]
    with in_float64():
        found = means(lm, PAIRS, sites, Effect(per_token=True))
        units = telling_units(found)
        check_slopes(found, slopes_by_hand(lm, PAIRS, units, per_token=True), units, 1e-6)


def test_a_first_token_has_its_share() -> None:
    lm = known("llama")
    sites = [site for site in all_sites(lm) if ".2." not in site]  # there nothing reads it
    whole = means(lm, PAIRS, sites)
    first = means(lm, PAIRS, sites, Effect(counted="first"))
    rest = means(lm, PAIRS, sites, Effect(counted="rest"))
    for site in sites:
        assert relative(first[site] + rest[site], whole[site]) < 1e-6
        assert first[site].abs().max() > 0
    with in_float64():
        first = means(lm, PAIRS, sites, Effect(counted="first"))
        units = telling_units(first)
        by_hand = slopes_by_hand(lm, PAIRS, units, counted=lambda token, start: token == 0)
    check_slopes(first, by_hand, units, 1e-6)


def test_other_reads_of_the_same_pass() -> None:
    """Adding to a unit, whose slope is the gradient itself; and scaling whole heads."""
    lm = known("llama")
    contrast, sites = tt.Contrast.from_pairs(PAIRS), ["layers.1.heads", "layers.2.heads"]
    heads = HeadSums(lm.anatomy.heads)
    wants = [Want(site, Effect(), Effects, read) for site in sites for read in (None, heads)]
    wants += [Want("layers.1.attn_out", Effect(), Effects, Slope())]
    found = collect(lm, contrast, wants)
    for site in sites:
        units, whole = (found.of(site, Effect(), Effects, read=read).mean for read in (None, heads))
        assert relative(whole, units.view(lm.anatomy.heads, -1).sum(1)) < 1e-6
    site, added = "layers.1.attn_out", torch.zeros(48)
    added[5] = 1.0
    steering = steer(lm, (site, tt.steering.Add(added)))
    up, down = (log_odds(lm, contrast, steering.at(at)).mean() for at in (1e-2, -1e-2))
    slope = found.of(site, Effect(), Effects, read=Slope()).mean[5]
    assert abs(float(up - down) / 2e-2 - float(slope)) < 1e-3 * abs(float(slope))


def test_unpaired_effects_are_slopes_of_the_preference() -> None:
    lm = known("llama")
    texts = [[prompt + side[i] for prompt, *side in PAIRS] for i in (0, 1)]
    contrast = tt.Contrast.from_texts(texts[0] + ["It is so."], texts[1])
    site = "layers.0.ffn_in"
    with in_float64():
        found = effects(lm, contrast, [site])[site]
        for unit in telling_units({site: found.mean})[site]:
            operator = Scale(torch.tensor([unit]), torch.ones(1), lm.anatomy.width(site))
            steering = steer(lm, (site, operator))
            up, down = (preference(lm, contrast, steering.at(at)) for at in (1e-4, -1e-4))
            assert abs((up - down) / 2e-4 - found.mean[unit]) < 1e-5 * found.mean.abs().max()
    assert found.counts == [3, 2]


# -- signs and sums --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "lfm2"])
def test_swapped_sides_have_the_opposite_effects(name: str) -> None:
    lm = known(name)
    sites = all_sites(lm)
    found, swapped = means(lm, PAIRS, sites), means(lm, SWAPPED, sites)
    assert all(relative(-swapped[site], found[site]) < 1e-6 for site in sites)


def test_equal_sides_are_refused() -> None:
    lm = known("llama")
    for answer in (" yes", ""):
        refused_in_one_line(
            lambda answer=answer: means(lm, [("So is it", answer, answer)], ["layers.0.heads"]),
            "the same|do not differ|equal",
        )


@pytest.mark.parametrize("name", TINY)
def test_sums_over_units_are_what_scaling_the_whole_site_does(name: str) -> None:
    """Nothing where a norm without a scale comes after it, and as much before a linear map without
    a bias as after it."""
    lm = fresh(name)
    # What a norm adds to its mean square, so that it has no scale whatever it reads.
    for module in lm.model.modules():
        for attribute in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    with in_float64():
        found = means(lm, PAIRS, all_sites(lm))
    last = lm.anatomy.layers - 1

    def total(site: str) -> float:
        return float(found[site].sum() / found[site].abs().max())

    assert abs(total(f"layers.{last}.resid")) < 1e-6
    for layer in range(lm.anatomy.layers):
        normed = name in ("gemma2", "gemma3", "olmo2")
        for kind in ("attn_out", "ffn_out"):
            assert (abs(total(f"layers.{layer}.{kind}")) < 1e-6) == normed
        if name not in ("gpt2", "qwen3_moe", "gemma2", "gemma3", "olmo2"):
            for inside, outside in (("heads", "attn_out"), ("ffn_in", "ffn_out")):
                sums = [found[f"layers.{layer}.{kind}"].sum() for kind in (inside, outside)]
                assert (
                    abs(sums[0] - sums[1]) < 1e-6 * found[f"layers.{layer}.{outside}"].abs().max()
                )


# -- units that nothing reads, units that were put there -------------------------------------------


def test_a_unit_that_nothing_reads_has_no_effect_though_its_sign_agrees() -> None:
    lm = fresh("llama", torch.float32)
    site = "layers.1.ffn_in"
    counts = collect(lm, tt.Contrast.from_pairs(PAIRS), [Want(site, "last", SignCounts)])
    rates = torch.maximum(*counts.of(site, "last", SignCounts).rates())
    unit = int((rates == 1).nonzero()[0])
    with torch.no_grad():
        linear(lm, site).weight[:, unit] = 0
    again = collect(lm, tt.Contrast.from_pairs(PAIRS), [Want(site, "last", SignCounts)])
    assert torch.maximum(*again.of(site, "last", SignCounts).rates())[unit] == 1
    found = effects(lm, PAIRS, [site])[site]
    assert found.mean[unit] == found.error[unit] == 0
    assert (found.mean != 0).sum() == len(found.mean) - 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_unit_is_found_with_its_sign(sign: float) -> None:
    """A unit that is always positive and writes what the unembedding reads of two answers."""
    lm = fresh("gpt2")
    yes, no = (token_ids(answer)[1] for answer in (" yes", " no"))
    pairs = [(prompt, " yes", " no") for prompt in ("Is it so?", "Today I feel", "She said")]
    site, unit = "layers.2.ffn_in", 11
    model: Any = lm.model
    with torch.no_grad():
        mlp = model.transformer.h[2].mlp
        mlp.c_fc.weight[:, unit] = 0
        mlp.c_fc.bias[unit] = 3.0
        head = model.lm_head.weight * model.transformer.ln_f.weight
        mlp.c_proj.weight[unit] = sign * (head[yes] - head[no])
    found = effects(lm, pairs, [site])
    assert int(found[site].mean.abs().argmax()) == unit
    assert found[site].mean[unit].sign() == sign


# -- predicted and real ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_predicted_gains_are_real_ones(name: str) -> None:
    lm, contrast = known(name, torch.float32), tt.Contrast.from_pairs(PAIRS)
    site = lm.anatomy.sites("attn_out")[1]
    mean = means(lm, PAIRS, [site])[site]
    units = mean.abs().argsort(descending=True)[:8].sort().values
    steering = steer(lm, (site, Scale(units, mean[units].sign().float(), len(mean))))
    before = log_odds(lm, contrast)
    gain = float((log_odds(lm, contrast, steering.at(0.01)) - before).mean())
    assert gain == pytest.approx(0.01 * float(mean[units].abs().sum()), rel=0.1)
    assert torch.equal(log_odds(lm, contrast, steering.at(0.0)), before)


def test_errors_are_standard_errors_of_the_pairs() -> None:
    lm = known("llama")
    pairs = [
        (f"{prompt} {n}", positive, negative) for n in "abc" for prompt, positive, negative in PAIRS
    ]
    site = "layers.1.heads"
    one = torch.stack([means(lm, [pair], [site])[site] for pair in pairs])
    found = effects(lm, pairs, [site])[site]
    assert relative(found.mean, one.mean(0)) < 1e-6
    assert relative(found.error, one.std(0) / len(pairs) ** 0.5) < 1e-6
    assert effects(lm, pairs[:1], [site])[site].error.isnan().all()
    alike = effects(lm, pairs[:1] * 3, [site])[site]
    assert (alike.error > 0).all()
    assert (alike.error < 1e-5 * alike.mean.abs()).all()
