"""llama.cpp's names of a model's weights, and how it stores them.

Rows of q and k are in Llama's order of rotary pairs, norms of Gemma stored as 1 + w; the experts of
a block lie in one tensor each of gate, up and down, where transformers has gate and up in one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.gguf_architectures import Architecture

#: What transformers stacks of a block's experts, and what it is there.
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
#: What a model's router reads is never rounded: which experts are chosen hangs on it.
ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")


class Names:
    """llama.cpp's names of a model's weights."""

    def __init__(self, architecture: Architecture, model: Any) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture.name]
        self.architecture, self.config = architecture, model.config
        self._transposed = {
            f"{path}.weight" for path, each in model.named_modules() if isinstance(each, Conv1D)
        }
        self._names = get_tensor_name_map(arch, self.config.num_hidden_layers)

    def of(self, weight: str) -> tuple[str, ...]:
        """The names of a weight or bias, from its name in the model: of several, each has as many
        of its rows as the others."""
        module, _, own = weight.rpartition(".")
        if own in _STACKED and module.endswith(".experts"):
            return tuple(self._named(f"{module}.{part}.weight") for part in _STACKED[own])
        return (self._named(weight),)

    def _named(self, weight: str) -> str:
        module, _, own = weight.rpartition(".")
        name = self._names.get_name(module)
        leaf = (name or "").rpartition(".")[2]
        if name is None or own not in ("weight", "bias"):
            raise TrimtabError(f"llama.cpp has no place for {shown(weight)}")
        if own == "bias" and leaf not in self.architecture.biased:
            raise TrimtabError(
                f"llama.cpp has no place for {shown(weight)}: it gives {self.architecture.name} no "
                "bias there; attach the steering instead"
            )
        return f"{name}.{own}"

    def parts(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        """A weight or bias of the model as llama.cpp's tensors, by name, each a part of it as it
        lies there; `stored` has its numbers."""
        if weight in self._transposed:
            tensor = tensor.mT
        parts = self.rows(weight, tensor)
        return {
            name: part[0] if name.endswith("ffn_gate_inp_shexp.weight") else part
            for name, part in parts.items()
        }

    def rows(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        """The rows [..., rows, n] that belong to a weight's, by llama.cpp's name."""
        names = self.of(weight)
        halves = tensor.chunk(len(names), dim=-2) if len(names) > 1 else (tensor,)
        return dict(zip(names, halves, strict=True))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A weight's or bias' numbers [rows, ...], as llama.cpp has them."""
        if self.architecture.plus_one and name.endswith("norm.weight"):
            return tensor.float() + 1
        heads = self.heads(name)
        return tensor if heads is None else permuted(tensor, heads)

    def heads(self, name: str) -> int | None:
        """How many heads a weight has whose rows llama.cpp has in another order."""
        if not self.architecture.permuted:
            return None
        of = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        wanted = of.get(name.rpartition(".")[0].rpartition(".")[2])
        return None if wanted is None else int(getattr(self.config, wanted))


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """Rows of heads whose rotary pairs are halves apart [first half, second half] in the order that
    has each pair side by side."""
    pairs: Tensor = tensor.unflatten(0, (heads, 2, -1))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()
