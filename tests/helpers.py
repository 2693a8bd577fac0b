"""What the tests of sites, attaching, baking and models share: steerings made by hand, tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from tiny import tiny_model, tiny_tokenizer
from trimtab.operators import Add, Scale
from trimtab.steering import Positions

#: Longer than the sliding window of 8 tokens, and of different lengths.
PROMPTS = [
    "She looked at the map and asked where they were going",
    "Today I feel sad because of the rain",
    "What is the best way to learn a language? Read, write and speak every day",
]


def language_model(name: str, **options: Any) -> tt.LanguageModel:
    """A tiny model as trimtab sees it. It never ends a text, so that lengths are known."""
    lm = tt.wrap(tiny_model(name, **options), tiny_tokenizer(), name)
    lm.model.generation_config.eos_token_id = None
    return lm


def token_ids(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text).input_ids
    return ids


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits of one unpadded sequence, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def scale(width: int, seed: int = 0) -> Scale:
    """A Scale that enlarges, shrinks and flips a third of the units."""
    units = torch.arange(0, width, 3)
    gain = torch.randn(len(units), generator=torch.Generator().manual_seed(seed))
    return Scale(units, gain, width)


def add(width: int, seed: int = 0, size: float = 0.3) -> Add:
    return Add(size * torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def operator(kind: str, width: int, seed: int = 0) -> Scale | Add:
    return scale(width, seed) if kind == "Scale" else add(width, seed)


def by_hand(op: Scale | Add, dial: float = 1.0) -> Any:
    """The operator as its formula says, on any tensor; shares no code with trimtab's."""

    def apply(x: Tensor) -> Tensor:
        if isinstance(op, Add):
            return x + dial * op.vector.to(x.dtype)
        changed = x.clone()
        changed[..., op.units] = x[..., op.units] * (1 + dial * op.gain.to(x.dtype))
        return changed

    return apply


def steer(
    lm: tt.LanguageModel,
    *interventions: tuple[str, Any],
    positions: Positions = "all",
    alpha: float = 1.0,
) -> tt.Steering:
    """A steering of (site, operator) pairs."""
    return tt.Steering(
        method="test",
        hyperparameters={},
        interventions=tuple(tt.Intervention(site, op, positions) for site, op in interventions),
        dial=tt.Dial("alpha", alpha, (-100.0, 100.0)),
        model=lm.identity,
    )


def steer_at(
    lm: tt.LanguageModel,
    kind: str,
    op: str = "Add",
    layer: int = 1,
    seed: int = 0,
    positions: Positions = "all",
) -> tt.Steering:
    """A random steering at one site of a kind."""
    site = lm.anatomy.sites(kind, (layer,))[0]
    made = operator(op, lm.anatomy.width(site), seed)
    return steer(lm, (site, made), positions=positions)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())
