"""Sites: what a hook sees is what the formulas say, in every architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

import trimtab as tt
from helpers import (
    IDS,
    MISSING,
    PROMPTS,
    SITES,
    add,
    language_model,
    relative,
    site_kinds,
    steer,
    steer_at,
)
from reference import reference
from sites_by_hand import both, capture
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab.anatomy import KINDS, Anatomy, Point, site_order
from trimtab.anatomy.hooks import hooked
from trimtab.anatomy.sites import BLOCK_KINDS

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
    layer = [seen[f"layers.1.{kind}"] for kind in BLOCK_KINDS if kind not in MISSING[name]]
    assert len(layer) in (9, 10, 11)
    for i, first in enumerate(layer):
        for second in layer[i + 1 :]:
            assert first.shape != second.shape or relative(first, second) > 0.05


@pytest.mark.parametrize("name", TINY)
def test_sites_that_an_architecture_lacks_are_refused(name: str) -> None:
    lm = language_model(name)
    places = lm.anatomy
    assert site_kinds(lm) == [kind for kind in KINDS if kind not in MISSING[name]]
    for kind in MISSING[name]:
        what = "mixture" if kind == "router" else "norm"
        add_there = steer(lm, (f"layers.1.{kind}", add(lm.anatomy.hidden_size)))
        for ask in (
            lambda kind=kind: places.sites(kind),
            lambda kind=kind: places.sites(kind, (0,)),
            lambda kind=kind: places.point(f"layers.1.{kind}"),
            lambda kind=kind: places.width(f"layers.1.{kind}"),
            lambda steering=add_there: lm.logits(PROMPTS, steering=steering),
            lambda steering=add_there: tt.bake(lm, steering),
        ):
            says = f"{name}.* has no .*{kind}.*{what}"
            with pytest.raises(tt.TrimtabError, match=says) as caught:
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
    assert writers == sorted(writers, key=site_order)
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
        assert places.writers(f"layers.1.{kind}") == []
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
    assert Anatomy(llama).point("layers.1.ffn_norm_in").module is layer.post_attention_layernorm
    layer = gemma.model.layers[1]
    assert Anatomy(gemma).point("layers.1.ffn_norm_in").module is layer.pre_feedforward_layernorm
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
    (writer,) = places.writers("layers.1.ffn_out")
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
    if kind == "embed":
        with pytest.raises(tt.TrimtabError, match="sees images, which do not come from the emb"):
            tt.bake(lm, steering)
    elif (kind, op) != ("resid", "Add"):  # a norm stands between: refused, as in the text model
        assert relative(tt.bake(lm, steering).logits(PROMPTS), expected) < 1e-5
    lm.model.generation_config.eos_token_id = alone.model.generation_config.eos_token_id = None
    written = [
        model.generate(PROMPTS, max_new_tokens=6, chat=False, steering=steer_at(model, kind, op))
        for model in (lm, alone)
    ]
    assert [one.tokens for one in written[0]] == [one.tokens for one in written[1]]
