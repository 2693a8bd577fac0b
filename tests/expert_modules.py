"""Fused experts of transformers, small and random, each with arguments of the kind it takes.

Every weight and bias is square where the layout lets it, so that shapes do not show which way
round it is stored. The table says how each module keeps its down projections; it was written from
the modeling files by hand, so that tests can change weights without asking trimtab.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN = UNITS = 32
EXPERTS, ROWS, TOKENS, TOP = 4, 2, 11, 2

#: Modules that declare nothing (Aria's do in later versions).
OTHERS = {
    "AriaExperts": "aria",
    "DbrxExperts": "dbrx",
    "InklingSharedExperts": "inkling",
    "JetMoeMoE": "jetmoe",
    "Llama4TextExperts": "llama4",
    "LongcatFlashExperts": "longcat_flash",
    "Step3p7Experts": "step3p7",
}
#: One of each layout: for tests that need not run over all.
LAYOUTS = (
    "Qwen3MoeExperts", "GptOssExperts", "AriaExperts", "NemotronHExperts", "DeepseekV4Experts",
    "DbrxExperts", "InklingSharedExperts", "JetMoeMoE", "Llama4TextExperts",
    "LongcatFlashExperts", "Step3p7Experts",
)  # fmt: skip
#: Of those that store [experts, in, out], or [experts * in, out].
TRANSPOSED = {
    "GptOssExperts", "OpenAIPrivacyFilterExperts", "AriaExperts", "Llama4TextExperts",
    "DbrxExperts",
}  # fmt: skip
#: Where the down projections are, if not at `down_proj`.
DOWN = {"DbrxExperts": "mlp.w2", "JetMoeMoE": "output_linear.weight"}


@cache
def declared() -> dict[str, str]:
    """The classes that transformers' decorator declares, and their packages."""
    found = {}
    pattern = r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)"
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = file.parent.name
    return found


def everything() -> list[str]:
    """The classes of all fused experts in transformers."""
    return sorted({*declared(), *OTHERS})


class Config:
    """Answers whatever a configuration of experts is asked for."""

    _experts_implementation = "eager"
    hidden_act = hidden_activation = mlp_hidden_act = activation_function = "silu"
    swiglu_limit, swiglu_alpha = 1.5, 1.702  # a limit that is reached
    mlp_gate_softcap, mlp_up_softcap = 2.0, 3.0
    moe_latent_size = None
    post_norm_eps = 1e-6
    num_experts_per_tok = moe_topk = TOP
    zero_expert_num = 2

    def __init__(self) -> None:
        self.ffn_act_fn = {"name": "silu"}

    def __getattr__(self, name: str) -> int:
        if "experts" in name:
            return EXPERTS
        if "hidden" in name or "intermediate" in name:
            return HIDDEN
        raise AttributeError(name)


def experts_class(name: str) -> Any:
    package = {**declared(), **OTHERS}[name]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    return getattr(module, name)


def expert_module(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A module of this class with random weights, in evaluation mode."""
    module = experts_class(name)(Config()).to(dtype).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn.to(dtype)
    return module


def arguments(name: str, dtype: torch.dtype = torch.float32, huge: bool = False) -> tuple[Any, ...]:
    """What a module of this class is called with, for ROWS * TOKENS tokens.

    `huge` gives a token a unit as large as the massive activations of real models.
    """
    generator = torch.Generator().manual_seed(6)
    tokens = ROWS * TOKENS
    x = torch.randn(tokens, HIDDEN, generator=generator)
    if huge:
        x[0, 3] = 300
    chosen, weights = routing(name)
    if name == "Llama4TextExperts":
        scores = torch.zeros(tokens, EXPERTS).scatter(1, chosen, weights)
        return ((x[None] * scores.T[..., None]).flatten(0, 1).to(dtype),)
    if name == "JetMoeMoE":
        return (x.view(ROWS, TOKENS, HIDDEN).to(dtype),)
    if name == "InklingSharedExperts":
        gammas = torch.rand(ROWS, TOKENS, EXPERTS, generator=generator)
        return x.view(ROWS, TOKENS, HIDDEN).to(dtype), gammas.to(dtype)
    if name == "DbrxExperts":
        x = x.view(ROWS, TOKENS, HIDDEN)
    if name == "AriaExperts" and hasattr(experts_class(name), "route_tokens_to_experts"):
        return x.to(dtype), torch.randn(tokens, EXPERTS, generator=generator).to(dtype)
    return x.to(dtype), chosen, weights.to(dtype)


def routing(name: str) -> tuple[Tensor, Tensor]:
    """Two experts of each token and their weights, which do not sum to one."""
    generator = torch.Generator().manual_seed(7)
    count = EXPERTS + (2 if name == "LongcatFlashExperts" else 0)
    order = [torch.randperm(count, generator=generator)[:TOP] for _ in range(ROWS * TOKENS)]
    return torch.stack(order), torch.rand(ROWS * TOKENS, TOP, generator=generator)


def scale_by_hand(module: nn.Module, name: str, factors: Tensor) -> None:
    """Multiply what the down projections read by factors [experts, units], in their weights."""
    fused = getattr(module, "fc2", None)  # Aria's, up to transformers 5.16
    path = "fc2.weight" if fused is not None else DOWN.get(name, "down_proj")
    weight = module.get_parameter(path)
    if name == "DbrxExperts":
        weight.data = weight.data * factors.flatten()[:, None].to(weight.dtype)
    elif name in TRANSPOSED:
        weight.data = weight.data * factors[:, :, None].to(weight.dtype)
    else:
        weight.data = weight.data * factors[:, None, :].to(weight.dtype)
