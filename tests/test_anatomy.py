"""Sites: what a hook sees is what the formulas say, in every architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

import trimtab as tt
from helpers import (
    MISSING,
    PROMPTS,
    SITES,
    add,
    language_model,
    relative,
    site_kinds,
    steer,
    steer_at,
    token_ids,
)
from reference import reference
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.anatomy import anatomy
from trimtab.anatomy.anatomy import KINDS, Anatomy, Architecture, Point
from trimtab.anatomy.hooks import hooked

IDS = token_ids(PROMPTS[0])


def capture(model: Any, sites: list[str], ids: list[int] = IDS) -> dict[str, Tensor]:
    """What hooks see at some sites in one pass over one sequence, each [tokens, units]."""
    seen: dict[str, Tensor] = {}
    places = Anatomy(model)

    def reader(site: str) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            seen[site] = x[0].clone()

        return read

    with torch.no_grad(), hooked(model, {places.point(site): reader(site) for site in sites}):
        seen["logits"] = model(torch.tensor([ids]), use_cache=False).logits[0]
    return seen


@cache
def both(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All sites of a tiny model: as hooks see them, and as the formulas give them."""
    model = tiny_model(name)
    places = Anatomy(model)
    kinds = [kind for kind in KINDS if kind not in MISSING[name]]
    seen = capture(model, [site for kind in kinds for site in places.sites(kind)])
    expected, logits = reference(name, model, IDS)
    return seen, {**expected, "logits": logits}


# -- every architecture, every kind -----------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), SITES)
def test_a_hook_sees_what_the_formula_gives(name: str, kind: str) -> None:
    seen, expected = both(name)
    places = Anatomy(tiny_model(name))
    for site in places.sites(kind):
        assert seen[site].shape == expected[site].shape == (len(IDS), places.width(site))
        assert relative(seen[site], expected[site]) < 1e-5, site


@pytest.mark.parametrize("name", TINY)
def test_reading_every_site_changes_nothing(name: str) -> None:
    seen, expected = both(name)
    assert relative(seen["logits"], expected["logits"]) < 1e-5
    with torch.no_grad():
        plain = tiny_model(name)(torch.tensor([IDS]), use_cache=False).logits[0]
    if name == "qwen3_moe":  # reading `ffn_in` sums the experts in another order
        assert relative(seen["logits"], plain) < 1e-5
    else:
        assert torch.equal(seen["logits"], plain)


@pytest.mark.parametrize("name", TINY)
def test_sites_of_one_layer_are_different_places(name: str) -> None:
    """Were two kinds the same tensor, the comparison above could pass for the wrong reason."""
    seen, _ = both(name)
    layer = [seen[f"layers.1.{kind}"] for kind in anatomy.BLOCK_KINDS if kind not in MISSING[name]]
    assert len(layer) in (9, 11)
    for i, first in enumerate(layer):
        for second in layer[i + 1 :]:
            assert first.shape != second.shape or relative(first, second) > 0.05


@pytest.mark.parametrize("name", TINY)
def test_norms_that_an_architecture_lacks_are_refused(name: str) -> None:
    lm = language_model(name)
    places = lm.anatomy
    assert site_kinds(lm) == [kind for kind in KINDS if kind not in MISSING[name]]
    for kind in MISSING[name]:
        add_there = steer(lm, (f"layers.1.{kind}", add(lm.anatomy.hidden_size)))
        for ask in (
            lambda kind=kind: places.sites(kind),
            lambda kind=kind: places.sites(kind, (0,)),
            lambda kind=kind: places.point(f"layers.1.{kind}"),
            lambda kind=kind: places.width(f"layers.1.{kind}"),
            lambda steering=add_there: lm.logits(PROMPTS, steering=steering),
            lambda steering=add_there: tt.bake(lm, steering),
        ):
            with pytest.raises(tt.TrimtabError, match=f"{name}.* has no .*{kind}.*norm") as caught:
                ask()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_what_a_norm_reads_is_the_residual_stream(name: str) -> None:
    seen, _ = both(name)
    places = Anatomy(tiny_model(name))
    assert places.block_input(0) == "embed"
    assert places.block_input(2) == "layers.1.resid"
    for layer in range(places.layers):
        before, at = seen[places.block_input(layer)], f"layers.{layer}"
        branch = seen[f"{at}.attn_post_norm" if places.has("attn_post_norm") else f"{at}.attn_out"]
        if name == "olmo2":  # which has no norm there: the branches read the stream itself
            assert torch.equal(seen[f"{at}.attn_norm"], before)
            assert torch.equal(seen[f"{at}.ffn_norm"], before + branch)
        else:
            assert torch.equal(seen[f"{at}.attn_norm_in"], before)
            assert torch.equal(seen[f"{at}.ffn_norm_in"], before + branch)


