"""Names of sites, their ranges and order, what is refused, and architectures that a user
registers."""

from __future__ import annotations

import pytest

import trimtab as tt
from helpers import IDS
from reference import reference
from tiny import TINY, tiny_model
from trimtab import anatomy
from trimtab.anatomy import Anatomy

# -- names, ranges, errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    "site", ["layers.ffn_out", "layers.1.mlp", "ffn_out", "layers.-1.resid", "layers.1.embed", ""]
)
def test_unknown_sites_are_refused_with_the_known_ones(site: str) -> None:
    with pytest.raises(tt.TrimtabError, match=r"unknown site .*ffn_in.*final_norm") as caught:
        Anatomy(tiny_model("llama")).point(site)
    assert "\n" not in str(caught.value)


def test_layers_out_of_range_are_refused() -> None:
    places = Anatomy(tiny_model("llama"))
    with pytest.raises(tt.TrimtabError, match="layer 3 is out of range.*0 to 2"):
        places.point("layers.3.resid")
    for layer in (3, -4):
        with pytest.raises(tt.TrimtabError, match=f"layer {layer} is out of range.*0 to 2"):
            places.sites("resid", (layer,))
    with pytest.raises(tt.TrimtabError, match="unknown site kind 'mlp'.*ffn_out"):
        places.sites("mlp")


def test_sites_are_listed_in_layer_order() -> None:
    places = Anatomy(tiny_model("gemma2"))
    assert places.sites("heads") == [f"layers.{i}.heads" for i in range(4)]
    assert places.sites("heads", (-1, 0)) == ["layers.3.heads", "layers.0.heads"]
    assert places.sites("embed", (1,)) == ["embed"]


def test_site_order_is_the_order_of_the_computation() -> None:
    """The reference notes each site as it computes it."""
    for name in TINY:
        computed = list(reference(name, tiny_model(name), IDS[:3])[0])
        assert sorted(reversed(computed), key=anatomy.site_order) == computed


def test_a_model_without_blocks_is_refused() -> None:
    body = tiny_model("llama").model  # LlamaModel: no `model.layers`, no LM head
    with pytest.raises(tt.TrimtabError, match="AutoModelForCausalLM"):
        Anatomy(body)
