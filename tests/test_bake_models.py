"""Baking and the user's model: what the two share, what is refused, and half precision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimtab as tt
from baking import check_same, check_untouched, snapshot
from helpers import PROMPTS, language_model, plain_logits, relative, steer, steer_at, token_ids

# -- the user's model, and what the two share -------------------------------------------------


def shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_tied_embeddings_are_untied_only_when_needed(name: str) -> None:
    lm = language_model(name)
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    before = snapshot(lm.model)
    for kind, op in (("heads", "Scale"), ("ffn_out", "Scale"), ("attn_out", "Add")):
        baked = tt.bake(lm, steer_at(lm, kind, op)).model
        assert baked.config.tie_word_embeddings
        assert baked.get_output_embeddings().weight is baked.get_input_embeddings().weight
    if name == "gpt2":  # its last norm has a bias, and takes all that acts unit by unit
        for op in ("Scale", "Add"):
            assert tt.bake(lm, steer_at(lm, "final_norm", op)).model.config.tie_word_embeddings
    for kind in ("embed",) if name == "gpt2" else ("embed", "final_norm"):
        baked = tt.bake(lm, steer_at(lm, kind, "Scale")).model
        assert not baked.config.tie_word_embeddings
        table, head = baked.get_input_embeddings().weight, baked.get_output_embeddings().weight
        assert not torch.equal(table, head)
        untouched, changed = (head, table) if kind == "embed" else (table, head)
        original = lm.model.get_input_embeddings().weight
        assert torch.equal(untouched, original)
        assert not torch.equal(changed, original)
    check_untouched(lm.model, before)
    assert lm.model.config.tie_word_embeddings
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight


def test_weights_that_do_not_change_are_shared() -> None:
    for name, op in (("llama", "Scale"), ("qwen2", "Add"), ("gemma3", "Scale")):
        lm = language_model(name)
        before = snapshot(lm.model)
        baked = tt.bake(lm, steer_at(lm, "heads", op)).model
        changed = "model.layers.1.self_attn.o_proj.weight"
        for key, parameter in baked.named_parameters():
            if key.endswith("bias") and key not in dict(lm.model.named_parameters()):
                continue
            original = lm.model.get_parameter(key)
            assert shares(parameter, original) == (key != changed or op == "Add"), (name, key)
        check_untouched(lm.model, before)


def test_training_the_baked_model_would_need_its_own_weights() -> None:
    """Changing a changed weight of the baked model in place leaves the user's alone."""
    lm = language_model("llama")
    before = snapshot(lm.model)
    baked = tt.bake(lm, steer_at(lm, "heads", "Scale")).model
    with torch.no_grad():
        baked.model.layers[1].self_attn.o_proj.weight.zero_()
    check_untouched(lm.model, before)


def test_the_name_and_the_mode_of_a_baked_model() -> None:
    lm = language_model("llama")
    baked = tt.bake(lm, steer_at(lm, "heads", "Scale").at(3))
    assert "llama" in baked.name
    assert "test alpha=3" in baked.name
    assert not baked.model.training
    assert baked.tokenizer is lm.tokenizer


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_models_without_biases_become_llama_models(name: str) -> None:
    lm = language_model(name, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    lm.model.generation_config.temperature = 0.7
    lm.model.generation_config.do_sample = True
    steering = steer_at(lm, "resid", "Add")
    baked = tt.bake(lm, steering)
    assert type(baked.model).__name__ == "LlamaForCausalLM"
    assert type(lm.model).__name__ != "LlamaForCausalLM"
    assert baked.model.config.architectures == ["LlamaForCausalLM"]
    assert baked.model.config.tie_word_embeddings == lm.model.config.tie_word_embeddings
    assert baked.model.generation_config.temperature == 0.7
    check_same(lm, baked, steering)
    # Where no bias is missing they stay what they are.
    assert type(tt.bake(lm, steer_at(lm, "heads", "Scale")).model) is type(lm.model)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_positions_other_than_all_are_refused(positions: Any) -> None:
    lm = language_model("llama")
    with pytest.raises(tt.TrimtabError, match=f"scope {positions!r}.*attach it instead"):
        tt.bake(lm, steer_at(lm, "ffn_out", "Scale", positions=positions))


def test_operators_that_are_not_linear_are_refused() -> None:
    lm = language_model("llama")

    class Clip:
        linear, identity, width, size = False, None, 48, 48
        description = "Clip"

    with pytest.raises(tt.TrimtabError, match="Clip is not linear.*attach it instead"):
        tt.bake(lm, steer(lm, ("layers.1.ffn_out", Clip())))


def test_quantised_models_are_refused() -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "ffn_out", "Scale")
    config = SimpleNamespace(quant_method="bitsandbytes")
    lm.model.hf_quantizer = SimpleNamespace(quantization_config=config)
    assert lm.quantised
    with pytest.raises(tt.TrimtabError, match="is quantised.*attach the steering instead"):
        tt.bake(lm, steering)
    lm.logits(PROMPTS, steering=steering)  # which is possible