@pytest.mark.parametrize("name", TINY)
def test_the_residual_stream_is_the_sum_of_its_writers(name: str) -> None:
    seen, _ = both(name)
    places = Anatomy(tiny_model(name))
    writers = places.stream_writers
    assert len(writers) == 1 + 2 * places.layers
    assert writers == sorted(writers, key=anatomy.site_order)
    for layer in range(places.layers):
        total = sum((seen[site] for site in writers[: 3 + 2 * layer]), start=torch.zeros(1))
        assert relative(total, seen[f"layers.{layer}.resid"]) < 1e-6


@pytest.mark.parametrize("name", TINY)
def test_heads_share_the_units_of_their_site(name: str) -> None:
    places = Anatomy(tiny_model(name))
    size = 12 if name == "gpt2" else 16
    assert places.heads == 4
    assert places.width("layers.0.heads") == 4 * size


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("attn_post_norm", "post_attention_layernorm"),
        ("ffn_post_norm", "post_feedforward_layernorm"),
    ],
)
def test_norms_on_the_branches_are_seen_where_they_leave(name: str, kind: str, module: str) -> None:
    seen, _ = both(name)
    norm = tiny_model(name).model.layers[1].get_submodule(module)
    with torch.no_grad():
        by_hand = norm(seen[f"layers.1.{kind.split('_')[0]}_out"])
    assert torch.equal(by_hand, seen[f"layers.1.{kind}"])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_editing_what_a_norm_reads_leaves_the_stream_alone(name: str) -> None:
    model, (plain, _) = tiny_model(name), both(name)
    places, shift = Anatomy(model), add(48).vector
    for kind, branch in (("attn_norm_in", "attn"), ("ffn_norm_in", "ffn")):
        seen: dict[str, Tensor] = {}
        edits: dict[Point, Any] = {places.point(f"layers.1.{kind}"): lambda x: x + shift}
        for other in (f"{branch}_norm", f"{branch}_out", "resid"):
            point = places.point(f"layers.1.{other}")
            edits[point] = partial(seen.__setitem__, other)
        with torch.no_grad(), hooked(model, edits):
            model(torch.tensor([IDS]))
        at = "layers.1"
        assert relative(seen[f"{branch}_norm"][0], plain[f"{at}.{branch}_norm"]) > 0.01
        if branch == "ffn" and name != "gemma3":
            # The stream got the FFN's new output, and not the shift that its norm was shown.
            stream = plain[f"{at}.ffn_norm_in"] + seen["ffn_out"][0]
            assert relative(seen["resid"][0], stream) < 1e-6


def test_no_linear_map_stands_at_a_norms_input_or_on_the_branch_norms() -> None:
    places = Anatomy(tiny_model("gemma2"))
    for kind in ("attn_norm_in", "ffn_norm_in", "attn_post_norm", "ffn_post_norm"):
        assert places.writer(f"layers.1.{kind}") is None
        assert places.readers(f"layers.1.{kind}") == []


# -- the formulas once more, written out where an architecture is special ---------------------


def test_llama_heads_are_narrower_or_wider_than_the_hidden_size() -> None:
    model = tiny_model("llama")
    places = Anatomy(model)
    assert places.width("layers.0.heads") == 4 * 16 != places.hidden_size == 48
    seen, _ = both("llama")
    weight = model.model.layers[1].self_attn.o_proj.weight
    by_hand = seen["layers.1.heads"] @ weight.T
    assert torch.allclose(by_hand, seen["layers.1.attn_out"], atol=1e-5)


