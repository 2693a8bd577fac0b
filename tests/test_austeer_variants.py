"""AUSteer's variants against a loop by hand: what they do to activations and weights, and which
options are refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from austeer_by_hand import CONTRAST, TWO, VARIANTS, gammas_of, last_of, ranked, tiny_lm
from helpers import PROMPTS, plain_logits, read_sites, refused_in_one_line, relative, token_ids
from reference import reference
from tiny import TINY, tiny_model
from trimtab.contrasts import Contrast

# -- activations, scores and changes without trimtab -------------------------------------------

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


# -- the comparisons of the paper --------------------------------------------------------------


def _check_effect(name: str, kind: str, options: dict[str, Any]) -> None:
    """Units in rank order, and logits, equal those of the loop over units."""
    lm, options = tiny_lm(name), {"k": 25, **options}
    steering = tt.AUSteer(**{"site": kind, "k": 16, "direction": "paper", **options}).fit(
        lm, CONTRAST
    )
    positive, negative = last_of(lm.model, kind)
    changes = _changes(positive, negative, options, ranked(steering))
    assert ranked(steering) == list(changes)
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
        steering = tt.AUSteer(
            **{"site": "ffn_out", "k": 3, "direction": "paper", "positions": positions, **options}
        ).fit(tiny_lm(), CONTRAST)  # type: ignore[arg-type]
        assert list(map(str, steering.scopes)) == [positions]


def test_random_units() -> None:
    lm = tiny_lm()
    drawn = [
        ranked(
            tt.AUSteer(k=40, locate="random", seed=seed, site="ffn_out", direction="paper").fit(
                lm, CONTRAST
            )
        )
        for seed in range(9)
    ]
    again = tt.AUSteer(k=40, locate="random", seed=4, site="ffn_out", direction="paper").fit(
        lm, TWO
    )
    assert ranked(again) == drawn[4]  # the texts have no say in it
    assert len({tuple(units) for units in drawn}) == 9
    assert all(len(set(units)) == 40 for units in drawn)
    # Neither layers nor units are favoured: 360 draws of 3 layers and of 2 halves.
    layers = torch.tensor([layer for units in drawn for layer, _ in units])
    assert (layers.bincount(minlength=3) > 90).all()
    upper = sum(unit >= 24 for units in drawn for _, unit in units)
    assert 140 < upper < 220
    assert tt.AUSteer(k=3, locate="random", site="ffn_out", direction="paper") == tt.AUSteer(
        k=3, locate="random", seed=0, site="ffn_out", direction="paper"
    )


def test_random_draws_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tt.AUSteer(k=3, locate="random", site="ffn_out", direction="paper").fit(tiny_lm(), TWO)
    assert torch.equal(torch.rand(3), expected)


def test_the_dial_of_the_least_is_a_share() -> None:
    lm = tiny_lm()
    steering = tt.AUSteer(k=20, choose="least", alpha=0.5, site="ffn_out", direction="paper").fit(
        lm, CONTRAST
    )
    assert steering.dial == tt.Dial("alpha", 0.5, (0.0, 1.0))
    for value in (0.0, 1.0):
        steering.at(value)
    with pytest.warns(tt.TrimtabWarning, match="0 to 1"):
        steering.at(1.5)
    assert tt.AUSteer(k=3, site="ffn_out", direction="paper").fit(lm, TWO).dial == tt.Dial(
        "alpha", 8.0, (0.0, 100.0)
    )


# -- what it does to activations ---------------------------------------------------------------


def _steered_and_not(steering: tt.Steering, kind: str) -> tuple[Tensor, Tensor]:
    """Activations of one layer's site under a steering of that layer alone, and without."""
    model = tiny_lm().model
    text = "The captain stood at the wheel"
    (before,) = read_sites(model, kind, [text])
    with tiny_lm().steered(steering):
        (after,) = read_sites(model, kind, [text])
    return after, before


@pytest.mark.parametrize("clamp", [False, True])
def test_suppressed_units_flip_unless_clamped(clamp: bool) -> None:
    method = tt.AUSteer(
        k=20, alpha=8, layers=(0,), clamp_sign=clamp, site="ffn_out", direction="paper"
    )
    steering = method.fit(tiny_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "ffn_out")
    gammas = gammas_of(steering)
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
    steering = tt.AUSteer(k=20, alpha=0.5, layers=(0,), site="ffn_out", direction="paper").fit(
        tiny_lm(), CONTRAST
    )
    clamped = tt.AUSteer(
        k=20, alpha=0.5, layers=(0,), clamp_sign=True, site="ffn_out", direction="paper"
    ).fit(tiny_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "ffn_out")
    assert (after[0] * before[0] > 0).all()
    assert torch.equal(_steered_and_not(clamped, "ffn_out")[0], after)


