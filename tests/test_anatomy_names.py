"""Names of sites, their ranges and order, what is refused, and architectures that a user
registers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from helpers import IDS
from reference import reference
from tiny import TINY, tiny_model, tiny_tokenizer
from trimtab import anatomy
from trimtab.anatomy import KINDS, Anatomy, Architecture, Point, architectures
from trimtab.anatomy.hooks import hooked

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


def test_an_unknown_architecture_is_told_how_to_register(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "model_type", "bloom")
    with pytest.raises(tt.TrimtabError) as caught:
        tt.wrap(model, tiny_tokenizer())
    message = str(caught.value)
    assert "'bloom'" in message
    assert "register('bloom'" in message
    assert all(known in message for known in anatomy.known())
    assert "\n" not in message
    # Every architecture that the project promises is among them.
    promised = {
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma3_text",
        "gpt2", "phi3", "olmo2",
    }  # fmt: skip
    assert promised <= set(anatomy.known())


def test_a_model_without_blocks_is_refused() -> None:
    body = tiny_model("llama").model  # LlamaModel: no `model.layers`, no LM head
    with pytest.raises(tt.TrimtabError, match="AutoModelForCausalLM"):
        Anatomy(body)


class _Block(nn.Module):
    """A made-up block whose names have nothing of Llama's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(size)
        self.mixer = nn.ModuleDict({"inp": nn.Linear(size, 6), "out": nn.Linear(6, size)})
        self.between = nn.LayerNorm(size)
        self.feed = nn.Sequential(nn.Linear(size, 10), nn.ReLU(), nn.Linear(10, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer["out"](self.mixer["inp"](self.before(x)).cumsum(1))
        return x + self.feed(self.between(x))


class _MadeUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="made_up", hidden_size=8)
        self.config.get_text_config = lambda: self.config
        self.core = nn.ModuleDict(
            {
                "words": nn.Embedding(20, 8),
                "stack": nn.ModuleList([_Block(8), _Block(8)]),
                "last": nn.LayerNorm(8),
            }
        )
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.core["words"](ids)
        for block in self.core["stack"]:
            x = block(x)
        return self.head(self.core["last"](x))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def test_a_made_up_architecture_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    model = _MadeUp()
    with pytest.raises(tt.TrimtabError, match="unknown architecture 'made_up'"):
        Anatomy(model)
    anatomy.register(
        "made_up",
        Architecture(
            body="core",
            blocks="stack",
            embeddings=("words",),
            final_norm="last",
            attn_norm="before",
            ffn_norm="between",
            attention="mixer",
            attn_readers=("mixer.inp",),
            attn_proj="mixer.out",
            ffn="feed",
            ffn_readers=("feed.0",),
            ffn_proj="feed.2",
        ),
    )
    assert "made_up" in anatomy.known()
    places = Anatomy(model)
    assert (places.layers, places.hidden_size) == (2, 8)
    kinds = [kind for kind in KINDS if places.has(kind)]
    assert {kind: places.width(f"layers.1.{kind}") for kind in kinds[1:-1]} == {
        "attn_norm_in": 8, "attn_norm": 8, "heads": 6, "attn_out": 8,
        "ffn_norm_in": 8, "ffn_norm": 8, "ffn_in": 10, "ffn_out": 8, "resid": 8,
    }  # fmt: skip
    seen: dict[str, Tensor] = {}
    edits: dict[Point, Any] = {
        places.point(site): partial(seen.__setitem__, site)
        for kind in kinds
        for site in places.sites(kind)
    }
    with torch.no_grad(), hooked(model, edits):
        model(torch.tensor([[3, 1, 4, 1, 5]]))
        block = model.core["stack"][1]
        middle = seen["layers.0.resid"] + seen["layers.1.attn_out"]
        assert torch.equal(seen["layers.1.attn_norm_in"], seen["layers.0.resid"])
        assert torch.allclose(seen["layers.1.ffn_norm_in"], middle)
        assert torch.allclose(seen["layers.1.attn_norm"], block.before(seen["layers.0.resid"]))
        assert torch.allclose(seen["layers.1.attn_out"], block.mixer["out"](seen["layers.1.heads"]))
        assert torch.allclose(seen["layers.1.ffn_norm"], block.between(middle))
        assert torch.allclose(seen["layers.1.ffn_out"], block.feed[2](seen["layers.1.ffn_in"]))
        assert torch.allclose(seen["layers.1.resid"], middle + seen["layers.1.ffn_out"])
        assert torch.allclose(seen["final_norm"], model.core["last"](seen["layers.1.resid"]))
    # Baking asks for the maps around a site.
    assert places.writer("layers.1.ffn_out").owner is block.feed[2]
    assert [one.owner for one in places.readers("layers.1.attn_norm")] == [block.mixer["inp"]]
    assert [one.owner for one in places.readers("final_norm")] == [model.head]