def test_post_attention_layernorm_is_the_ffn_norm_in_llama_but_not_in_gemma() -> None:
    llama, gemma = tiny_model("llama"), tiny_model("gemma2")
    layer = llama.model.layers[1]
    assert Anatomy(llama).point("layers.1.ffn_norm").module is layer.post_attention_layernorm
    layer = gemma.model.layers[1]
    assert Anatomy(gemma).point("layers.1.ffn_norm").module is layer.pre_feedforward_layernorm
    # And by value: what the norm on Gemma's branch puts out is something else.
    seen, _ = both("gemma2")
    with torch.no_grad():
        on_branch = layer.post_attention_layernorm(seen["layers.1.attn_out"])
    assert relative(seen["layers.1.ffn_norm"], on_branch) > 0.1


def test_gemma_norms_multiply_by_one_plus_their_weight() -> None:
    model = tiny_model("gemma3")
    seen, _ = both("gemma3")
    x, weight = seen["layers.0.resid"], model.model.layers[1].input_layernorm.weight
    normed = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    assert relative(seen["layers.1.attn_norm"], normed * (1 + weight)) < 1e-5
    assert relative(seen["layers.1.attn_norm"], normed * weight) > 0.1


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_ffn_out_comes_before_gemmas_norm_on_the_branch(name: str) -> None:
    model = tiny_model(name)
    seen, _ = both(name)
    x = seen["layers.1.ffn_out"]
    by_hand = seen["layers.1.ffn_in"] @ model.model.layers[1].mlp.down_proj.weight.T
    assert relative(x, by_hand) < 1e-5
    with torch.no_grad():
        assert relative(x, model.model.layers[1].post_feedforward_layernorm(by_hand)) > 0.1


def test_gemma_embeddings_are_scaled() -> None:
    model = tiny_model("gemma2")
    seen, _ = both("gemma2")
    by_hand = model.model.embed_tokens.weight[IDS] * 48**0.5
    assert relative(seen["embed"], by_hand) < 1e-5
    assert Anatomy(model).embedding_scale == pytest.approx(48**0.5)


def test_gemma2_logits_are_soft_capped() -> None:
    lm = language_model("gemma2")
    seen, _ = both("gemma2")
    raw = seen["final_norm"] @ lm.model.lm_head.weight.T
    assert relative(seen["logits"], 2.0 * torch.tanh(raw / 2.0)) < 1e-5
    assert relative(seen["logits"], raw) > 0.1  # the cap bites here
    assert relative(lm.unembed(seen["final_norm"]), seen["logits"]) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_unembed_gives_the_logits(name: str) -> None:
    seen, _ = both(name)
    with torch.no_grad():
        assert relative(language_model(name).unembed(seen["final_norm"]), seen["logits"]) < 1e-5


def test_gpt2_weights_are_stored_input_first() -> None:
    model = tiny_model("gpt2")
    places, projection = Anatomy(model), model.transformer.h[1].mlp.c_proj
    assert projection.weight.shape == (96, 48)
    assert places.width("layers.1.ffn_in") == 96
    writer = places.writer("layers.1.ffn_out")
    assert writer is not None
    assert torch.equal(writer.read(), projection.weight.T)
    seen, _ = both("gpt2")
    by_hand = seen["layers.1.ffn_in"] @ writer.read().T + projection.bias
    assert relative(by_hand, seen["layers.1.ffn_out"]) < 1e-5
    # And writing turns it round again: "column i of W" is row i of the parameter.
    changed = writer.read().clone()
    changed[:, 5] *= 3
    before = projection.weight.detach().clone()
    writer.write(changed)
    assert torch.equal(model.transformer.h[1].mlp.c_proj.weight[5], 3 * before[5])
    assert torch.equal(model.transformer.h[1].mlp.c_proj.weight[6], before[6])


