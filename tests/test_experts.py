"""Fused experts in every layout of transformers: shown, steered, proved, folded into weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expert_modules import (
    EXPERTS,
    HIDDEN,
    LAYOUTS,
    ROWS,
    TOKENS,
    UNITS,
    arguments,
    declared,
    everything,
    expert_module,
    routing,
    scale_by_hand,
)
from helpers import refused_in_one_line, relative
from trimtab.anatomy.experts import disagreement, layout_of
from trimtab.anatomy.hooks import hooked, is_hooked
from trimtab.anatomy.maps import (
    LinearMap,
    experts_joint_reader,
    experts_readers,
    experts_writer,
)
from trimtab.anatomy.sites import Edit, Point

WIDTH = EXPERTS * UNITS


class Around(nn.Module):
    """A mixture that gives its experts all rows in one list, as most do."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        output: Tensor = self.experts(*args)
        return output


def at(module: nn.Module, edit: Edit, side: Any = "experts") -> tuple[Around, dict[Point, Edit]]:
    around = Around(module)
    return around, {Point("layers.0.ffn_in", module, side, WIDTH, around): edit}


def run(module: nn.Module, name: str, edit: Edit, side: Any = "experts") -> Tensor:
    """The module's output while an edit is at its inner activations."""
    around, edits = at(module, edit, side)
    with torch.no_grad(), hooked(around, edits):
        return around(torch.zeros(ROWS, TOKENS, HIDDEN), *arguments(name))


def plain(module: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(*arguments(name))
    return output


# -- all of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_layout_of_all_experts_of_transformers_is_proved(dtype: torch.dtype) -> None:
    """Those that declare themselves, and all others; with each way of computing them."""
    assert len(declared()) > 50
    wrong = {}
    for name in everything():
        module = expert_module(name, dtype)
        ways = ("eager", "batched_mm", "grouped_mm")  # which has no kernel for float64
        ways = ways[:2] if dtype is torch.float64 else ways
        for way in ways if name in declared() else ("",):
            if way:
                module.config._experts_implementation = way
            for huge in (False, True):
                given = arguments(name, dtype, huge)
                with torch.no_grad():
                    output = module(*given)
                why = disagreement(module, given, {}, output)
                if why is not None:
                    wrong[name, way, huge] = why
    assert not wrong


@pytest.mark.parametrize("side", ["experts", "expert_acts"])
def test_reading_changes_nothing_beyond_rounding(side: str) -> None:
    for name in everything():
        module, seen = expert_module(name), []
        output = run(module, name, seen.append, side)
        assert relative(output, plain(module, name)) < 1e-5, name
        assert [x.shape for x in seen] == [(ROWS, TOKENS, WIDTH)], name


def test_scaling_units_is_scaling_what_reads_them() -> None:
    factors = 1 + torch.rand(EXPERTS, UNITS, generator=torch.Generator().manual_seed(8))
    for name in everything():
        module = expert_module(name)
        output = run(module, name, lambda x: x * factors.flatten())
        scale_by_hand(module, name, factors)
        assert relative(output, plain(module, name)) < 1e-5, name


# -- what is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n not in ("JetMoeMoE", "AriaExperts")])
def test_tokens_that_are_not_routed_are_zero_and_stay_out(name: str) -> None:
    module, seen = expert_module(name), []
    run(module, name, seen.append)
    inner = seen[0].view(ROWS * TOKENS, EXPERTS, UNITS)
    chosen, _ = routing(name)
    routed = (chosen[..., None] == torch.arange(EXPERTS)).any(1)
    if name == "InklingSharedExperts":
        routed = torch.ones_like(routed)
    assert torch.equal(inner.any(-1), routed)

    def noise_elsewhere(x: Tensor) -> Tensor:
        return x + 100 * (~routed).repeat_interleave(UNITS, 1).view(x.shape)

    assert relative(run(module, name, noise_elsewhere), plain(module, name)) < 1e-5


def test_gpt_oss_shows_what_its_formula_says() -> None:
    module, seen, acts = expert_module("GptOssExperts"), [], []
    run(module, "GptOssExperts", seen.append)
    run(module, "GptOssExperts", acts.append, "expert_acts")
    x, chosen, _ = arguments("GptOssExperts")
    limit = module.limit
    for token, experts in enumerate(chosen.tolist()):
        for expert in experts:
            both = x[token] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            gate, up = both[::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
            act = gate * torch.sigmoid(1.702 * gate)
            place = slice(expert * UNITS, (expert + 1) * UNITS)
            flat = seen[0].view(-1, WIDTH)[token, place], acts[0].view(-1, WIDTH)[token, place]
            assert relative(flat[0], (up + 1) * act) < 1e-5
            assert relative(flat[1], act) < 1e-5


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "DeepseekV4Experts", "Step3p7Experts"])
def test_what_an_activation_function_puts_out_is_the_factor_of_the_other_half(name: str) -> None:
    module, acts = expert_module(name), []
    run(module, name, acts.append, "expert_acts")
    x, chosen, _ = arguments(name)
    token, expert = 3, int(chosen[3, 0])
    gate = (module.gate_up_proj[expert] @ x[token])[:UNITS]
    gate = gate.clamp(max=1.5) if name == "DeepseekV4Experts" else gate
    seen = acts[0].view(-1, EXPERTS, UNITS)[token, expert]
    assert relative(seen, nn.functional.silu(gate)) < 1e-5


