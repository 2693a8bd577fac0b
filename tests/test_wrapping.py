"""Who is wrapped: models inside other modules, adapters of peft; the rest is one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import trimtab as tt
from helpers import (
    PROMPTS,
    language_model,
    plain_logits,
    refused_in_one_line,
    relative,
    site_kinds,
    steer_at,
    token_ids,
)
from tiny import tiny_model, tiny_tokenizer
from trimtab.model.plain import plain_copy

IDS = token_ids(PROMPTS[0])


# -- what is taken off -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_modules_around_a_model_are_taken_off(name: str) -> None:
    model = tiny_model(name)
    lm = language_model(name)
    steering = steer_at(lm, "ffn_out")
    for around in (
        torch.compile(model),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model)),
    ):
        wrapped = tt.wrap(around, tiny_tokenizer())
        assert wrapped.model is model
        assert wrapped.identity.digest == lm.identity.digest
        expected = lm.logits(PROMPTS, steering=steering)
        assert torch.equal(wrapped.logits(PROMPTS, steering=steering), expected)


def test_a_processor_has_a_tokenizer() -> None:
    processor = SimpleNamespace(tokenizer=tiny_tokenizer(), image_processor=object())
    assert tt.wrap(tiny_model("llama"), processor).tokenizer is processor.tokenizer


@pytest.mark.parametrize(
    ("model", "tokenizer", "says"),
    [
        (lambda: tiny_model("llama"), None, "needs a tokenizer"),
        (lambda: tiny_model("llama"), "gpt2", "not a name"),
        (lambda: tiny_model("llama"), SimpleNamespace(image_processor=1), "not SimpleNamespace"),
        (lambda: tiny_model("llama"), tiny_tokenizer().backend_tokenizer, "not Tokenizer"),
        (lambda: tiny_model("llama"), tiny_model("llama"), "not LlamaForCausalLM"),
        (tiny_tokenizer, tiny_model("llama"), "the model first"),
        (lambda: "gpt2", tiny_tokenizer(), "load it with"),
        (lambda: Path("gpt2"), tiny_tokenizer(), "load it with"),
        (lambda: None, tiny_tokenizer(), "not NoneType"),
        (lambda: language_model("llama"), tiny_tokenizer(), "wrapped already"),
        (lambda: LlamaModel(tiny_model("llama").config), tiny_tokenizer(), "LlamaModel"),
        (
            lambda: LlamaForSequenceClassification(tiny_model("llama").config),
            tiny_tokenizer(),
            "LlamaForSequenceClassification is no causal language model",
        ),
        (
            lambda: LlamaForTokenClassification(tiny_model("llama").config),
            tiny_tokenizer(),
            "LlamaForTokenClassification is no causal language model",
        ),
        (
            lambda: tiny_model("llama", vocab_size=300),
            tiny_tokenizer(),
            "another model's tokenizer",
        ),
    ],
)
def test_what_is_no_model_and_tokenizer_is_one_line(model: Any, tokenizer: Any, says: str) -> None:
    refused_in_one_line(lambda: tt.wrap(model(), tokenizer), says)


# -- adapters of peft ------------------------------------------------------------------------------

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gemma2": ["q_proj", "gate_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
}


def adapted(name: str, seed: int = 0, **options: Any) -> Any:
    """A peft model whose adapter does something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": TARGETS[name], **options},
        fan_in_fan_out=name == "gpt2",
    )
    return shaken(peft.get_peft_model(tiny_model(name), config), seed)


def shaken(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key or "ia3_" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


KINDS = {
    "lora": {},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}


def same_elsewhere(folder: Path, expected: Any, attention: str | None = None) -> None:
    """Read by plain transformers, all of it, and no adapter beside it."""
    assert not list(folder.glob("adapter*"))
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention
    )
    assert not any(found.values())
    assert not any("lora" in key or "base_layer" in key for key in model.state_dict())
    assert relative(plain_logits(model.eval(), IDS), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "lora") for n in TARGETS), *(("llama", k) for k in KINDS)]
)
def test_an_adapter_acts_and_is_baked(name: str, kind: str, tmp_path: Path) -> None:
    """Wrapped with peft's model around it and without, at every site."""
    model = adapted(name, **KINDS[kind])
    expected = plain_logits(model, IDS)
    assert relative(expected, plain_logits(tiny_model(name), IDS)) > 1e-3
    names = set(model.state_dict())
    for wrapped in (
        tt.wrap(model, tiny_tokenizer(), "x"),
        tt.wrap(model.get_base_model(), tiny_tokenizer(), "x"),
    ):
        assert torch.equal(plain_logits(wrapped.model, IDS), expected)
        for site in site_kinds(wrapped):
            if (name, site) == ("qwen3_moe", "ffn_in"):
                continue
            steering = steer_at(wrapped, site)
            with wrapped.steered(steering):
                steered = plain_logits(wrapped.model, IDS)
                assert torch.equal(plain_logits(model, IDS), steered)
            assert not torch.equal(steered, expected)
        steering = steer_at(wrapped, "ffn_in", "Scale", layer=2)
        with wrapped.steered(steering):
            steered = plain_logits(wrapped.model, IDS)
        baked = tt.bake(wrapped, steering)
        assert relative(plain_logits(baked.model, IDS), steered) < 1e-4
        # The model stays what it was.
        assert torch.equal(plain_logits(model, IDS), expected)
        assert set(model.state_dict()) == names
    attention = model.config._attn_implementation  # older versions would leave out a soft-cap
    same_elsewhere(baked.save_pretrained(tmp_path / "baked"), steered, attention)
    same_elsewhere(wrapped.save_pretrained(tmp_path / "merged"), expected, attention)


