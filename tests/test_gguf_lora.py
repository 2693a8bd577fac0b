"""An adapter for llama.cpp, added to the weights as it adds it, is the baked model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab as tt
from commands import Command, home, trimtab, work
from gguf_files import tensors, tiny, values
from helpers import operator, refused_in_one_line, steer
from tiny_packs import cache
from trimtab.steering import Add

__all__ = ["cache", "home", "trimtab", "work"]

#: What writes a site, what reads one, and what turns what readers read.
ACTING = (
    ("layers.1.ffn_out", "Scale"),
    ("layers.1.heads", "Scale"),
    ("layers.2.attn_norm", "Rotate"),
)


def added(base: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """The weights of a GGUF file with an adapter, as src/llama-adapter.cpp and llm_graph's
    build_lora_mm have it: w + alpha / rank * lora_b lora_a."""
    factors, alpha = tensors(adapter), values(adapter)["adapter.lora.alpha"]
    weights = dict(base)
    for name in {key.rpartition(".")[0] for key in factors}:
        down, up = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert down.shape[-2] == up.shape[-1]
        more = (up @ down).reshape(weights[name].shape)  # of a lone row, which has no rows there
        assert (*up.shape[:-1], down.shape[-1]) == (up @ down).shape
        weights[name] = weights[name] + alpha / up.shape[-1] * more
    return weights


#: Of mixtures also what a router reads and writes, and the units within the experts.
OF_EXPERTS = (
    ("layers.1.ffn_in", "Scale"),
    ("layers.1.ffn_norm", "Rotate"),
    ("layers.1.router", "Scale"),
)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize(
    ("name", "site", "kind"),
    [
        *(
            (name, *each)
            for name in ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")
            for each in ACTING
        ),
        *((name, *each) for name in MIXTURES for each in (*ACTING, *OF_EXPERTS)),
    ],
)
def test_the_adapter_makes_the_baked_model(name: str, site: str, kind: str, tmp_path: Path) -> None:
    lm = tiny(name)
    if name in ("gemma3", "gpt2") and site.endswith("ffn_out"):
        site = "layers.1.ffn_in"  # a norm writes the other one, or there is a bias
    steering = steer(lm, (site, operator(kind, lm.anatomy.width(site))))
    steering = replace(steering, dial=tt.Dial("dial", 1.0, (-180.0, 180.0))).at(
        40.0 if kind == "Rotate" else 1.5
    )
    done = tt.export(lm, steering, "gguf-lora", tmp_path / "a.gguf")
    assert (done.format, done.files, done.exact) == ("gguf-lora", (tmp_path / "a.gguf",), True)
    tt.save_gguf(lm, tmp_path / "base.gguf")
    tt.save_gguf(tt.bake(lm, steering), tmp_path / "baked.gguf")
    base, baked = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "baked.gguf")
    together = added(base, tmp_path / "a.gguf")
    changed = {name for name in base if not np.array_equal(base[name], baked[name])}
    assert changed
    assert changed == {name for name in base if together[name] is not base[name]}
    for key, weight in baked.items():
        np.testing.assert_allclose(together[key], weight, atol=2e-6, err_msg=key)


def test_what_the_file_says(tmp_path: Path) -> None:
    lm = tiny("llama")
    steering = steer(lm, ("layers.1.ffn_out", operator("Scale", 48))).at(3)
    tt.export(lm, steering, "gguf-lora", tmp_path / "a.gguf")
    said = values(tmp_path / "a.gguf")
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    assert (
        said["adapter.lora.alpha"]
        == 3 * tensors(tmp_path / "a.gguf")["blk.1.ffn_down.weight.lora_a"].shape[0]
    )
    assert json.loads(said["trimtab.adapter"])["steerings"][0]["digest"] == steering.digest


def test_what_cannot_be_carried(tmp_path: Path) -> None:
    lm, path = tiny("llama"), tmp_path / "a.gguf"
    constant = steer(lm, ("layers.1.ffn_out", Add(operator("Add", 48).vector)))
    refused_in_one_line(lambda: tt.export(lm, constant, "gguf-lora", path), "adds a constant")
    other = tiny("olmo2")
    scaled = steer(
        other, ("layers.1.heads", operator("Scale", other.anatomy.width("layers.1.heads")))
    )
    refused_in_one_line(lambda: tt.export(other, scaled, "gguf-lora", path), "of olmo2, only of")
    assert not list(tmp_path.iterdir())
    both = steer(
        lm,
        *(
            (f"layers.{n}.ffn_out", op)
            for n, op in enumerate((operator("Scale", 48), operator("Add", 48)))
        ),
    )
    done = tt.export(lm, both, "gguf-lora", path, split=True)
    assert len(done.left_out) == 1
    refused_in_one_line(lambda: tt.export(lm, both, "gguf-lora", path, split=True), "exists")


def test_the_command_line(trimtab: Command, work: Path) -> None:
    ran = trimtab(
        "export",
        "au.safetensors@3",
        "--model",
        "model",
        "--to",
        "gguf-lora",
        "-o",
        "a.gguf",
        "--json",
    )
    assert ran.json["format"] == "gguf-lora"
    assert ran.json["files"] == ["a.gguf"]
    assert ran.json["lora_alpha"] == 3 * ran.json["rank"]
    text = trimtab(
        "export", "au.safetensors@3", "--model", "model", "--to", "gguf-lora", "-o", "b.gguf"
    ).text
    assert "llama-cli -m MODEL.gguf --lora b.gguf" in text
