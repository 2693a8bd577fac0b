"""Adapters of peft that act: at their sites, on quantised weights, and without peft's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import trimtab as tt
from helpers import (
    IDS,
    by_hand,
    greedy_by_hand,
    plain_logits,
    refused_in_one_line,
    relative,
    steer_at,
)
from tiny import tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")

CONFIGS: dict[str, Any] = {
    "LoRA": lambda targets, ffn: peft.LoraConfig(target_modules=targets, r=4, lora_alpha=16),
    "DoRA": lambda targets, ffn: peft.LoraConfig(target_modules=targets, r=4, use_dora=True),
    "IA3": lambda targets, ffn: peft.IA3Config(target_modules=targets, feedforward_modules=ffn),
}
#: What carries the adapter: single projections, and fused ones.
TARGETS = {
    "llama": (["q_proj", "o_proj", "down_proj"], ["down_proj"]),
    "phi3": (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ["down_proj"]),
}


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("by", ["a model of peft", "layers alone"])
def test_adapters_are_steered_by_hooks_and_baked(name: str, kind: str, by: str) -> None:
    model: Any = tiny_model(name)
    plain = plain_logits(model, IDS)
    config = CONFIGS[kind](*TARGETS[name])
    if by == "a model of peft":
        model = peft.get_peft_model(model, config)
    else:
        model = peft.inject_adapter_in_model(config, model)  # as transformers' add_adapter does
    lm = tt.wrap(shaken(model), tiny_tokenizer(), name)
    assert relative(plain_logits(lm.model, IDS), plain) > 1e-3
    for op in ("Add", "Scale"):
        steering = steer_at(lm, "resid", op)
        expected = greedy_by_hand(lm.model, IDS, 4, by_hand(steering.interventions[0].operator))
        with lm.steered(steering):
            assert greedy_by_hand(lm.model, IDS, 4, lambda x: x) == expected
    steering = steer_at(lm, "heads", "Scale")
    with lm.steered(steering):
        steered = plain_logits(lm.model, IDS)
    assert relative(plain_logits(tt.bake(lm, steering).model, IDS), steered) < 1e-4


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_on_quantised_weights(bits: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    base = tt.load(tmp_path / "m", device="cpu", quantise=bits).model
    model = peft.get_peft_model(base, CONFIGS["LoRA"](*TARGETS["llama"]))
    lm = tt.wrap(shaken(model), tiny_tokenizer(), "x")
    steering = steer_at(lm, "resid", "Add")
    expected = greedy_by_hand(lm.model, IDS, 4, by_hand(steering.interventions[0].operator))
    with lm.steered(steering):
        assert greedy_by_hand(lm.model, IDS, 4, lambda x: x) == expected
    refused_in_one_line(lambda: tt.bake(lm, steering), "is quantised: baking would")
    refused_in_one_line(lambda: lm.save_pretrained(tmp_path / "saved"), "quantised")


def test_a_classifier_is_no_language_model() -> None:
    classifier = LlamaForSequenceClassification(tiny_model("llama").config)
    refused_in_one_line(lambda: tt.wrap(classifier, tiny_tokenizer()), "no causal language model")
