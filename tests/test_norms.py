"""The norms before attention and FFN, where blocks differ, or share one, or have none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import IDS, one_line
from plain_sites import plain_capture
from tiny import tiny_tokenizer
from tiny_curated import curated_model
from trimtab.methods.norms import norm_inputs, norm_sites, read_sites


@cache
def _lm(name: str) -> tt.LanguageModel:
    return tt.wrap(curated_model(name), tiny_tokenizer(), name)


def test_a_block_with_one_branch_has_the_norm_of_that_one() -> None:
    kinds = ("attn", "attn", "ffn", "ffn", "attn")  # Mamba, attention, experts, FFN, Mamba
    expected = [f"layers.{layer}.{kind}_norm" for layer, kind in enumerate(kinds)]
    anatomy = _lm("nemotron_h").anatomy
    assert read_sites(anatomy) == expected
    assert norm_sites(anatomy) == expected
    assert norm_inputs(anatomy) == {site: f"{site}_in" for site in expected}


def test_where_norms_come_after_the_branches_only_those_are_norms() -> None:
    anatomy = _lm("olmo3").anatomy
    both = [f"layers.{n}.{part}" for n in range(3) for part in ("attn", "ffn")]
    assert read_sites(anatomy) == [f"{part}_norm" for part in both]
    assert norm_sites(anatomy) == [f"{part}_post_norm" for part in both]
    assert norm_inputs(anatomy) == {site: site for site in read_sites(anatomy)}


#: The module that both branches read through.
SHARED = {
    "gptj": "transformer.h.{}.ln_1",
    "phi": "model.layers.{}.input_layernorm",
    "cohere2": "model.layers.{}.input_layernorm",
    "falcon_h1": "model.layers.{}.input_layernorm",
}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_norm_reads_what_the_block_reads(name: str) -> None:
    """Numbers of a plain hook on the norm."""
    model: Any = _lm(name).model
    inputs, seen = norm_inputs(_lm(name).anatomy), plain_capture(model, name, IDS)
    found: dict[int, Tensor] = {}
    for layer in range(3):
        norm = model.get_submodule(SHARED[name].format(layer))
        handle = norm.register_forward_pre_hook(
            lambda module, args, layer=layer: found.__setitem__(layer, args[0][0])
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([IDS]), use_cache=False)
        handle.remove()
        parts = ("attn",) if name == "falcon_h1" else ("attn", "ffn")
        for part in parts:
            place = inputs[f"layers.{layer}.{part}_norm"]
            assert torch.equal(seen[place], found[layer])


def test_what_no_site_shows_is_refused_with_the_way_out() -> None:
    with pytest.raises(tt.TrimtabError, match="candidates output") as caught:
        norm_inputs(_lm("granitemoehybrid").anatomy)
    one_line(caught)
    with pytest.raises(tt.TrimtabError, match="no layers.0.ffn_norm"):
        read_sites(_lm("gemma4_moe").anatomy)