def test_an_adapters_directory(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    model = shaken(peft.get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    lm = tt.load(tmp_path / "adapter", device="cpu")
    assert torch.allclose(plain_logits(lm.model, IDS), plain_logits(model, IDS), atol=1e-6)
    assert lm.identity.digest == tt.wrap(model, tiny_tokenizer()).identity.digest
    steering = steer_at(lm, "ffn_out", "Scale")
    with lm.steered(steering):
        steered = plain_logits(lm.model, IDS)
    same_elsewhere(tt.bake(lm, steering).save_pretrained(tmp_path / "out"), steered)
    assert load_file(tmp_path / "out/model.safetensors").keys() == (
        load_file(tmp_path / "base/model.safetensors").keys()
    )
    # Some trainers write a configuration beside the adapter.
    adapter = tmp_path / "adapter"
    (adapter / "config.json").write_text("{}")
    assert tt.load(adapter, device="cpu").identity == lm.identity
    for action, says in (
        (lambda: (adapter / "adapter_model.safetensors").write_bytes(b"x"), "cannot read adapter"),
        (lambda: (adapter / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda: (adapter / "adapter_config.json").write_text("["), "is not JSON"),
        (lambda: (adapter / "adapter_config.json").write_text("{}"), "names no peft_type"),
    ):
        action()
        refused_in_one_line(lambda: tt.load(adapter, device="cpu"), says)


def test_an_adapter_whose_model_is_gone(tmp_path: Path) -> None:
    model = adapted("llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "adapter")
    refused_in_one_line(lambda: tt.load(tmp_path / "adapter"), "the model that the adapter is for")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config |= {"megatron_config": {}, "megatron_core": "antigravity"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    refused_in_one_line(lambda: tt.load(tmp_path / "adapter"), "a module to import")


def test_an_adapters_directory_without_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "nowhere"})
    )
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr("trimtab.model.loading.is_peft_available", lambda: False)
    refused_in_one_line(lambda: tt.load(tmp_path), "it is an adapter.*install peft")


def test_an_adapter_that_lacks_a_tensor(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    path = tmp_path / "adapter/adapter_model.safetensors"
    held = load_file(path)
    held.pop(sorted(held)[1])
    save_file(held, path)
    refused_in_one_line(lambda: tt.load(tmp_path / "adapter"), "missing from the files")


def test_adapters_that_are_switched_are_other_models() -> None:
    model = adapted("llama")
    lm = tt.wrap(model, tiny_tokenizer(), "x")
    steering = steer_at(lm, "ffn_out")
    with model.disable_adapter():
        refused_in_one_line(lambda: lm.logits(PROMPTS, steering=steering), "fit one for this model")
        off = plain_logits(lm.model, IDS)
        assert relative(plain_logits(tt.bake(lm).model, IDS), off) < 1e-5
    lm.logits(PROMPTS, steering=steering)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=steering), "fit one for this model")


def test_an_adapter_that_was_merged_in_place() -> None:
    model = adapted("llama")
    expected = plain_logits(model, IDS)
    lm = tt.wrap(model, tiny_tokenizer(), "x")
    model.merge_adapter()
    assert relative(plain_logits(tt.bake(lm).model, IDS), expected) < 1e-4


def test_other_adapters_are_exact_or_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kinds = {
        "IA3Config": {
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "LoHaConfig": {"target_modules": ["q_proj"]},
        "LoKrConfig": {"target_modules": ["q_proj"]},
        "OFTConfig": {"target_modules": ["q_proj"], "oft_block_size": 16, "r": 0},
        "VeraConfig": {"target_modules": ["q_proj", "o_proj"], "r": 4},
        "PromptTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
        "PrefixTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
        "AdaptionPromptConfig": {"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
    }
    ran = []
    for kind, options in kinds.items():
        model = peft.get_peft_model(tiny_model("llama"), getattr(peft, kind)(**options))
        said = ""
        try:
            baked = tt.bake(tt.wrap(shaken(model), tiny_tokenizer(), kind))
        except tt.TrimtabError as error:
            said = str(error)
        if said:
            assert "adapter" in said
            assert "\n" not in said
            continue
        assert relative(plain_logits(baked.model, IDS), plain_logits(model, IDS)) < 1e-3, kind
        ran.append(kind)
    assert "IA3Config" in ran
    assert not {"PromptTuningConfig", "PrefixTuningConfig"} & set(ran)


def test_an_adapter_on_quantised_weights_is_not_merged() -> None:
    model = adapted("llama")
    model.get_base_model().hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method="bitsandbytes")
    )
    lm = tt.wrap(model, tiny_tokenizer(), "x")
    with lm.steered(steer_at(lm, "ffn_out")):
        plain_logits(lm.model, IDS)
    refused_in_one_line(lambda: tt.bake(lm), "quantised")
    refused_in_one_line(lambda: lm.save_pretrained("never"), "quantised")


def test_experts_that_carry_an_adapter() -> None:
    """peft adds to their weights while they run, so that their inside is shown as it is."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"], r=2)
    model = peft.get_peft_model(tiny_model("qwen3_moe"), config).get_base_model()
    lm = tt.wrap(model, tiny_tokenizer(), "x")
    for layer in model.modules():
        for parameters in (getattr(layer, "lora_B", None) or {}).values():
            torch.nn.init.normal_(parameters.weight, std=0.1)
    merged = tt.wrap(plain_copy(model, "x"), tiny_tokenizer(), "x")
    for kind in ("ffn_in", "ffn_out"):
        steering = steer_at(merged, kind)
        expected = merged.logits(PROMPTS, steering=steering)
        live = lm.logits(PROMPTS, steering=steering, force=True)
        assert relative(live, expected) < 1e-5
        assert relative(live, lm.logits(PROMPTS)) > 1e-3
