"""What the tests of other tools' files share: formats, vectors, logits by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trimtab as tt
from helpers import token_ids

FOREIGN = Path(__file__).parent / "foreign"
TEXT = "She looked at the map and asked where they were going"
#: What each format's file is called.
WRITTEN = {
    "gguf": "vector.gguf",
    "repeng": "vector-repeng.gguf",
    "lm-eval": "vector.pt",
    "svec": "vector.svec",
    "steering-vectors": "fields.pt",
    "steering-lite": "vector.safetensors",
    "vllm-lens": "vector.json",
    "persona-vectors": "persona.pt",
}


def vector(seed: int, units: int = 48) -> Tensor:
    """The vectors in tests/foreign, by the number of the tool's layer."""
    return 0.3 * torch.randn(units, generator=torch.Generator().manual_seed(seed))


def imported(path: Path, lm: tt.LanguageModel, **options: Any) -> tt.Steering:
    return tt.Steering.from_(path, lm, measure=False, **options)


def what(steering: tt.Steering) -> dict[str, Tensor]:
    """What is added at each site where the dial stands."""
    found = {}
    for each in steering.interventions:
        added = each.operator.added
        assert added is not None
        found[each.site] = each.dial_at(steering.setting) * added
    return found


def logits(lm: tt.LanguageModel, steering: Any = None) -> Tensor:
    """Of every token of TEXT, steered as users steer."""
    ids = torch.tensor([token_ids(TEXT)])
    with torch.no_grad():
        if steering is None:
            return lm.model(ids).logits
        with lm.steered(steering):
            return lm.model(ids).logits


@contextmanager
def hooks(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Plain hooks of PyTorch on what modules put out."""

    def change(module: nn.Module, inputs: Any, output: Any) -> Any:
        edit = changes[module]
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handles = [module.register_forward_hook(change) for module in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_by_hand(lm: tt.LanguageModel, vectors: Mapping[int, Tensor]) -> Tensor:
    """Logits with vectors added to what blocks put out, by number from 0."""
    blocks = lm.anatomy.blocks
    with hooks({blocks[n]: lambda x, v=v: x + v for n, v in vectors.items()}):  # type: ignore[misc]
        return logits(lm)
