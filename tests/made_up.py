"""A made-up language model whose names have nothing of Llama's, and variants that break a rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SIZE, HEADS, WORDS = 16, 2, 40


class MadeUpConfig(PreTrainedConfig):
    """Only what any configuration of transformers has."""

    model_type = "made_up"

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.vocab_size, self.hidden_size, self.num_attention_heads = WORDS, SIZE, HEADS
        self.pull = 0.5


class Look(nn.Module):
    """Softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(SIZE, 3 * 12), nn.Linear(12, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inp(x).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.act, self.narrow = nn.Linear(SIZE, 20), nn.Tanh(), nn.Linear(20, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x)))


class Layer(nn.Module):
    """A block; `break_it` says how it is otherwise than a block with two branches."""

    def __init__(self, break_it: str = "") -> None:
        super().__init__()
        self.before, self.look = nn.LayerNorm(SIZE), Look()
        self.between, self.feed = nn.LayerNorm(SIZE), Feed()
        self.break_it = break_it

    def forward(self, x: Tensor) -> Tensor:
        pull = 0.5 if self.break_it == "pull" else 1.0
        x = x + pull * self.look(self.before(x))
        if self.break_it == "hidden term":
            x = x + 0.01 * x.roll(1, -1)
        return x + pull * self.feed(self.between(x))


class Core(nn.Module):
    def __init__(self, break_it: str) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, SIZE)
        inside = break_it if break_it in ("pull", "hidden term") else ""
        self.stack = nn.ModuleList([Layer(inside), Layer(inside), Layer(inside)])
        self.last = nn.LayerNorm(SIZE)
        self.break_it = break_it

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        x = self.words(input_ids)
        for number, layer in enumerate(self.stack):
            x = layer(x)
            if self.break_it == "between blocks" and number == 1:
                x = x + 0.01
            if self.break_it == "loop" and number == 0:
                x = layer(x)
        if self.break_it == "after the blocks":
            x = x + 0.01 * x.roll(1, -1)
        return SimpleNamespace(last_hidden_state=self.last(x), values=None, keys=None).__dict__


class MadeUp(nn.Module):
    """It computes what a causal language model does, and returns logits."""

    def __init__(self, break_it: str = "", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.core, self.head = Core(break_it), nn.Linear(SIZE, WORDS)
            for parameter in self.parameters():
                parameter.data = 0.4 * torch.randn(parameter.shape) + (parameter.dim() == 1)
        self.config = MadeUpConfig()

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        hidden = self.core(input_ids=input_ids)["last_hidden_state"]
        return SimpleNamespace(logits=self.head(hidden))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def get_input_embeddings(self) -> nn.Embedding:
        return self.core.words