def test_gpt2_heads_come_from_one_fused_map() -> None:
    model = tiny_model("gpt2")
    seen, _ = both("gpt2")
    attention = model.transformer.h[1].attn
    fused = seen["layers.1.attn_norm"] @ attention.c_attn.weight + attention.c_attn.bias
    q, k, v = (part.unflatten(-1, (4, 12)).transpose(0, 1) for part in fused.split(48, dim=-1))
    scores = (q @ k.mT / 12**0.5).masked_fill(torch.ones(len(IDS), len(IDS)).triu(1).bool(), -1e9)
    by_hand = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    assert relative(by_hand, seen["layers.1.heads"]) < 1e-5


def test_phi3_gate_and_up_are_the_halves_of_one_map() -> None:
    model = tiny_model("phi3")
    seen, _ = both("phi3")
    fused = seen["layers.1.ffn_norm"] @ model.model.layers[1].mlp.gate_up_proj.weight.T
    gate, up = fused.chunk(2, dim=-1)
    assert relative(nn.functional.silu(gate) * up, seen["layers.1.ffn_in"]) < 1e-5
    assert relative(gate * nn.functional.silu(up), seen["layers.1.ffn_in"]) > 0.1


def test_olmo2_norm_sites_are_what_attention_and_ffn_read() -> None:
    """OLMo 2 normalises after the branches, so both read the residual stream as it is."""
    seen, _ = both("olmo2")
    assert torch.equal(seen["layers.1.attn_norm"], seen["layers.0.resid"])
    model = tiny_model("olmo2")
    branch = model.model.layers[1].post_attention_layernorm(seen["layers.1.attn_out"])
    assert relative(seen["layers.1.ffn_norm"], seen["layers.0.resid"] + branch) < 1e-5


def test_editing_an_olmo2_norm_site_leaves_the_residual_stream_alone() -> None:
    model = tiny_model("olmo2")
    places = Anatomy(model)
    seen: dict[str, Tensor] = {}
    edits = {
        places.point("layers.1.attn_norm"): lambda x: x + 1.0,
        places.point("layers.1.attn_out"): partial(seen.__setitem__, "attn_out"),
        places.point("layers.1.ffn_norm"): partial(seen.__setitem__, "ffn_norm"),
    }
    with torch.no_grad(), hooked(model, edits):
        model(torch.tensor([IDS]))
        branch = model.model.layers[1].post_attention_layernorm(seen["attn_out"][0])
    plain, _ = both("olmo2")
    assert relative(seen["attn_out"][0], plain["layers.1.attn_out"]) > 0.01
    assert relative(seen["ffn_norm"][0], plain["layers.0.resid"] + branch) < 1e-5


# -- experts ----------------------------------------------------------------------------------


def test_experts_are_seen_with_zeros_where_a_token_was_not_routed() -> None:
    model = tiny_model("qwen3_moe")
    places, (seen, _) = Anatomy(model), both("qwen3_moe")
    # The first layer is dense: 80 units; the others have 4 experts of 32.
    assert [places.width(site) for site in places.sites("ffn_in")] == [80, 128, 128]
    inner = seen["layers.1.ffn_in"].view(len(IDS), 4, 32)
    router = model.model.layers[1].mlp.gate.weight
    chosen = (seen["layers.1.ffn_norm"] @ router.T).topk(2).indices
    routed = torch.zeros(len(IDS), 4, dtype=torch.bool).scatter(1, chosen, True)
    assert torch.equal(inner.abs().sum(-1) > 0, routed)
    assert routed.any(0).all()  # every expert has work in this text, so none is untested


