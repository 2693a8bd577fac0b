"""Whose steering it is: the identity of a model follows its weights, however these change."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import trimtab as tt
from helpers import PROMPTS, asked, language_model, refused_in_one_line, relative, steer_at
from tiny import TINY, tiny_model, tiny_tokenizer


def digest_by_hand(model: Any) -> str:
    """As steering files of every version have it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.reshape(-1)
        chosen = flat[:: max(1, len(flat) // 512)][:512]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(torch.signbit(chosen).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", TINY)
def test_the_digest_is_what_it_was(name: str) -> None:
    lm = language_model(name)
    assert lm.identity.digest == digest_by_hand(lm.model)


# -- weights that change after wrap ----------------------------------------------------------------


def train(model: Any) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=50.0)
    ids = tiny_tokenizer()(PROMPTS[0], return_tensors="pt").input_ids
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    model.eval()


def past_the_count(model: Any) -> None:
    """`tensor.data` has a count of writes of its own."""
    for parameter in model.parameters():
        parameter.data.neg_()


def exchange(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(-head.weight.detach())


def load_others(model: Any) -> None:
    model.load_state_dict(tiny_model(model.config.model_type.split("_")[0], seed=3).state_dict())


CHANGES: list[Callable[[Any], None]] = [train, past_the_count, exchange, load_others]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_identity_follows_the_weights(name: str, change: Callable[[Any], None]) -> None:
    """Old steerings are refused, new ones are the changed model's, also when it is loaded anew."""
    lm = language_model(name)
    old = steer_at(lm, "ffn_out")
    lm.logits(PROMPTS, steering=old)
    change(lm.model)
    assert lm.identity.digest == digest_by_hand(lm.model)
    assert lm.identity.digest != old.model.digest
    refused_in_one_line(lambda: lm.logits(PROMPTS, steering=old), "fit one for this model")
    refused_in_one_line(lambda: tt.bake(lm, old), "fit one for this model")
    new = steer_at(lm, "ffn_out")
    again = tt.wrap(copy.deepcopy(lm.model), lm.tokenizer, name)
    assert torch.equal(again.logits(PROMPTS, steering=new), lm.logits(PROMPTS, steering=new))


def test_what_is_undone_is_the_old_model() -> None:
    lm = language_model("llama")
    before = lm.identity
    weight = lm.model.model.layers[0].mlp.up_proj.weight
    for _ in range(2):
        with torch.no_grad():
            weight.neg_()
    assert lm.identity == before


def test_moving_and_casting_keep_it() -> None:
    lm = language_model("llama")
    before = lm.identity
    lm.model.to(torch.bfloat16)
    assert lm.identity == before


def test_reading_it_again_digests_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked whenever a steering is attached."""
    lm = asked(language_model("llama"))
    before = lm.identity

    def never(*arguments: Any) -> Any:
        raise AssertionError("the weights were digested again")

    monkeypatch.setattr("trimtab.model.identity.hashlib.sha256", never)
    lm.logits(PROMPTS)
    lm.generate(PROMPTS, max_new_tokens=2)
    assert lm.identity == before


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        lm = language_model("llama")
        assert lm.identity.digest == digest_by_hand(lm.model)


# -- quantised models ------------------------------------------------------------------------------


class EightBits(nn.Module):
    """A linear map in 8 bits with a scale per row, as bitsandbytes has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1) / 127)
        whole = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = linear.bias
        self.in_features = linear.in_features

    def forward(self, x: Any) -> Any:
        return nn.functional.linear(x, self.weight * self.scale[:, None], self.bias)


