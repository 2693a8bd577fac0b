"""Gates without trimtab: plain loops over whole texts, without a KV cache, with hooks written out.

Of every text the condition is scored by its formula in float64 from what plain transformers puts
out, and the steered block adds a vector where that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from helpers import block

#: Of an activation [units] the score by a direction.
BY_HAND: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cosine": lambda x, v: float(x @ v / (x.norm() * v.norm())),
    "projection": lambda x, v: float(x @ v / v.norm()),
    "probe": lambda x, v: float(x @ v) + 0.25,
    "compat": lambda x, v: _compat(x, v / v.norm()),
}


def _compat(x: Tensor, v: Tensor) -> float:
    projected = torch.tanh(torch.outer(v, v) @ x)
    return float(x @ projected / (x.norm() * projected.norm()))


def stream(model: Any, ids: Sequence[int], layer: int) -> Tensor:
    """What a block puts out for a text that is not steered, [tokens, units] in float64."""
    seen: list[Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = block(model, layer).register_forward_hook(see)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        handle.remove()
    return seen[0][0].double()


def token_scores(
    model: Any, ids: Sequence[int], layer: int, score: str, direction: Tensor
) -> list[float]:
    """The score at each token of a text."""
    direction = direction.double()
    return [BY_HAND[score](x, direction) for x in stream(model, ids, layer)]


def prompt_score(
    model: Any,
    ids: Sequence[int],
    layer: int,
    score: str,
    direction: Tensor,
    read: Sequence[int] | None,
) -> float:
    """The score of the mean over some tokens of a prompt, by number (None: of its last one)."""
    rows = stream(model, ids, layer)
    x = rows[-1] if read is None else rows[list(read)].mean(0)
    return BY_HAND[score](x, direction.double())


@contextmanager
def adding(model: Any, layer: int, where: Sequence[bool], vector: Tensor) -> Iterator[None]:
    """A vector is added to what a block puts out, at some tokens of one text."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        mask = torch.tensor(list(where))[None, : x.shape[1], None]
        changed = torch.where(mask, x + vector, x)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def written(
    model: Any,
    ids: Sequence[int],
    new: int,
    where: Callable[[list[int]], Sequence[bool]],
    layer: int,
    vector: Tensor,
) -> list[int]:
    """Greedy tokens after a prompt, one whole pass each; `where` says of a text's token ids which
    tokens are steered."""
    text = list(ids)
    for _ in range(new):
        with torch.no_grad(), adding(model, layer, where(text), vector):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        text.append(int(logits.argmax()))
    return text[len(ids) :]
