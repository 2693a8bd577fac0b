"""An audit of SmolLM2: steerings of three methods and a merged adapter are told apart, explained
and taken out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import trimtab as tt
from commands import PAIRS

pytestmark = pytest.mark.slow


def test_smollm2(smollm2: tt.LanguageModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm, pack = smollm2, "smollm2-135m-instruct"
    contrast = tt.Contrast.from_pairs([tuple(pair.values()) for pair in PAIRS])
    methods = [
        tt.AUSteer(k=16, alpha=2.0, site="ffn_out", direction="paper"),
        tt.CAA(layer=12, token="last"),
        tt.Ablation(layer=12),
    ]
    austeer, caa, ablation = tt.fit(methods, lm, contrast)
    expected = {
        "austeer": (austeer, {"scaled rows"}),
        "caa": (caa, {"constant"}),
        "ablation": (ablation, {"ablation"}),
    }
    for name, (steering, kinds) in expected.items():
        other = str(tt.bake(lm, steering).save_pretrained(tmp_path / name))
        found = tt.audit(pack, other)
        assert {change.edit.kind for change in found.differing if change.edit} == kinds, name
        explained = tt.audit(pack, other, steering)
        assert explained.exact, name
        assert len(explained.changes) == len(found.changes)
        stripped = tt.strip(pack, other, steering)
        assert stripped.exact
        assert not tt.audit(lm, stripped.model).changes
    # The one direction that is ablated wherever the stream is written.
    shared = tt.audit(pack, tmp_path / "ablation").directions
    assert len(shared) == 1
    assert len(shared[0].tensors) == 61

    model = peft.get_peft_model(
        copy.deepcopy(lm.model), peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=8)
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.02)
    merged = tt.wrap(model.merge_and_unload(), lm.tokenizer, "merged")
    other = str(merged.save_pretrained(tmp_path / "merged"))
    found = tt.audit(pack, other)
    assert {(change.edit.kind, change.edit.rank) for change in found.changes if change.edit} == {
        ("low rank", 8)
    }
    assert len(found.changes) == 60
    unexplained = tt.audit(pack, other, austeer).unexplained
    assert unexplained is not None
    assert unexplained > 0.9
