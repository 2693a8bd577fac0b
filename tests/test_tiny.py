"""The tiny models themselves: what the other tests take for granted about them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tiny import TINY, tiny_model, tiny_tokenizer

Tiny = tuple[str, PreTrainedModel, PreTrainedTokenizerFast]

# Longer than the sliding window of 8 tokens.
PROMPTS = ["She looked at the map and asked where", "Today I feel sad because of the rain and"]

# Head size times heads is not the hidden size here.
WIDE = {"llama", "qwen3", "qwen3_moe", "gemma2", "gemma3"}


def _logits(model: PreTrainedModel, text: str) -> torch.Tensor:
    """Logits of the last token of `text`: [vocabulary]."""
    with torch.no_grad():
        return model(**tiny_tokenizer()(text, return_tensors="pt")).logits[0, -1]


def _generate(model: PreTrainedModel, text: str, tokens: int, use_cache: bool = True) -> list[int]:
    batch = tiny_tokenizer()(text, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, use_cache=use_cache)
    return out[0, batch.input_ids.shape[1] :].tolist()


def test_forward_depends_on_the_prompt(tiny: Tiny) -> None:
    _, model, tokenizer = tiny
    first, second = (_logits(model, prompt) for prompt in PROMPTS)
    assert first.shape == (len(tokenizer),)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert (first - second).std() > 0.3
    assert not model.training


def test_generates_the_same_with_and_without_cache(tiny: Tiny) -> None:
    _, model, _ = tiny
    for prompt in PROMPTS:
        assert _generate(model, prompt, 8) == _generate(model, prompt, 8, use_cache=False)


def test_greedy_text_does_not_collapse(tiny: Tiny) -> None:
    _, model, _ = tiny
    assert max(len(set(_generate(model, prompt, 16))) for prompt in PROMPTS) >= 4


def test_shapes_are_as_promised(tiny: Tiny) -> None:
    name, model, _ = tiny
    config = model.config
    projection = next(  # the output projection of attention; GPT-2's is a Conv1D, [in, out]
        module.weight if name != "gpt2" else module.weight.T
        for path, module in model.named_modules()
        if path.endswith(("o_proj", "attn.c_proj"))
    )
    assert (projection.shape[1] != config.hidden_size) == (name in WIDE)
    if name != "gpt2":
        assert config.num_key_value_heads < config.num_attention_heads
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000


def test_both_ties_are_present() -> None:
    assert {tiny_model(name).config.tie_word_embeddings for name in TINY} == {True, False}


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_sliding_window_and_both_layer_types(name: str) -> None:
    model = tiny_model(name)
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    # The prompt is longer than the window, so the same weights with a wide one say something else.
    wide = tiny_model(name, sliding_window=200)
    assert not torch.allclose(_logits(model, PROMPTS[0]), _logits(wide, PROMPTS[0]), atol=1e-3)


@pytest.mark.parametrize("cap", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_gemma2_soft_caps_bite(cap: str) -> None:
    capped, free = tiny_model("gemma2"), tiny_model("gemma2", **{cap: None})
    assert not torch.allclose(_logits(capped, PROMPTS[0]), _logits(free, PROMPTS[0]), atol=1e-3)


def test_mistral_takes_a_sliding_window() -> None:
    full, sliding = tiny_model("mistral"), tiny_model("mistral", sliding_window=4)
    assert full.config.sliding_window is None
    assert not torch.allclose(_logits(full, PROMPTS[0]), _logits(sliding, PROMPTS[0]), atol=1e-3)


def test_qwen3_moe_has_dense_and_expert_layers() -> None:
    layers = tiny_model("qwen3_moe").model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True, True]
    assert layers[1].mlp.experts.down_proj.shape == (4, 48, 32)  # [experts, hidden, units]
    assert layers[1].mlp.gate.weight.std() > 0.1


def test_norms_and_biases_are_not_trivial(tiny: Tiny) -> None:
    _, model, _ = tiny
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if kind == "bias" or "Norm" in type(module).__name__:
                assert parameter.std() > 0.1, f"{path}.{kind}"


def test_seeded_and_without_side_effects() -> None:
    before = torch.random.get_rng_state()
    a, b, c = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_dtype_keeps_the_weights(tiny: Tiny) -> None:
    name, model, _ = tiny
    half = tiny_model(name, dtype=torch.bfloat16)
    for x, y in zip(model.parameters(), half.parameters(), strict=True):
        assert y.dtype is torch.bfloat16
        assert torch.equal(x.to(torch.bfloat16), y)


def test_overrides_reach_the_configuration() -> None:
    model = tiny_model("gpt2", num_hidden_layers=2)
    assert len(model.transformer.h) == 2
    assert isinstance(model.lm_head, nn.Linear)
    with pytest.raises(ValueError, match=r"no tiny model 'bloom'.*llama"):
        tiny_model("bloom")


def test_tokenizer_round_trip() -> None:
    tokenizer = tiny_tokenizer()
    for text in ["She looked at the map.", "  two  spaces\n\tand tabs ", "Zoë 漢字 🙂", ""]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert 300 <= len(tokenizer) <= 500


def test_bos_comes_once_from_either_side() -> None:
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token_id
    assert tokenizer("Hello").input_ids[0] == bos
    assert bos not in tokenizer("Hello", add_special_tokens=False).input_ids
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|user|>\nHello</s>\n<|assistant|>\n"
    assert tokenizer(text, add_special_tokens=False).input_ids.count(bos) == 1
    assert tokenizer(text).input_ids.count(bos) == 2  # the trap that the library must avoid
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_saved_and_loaded(tiny: Tiny, tmp_path) -> None:
    _, model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    attention = model.config._attn_implementation  # older versions would leave out a soft-cap
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert torch.allclose(_logits(model, PROMPTS[0]), _logits(again, PROMPTS[0]), atol=1e-5)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Today I feel  happy. 漢"
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    assert reloaded.chat_template == tokenizer.chat_template
