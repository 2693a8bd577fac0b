"""The hand-written table of sites: that it says what transformers computes. Nothing of trimtab."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plain_sites import PLAIN, plain_capture, plain_edit, plain_sites
from tiny import TINY, tiny_model, tiny_tokenizer
from tiny_curated import CURATED, curated_model

IDS = tiny_tokenizer()("She looked at the map and asked where they were going").input_ids

#: What attention and FFN are multiplied by when they are added.
FACTORS = {
    "falcon_h1": (1.3, 1.0),
    "granite": (0.4, 0.4),
    "granitemoehybrid": (0.4, 0.4),
    "granitemoehybrid_dense": (0.4, 0.4),
}

#: A branch without sites of its own: the module that returns it, and its factor.
BESIDE = {
    "falcon_h1": ("mamba", 0.6),
    "gemma4": ("post_per_layer_input_norm", 1.0),
    "gemma4_wrapper": ("post_per_layer_input_norm", 1.0),
    "granitemoehybrid": ("shared_mlp", 0.4),
}


def _model(name: str) -> Any:
    return tiny_model(name) if name in TINY else curated_model(name)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_table_has_every_model() -> None:
    assert list(PLAIN) == sorted([*TINY, *CURATED])


@pytest.mark.parametrize("name", [*TINY, *CURATED])
def test_each_block_adds_its_branches_to_what_it_reads(name: str) -> None:
    model = _model(name)
    blocks = model.get_submodule(PLAIN[name].blocks)
    beside: list[Tensor] = []
    path, factor = BESIDE.get(name, (None, 0.0))
    for block in blocks if path else []:
        block.get_submodule(path).register_forward_hook(lambda m, a, out: beside.append(out[0]))
    seen = plain_capture(model, name, IDS)
    assert len(blocks) == len(PLAIN[name].layers) >= 3
    before = seen["embed"]
    for layer, block in enumerate(blocks):
        total = before
        for branch, times in zip(("attn", "ffn"), FACTORS.get(name, (1.0, 1.0)), strict=True):
            for kind in (f"{branch}_post_norm", f"{branch}_out"):
                if (site := f"layers.{layer}.{kind}") in seen:
                    total = total + times * seen[site]
                    break
        if path:
            total = total + factor * beside[layer]
        total = total * getattr(block, "layer_scalar", 1.0)
        before = seen[f"layers.{layer}.resid"]
        assert _relative(total, before) < 1e-6, layer


@pytest.mark.parametrize("name", [*TINY, *CURATED])
def test_reading_leaves_the_model_as_it_is_and_editing_does_not(name: str) -> None:
    model = _model(name)
    with torch.no_grad():
        plain = model(torch.tensor([IDS])).logits[0]
    seen = plain_capture(model, name, IDS)
    # Experts are summed in another order.
    assert _relative(seen["logits"], plain) < 1e-6
    # The last of each kind, which may be a mixture of experts where the first is dense.
    for site in {site.split(".")[-1]: site for site in plain_sites(name)}.values():
        shift = torch.randn(seen[site].shape[-1], generator=torch.Generator().manual_seed(0))
        with plain_edit(model, name, site, lambda x: x + shift), torch.no_grad():
            assert _relative(model(torch.tensor([IDS])).logits[0], plain) > 1e-3, site
    assert not any(module._forward_hooks for module in model.modules())
