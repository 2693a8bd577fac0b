"""A baked model is compared with the steered one before it is handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from baking import ablated
from helpers import add, language_model, steer
from tiny import tiny_tokenizer
from tiny_curated import curated_model
from trimtab.model import baking


def _direction(width: int) -> torch.Tensor:
    return nn.functional.normalize(
        torch.randn(width, generator=torch.Generator().manual_seed(3)), dim=0
    )


def test_a_second_reader_of_the_embedding_refuses_the_bake() -> None:
    """Gemma 4 makes what each layer has of a token from the embedding as well."""
    lm = tt.wrap(curated_model("gemma4"), tiny_tokenizer(), "gemma4")
    steering = ablated(lm, ["embed"], _direction(lm.anatomy.hidden_size))
    with pytest.raises(
        tt.TrimtabError, match="logits differ from the steered model's by"
    ) as caught:
        tt.bake(lm, steering)
    assert "\n" not in str(caught.value)
    # Where nothing else reads it, it bakes.
    plain = language_model("gemma3")
    tt.bake(plain, ablated(plain, ["embed"], _direction(plain.anatomy.hidden_size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_that_is_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    lm = language_model("llama", dtype=dtype)
    width = lm.anatomy.width("layers.1.ffn_out")
    steering = ablated(lm, ["layers.0.ffn_out", "layers.1.ffn_out"], _direction(width))
    tt.bake(lm, steering)
    right: Any = baking.fold_output

    def wrong(operator: Any, dial: float, weight: Any, bias: Any, factor: float = 1.0) -> Any:
        new, shift = right(operator, dial, weight, bias, factor)
        return weight.double() - 2 * (weight.double() - new), shift

    monkeypatch.setattr(baking, "fold_output", wrong)
    with pytest.raises(tt.TrimtabError, match="logits differ from the steered model's"):
        tt.bake(lm, steering)


def test_nothing_is_written_of_a_bake_that_is_refused(tmp_path: Path) -> None:
    from trimtab.cli import main

    directory = tmp_path / "model"
    curated_model("gemma4").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    lm = tt.load(directory, device="cpu")
    ablated(lm, ["embed"], _direction(lm.anatomy.hidden_size)).save(tmp_path / "x.safetensors")
    words = ["bake", "-m", str(directory), "-s", f"{tmp_path}/x.safetensors", "-o"]
    with pytest.raises(SystemExit) as ended:
        main([*words, str(tmp_path / "baked")])
    assert ended.value.code == 2
    assert not (tmp_path / "baked").exists()


def test_a_multiplier_stands_between_a_bias_and_the_stream() -> None:
    """Granite adds 0.4 times what its FFN returns."""
    lm = tt.wrap(curated_model("granite", mlp_bias=True), tiny_tokenizer(), "granite")
    vector = steer(lm, ("layers.1.resid", add(lm.anatomy.hidden_size)))
    baked = tt.bake(lm, vector)
    prompts = ["Today I feel", "The king"]
    attached = lm.logits(prompts, steering=vector)
    torch.testing.assert_close(baked.logits(prompts), attached, rtol=1e-4, atol=1e-4)
    bias = (
        baked.model.model.layers[1].mlp.down_proj.bias - lm.model.model.layers[1].mlp.down_proj.bias
    )
    added = vector.interventions[0].operator.offset(vector.setting)  # type: ignore[union-attr]
    torch.testing.assert_close(0.4 * bias.double(), added.double(), rtol=1e-5, atol=1e-6)
