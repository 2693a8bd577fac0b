"""SADI: its choice and its effect against a loop over plain activations and weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, silu

import trimtab as tt
from helpers import (
    PROMPTS,
    plain_logits,
    read_last,
    refused_in_one_line,
    relative,
    scale,
    side_texts,
    steer,
    token_ids,
)
from reference import reference
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.contrasts import Contrast
from trimtab.fitting.activations import Statistics, Want
from trimtab.fitting.statistics import Means, Sides
from trimtab.steering.operators import Scale

#: What each variant scales.
SITES = {"head": "heads", "neuron": "ffn_in", "hidden": "ffn_out", "resid": "resid"}
HEADS = 4  # of every tiny model
GELU = ("gemma2", "gemma3", "gpt2")  # the others have SiLU

PAIRS = [
    (f"The {who} looked at the {what} and said that it was", " right.", " wrong, and left!")
    for who in ("king", "mother", "captain")
    for what in ("ship", "map", "fire")
]
CONTRAST = Contrast.from_pairs(PAIRS, "mine")


@functools.cache
def _lm(name: str = "llama") -> tt.LanguageModel:
    return tt.wrap(tiny_model(name), tiny_tokenizer(), name)


# -- the oracle --------------------------------------------------------------------------------


def _activated(name: str, model: Any, ids: list[int]) -> list[Tensor]:
    """What the activation function of each block's FFN puts out, [tokens, units] in float64, from
    the weights alone: act(W_gate x), of experts side by side and zero where none was routed."""
    seen, _ = reference(name, model, ids)
    weights = {key: value.double() for key, value in model.state_dict().items()}
    act = functools.partial(gelu, approximate="tanh") if name in GELU else silu
    found = []
    for layer in range(model.config.num_hidden_layers):
        x, mlp = seen[f"layers.{layer}.ffn_norm"], f"model.layers.{layer}.mlp"
        if name == "gpt2":
            mlp = f"transformer.h.{layer}.mlp"
            found.append(act(x @ weights[f"{mlp}.c_fc.weight"] + weights[f"{mlp}.c_fc.bias"]))
        elif name == "phi3":
            width = model.config.intermediate_size
            found.append(act(x @ weights[f"{mlp}.gate_up_proj.weight"][:width].T))
        elif f"{mlp}.experts.gate_up_proj" in weights:
            width = model.config.moe_intermediate_size
            logits = x @ weights[f"{mlp}.gate.weight"].T
            experts = [act(x @ e[:width].T) for e in weights[f"{mlp}.experts.gate_up_proj"]]
            least = logits.topk(model.config.num_experts_per_tok).values[:, -1:]
            found.append(
                torch.cat([e * (logits[:, [i]] >= least) for i, e in enumerate(experts)], dim=-1)
            )
        else:
            found.append(act(x @ weights[f"{mlp}.gate_proj.weight"].T))
    return found


def _differences(name: str, kind: str) -> Tensor:
    """D of a kind of site, [layers, units]; of `ffn_in`, what the authors rank its units by."""
    lm = _lm(name)
    sides = []
    for texts in side_texts(PAIRS):
        if kind == "ffn_in":
            found = [_activated(name, lm.model, token_ids(text)) for text in texts]
            sides.append([[act[-1] for act in acts] for acts in found])
        else:
            sides.append([list(x) for x in read_last(lm.model, kind, texts)])
    layers = []
    for layer in range(lm.anatomy.layers):
        positive, negative = (torch.stack([text[layer] for text in side]) for side in sides)
        layers.append((positive - negative).mean(0))
    width = max(len(layer) for layer in layers)
    # A dense layer is narrower than one with experts: what it lacks is never chosen.
    return torch.stack(
        [torch.nn.functional.pad(x, (0, width - len(x)), value=-torch.inf) for x in layers]
    )


def _largest(differences: Tensor, variant: str) -> list[tuple[float, int, int]]:
    """(difference, layer, unit or head), the largest first."""
    found = []
    for layer, row in enumerate(differences.tolist()):
        if variant == "head":
            size = len(row) // HEADS
            row = [sum(row[h * size : (h + 1) * size]) / size for h in range(HEADS)]
        found += [(value, layer, unit) for unit, value in enumerate(row)]
    return sorted(found, key=lambda entry: (-entry[0], entry[1], entry[2]))


def _edits(
    places: list[tuple[int, int]], variant: str, delta: float
) -> dict[str, Callable[[Tensor], Tensor]]:
    """A + delta (A * M) at every site, one unit or head at a time."""

    def edit(layer: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:  # [tokens, units]
            mask = torch.zeros(x.shape[1], dtype=x.dtype)
            size = x.shape[1] // HEADS if variant == "head" else 1
            for _, element in (place for place in places if place[0] == layer):
                mask[element * size : (element + 1) * size] = 1
            return x + delta * (x * mask)

        return change

    return {f"layers.{layer}.{SITES[variant]}": edit(layer) for layer, _ in places}


def _ranked(steering: tt.Steering) -> list[tuple[int, int]]:
    tables = steering.tables
    element = tables["head" if "head" in tables else "unit"]
    return list(zip(tables["layer"].tolist(), element.tolist(), strict=True))


# -- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("variant", SITES)
def test_the_largest_differences_are_chosen(name: str, variant: Any) -> None:
    k = 5 if variant == "head" else 30
    steering = tt.SADI(variant=variant, k=k).fit(_lm(name), CONTRAST)
    expected = _largest(_differences(name, SITES[variant]), variant)[:k]
    assert _ranked(steering) == [(layer, element) for _, layer, element in expected]
    values = torch.tensor([value for value, _, _ in expected])
    assert torch.allclose(steering.tables["score"], values, rtol=1e-4, atol=1e-5)
    assert steering.tables.keys() == {"layer", "head" if variant == "head" else "unit", "score"}


@pytest.mark.parametrize("variant", SITES)
def test_largest_means_with_their_sign(variant: Any) -> None:
    """Units that are larger on the negative side are not among the first, however much so."""
    swapped = Contrast.from_pairs([(prompt, no, yes) for prompt, yes, no in PAIRS])
    lm, k = _lm(), 3 if variant == "head" else 20
    one, other = (tt.SADI(variant=variant, k=k).fit(lm, c) for c in (CONTRAST, swapped))
    assert (one.tables["score"] > 0).all()
    assert (other.tables["score"] > 0).all()
    assert not set(_ranked(one)) & set(_ranked(other))
    # Which by absolute value would not be so.
    differences = _largest(_differences("llama", SITES[variant]), variant)
    by_size = sorted(differences, key=lambda entry: -abs(entry[0]))[:k]
    assert any(value < 0 for value, _, _ in by_size)


def test_more_than_are_larger_on_the_positive_side() -> None:
    """The least negative come next, as in the authors' code."""
    steering = tt.SADI(k=12).fit(_lm(), CONTRAST)
    score = steering.tables["score"]
    assert (score < 0).any()
    assert (score.diff() <= 0).all()
    assert set(_ranked(steering)) == set(itertools.product(range(3), range(4)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 144))