@pytest.mark.parametrize("name", ["GptOssExperts", "Llama4TextExperts", "DbrxExperts"])
def test_gradients_pass_through_an_edit(name: str) -> None:
    """Both ways: fits go backward, and dials that are turned forward."""
    module = expert_module(name, torch.float64)
    around = Around(module)
    given = (torch.zeros(ROWS, TOKENS, HIDDEN), *arguments(name, torch.float64))
    point = Point("layers.0.ffn_in", module, "experts", WIDTH, around)

    def squares(factor: Tensor) -> Tensor:
        with hooked(around, {point: lambda x: x * factor}):
            output: Tensor = around(*given)
        return output.square().sum()

    one, step = torch.ones((), dtype=torch.float64), 1e-4
    with torch.no_grad():
        expected = (squares(one + step) - squares(one - step)) / (2 * step)
    backward = torch.autograd.functional.jacobian(squares, one)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(one, one)
        forward = torch.autograd.forward_ad.unpack_dual(squares(dual)).tangent
    assert forward is not None
    assert relative(backward, expected) < 1e-6
    assert relative(forward, expected) < 1e-6


def test_experts_that_stand_alone_do_not_know_their_rows() -> None:
    module = expert_module("Qwen3MoeExperts")
    point = Point("layers.0.ffn_in", module, "experts", WIDTH)
    with hooked(module, {point: lambda x: x}):
        refused_in_one_line(lambda: module(*arguments("Qwen3MoeExperts")), "how many rows")
    jetmoe = expert_module("JetMoeMoE")  # which gets rows and tokens itself
    seen: list[Tensor] = []
    with hooked(jetmoe, {Point("layers.0.ffn_in", jetmoe, "experts", WIDTH): seen.append}):
        jetmoe(*arguments("JetMoeMoE"))
    assert seen[0].shape == (ROWS, TOKENS, WIDTH)


# -- real mixtures ----------------------------------------------------------------------------