def test_a_model_read_from_gguf_has_plain_weights_and_bakes(tmp_path: Path) -> None:
    """transformers keeps the mark of the file that it was read from, and refuses to save it."""
    lm = language_model("llama")
    steering = steer_at(lm, "ffn_out", "Scale")
    config = SimpleNamespace(quant_method="gguf")
    lm.model.hf_quantizer = SimpleNamespace(quantization_config=config)
    lm.model.is_quantized = True
    lm.model.config.quantization_config = config
    assert not lm.quantised
    baked = tt.bake(lm, steering)
    assert getattr(baked.model, "hf_quantizer", None) is None
    assert not hasattr(baked.model.config, "quantization_config")
    assert lm.model.config.quantization_config is config
    baked.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = token_ids(PROMPTS[0])
    assert torch.equal(plain_logits(again, ids), plain_logits(baked.model, ids))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_a_short_sliding_window_has_no_llama_that_computes_the_same(
    name: str, options: dict[str, Any]
) -> None:
    lm = language_model(name, **options)
    with pytest.raises(tt.TrimtabError, match="sliding window of 8 tokens.*attach the steering"):
        tt.bake(lm, steer_at(lm, "resid", "Add"))
    # Scaling needs no bias, so nothing has to move.
    steering = steer_at(lm, "heads", "Scale")
    check_same(lm, tt.bake(lm, steering), steering)


def test_a_window_as_long_as_the_text_can_be_is_none() -> None:
    lm = language_model("mistral", sliding_window=256)
    steering = steer_at(lm, "resid", "Add")
    check_same(lm, tt.bake(lm, steering), steering)


def test_baking_inside_a_steered_block_is_refused() -> None:
    """The copy would carry the block's hooks with it, and stay steered for good."""
    lm = language_model("llama")
    for attached in (
        steer_at(lm, "ffn_out", "Scale"),
        steer_at(lm, "heads", "Scale"),
        steer_at(lm, "resid", positions="last"),
        steer_at(lm, "attn_norm_in", "Turn"),
    ):
        with (
            lm.steered(attached),
            pytest.raises(tt.TrimtabError, match="while it is steered.*after the block"),
        ):
            tt.bake(lm, steer_at(lm, "resid", "Add"))
    tt.bake(lm, steer_at(lm, "resid", "Add"))
    experts = language_model("qwen3_moe")
    with (
        experts.steered(steer_at(experts, "ffn_in", "Scale")),
        pytest.raises(tt.TrimtabError, match="while it is steered"),
    ):
        tt.bake(experts)


def test_another_models_steering_is_refused_unless_forced() -> None:
    lm, other = language_model("llama"), language_model("llama", seed=1)
    steering = steer_at(other, "ffn_out", "Scale")
    with pytest.raises(tt.TrimtabError, match="was made for"):
        tt.bake(lm, steering)
    baked = tt.bake(lm, steering, force=True)
    attached = lm.logits(PROMPTS, steering=steering, force=True)
    assert relative(baked.logits(PROMPTS), attached) < 1e-5


# -- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_bfloat16_baked_is_close_to_attached(name: str) -> None:
    lm = language_model(name, dtype=torch.bfloat16)
    exact = language_model(name)
    kinds = [("heads", "Scale"), ("ffn_out", "Scale"), ("attn_out", "Add"), ("embed", "Add")]
    for kind, op in kinds:
        steering = steer_at(lm, kind, op)
        baked = tt.bake(lm, steering)
        assert all(parameter.dtype is torch.bfloat16 for parameter in baked.model.parameters())
        attached = lm.logits(PROMPTS, steering=steering)
        # What rounding to 8 bits does to this model anyway, attached and in float32.
        rounding = relative(attached, exact.logits(PROMPTS, steering=steer_at(exact, kind, op)))
        assert relative(baked.logits(PROMPTS), attached) < max(0.03, 2 * rounding)
        assert relative(lm.logits(PROMPTS), attached) > 0.05