@settings(max_examples=15, deadline=None)
def test_ties_go_to_the_lower_layer_and_unit(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Four pairs of whole numbers: means are exact, and so are their ties.
    positive, negative = torch.randint(-2, 3, (2, 4, 3, 48), generator=generator).float()
    statistics, rows = Statistics(), torch.arange(4)
    for layer in range(3):
        means = Means()
        means.update(Sides(positive[:, layer], negative[:, layer], rows, rows))
        statistics[Want(f"layers.{layer}.ffn_out", "last", Means)] = means
    steering = tt.SADI(variant="hidden", k=k).build(_lm(), CONTRAST, statistics)
    expected = _largest((positive - negative).sum(0), "hidden")[:k]
    assert _ranked(steering) == [(layer, unit) for _, layer, unit in expected]
    found = {
        (int(i.site.split(".")[1]), unit)
        for i in steering.interventions
        for unit in i.operator.units.tolist()  # type: ignore[attr-defined]
    }
    assert found == set(_ranked(steering))


def test_texts_that_are_not_pairs() -> None:
    """The mean difference needs no pairs."""
    plus, minus = side_texts(PAIRS)
    unpaired = Contrast.from_texts(plus, minus)
    for variant in SITES:
        method = tt.SADI(variant=variant, k=6)  # type: ignore[arg-type]
        one, other = method.fit(_lm(), unpaired), method.fit(_lm(), CONTRAST)
        assert _ranked(one) == _ranked(other)
        assert torch.allclose(one.tables["score"], other.tables["score"], rtol=1e-4, atol=1e-5)


def test_only_train_rows_are_read() -> None:
    rows = tuple(
        replace(row, part="train" if number % 2 else "test")
        for number, row in enumerate(CONTRAST.pairs)
    )
    some = tt.SADI(variant="hidden", k=30).fit(_lm(), Contrast(rows))
    alone = tt.SADI(variant="hidden", k=30).fit(_lm(), Contrast.from_pairs(PAIRS[1::2]))
    assert _ranked(some) == _ranked(alone)
    assert _ranked(some) != _ranked(tt.SADI(variant="hidden", k=30).fit(_lm(), CONTRAST))


@pytest.mark.parametrize("name", TINY)
def test_neurons_are_ranked_by_what_the_activation_function_puts_out(name: str) -> None:
    """In a gated FFN that is another ranking than by what the down projection reads; scaling a
    neuron scales both alike, which is why units of `ffn_in` are scaled."""
    lm, k = _lm(name), 30
    steering = tt.SADI(variant="neuron", k=k).fit(lm, CONTRAST)
    of_down = []
    for texts in side_texts(PAIRS):
        found = [reference(name, lm.model, token_ids(text))[0] for text in texts]
        layers = range(lm.anatomy.layers)
        means = [torch.stack([s[f"layers.{n}.ffn_in"][-1] for s in found]).mean(0) for n in layers]
        of_down.append(means)
    places = [
        (float(a - b), layer, unit)
        for layer, (one, other) in enumerate(zip(*of_down, strict=True))
        for unit, (a, b) in enumerate(zip(one, other, strict=True))
    ]
    by_down = {(layer, unit) for _, layer, unit in sorted(places, reverse=True)[:k]}
    common = len(by_down & set(_ranked(steering)))
    assert common == k if name == "gpt2" else common < k  # GPT-2's FFN has no gate
    assert {i.site.split(".")[2] for i in steering.interventions} == {"ffn_in"}


def test_the_activation_function_can_be_read_and_not_steered() -> None:
    lm = _lm()
    assert lm.anatomy.read_point("layers.1.ffn_act").width == lm.anatomy.width("layers.1.ffn_in")
    with pytest.raises(tt.TrimtabError, match=r"layers\.1\.ffn_act can be read and not steered"):
        lm.anatomy.point("layers.1.ffn_act")
    by_hand = steer(lm, ("layers.1.ffn_act", scale(80)))
    refused_in_one_line(
        lambda: lm.logits(PROMPTS[:1], steering=by_hand), "can be read and not steered"
    )


def test_reading_several_sites_of_a_mixture_at_once() -> None:
    """What is read before and after the gate in one pass is the same as in two, whichever is
    first, and a steering at `ffn_in` stays where it is."""
    lm = _lm("qwen3_moe")
    methods = [tt.SADI(variant="neuron", k=9), tt.AUSteer(site="ffn_in", k=9, direction="paper")]
    alone = [method.fit(lm, CONTRAST) for method in methods]
    for order in (1, -1):
        both = tt.fit(methods[::order], lm, CONTRAST)[::order]
        for one, other in zip(alone, both, strict=True):
            assert torch.equal(one.tables["unit"], other.tables["unit"])
            assert torch.allclose(one.tables["score"], other.tables["score"])
    with lm.steered(alone[1].at(2)):
        before = lm.logits(PROMPTS[:1])
        methods[0].fit(lm, CONTRAST)
        assert torch.equal(lm.logits(PROMPTS[:1]), before)


def test_an_activation_function_that_is_not_where_it_should_be() -> None:
    lm = tt.wrap(tiny_model("llama"), tiny_tokenizer(), "mine")
    body: Any = lm.model
    plain = body.model.layers[1].mlp.act_fn
    # A fused kernel computes the FFN without ever calling the module.
    body.model.layers[1].mlp.forward = lambda x: body.model.layers[1].mlp.down_proj(
        plain.forward(body.model.layers[1].mlp.gate_proj(x)) * body.model.layers[1].mlp.up_proj(x)
    )
    method = tt.SADI(variant="neuron", k=3)
    refused_in_one_line(lambda: method.fit(lm, CONTRAST), r"layers\.1\.ffn_act was not computed")
    del body.model.layers[1].mlp.act_fn
    refused_in_one_line(lambda: method.fit(lm, CONTRAST), r"no module mlp\.act_fn any more")


# -- the effect --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("variant", SITES)
def test_activations_are_scaled_where_they_were_chosen(name: str, variant: Any) -> None:
    lm, k, delta = _lm(name), 4 if variant == "head" else 25, 1.5
    steering = tt.SADI(variant=variant, k=k, delta=delta).fit(lm, CONTRAST)
    edits = _edits(_ranked(steering), variant, delta)
    assert [i.site for i in steering.interventions] == sorted(edits)
    prompt, other = PROMPTS[0], PROMPTS[1]
    found, _ = lm.logits([prompt, other], steering=steering, at="all")
    _, expected = reference(name, lm.model, token_ids(prompt), edits)
    assert relative(found, expected) < 2e-4
    assert relative(plain_logits(lm.model, token_ids(prompt)), expected) > 0.01


def test_a_text_is_scaled_by_what_it_says() -> None:
    """What is added is a share of the text's own activation: -1 takes it away, 1 doubles it."""
    lm = _lm()
    steering = tt.SADI(variant="hidden", k=20).fit(lm, CONTRAST)
    first = min(layer for layer, _ in _ranked(steering))
    units = [unit for layer, unit in _ranked(steering) if layer == first]
    texts = ["The captain stood at the wheel", "It is true that water boils"]
    before = read_last(lm.model, "ffn_out", texts)[:, first]
    for delta in (-1.0, 0.5, 1.0, 9.0):
        with lm.steered(steering.at(delta)):
            after = read_last(lm.model, "ffn_out", texts)[:, first]
        for unit in range(48):
            factor = 1 + delta if unit in units else 1.0
            assert torch.allclose(after[:, unit], factor * before[:, unit], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[0], before[1], rtol=0.5)


@pytest.mark.parametrize("variant", SITES)
def test_delta_zero_changes_nothing(variant: Any) -> None:
    lm = _lm()
    steering = tt.SADI(variant=variant, k=9).fit(lm, CONTRAST)
    base = lm.logits(PROMPTS)
    assert torch.equal(lm.logits(PROMPTS, steering=steering.at(0)), base)
    assert not torch.equal(lm.logits(PROMPTS, steering=steering), base)
    nothing = tt.SADI(variant=variant, k=0).fit(lm, CONTRAST)
    assert nothing.interventions == ()
    assert torch.equal(lm.logits(PROMPTS, steering=nothing), base)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_heads_are_scaled_by_columns_of_the_output_projection(name: str) -> None:
    """All units of a head, and no other: W_o[:, head] times 1 + delta."""
    lm = _lm(name)
    steering = tt.SADI(k=3, delta=2).fit(lm, CONTRAST)
    edited = tiny_model(name)
    gpt2 = name == "gpt2"
    blocks: Any = edited.transformer.h if gpt2 else edited.model.layers
    with torch.no_grad():
        for layer, head in _ranked(steering):
            block = blocks[layer]
            weight = block.attn.c_proj.weight.T if gpt2 else block.self_attn.o_proj.weight
            size = weight.shape[1] // HEADS
            weight[:, head * size : (head + 1) * size] *= 3
    for prompt, found in zip(PROMPTS, lm.logits(PROMPTS, steering=steering, at="all"), strict=True):
        assert relative(found, plain_logits(edited, token_ids(prompt))) < 1e-4


# -- what is recorded, and what bad input gets -------------------------------------------------


@pytest.mark.parametrize("variant", SITES)
def test_saved_and_loaded(variant: Any, tmp_path: Path) -> None:
    made = tt.SADI(variant=variant, k=3, delta=-0.5, positions="last").fit(_lm(), CONTRAST)
    loaded = tt.Steering.load(made.save(tmp_path / "a.safetensors"))
    for steering in (made, loaded):
        assert steering.method == "sadi"
        assert steering.hyperparameters == {
            "variant": variant,
            "k": 3,
            "delta": -0.5,
            "locate": "difference",
            "positions": "last",
        }
        assert steering.dial == tt.Dial("delta", -0.5, (-1.0, 90.0))
        assert list(map(str, steering.scopes)) == ["last"]
        assert {i.site.split(".")[2] for i in steering.interventions} == {SITES[variant]}
    assert loaded.tables.keys() == made.tables.keys()
    assert all(torch.equal(loaded.tables[name], made.tables[name]) for name in made.tables)
    for one, other in zip(loaded.interventions, made.interventions, strict=True):
        assert isinstance(one.operator, Scale)
        assert isinstance(other.operator, Scale)
        assert torch.equal(one.operator.units, other.operator.units)
        assert torch.equal(one.operator.gain, other.operator.gain)


def _made(**options: Any) -> Callable[[], Any]:
    return lambda: tt.SADI(**options)


def _fit(**options: Any) -> Callable[[], Any]:
    return lambda: tt.SADI(**options).fit(_lm(), CONTRAST)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "variant": (_made(variant="unit"), "sadi: variant is 'unit': known are head, neuron, hidden"),
    "positions": (_made(positions="first"), "sadi: positions is 'first': .*known are all"),
    "delta": (_made(delta=float("inf")), "sadi: delta must be a finite number"),
    "k": (_made(k=-1), "sadi: k must be 0 or more, not -1"),
    "k with a point": (_made(k=1.5), "sadi: k must be 0 or more, not 1.5"),
    "heads": (_fit(k=13), "k is 13, but llama has 12 heads"),
    "neurons": (_fit(variant="neuron", k=241), "llama has 240 units of ffn_in"),
    "hidden": (_fit(variant="hidden", k=145), "llama has 144 units of ffn_out"),
    "resid": (_fit(variant="resid", k=145), "llama has 144 units of resid"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    refused_in_one_line(*BAD[name])


def test_as_many_as_there_are_will_do() -> None:
    for variant, count in (("head", 12), ("neuron", 240), ("hidden", 144), ("resid", 144)):
        steering = tt.SADI(variant=variant, k=count).fit(_lm(), CONTRAST)  # type: ignore[arg-type]
        assert len(_ranked(steering)) == count