def quantised(name: str, **options: Any) -> tt.LanguageModel:
    lm = language_model(name, **options)
    head = lm.model.get_output_embeddings()
    for module in list(lm.model.modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear and linear is not head:
                setattr(module, child, EightBits(linear))
    method = SimpleNamespace(quant_method="bitsandbytes")
    lm.model.hf_quantizer = SimpleNamespace(quantization_config=method)
    return lm


@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt2"])
def test_a_quantised_model_takes_its_originals_steering_and_no_others(name: str) -> None:
    small, own = quantised(name), steer_at(language_model(name), "ffn_out")
    changed = small.logits(PROMPTS, steering=own)
    assert relative(changed, small.logits(PROMPTS)) > 1e-3
    stranger = steer_at(language_model(name, seed=1), "ffn_out")
    refused_in_one_line(lambda: small.logits(PROMPTS, steering=stranger), "fit one for this model")
    assert torch.isfinite(small.logits(PROMPTS, steering=stranger, force=True)).all()
    # One that was made on the quantised model itself.
    small.logits(PROMPTS, steering=steer_at(small, "ffn_out"))


def test_real_quantised_models(tmp_path: Path) -> None:
    """bitsandbytes, on the CPU."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "m")
    whole = language_model("llama", hidden_size=64, head_dim=16)
    for bits in ({"load_in_8bit": True}, {"load_in_4bit": True}):
        config = BitsAndBytesConfig(**bits)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)
        lm = tt.wrap(model, tiny_tokenizer(), "small")
        lm.logits(PROMPTS, steering=steer_at(whole, "ffn_out"))
        other = language_model("llama", seed=1, hidden_size=64, head_dim=16)
        refused_in_one_line(
            lambda lm=lm, other=other: lm.logits(PROMPTS, steering=steer_at(other, "ffn_out")),
            "fit one for this model",
        )


def test_the_file_keeps_both_digests_and_old_files_load(tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "ffn_out")
    path = steering.save(tmp_path / "a.safetensors")
    assert tt.Steering.load(path).model == lm.identity
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["trimtab"])
    assert document["model"].pop("plain_digest") == lm.identity.plain_digest
    save_file(load_file(path), tmp_path / "old.st", {"trimtab": json.dumps(document)})
    old = tt.Steering.load(tmp_path / "old.st")
    assert old.model == replace(lm.identity, plain_digest="")
    assert torch.equal(lm.logits(PROMPTS, steering=old), lm.logits(PROMPTS, steering=steering))
    with pytest.warns(tt.TrimtabWarning, match="does not say whether the quantised llama"):
        quantised("llama").logits(PROMPTS, steering=old)


# -- offloaded models ------------------------------------------------------------------------------


def offloaded(lm: tt.LanguageModel, folder: Path, everything: bool) -> tt.LanguageModel:
    """The same model with a block, or all of it, on disk."""
    names = lm.anatomy.known.description
    body = lm.anatomy.body
    places = {f"{names.body}.{name}": "cpu" for name, _ in body.named_children()}
    del places[names.blocks]
    places |= {name: "cpu" for name, _ in lm.model.named_children() if name != names.body}
    blocks = [f"{names.blocks}.{layer}" for layer in range(lm.anatomy.layers)]
    places |= dict.fromkeys(blocks, "cpu") | {blocks[1]: "disk"}
    if everything:
        places = dict.fromkeys(places, "disk") | {blocks[0]: "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        lm.save_pretrained(folder / "m"), device_map=places, offload_folder=folder / "off"
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    return tt.wrap(model, lm.tokenizer, lm.name)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_offloaded_models_are_the_same_model(name: str, everything: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    lm = language_model(name)
    apart = offloaded(lm, tmp_path, everything)
    assert apart.identity == lm.identity
    assert apart.device == torch.device("cpu")
    steering = steer_at(lm, "ffn_out")
    expected = lm.logits(PROMPTS, steering=steering)
    assert relative(apart.logits(PROMPTS, steering=steering), expected) < 1e-5
    assert apart.identity == lm.identity
    stranger = steer_at(language_model(name, seed=1), "ffn_out")
    refused_in_one_line(lambda: apart.logits(PROMPTS, steering=stranger), "fit one for this model")
    refused_in_one_line(lambda: tt.bake(apart, steering), "offloaded.*load it whole")


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ffn_out", "heads", "attn_norm_in", "ffn_in"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_steered_model_is_not_copied(name: str, kind: str) -> None:
    """The copy would stay steered for ever. Afterwards a copy is a model of its own."""
    lm = language_model(name)
    with lm.steered(steer_at(lm, kind)):
        for what in (lm, lm.model, lm.anatomy.blocks[1]):
            refused_in_one_line(lambda what=what: copy.deepcopy(what), "copy.*after the block")
    copied = copy.deepcopy(lm)
    assert copied.identity == lm.identity
    assert torch.equal(copied.logits(PROMPTS), lm.logits(PROMPTS))
    with torch.no_grad():
        copied.model.get_input_embeddings().weight.neg_()
    assert lm.identity == language_model(name).identity
    assert copied.identity != lm.identity