def mixture(name: str) -> tuple[Any, str]:
    """A mixture block of a small model, and where its router is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "pad_token_id": 0,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "qwen2_moe": {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
        "deepseek_v3": {
            "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        },
        "llama4_text": {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
        "dbrx": {
            "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2,
                           "hidden_size": 32},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        },
        "jetmoe": {"kv_channels": 16},
    }  # fmt: skip
    given = own["dbrx"] if name == "dbrx" else {**small, **own.get(name, {})}
    config = AutoConfig.for_model(name, **given)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    experts = [m for m in model.modules() if layout_of(m) is not None]
    assert len(experts) == 1
    path = next(path for path, module in model.named_modules() if module is experts[0])
    block = experts[0] if name == "jetmoe" else model.get_submodule(path.rpartition(".")[0])
    block.fused = experts
    return block, "gate" if hasattr(block, "gate") else "router"


MIXTURES = ("qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "jetmoe")


@contextmanager
def inputs_and_outputs(module: nn.Module) -> Iterator[list[Any]]:
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_keeps_its_router_its_rows_and_its_shared_experts(name: str) -> None:
    block, router = mixture(name)
    (experts,) = block.fused
    layout = layout_of(experts)
    assert layout is not None
    point = Point("layers.0.ffn_in", experts, "experts", layout.width, block)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(9))
    seen: list[Tensor] = []
    with torch.no_grad(), inputs_and_outputs(block.get_submodule(router)) as routed:
        before = first(block(x))
        with hooked(block, {point: seen.append}):
            after = first(block(x))
            for row in x:
                block(row[None])
        with hooked(block, {point: torch.zeros_like}):
            silent = first(block(x))
        rest = first(block(x)) - before
    assert relative(after, before) < 1e-5
    assert not rest.any()
    assert seen[0].shape == (3, 5, layout.width)
    assert relative(seen[0], torch.cat(seen[1:])) < 1e-5  # each row is what it is alone
    assert torch.equal(routed[0][0], routed[1][0])
    flat = [value for value in routed[0][1] if isinstance(value, Tensor)]
    for one, other in zip(flat, [v for v in routed[1][1] if isinstance(v, Tensor)], strict=True):
        assert torch.equal(one, other)
    # Without inner activations there is left what stands beside them.
    expected = torch.zeros_like(before)
    if name == "qwen2_moe":
        flat_x = x.view(-1, 32)
        gate = torch.sigmoid(block.shared_expert_gate(flat_x))
        expected = (gate * block.shared_expert(flat_x)).view_as(before)
    elif name == "deepseek_v3":
        expected = block.shared_experts(x)
    elif name == "llama4_text":
        expected = block.shared_expert(x.view(-1, 32))
    elif name == "jetmoe":
        expected = block.bias.expand_as(before)
    elif name == "gpt_oss":
        _, weights, chosen = routed[0][1]
        expected = (experts.down_proj_bias[chosen] * weights[..., None]).sum(1).view_as(before)
    assert torch.allclose(silent, expected, atol=1e-5)


def first(output: Any) -> Tensor:
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value.clone()


# -- the proof --------------------------------------------------------------------------------


def transposed(module: Any) -> None:
    module.is_transposed = True


def swapped(module: Any) -> None:
    module._apply_gate = lambda x: nn.functional.silu(x[..., UNITS:]) * x[..., :UNITS]


def interleaved(module: Any) -> None:
    module._apply_gate = lambda x: nn.functional.silu(x[..., ::2]) * x[..., 1::2]


def relu(module: Any) -> None:
    module._apply_gate = lambda x: nn.functional.relu(x[..., :UNITS]) * x[..., UNITS:]


def gelu(module: Any) -> None:
    module._apply_gate = lambda x: nn.functional.gelu(x[..., :UNITS]) * x[..., UNITS:]


def clamped(module: Any) -> None:
    module._apply_gate = lambda x: (
        nn.functional.silu(x[..., :UNITS].clamp(max=4)) * x[..., UNITS:].clamp(-4, 4)
    )


def normed(module: Any) -> None:
    module.has_post_expert_norm = True
    module.post_expert_norm = nn.RMSNorm(HIDDEN, elementwise_affine=False)


def biased(module: Any) -> None:
    module.has_bias = True
    module.gate_up_proj_bias = torch.zeros(EXPERTS, 2 * UNITS, dtype=module.down_proj.dtype)
    module.down_proj_bias = torch.full((EXPERTS, HIDDEN), 0.3, dtype=module.down_proj.dtype)


def one_expert_changed(module: Any) -> None:
    module.down_proj.data[2] *= 1.2


WRONG = (transposed, swapped, interleaved, relu, gelu, clamped, normed, biased, one_expert_changed)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_layout_that_is_wrong_is_found(
    wrong: Callable[[Any], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are square: gate and up in one would show their orientation, so they are apart."""
    module, given = expert_module("Qwen3MoeExperts", dtype), arguments("Qwen3MoeExperts", dtype)
    with torch.no_grad():
        output = module(*given)
    assert disagreement(module, given, {}, output) is None
    if wrong is transposed:
        module = expert_module("NemotronHExperts", dtype)
        with torch.no_grad():
            output = module(*given)
    wrong(module)
    why = disagreement(module, given, {}, output)
    assert why is not None
    assert "times the rounding" in why
    assert "\n" not in why


