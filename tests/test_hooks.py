"""Hooks on sites: experts, tuples, inputs by name, and that they go again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import IDS, relative
from sites_by_hand import both
from tiny import tiny_model
from trimtab.anatomy import Anatomy, Point
from trimtab.anatomy.hooks import hooked

# -- experts ----------------------------------------------------------------------------------


def test_experts_are_seen_with_zeros_where_a_token_was_not_routed() -> None:
    model = tiny_model("qwen3_moe")
    places, (seen, _) = Anatomy(model), both("qwen3_moe")
    # The first layer is dense: 80 units; the others have 4 experts of 32.
    assert [places.width(site) for site in places.sites("ffn_in")] == [80, 128, 128]
    inner = seen["layers.1.ffn_in"].view(len(IDS), 4, 32)
    router = model.model.layers[1].mlp.gate.weight
    chosen = (seen["layers.1.ffn_norm"] @ router.T).topk(2).indices
    routed = torch.zeros(len(IDS), 4, dtype=torch.bool).scatter(1, chosen, True)
    assert torch.equal(inner.abs().sum(-1) > 0, routed)
    assert routed.any(0).all()  # every expert has work in this text, so none is untested


def test_fused_experts_are_not_skipped() -> None:
    model = tiny_model("qwen3_moe")
    point = Anatomy(model).point("layers.1.ffn_in")
    calls = []

    def silence(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return torch.zeros_like(x)

    outputs: list[Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    with torch.no_grad(), hooked(model, {point: silence}):
        model(torch.tensor([IDS, IDS[::-1]]))
    handle.remove()
    assert calls == [(2, len(IDS), 128)]
    assert not outputs[0].any()  # without inner activations the experts have nothing to say


def test_an_edit_of_one_expert_reaches_only_the_tokens_routed_to_it() -> None:
    model = tiny_model("qwen3_moe")
    places, (plain, _) = Anatomy(model), both("qwen3_moe")
    seen: dict[str, Tensor] = {}

    def louder(x: Tensor) -> Tensor:
        return torch.cat((2 * x[..., :32], x[..., 32:]), dim=-1)

    edits = {
        places.point("layers.1.ffn_in"): louder,
        places.point("layers.1.ffn_out"): partial(seen.__setitem__, "out"),
    }
    with torch.no_grad(), hooked(model, edits):
        model(torch.tensor([IDS]))
    moved = (seen["out"][0] - plain["layers.1.ffn_out"]).abs().amax(-1) > 1e-6
    assert torch.equal(moved, plain["layers.1.ffn_in"][:, :32].any(-1))
    assert 0 < moved.sum() < len(IDS)


def test_experts_take_several_edits_and_give_their_forward_back() -> None:
    model = tiny_model("qwen3_moe")
    experts, point = model.model.layers[1].mlp.experts, Anatomy(model).point("layers.1.ffn_in")
    seen: list[Tensor] = []
    with torch.no_grad(), hooked(model, {point: lambda x: x + 1}):
        with hooked(model, {point: seen.append}):
            model(torch.tensor([IDS]))
        assert "forward" in vars(experts)
        model(torch.tensor([IDS]))
    assert "forward" not in vars(experts)
    plain, _ = both("qwen3_moe")
    assert len(seen) == 1
    assert relative(seen[0][0], plain["layers.1.ffn_in"] + 1) < 1e-5  # the outer one came first


def test_experts_keep_a_forward_that_somebody_else_put_there() -> None:
    """As accelerate does, with a functools.partial, on models that are spread over devices."""
    model = tiny_model("qwen3_moe")
    experts, point = model.model.layers[1].mlp.experts, Anatomy(model).point("layers.1.ffn_in")
    foreign = partial(type(experts).forward, experts)
    experts.forward = foreign
    with (
        torch.no_grad(),
        hooked(model, {point: lambda x: x + 1}),
        hooked(model, {point: lambda x: x + 1}),
    ):
        model(torch.tensor([IDS]))
    assert vars(experts)["forward"] is foreign


# -- hooks ------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A module that returns (normed, residual), as fused norms do."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * hidden_states, residual


def test_of_a_tuple_only_the_first_element_is_edited() -> None:
    module, x, residual = Normed(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    point = Point("layers.0.attn_norm", module, "output", 3)
    with hooked(module, {point: lambda y: y + 1}):
        output = module(x, residual)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], 2 * x + 1)
    assert output[1] is residual


def test_a_real_module_with_a_tuple_output_is_steered_like_its_tensor() -> None:
    """Llama's attention returns (output, weights), its output projection a tensor."""
    model = tiny_model("llama")
    attention = Point("x", model.model.layers[1].self_attn, "output", 48)
    projection = Anatomy(model).point("layers.1.attn_out")
    results = []
    for point in (attention, projection):
        with torch.no_grad(), hooked(model, {point: lambda x: x * 1.5 + 1}):
            results.append(model(torch.tensor([IDS])).logits)
    assert torch.equal(results[0], results[1])
    assert relative(results[0][0], both("llama")[0]["logits"]) > 0.01


def test_inputs_are_edited_whether_positional_or_by_name() -> None:
    module, x, residual = Normed(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    with hooked(module, {Point("layers.0.heads", module, "input", 3): lambda y: y + 1}):
        assert torch.equal(module(x, residual)[0], 2 * (x + 1))
        named = module(hidden_states=x, residual=residual)
    assert torch.equal(named[0], 2 * (x + 1))
    assert named[1] is residual


def test_an_edit_that_returns_none_leaves_the_very_tensor() -> None:
    module, x, residual = Normed(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, output: outputs.append(output))
    with hooked(module, {Point("x", module, "output", 3): lambda y: None}):
        assert module(x, residual) is outputs[0]
    handle.remove()


def test_hooks_go_when_installing_a_later_one_fails() -> None:
    module = nn.Linear(3, 3)
    good, bad = Point("a", module, "output", 3), Point("b", None, "output", 3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError), hooked(module, {good: lambda x: x, bad: lambda x: x}):
        pass
    assert not module._forward_hooks
