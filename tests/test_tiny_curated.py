"""The tiny curated models themselves: what the other tests take for granted about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tiny import TINY, tiny_tokenizer
from tiny_curated import CURATED, WRAPPERS, curated_model

# Longer than the sliding window of 8 tokens.
PROMPTS = ["She looked at the map and asked where", "Today I feel sad because of the rain and"]


def _generate(model: PreTrainedModel, text: str, use_cache: bool) -> list[int]:
    batch = tiny_tokenizer()(text, return_tensors="pt")
    ids, mask = batch.input_ids, batch.attention_mask
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    return model.generate(ids, attention_mask=mask, **options)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", CURATED)
def test_text_depends_on_the_prompt_and_not_on_the_cache(name: str) -> None:
    model = curated_model(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    logits = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits.append(model(tiny_tokenizer()(prompt, return_tensors="pt").input_ids).logits[0])
        assert logits[-1].isfinite().all()
    assert (logits[0][-1] - logits[1][-1]).std() > 0.3
    texts = [_generate(model, prompt, use_cache=True) for prompt in PROMPTS]
    assert texts[0] == _generate(model, PROMPTS[0], use_cache=False)
    assert len({*texts[0], *texts[1]}) >= 4


@pytest.mark.parametrize("name", CURATED)
def test_norms_and_biases_are_not_trivial_and_each_dtype_has_the_weights(name: str) -> None:
    model, half = curated_model(name), curated_model(name, dtype=torch.bfloat16)
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if kind.endswith("bias") or "Norm" in type(module).__name__:
                assert parameter.std() > 0.05, f"{path}.{kind}"
    states = zip(model.state_dict().items(), half.state_dict().values(), strict=True)
    for (path, here), there in states:
        assert torch.equal(here.to(there.dtype), there), path


def test_seeded_and_without_side_effects() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (curated_model("qwen3_next", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_no_name_is_there_twice_and_an_unknown_one_is_named() -> None:
    assert not {*TINY} & {*CURATED}
    assert list(CURATED) == sorted(CURATED)
    with pytest.raises(ValueError, match=r"no curated model 'lama'.*granite"):
        curated_model("lama")


def test_overrides_reach_the_configuration_of_the_decoder() -> None:
    assert curated_model("granite", residual_multiplier=1.0).config.residual_multiplier == 1.0
    model = curated_model("qwen3_vl", num_hidden_layers=2)
    assert len(model.model.language_model.layers) == 2


# -- the details on which wrong code breaks ---------------------------------------------------


def _layers(name: str) -> Any:
    model: Any = curated_model(name)
    body = model.model.language_model if name in WRAPPERS else model.model
    return body.layers


def test_widths_differ_by_layer_where_the_architecture_lets_them() -> None:
    layers = _layers("gemma4")
    assert [layer.self_attn.o_proj.in_features for layer in layers] == [64, 96, 64, 96]
    assert [layer.mlp.down_proj.in_features for layer in layers] == [80, 80, 160, 160]
    assert [layer.self_attn.is_kv_shared_layer for layer in layers] == [False, False, True, True]
    assert len({float(layer.layer_scalar) for layer in layers}) == 4


def test_experts_that_are_square_may_be_transposed_unseen() -> None:
    experts = _layers("gpt_oss")[0].mlp.experts
    assert experts.down_proj.shape == (4, 48, 48)
    assert experts.down_proj_bias.std() > 0.1


@pytest.mark.parametrize(
    ("name", "shared", "there"),
    [
        ("deepseek_v3", "mlp.shared_experts", [False, True, True]),
        ("glm4_moe", "mlp.shared_experts", [False, True, True]),
        ("qwen3_5_moe", "mlp.shared_expert", [True, True, True]),
        ("qwen3_next", "mlp.shared_expert", [False, True, True]),
        ("llama4_text", "feed_forward.shared_expert", [False, True, False, True]),
        ("nemotron_h", "mixer.shared_experts", [False, False, True, False, False]),
        ("granitemoehybrid", "shared_mlp", [True, True, True]),
    ],
)
def test_shared_experts_stand_beside_the_routed_ones(
    name: str, shared: str, there: list[bool]
) -> None:
    assert [shared in dict(layer.named_modules()) for layer in _layers(name)] == there


def test_hybrids_have_layers_of_every_kind() -> None:
    kinds = [type(layer.mixer).__name__ for layer in _layers("nemotron_h")]
    assert len(set(kinds)) == 4
    for name, kind in (("qwen3_next", "linear_attn"), ("lfm2", "conv"), ("qwen3_5", "linear_attn")):
        assert [hasattr(layer, kind) for layer in _layers(name)] == [True, False, True]
    assert [layer.mamba is None for layer in _layers("granitemoehybrid")] == [False, True, False]
    assert all(hasattr(layer, "mamba") and layer.self_attn for layer in _layers("falcon_h1"))


@pytest.mark.parametrize(
    ("name", "multiplier"),
    [
        ("cohere2", "logit_scale"),
        ("falcon_h1", "attention_in_multiplier"),
        ("falcon_h1", "attention_out_multiplier"),
        ("falcon_h1", "embedding_multiplier"),
        ("falcon_h1", "ssm_out_multiplier"),
        ("granite", "attention_multiplier"),
        ("granite", "embedding_multiplier"),
        ("granite", "residual_multiplier"),
        ("granitemoehybrid", "residual_multiplier"),
    ],
)
def test_multipliers_are_felt(name: str, multiplier: str) -> None:
    ids = torch.tensor([tiny_tokenizer()(PROMPTS[0]).input_ids])
    model, plain = curated_model(name), curated_model(name, **{multiplier: 1.0})
    with torch.no_grad():
        difference = (model(ids).logits - plain(ids).logits).abs().max()
    assert difference > 0.05