@pytest.mark.parametrize("share", [1e-4, 1e-3])
def test_a_factor_is_found(share: float) -> None:
    module, given = expert_module("Qwen3MoeExperts"), arguments("Qwen3MoeExperts")
    with torch.no_grad():
        output = module(*given) * (1 + share)
    assert disagreement(module, given, {}, output) is not None


def test_a_pass_that_cannot_be_replayed_is_a_disagreement() -> None:
    module = expert_module("Qwen3MoeExperts")
    x, chosen, weights = arguments("Qwen3MoeExperts")
    output = plain(module, "Qwen3MoeExperts")
    for args, said in (((x,), "fails"), ((x, chosen[:3], weights), "fails")):
        why = disagreement(module, args, {}, output)
        assert why is not None
        assert said in why
    assert disagreement(module, (x, chosen, weights), {}, output[:, :-1]) is not None
    assert disagreement(nn.Linear(2, 2), (x,), {}, output) is not None
    by_name = {"top_k_weights": weights, "top_k_index": chosen}
    assert disagreement(module, (x,), by_name, output) is None


def test_modules_that_are_no_fused_experts_have_no_layout() -> None:
    class Packed(nn.Module):
        """As weights of four bits are kept."""

        def __init__(self) -> None:
            super().__init__()
            shape = (EXPERTS, 64, 16)
            self.gate_up_proj = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), False)
            self.down_proj = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), False)

    class Odd(nn.Module):
        """Whose weights' shapes do not go together."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 5, 7))
            self.down_proj = nn.Parameter(torch.zeros(EXPERTS, 3, 11))

        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            return x

    from transformers.models.jetmoe import modeling_jetmoe

    attention = modeling_jetmoe.JetMoeMoA(
        modeling_jetmoe.JetMoeConfig(hidden_size=32, num_key_value_heads=2, kv_channels=16)
    )
    for module in (nn.Linear(2, 2), nn.Identity(), Packed(), Odd(), attention):
        assert layout_of(module) is None
        assert experts_writer(module) is None
        assert not experts_readers(module)
        assert experts_joint_reader(module) is None
    refused_in_one_line(lambda: hooked_once(Odd()), "layout that is not known")


def hooked_once(module: nn.Module) -> None:
    around, edits = at(module, lambda x: x)
    with hooked(around, edits):
        pass


# -- hooks ------------------------------------------------------------------------------------


def test_edits_join_and_the_forward_comes_back() -> None:
    name = "GptOssExperts"
    module = expert_module(name)
    around, edits = at(module, lambda x: 2 * x)
    point = next(iter(edits))
    seen: list[Tensor] = []
    given = (torch.zeros(ROWS, TOKENS, HIDDEN), *arguments(name))
    with torch.no_grad(), hooked(around, edits):
        with hooked(around, {point: seen.append}):
            around(*given)
            refused_in_one_line(lambda: copy.deepcopy(around), "cannot copy")
            refused_in_one_line(lambda: pickle.dumps(around), "cannot copy")
        assert is_hooked(around)
        assert len(around._forward_pre_hooks) == 1
        around(*given)
    run(module, name, seen.append)
    assert len(seen) == 2
    assert relative(seen[0], 2 * seen[1]) < 1e-6
    assert not is_hooked(around)
    assert "forward" not in vars(module)
    assert not around._forward_pre_hooks
    copy.deepcopy(around)


def test_an_adapter_around_experts_is_refused() -> None:
    module = expert_module("Qwen3MoeExperts")
    module.base_layer = nn.Identity()
    assert layout_of(module) is None
    refused_in_one_line(lambda: hooked_once(module), "adapter")


def test_offloaded_experts_are_refused() -> None:
    refused_in_one_line(lambda: hooked_once(expert_module("GptOssExperts").to("meta")), "offloaded")


# -- maps -------------------------------------------------------------------------------------


def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(10)
    return torch.eye(HIDDEN) + 0.2 * torch.randn(HIDDEN, HIDDEN, generator=generator)


def fold(maps: list[LinearMap], change: Callable[[Tensor], Tensor]) -> None:
    for linear_map in maps:
        before = linear_map.read()
        linear_map.write(change(before))
        assert relative(linear_map.read(), change(before)) < 1e-6


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "LongcatFlashExperts"])
def test_a_linear_map_of_the_output_is_one_of_the_weights(name: str) -> None:
    module, by = expert_module(name), matrix()
    expected = plain(module, name) @ by.T
    writer = experts_writer(module)
    assert writer is not None
    assert writer.read().shape == (EXPERTS, HIDDEN, UNITS)
    fold([writer], lambda weight: by @ weight)
    if writer.bias is not None:
        bias = getattr(module, writer.bias)
        setattr(module, writer.bias, nn.Parameter(bias.detach() @ by.T))
    assert relative(plain(module, name), expected) < 1e-5
    if writer.bias is not None and writer.constant:  # the bias of a sum
        getattr(module, writer.bias).data += 1
        assert relative(plain(module, name), expected + 1) < 1e-5
    assert (writer.bias is not None and writer.constant) == (name == "JetMoeMoE")


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "LongcatFlashExperts"])
def test_a_linear_map_of_the_input_is_one_of_the_weights(name: str) -> None:
    module, by = expert_module(name), matrix()
    x, *rest = arguments(name)
    with torch.no_grad():
        expected = module(x @ by.T, *rest)
    readers = experts_readers(module)
    fold(readers, lambda weight: weight @ by)
    assert relative(plain(module, name), expected) < 1e-5
    assert all(reader.constant for reader in readers)


def test_a_constant_in_front_of_biased_experts_is_one_of_their_biases() -> None:
    module, shift = expert_module("GptOssExperts"), torch.linspace(-1, 1, HIDDEN)
    x, *rest = arguments("GptOssExperts")
    with torch.no_grad():
        expected = module(x + shift, *rest)
    (reader,) = experts_readers(module)
    assert reader.bias is not None
    bias = getattr(module, reader.bias)
    setattr(module, reader.bias, nn.Parameter(bias.detach() + reader.read() @ shift))
    assert relative(plain(module, "GptOssExperts"), expected) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_factors_of_the_inner_units_are_in_the_joint_map(name: str) -> None:
    module = expert_module(name)
    factors = 1 + torch.rand(WIDTH, generator=torch.Generator().manual_seed(11))
    expected = run(module, name, lambda x: x * factors)
    reader = experts_joint_reader(module)
    assert reader is not None
    assert reader.read().shape == (HIDDEN, WIDTH)
    fold([reader], lambda weight: weight * factors)
    assert relative(plain(module, name), expected) < 1e-5
    assert reader.bias is None


def test_experts_beside_their_own_input_and_normed_ones_take_no_map_of_the_output() -> None:
    longcat, muse = expert_module("LongcatFlashExperts"), expert_module("Qwen3MoeExperts")
    normed(muse)
    assert experts_writer(longcat) is None
    assert not experts_readers(longcat)
    assert experts_writer(muse) is None
    assert len(experts_readers(muse)) == 1
