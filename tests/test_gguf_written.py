"""A model written as a GGUF file, and read again, is the model; what llama.cpp would compute in
another way is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimtab as tt
from commands import Command, home, trimtab, work
from gguf_files import MODELS, tensors, tiny, values
from helpers import logits_of, operator, refused_in_one_line, steer
from tiny import tiny_model
from tiny_packs import (
    add_byte_level_tokenizer,
    add_sentencepiece_tokenizer,
    cache,
    permuted,
    write_tiny_llama,
)
from trimtab.checkpoints import metadata_of
from trimtab.steering import Add

__all__ = ["cache", "home", "trimtab", "work"]
pytestmark = pytest.mark.usefixtures("cache")

IDS = torch.arange(60).reshape(2, 30) * 6


def logits(lm: tt.LanguageModel) -> Tensor:
    with torch.no_grad():
        return lm.model(IDS).logits


def same_weights(lm: tt.LanguageModel, other: tt.LanguageModel, atol: float = 0.0) -> None:
    weights, others = dict(lm.model.named_parameters()), dict(other.model.named_parameters())
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        # A norm of Gemma is stored as 1 + w, which rounds it.
        near = max(atol, 1e-7) if "norm" in name and "gemma" in lm.anatomy.name else atol
        torch.testing.assert_close(weight, others[name], atol=near, rtol=0, msg=name)


# -- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(name: str, tmp_path: Path) -> None:
    lm = tiny(name)
    assert tt.save_gguf(lm, tmp_path / "m.gguf") == tmp_path / "m.gguf"
    again = tt.load(tmp_path / "m.gguf")
    same_weights(lm, again)
    torch.testing.assert_close(logits(again), logits(lm), atol=1e-5, rtol=0)
    text = "<|user|>The ship left at 12:30.\n\n  \t¿Qué?"
    if name != "qwen2":  # to which transformers gives its own way to cut text, whatever is written
        assert again.tokenizer(text).input_ids == lm.tokenizer(text).input_ids
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
    # What came from a GGUF file is that file again, bit by bit.
    tt.save_gguf(again, tmp_path / "again.gguf")
    first, second = tensors(tmp_path / "m.gguf"), tensors(tmp_path / "again.gguf")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert values(tmp_path / "m.gguf") == values(tmp_path / "again.gguf")


def test_rows_of_q_and_k_are_in_llama_cpps_order(tmp_path: Path) -> None:
    lm = tiny("llama")
    tt.save_gguf(lm, tmp_path / "m.gguf")
    written, attention = tensors(tmp_path / "m.gguf"), lm.model.model.layers[1].self_attn
    for name, module, heads in (("q", attention.q_proj, 4), ("k", attention.k_proj, 2)):
        expected = permuted(module.weight.detach().numpy(), heads)
        assert np.array_equal(written[f"blk.1.attn_{name}.weight"], expected)
    value = attention.v_proj.weight.detach().numpy()
    assert np.array_equal(written["blk.1.attn_v.weight"], value)


#: Few positions, so that a text of 30 tokens is a long one, or many.
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.5, 2.0, 4.0, 8.0],
}  # fmt: skip


@pytest.mark.parametrize("original", [16, 64])
def test_phi_3s_rotary_frequencies(original: int, tmp_path: Path) -> None:
    rope = {**LONG_ROPE, "original_max_position_embeddings": original}
    size = {"original_max_position_embeddings": original}
    lm = tiny("phi3", rope_parameters={**rope}, **size)
    tt.save_gguf(lm, tmp_path / "m.gguf")
    factors = tensors(tmp_path / "m.gguf")
    for length in ("long", "short"):
        stored = factors[f"rope_factors_{length}.weight"].tolist()
        assert stored == pytest.approx(LONG_ROPE[f"{length}_factor"])
    said = values(tmp_path / "m.gguf")
    assert said["phi3.rope.dimension_count"] == 8
    factor = (1 + np.log(256 / original) / np.log(original)) ** 0.5
    assert said["phi3.rope.scaling.attn_factor"] == pytest.approx(factor)
    again = tt.load(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(again), logits(lm), atol=1e-5, rtol=0)
    alike = {**rope, "short_factor": rope["long_factor"]}
    other = tiny("phi3", rope_parameters=alike, **size)
    same = torch.allclose(logits(other), logits(lm), atol=1e-5)
    assert same == (original == 16)
    tt.save_gguf(again, tmp_path / "again.gguf")
    assert values(tmp_path / "again.gguf") == said
    assert tensors(tmp_path / "again.gguf").keys() == factors.keys()


def test_experts_lie_in_a_tensor_each_of_gate_up_and_down(tmp_path: Path) -> None:
    lm = tiny("mixtral")
    tt.save_gguf(lm, tmp_path / "m.gguf", type="f16")
    written, block = tensors(tmp_path / "m.gguf"), lm.model.model.layers[1].mlp
    gate_up = block.experts.gate_up_proj.detach()  # [experts, gate then up, read]
    expected = {"gate": gate_up[:, :40], "up": gate_up[:, 40:], "down": block.experts.down_proj}
    for name, weights in expected.items():
        stored = weights.detach().half().float().numpy()
        assert np.array_equal(written[f"blk.1.ffn_{name}_exps.weight"], stored)
    # What chooses experts is not rounded, and nothing is left of experts beside each other.
    assert np.array_equal(written["blk.1.ffn_gate_inp.weight"], block.gate.weight.detach().numpy())
    said = values(tmp_path / "m.gguf")
    assert (said["llama.expert_count"], said["llama.expert_used_count"]) == (4, 2)
    # transformers takes it for a Llama without experts, and does not get that far.
    refused_in_one_line(lambda: tt.load(tmp_path / "m.gguf"), "lacks .* of the model's tensors")


def test_an_embedding_table_that_is_the_head_is_written_twice_where_it_must(tmp_path: Path) -> None:
    lm = tiny("qwen2_moe", tie_word_embeddings=True)
    tt.save_gguf(lm, tmp_path / "m.gguf")
    written = tensors(tmp_path / "m.gguf")
    assert np.array_equal(written["output.weight"], written["token_embd.weight"])


@pytest.mark.parametrize(
    ("kind", "largest"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)], ids=str
)
def test_other_types_round_no_more_than_they_must(
    kind: str, largest: float, tmp_path: Path
) -> None:
    lm = tiny("qwen2")
    tt.save_gguf(lm, tmp_path / "m.gguf", type=kind)
    tt.save_gguf(lm, tmp_path / "full.gguf")
    full, rounded = tensors(tmp_path / "full.gguf"), tensors(tmp_path / "m.gguf")
    kinds = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert {kinds[name] for name in full if full[name].ndim == 1} == {"F32"}
    assert {kinds[name] for name in full if full[name].ndim == 2} == {kind.upper()}
    for name, weight in full.items():
        scale = np.abs(weight).max()
        assert np.abs(weight - rounded[name]).max() <= largest * scale, name
    assert (
        values(tmp_path / "m.gguf")["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]
    )
    again = tt.load(tmp_path / "m.gguf")
    assert (logits(again) - logits(lm)).abs().max() < 40 * largest * logits(lm).abs().max()


def test_q8_0_takes_rows_of_32(tmp_path: Path) -> None:
    tt.save_gguf(tiny("llama"), tmp_path / "m.gguf", type="q8_0")  # 48 wide, and 64 at heads
    kinds = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_output.weight"] == "Q8_0"


def test_experts_are_rounded_and_routers_are_not(tmp_path: Path) -> None:
    lm = tiny("qwen2_moe")
    tt.save_gguf(lm, tmp_path / "m.gguf", type="q8_0")
    kinds = {
        each.name.removeprefix("blk.1."): each.tensor_type.name
        for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert {kinds[f"ffn_{name}_exps.weight"] for name in ("gate", "up", "down")} == {"Q8_0"}
    assert {kinds[f"ffn_gate_inp{of}.weight"] for of in ("", "_shexp")} == {"F32"}
    again = tt.load(tmp_path / "m.gguf")
    assert (logits(again) - logits(lm)).abs().max() < 0.3 * logits(lm).abs().max()


# -- baked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_baked_model_comes_back(name: str, tmp_path: Path) -> None:
    lm = tiny(name)
    width = lm.anatomy.width("layers.1.ffn_out")
    site = "layers.1.ffn_in" if name.startswith("gemma") else "layers.1.ffn_out"
    steering = steer(lm, (site, operator("Scale", lm.anatomy.width(site)))).at(2)
    added = steer(lm, ("layers.1.ffn_out", Add(torch.linspace(-1, 1, width))))
    takes_biases = name in ("llama", "mistral", "qwen2")  # the latter as Llama models
    baked = tt.bake(lm, steering, *([added] if takes_biases else []))
    tt.save_gguf(baked, tmp_path / "m.gguf")
    again = tt.load(tmp_path / "m.gguf")
    same_weights(baked, again)
    torch.testing.assert_close(logits(again), logits(baked), atol=1e-5, rtol=0)
    assert (logits(again) - logits(lm)).abs().max() > 1e-3
    assert [record["digest"] for record in again.baked] == [
        record["digest"] for record in baked.baked
    ]
    if takes_biases:
        assert values(tmp_path / "m.gguf")["general.architecture"] == "llama"
        assert np.abs(tensors(tmp_path / "m.gguf")["blk.1.ffn_down.bias"]).max() > 0


def test_the_command_line(trimtab: Command, work: Path) -> None:
    write_tiny_llama(work / "base.gguf")
    lm = tt.load(work / "base.gguf")
    steering = steer(lm, ("layers.1.ffn_out", operator("Scale", 64)))
    steering.save(work / "s.safetensors")
    common = ("bake", "--model", "base.gguf", "--steer", "s.safetensors@2")
    assert trimtab(*common, "-o", "m.gguf", "--to", "gguf", "--json").json["output"] == "m.gguf"
    same_weights(tt.bake(lm, steering.at(2)), tt.load(work / "m.gguf"))
    text = trimtab(*common, "-o", "q.gguf", "--to", "gguf", "--gguf-type", "q8_0").text
    assert "llama-cli -m q.gguf" in text
    for arguments, says in (
        (("-o", "x", "--gguf-type", "f16"), "add --to gguf"),
        (("-o", "base.gguf", "--to", "gguf", "--overwrite"), "where the model comes from"),
        (("-o", ".", "--to", "gguf", "--overwrite"), "is a directory"),
        (("-o", "m.gguf", "--to", "gguf"), "exists"),
    ):
        failed = trimtab(*common, *arguments)
        assert failed.status == 2
        assert says in failed.err


# -- metadata ----------------------------------------------------------------------------------


def test_a_files_metadata_go_along(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "base.gguf", add_tokenizer=own_tokenizer, rope_freqs=True)
    with pytest.warns(tt.TrimtabWarning, match="rotary frequencies"):
        lm = tt.load(tmp_path / "base.gguf")
    os.remove(tmp_path / "base.gguf")
    tt.save_gguf(
        tt.bake(lm, steer(lm, ("layers.1.ffn_out", operator("Scale", 64)))), tmp_path / "m.gguf"
    )
    said = values(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.pre"] == "other"  # of which trimtab knows nothing
    assert said["general.license"] == "be kind"
    assert said["general.name"].startswith("base.gguf + ")
    assert np.array_equal(tensors(tmp_path / "m.gguf")["rope_freqs.weight"], np.ones(8))


def own_tokenizer(writer: gguf.GGUFWriter) -> int:
    writer.add_license("be kind")
    return add_byte_level_tokenizer(writer, "other")


@pytest.mark.parametrize(
    "kind", ["bytes", "smollm", "llama-bpe", "qwen2", "tekken", "pieces", "space"]
)
def test_tokenizers_are_written_as_they_are_read(kind: str, tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> int:
        if kind in ("pieces", "space"):
            return add_sentencepiece_tokenizer(writer, space_prefix=kind == "space")
        return add_byte_level_tokenizer(writer, "gpt-2" if kind == "bytes" else kind)

    write_tiny_llama(tmp_path / "base.gguf", add_tokenizer=add)
    lm = tt.load(tmp_path / "base.gguf")
    # Saved as a checkpoint, it no longer knows the file.
    lm.save_pretrained(tmp_path / "checkpoint")
    assert metadata_of(tmp_path / "checkpoint") is None
    tt.save_gguf(tt.load(tmp_path / "checkpoint"), tmp_path / "m.gguf")
    said, expected = values(tmp_path / "m.gguf"), values(tmp_path / "base.gguf")
    keys = ["model", "pre", "bos_token_id", "eos_token_id", "add_bos_token"]
    if kind in ("pieces", "space"):
        keys = [*keys[:-1], "padding_token_id", "eot_token_id", "add_space_prefix"]
        # Several spaces are a token as any other, which llama.cpp merges as well.
        spelled = [text.replace("▁", " ") for text in said["tokenizer.ggml.tokens"]]
        assert spelled == [text.replace("▁", " ") for text in expected["tokenizer.ggml.tokens"]]
    else:
        keys += ["tokens", "token_type", "merges"]
    for key in keys:
        assert said[f"tokenizer.ggml.{key}"] == expected[f"tokenizer.ggml.{key}"], key
    again = tt.load(tmp_path / "m.gguf")
    for text in ("hello hello\né", "ab 2020", " ab\n\n  x", "日本 🎉", "<|turn|>ab<eos>"):
        assert again.tokenizer(text).input_ids == lm.tokenizer(text).input_ids
    assert again.model.generation_config.eos_token_id == lm.model.generation_config.eos_token_id


def test_llama_3s_rotary_frequencies(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    lm = tiny("llama", rope_parameters=rope)
    tt.save_gguf(lm, tmp_path / "m.gguf")
    factors = tensors(tmp_path / "m.gguf")["rope_freqs.weight"]
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)
    actual = lm.model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / factors, actual, rtol=1e-6)


# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("olmo2", {}, "no GGUF file is written of olmo2"),
        ("gpt2", {"activation_function": "relu"}, "activation is gelu_new, not relu"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "root of a head's size, and by nothing",
        ),
        ("phi3", {"sliding_window": 8}, "no sliding window"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "some of this model have none"),
        ("qwen3_moe", {"norm_topk_prob": False}, "experts sum to 1"),
        ("qwen2_moe", {"norm_topk_prob": True}, "experts are not made to sum to 1"),
        ("mixtral", {"sliding_window": 8}, "no sliding window"),
        ("mistral", {"sliding_window": 8}, "no sliding window"),
        ("llama", {"hidden_act": "gelu"}, "activation is silu"),
        ("gemma3", {"query_pre_attn_scalar": 1}, "scales attention by the root of 16"),
        ("gemma3", {"sliding_window_pattern": 2}, "every 6th of its layers"),
        ("qwen3", {"attention_bias": True}, "no place for model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_what_llama_cpp_computes_otherwise(
    name: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    lm = tiny(name, **options)
    refused_in_one_line(lambda: tt.save_gguf(lm, tmp_path / "m.gguf"), says)
    assert not list(tmp_path.glob("*"))


def test_a_head_of_its_own_where_there_is_none(tmp_path: Path) -> None:
    lm = tiny("gemma2")
    baked = tt.bake(lm, steer(lm, ("final_norm", operator("Scale", 48))))
    refused_in_one_line(lambda: tt.save_gguf(baked, tmp_path / "m.gguf"), "one table")


def test_numbers_that_a_type_cannot_hold(tmp_path: Path) -> None:
    lm = tiny("llama")
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    refused_in_one_line(lambda: tt.save_gguf(lm, tmp_path / "m.gguf", type="f16"), "F16 cannot")
    assert not list(tmp_path.glob("*"))
    tt.save_gguf(lm, tmp_path / "m.gguf")
    refused_in_one_line(lambda: tt.save_gguf(lm, tmp_path / "m.gguf"), "exists")
    refused_in_one_line(lambda: tt.save_gguf(lm, tmp_path / "n.gguf", type="q4"), "known are f32")


def test_a_tokenizer_that_no_gguf_file_has(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tiny_model("llama")
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lm = tt.wrap(model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?"))
    refused_in_one_line(lambda: tt.save_gguf(lm, tmp_path / "m.gguf"), "WordLevel")


# -- real models -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    lm = request.getfixturevalue(name)
    site = "layers.5.ffn_in"
    baked = tt.bake(lm, steer(lm, (site, operator("Scale", lm.anatomy.width(site)))))
    tt.save_gguf(baked, tmp_path / "m.gguf")
    again = tt.load(tmp_path / "m.gguf", device="cpu", dtype="float32")
    prompts = ["She looked at the map and", "Numbers: 1, 22, 333.\n\n  Größe, 日本 🎉"]
    same_weights(baked, again)
    for text in prompts:
        assert again.tokenizer(text).input_ids == lm.tokenizer(text).input_ids
    assert logits_of(again, prompts).sub(logits_of(baked, prompts)).abs().max() < 1e-3
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_baked_model_as_transformers_reads_it(
    name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Equal logits, of a model whose weights are rounded as the file rounds them."""
    lm = request.getfixturevalue(name)
    site = "layers.5.ffn_in"
    baked = tt.bake(lm, steer(lm, (site, operator("Scale", lm.anatomy.width(site)))).at(2))
    tt.save_gguf(baked, tmp_path / "m.gguf", type=kind)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, local_files_only=True
    )
    rounded = {"f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}
    with torch.no_grad():
        for parameter in baked.model.parameters():
            if parameter.dim() == 2 and kind != "f32":
                of = rounded.get(kind, gguf.GGMLQuantizationType.Q8_0)
                numbers = gguf.quantize(parameter.float().numpy(), of)
                parameter.copy_(torch.from_numpy(gguf.dequantize(numbers, of).copy()))
    ids = lm.tokenizer("She looked at the map and", return_tensors="pt").input_ids
    with torch.no_grad():
        found, expected = again(ids).logits, baked.model(ids).logits
    assert (found - expected).abs().max() < 1e-3
    with torch.no_grad():
        assert (lm.model(ids).logits - expected).abs().max() > 0.1