def test_fused_experts_are_not_skipped() -> None:
    model = tiny_model("qwen3_moe")
    point = Anatomy(model).point("layers.1.ffn_in")
    calls = []

    def silence(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return torch.zeros_like(x)

    outputs: list[Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    with torch.no_grad(), hooked(model, {point: silence}):
        model(torch.tensor([IDS, IDS[::-1]]))
    handle.remove()
    assert calls == [(2, len(IDS), 128)]
    assert not outputs[0].any()  # without inner activations the experts have nothing to say


def test_an_edit_of_one_expert_reaches_only_the_tokens_routed_to_it() -> None:
    model = tiny_model("qwen3_moe")
    places, (plain, _) = Anatomy(model), both("qwen3_moe")
    seen: dict[str, Tensor] = {}

    def louder(x: Tensor) -> Tensor:
        return torch.cat((2 * x[..., :32], x[..., 32:]), dim=-1)

    edits = {
        places.point("layers.1.ffn_in"): louder,
        places.point("layers.1.ffn_out"): partial(seen.__setitem__, "out"),
    }
    with torch.no_grad(), hooked(model, edits):
        model(torch.tensor([IDS]))
    moved = (seen["out"][0] - plain["layers.1.ffn_out"]).abs().amax(-1) > 1e-6
    assert torch.equal(moved, plain["layers.1.ffn_in"][:, :32].any(-1))
    assert 0 < moved.sum() < len(IDS)


def test_experts_take_several_edits_and_give_their_forward_back() -> None:
    model = tiny_model("qwen3_moe")
    block, point = model.model.layers[1].mlp, Anatomy(model).point("layers.1.ffn_in")
    seen: list[Tensor] = []
    with torch.no_grad(), hooked(model, {point: lambda x: x + 1}):
        with hooked(model, {point: seen.append}):
            model(torch.tensor([IDS]))
        assert "forward" in vars(block)
        model(torch.tensor([IDS]))
    assert "forward" not in vars(block)
    plain, _ = both("qwen3_moe")
    assert len(seen) == 1
    assert relative(seen[0][0], plain["layers.1.ffn_in"] + 1) < 1e-5  # the outer one came first


def test_experts_keep_a_forward_that_somebody_else_put_there() -> None:
    """As accelerate does, with a functools.partial, on models that are spread over devices."""
    model = tiny_model("qwen3_moe")
    block, point = model.model.layers[1].mlp, Anatomy(model).point("layers.1.ffn_in")
    foreign = partial(type(block).forward, block)
    block.forward = foreign
    with (
        torch.no_grad(),
        hooked(model, {point: lambda x: x + 1}),
        hooked(model, {point: lambda x: x + 1}),
    ):
        model(torch.tensor([IDS]))
    assert vars(block)["forward"] is foreign


# -- hooks ------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A module that returns (normed, residual), as fused norms do."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * hidden_states, residual


def test_of_a_tuple_only_the_first_element_is_edited() -> None:
    module, x, residual = Normed(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    point = Point("layers.0.attn_norm", module, "output", 3)
    with hooked(module, {point: lambda y: y + 1}):
        output = module(x, residual)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], 2 * x + 1)
    assert output[1] is residual


def test_a_real_module_with_a_tuple_output_is_steered_like_its_tensor() -> None:
    """Llama's attention returns (output, weights), its output projection a tensor."""
    model = tiny_model("llama")
    attention = Point("x", model.model.layers[1].self_attn, "output", 48)
    projection = Anatomy(model).point("layers.1.attn_out")
    results = []
    for point in (attention, projection):
        with torch.no_grad(), hooked(model, {point: lambda x: x * 1.5 + 1}):
            results.append(model(torch.tensor([IDS])).logits)
    assert torch.equal(results[0], results[1])
    assert relative(results[0][0], both("llama")[0]["logits"]) > 0.01


def test_inputs_are_edited_whether_positional_or_by_name() -> None:
    module, x, residual = Normed(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    with hooked(module, {Point("layers.0.heads", module, "input", 3): lambda y: y + 1}):
        assert torch.equal(module(x, residual)[0], 2 * (x + 1))
        named = module(hidden_states=x, residual=residual)
    assert torch.equal(named[0], 2 * (x + 1))
    assert named[1] is residual


def test_an_edit_that_returns_none_leaves_the_very_tensor() -> None:
    module, x, residual = Normed(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, output: outputs.append(output))
    with hooked(module, {Point("x", module, "output", 3): lambda y: None}):
        assert module(x, residual) is outputs[0]
    handle.remove()


def test_hooks_go_when_installing_a_later_one_fails() -> None:
    module = nn.Linear(3, 3)
    good, bad = Point("a", module, "output", 3), Point("b", None, "output", 3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError), hooked(module, {good: lambda x: x, bad: lambda x: x}):
        pass
    assert not module._forward_hooks


# -- names, ranges, errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    "site", ["layers.ffn_out", "layers.1.mlp", "ffn_out", "layers.-1.resid", "layers.1.embed", ""]
)
def test_unknown_sites_are_refused_with_the_known_ones(site: str) -> None:
    with pytest.raises(tt.TrimtabError, match=r"unknown site .*ffn_in.*final_norm") as caught:
        Anatomy(tiny_model("llama")).point(site)
    assert "\n" not in str(caught.value)


def test_layers_out_of_range_are_refused() -> None:
    places = Anatomy(tiny_model("llama"))
    with pytest.raises(tt.TrimtabError, match="layer 3 is out of range.*0 to 2"):
        places.point("layers.3.resid")
    for layer in (3, -4):
        with pytest.raises(tt.TrimtabError, match=f"layer {layer} is out of range.*0 to 2"):
            places.sites("resid", (layer,))
    with pytest.raises(tt.TrimtabError, match="unknown site kind 'mlp'.*ffn_out"):
        places.sites("mlp")


def test_sites_are_listed_in_layer_order() -> None:
    places = Anatomy(tiny_model("gemma2"))
    assert places.sites("heads") == [f"layers.{i}.heads" for i in range(4)]
    assert places.sites("heads", (-1, 0)) == ["layers.3.heads", "layers.0.heads"]
    assert places.sites("embed", (1,)) == ["embed"]


def test_site_order_is_the_order_of_the_computation() -> None:
    """The reference notes each site as it computes it."""
    for name in TINY:
        computed = list(reference(name, tiny_model(name), IDS[:3])[0])
        assert sorted(reversed(computed), key=anatomy.site_order) == computed


def test_an_unknown_architecture_is_told_how_to_register(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "model_type", "bloom")
    with pytest.raises(tt.TrimtabError) as caught:
        tt.wrap(model, tiny_tokenizer())
    message = str(caught.value)
    assert "'bloom'" in message
    assert "register('bloom'" in message
    assert all(known in message for known in anatomy.known())
    assert "\n" not in message
    # Every architecture that the project promises is among them.
    promised = {
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma3_text",
        "gpt2", "phi3", "olmo2",
    }  # fmt: skip
    assert promised <= set(anatomy.known())


def test_a_model_without_blocks_is_refused() -> None:
    body = tiny_model("llama").model  # LlamaModel: no `model.layers`, no LM head
    with pytest.raises(tt.TrimtabError, match="AutoModelForCausalLM"):
        Anatomy(body)


class _Block(nn.Module):
    """A made-up block whose names have nothing of Llama's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(size)
        self.mixer = nn.ModuleDict({"inp": nn.Linear(size, 6), "out": nn.Linear(6, size)})
        self.between = nn.LayerNorm(size)
        self.feed = nn.Sequential(nn.Linear(size, 10), nn.ReLU(), nn.Linear(10, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer["out"](self.mixer["inp"](self.before(x)).cumsum(1))
        return x + self.feed(self.between(x))


class _MadeUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="made_up", hidden_size=8)
        self.config.get_text_config = lambda: self.config
        self.core = nn.ModuleDict(
            {
                "words": nn.Embedding(20, 8),
                "stack": nn.ModuleList([_Block(8), _Block(8)]),
                "last": nn.LayerNorm(8),
            }
        )
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.core["words"](ids)
        for block in self.core["stack"]:
            x = block(x)
        return self.head(self.core["last"](x))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def test_a_made_up_architecture_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_ARCHITECTURES", dict(anatomy._ARCHITECTURES))
    model = _MadeUp()
    with pytest.raises(tt.TrimtabError, match="unknown architecture 'made_up'"):
        Anatomy(model)
    anatomy.register(
        "made_up",
        Architecture(
            body="core",
            blocks="stack",
            embeddings=("words",),
            final_norm="last",
            attn_norm="before",
            ffn_norm="between",
            attention="mixer",
            attn_readers=("mixer.inp",),
            attn_proj="mixer.out",
            ffn="feed",
            ffn_readers=("feed.0",),
            ffn_proj="feed.2",
        ),
    )
    assert "made_up" in anatomy.known()
    places = Anatomy(model)
    assert (places.layers, places.hidden_size) == (2, 8)
    kinds = [kind for kind in KINDS if places.has(kind)]
    assert {kind: places.width(f"layers.1.{kind}") for kind in kinds[1:-1]} == {
        "attn_norm_in": 8, "attn_norm": 8, "heads": 6, "attn_out": 8,
        "ffn_norm_in": 8, "ffn_norm": 8, "ffn_in": 10, "ffn_out": 8, "resid": 8,
    }  # fmt: skip
    seen: dict[str, Tensor] = {}
    edits: dict[Point, Any] = {
        places.point(site): partial(seen.__setitem__, site)
        for kind in kinds
        for site in places.sites(kind)
    }
    with torch.no_grad(), hooked(model, edits):
        model(torch.tensor([[3, 1, 4, 1, 5]]))
        block = model.core["stack"][1]
        middle = seen["layers.0.resid"] + seen["layers.1.attn_out"]
        assert torch.equal(seen["layers.1.attn_norm_in"], seen["layers.0.resid"])
        assert torch.allclose(seen["layers.1.ffn_norm_in"], middle)
        assert torch.allclose(seen["layers.1.attn_norm"], block.before(seen["layers.0.resid"]))
        assert torch.allclose(seen["layers.1.attn_out"], block.mixer["out"](seen["layers.1.heads"]))
        assert torch.allclose(seen["layers.1.ffn_norm"], block.between(middle))
        assert torch.allclose(seen["layers.1.ffn_out"], block.feed[2](seen["layers.1.ffn_in"]))
        assert torch.allclose(seen["layers.1.resid"], middle + seen["layers.1.ffn_out"])
        assert torch.allclose(seen["final_norm"], model.core["last"](seen["layers.1.resid"]))
    # Baking asks for the maps around a site.
    assert places.writer("layers.1.ffn_out").owner is block.feed[2]
    assert [one.owner for one in places.readers("layers.1.attn_norm")] == [block.mixer["inp"]]
    assert [one.owner for one in places.readers("final_norm")] == [model.head]


# -- Gemma 3 with eyes ------------------------------------------------------------------------


def multimodal() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny Gemma 3 with a vision tower, and the text-only model with the same weights."""
    text = tiny_model("gemma3")
    config = Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=390,
        eoi_token_index=391,
        image_token_index=392,
    )
    with torch.random.fork_rng(devices=[]):
        model = Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model, text