def test_signed_direction() -> None:
    positive, negative = last_of(tiny_lm().model, "ffn_out")
    paper = tt.AUSteer(k=60, alpha=2, site="ffn_out", direction="paper").fit(tiny_lm(), CONTRAST)
    signed = tt.AUSteer(k=60, alpha=2, direction="signed", site="ffn_out").fit(tiny_lm(), CONTRAST)
    assert ranked(paper) == ranked(signed)
    sign = torch.cat([positive, negative]).mean(0).sign()
    assert {-1.0, 1.0} == {sign[place].item() for place in ranked(paper)}
    by_paper, by_sign = gammas_of(paper), gammas_of(signed)
    for place in ranked(paper):
        assert by_sign[place] == by_paper[place] * sign[place]
    # What signed is for: a unit that is mostly of one sign moves toward the positive side.
    for layer, unit in ranked(signed):
        x = torch.cat([positive, negative])[:, layer, unit]
        momentum = (positive - negative)[:, layer, unit]
        if (x.sign() == sign[layer, unit]).all() and (momentum.sign() == momentum[0].sign()).all():
            assert ((by_sign[layer, unit] * x).sign() == momentum[0].sign()).all()


def test_absolute_goes_toward_the_positive_side_at_every_token() -> None:
    steering = tt.AUSteer(
        k=20, layers=(0,), change="absolute", site="ffn_out", direction="paper"
    ).fit(tiny_lm(), CONTRAST)
    after, before = _steered_and_not(steering, "ffn_out")
    for (_, unit), r_pos, r_neg in zip(
        ranked(steering), steering.tables["r_pos"], steering.tables["r_neg"], strict=True
    ):
        moved = (after - before)[0, :, unit]
        assert (moved > 0).all() if r_pos > r_neg else (moved < 0).all()
    # That is no linear map, so no weights have the same effect.
    with pytest.raises(tt.TrimtabError, match="linear"):
        tt.bake(tiny_lm(), steering)


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
    lm = tiny_lm(name)
    steering = tt.AUSteer(site=kind, k=40, alpha=2, direction="paper").fit(lm, CONTRAST)
    edited = tiny_model(name)
    blocks: Any = edited.transformer.h if name == "gpt2" else edited.model.layers
    with torch.no_grad():
        for (layer, unit), gamma in gammas_of(steering).items():
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


# -- what bad input gets -----------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")
_UNPAIRED = Contrast.from_texts(["I love it"], ["I hate it"], "mine")


def _austeer(**options: Any) -> Callable[[], Any]:
    return lambda: tt.AUSteer(**options)


def _fit(contrast: Contrast = TWO, **options: Any) -> Callable[[], Any]:
    return lambda: tt.AUSteer(**options).fit(tiny_lm(), contrast)


_LEAST = {"choose": "least", "alpha": 0.5}

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "site": (_austeer(site="mlp"), "is .mlp.: known are heads, attn_out, ffn_in, ffn_out, resid"),
    "site with layer": (_austeer(site="layers.1.ffn_out"), "known are heads"),
    "direction": (_austeer(direction="up"), "direction is 'up': known are paper, signed"),
    "positions": (_austeer(positions="first"), "positions is 'first': .*known are all"),
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
    "least alpha": (_austeer(choose="least", alpha=8), "1 - alpha: alpha must be 0 to 1, not 8"),
    "least negative": (_austeer(choose="least", alpha=-0.1), "alpha must be 0 to 1, not -0.1"),
    "signed vector": (_austeer(direction="signed", change="vector"), "signed is for scaling"),
    "signed absolute": (_austeer(direction="signed", change="absolute"), "signed is for scaling"),
    "clamped vector": (_austeer(clamp_sign=True, change="vector"), "clamp_sign is for scaling"),
    "clamped absolute": (_austeer(clamp_sign=True, change="absolute"), "clamp_sign is for scaling"),
    "fixed vector": (_austeer(strength="fixed", change="vector"), "fixed is for gamma"),
    # What does not fit the model or the texts.
    "k too large": (_fit(site="ffn_out", k=145), "k is 145, .* has 144 units"),
    "k too large for heads": (_fit(site="heads", k=193), "192 units"),
    "k too large for ffn_in": (_fit(site="ffn_in", k=241), "240"),
    # A layer that is named twice has its units once.
    "k too large for layers": (
        _fit(site="ffn_out", k=97, layers=(1, 2, -1)),
        "k is 97, .* has 96 units",
    ),
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