def test_multimodal_gemma3_has_the_sites_of_its_language_model() -> None:
    model, text = multimodal()
    places = Anatomy(model)
    assert (places.name, places.layers, places.hidden_size) == ("gemma3", 4, 48)
    expected, logits = reference("gemma3", text, IDS)
    seen = capture(model, list(expected))
    for site, value in expected.items():
        assert relative(seen[site], value) < 1e-5, site
    assert relative(seen["logits"], logits) < 1e-5
    assert places.embedding_scale == pytest.approx(48**0.5)


@pytest.mark.parametrize(
    ("kind", "op"), [("resid", "Add"), ("ffn_out", "Scale"), ("attn_out", "Add"), ("embed", "Add")]
)
def test_multimodal_gemma3_is_steered_and_baked_as_the_text_model(kind: str, op: str) -> None:
    model, text = multimodal()
    lm = tt.wrap(model, tiny_tokenizer(), "eyes")
    alone = tt.wrap(text, tiny_tokenizer(), "text")
    steering = steer_at(lm, kind, op)
    expected = alone.logits(PROMPTS, steering=steer_at(alone, kind, op))
    assert relative(lm.logits(PROMPTS, steering=steering), expected) < 1e-5
    assert relative(lm.logits(PROMPTS), expected) > 0.01
    if (kind, op) != ("resid", "Add"):  # a norm stands between: refused, as in the text model
        assert relative(tt.bake(lm, steering).logits(PROMPTS), expected) < 1e-5
    lm.model.generation_config.eos_token_id = alone.model.generation_config.eos_token_id = None
    written = [
        model.generate(PROMPTS, max_new_tokens=6, chat=False, steering=steer_at(model, kind, op))
        for model in (lm, alone)
    ]
    assert [one.tokens for one in written[0]] == [one.tokens for one in written[1]]
