"""Adapters that are exported, and read by PEFT itself onto a model of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, basis, operator, plain_logits, steer, token_ids
from tiny import tiny_model
from trimtab.steering import Ablate, Affine, Clamp, Rotate, Scale, Shift

IDS = token_ids(PROMPTS[0])


def peft_model(name: str, *directories: Path, **options: Any) -> Any:
    """A tiny model that is made anew, with adapters as PEFT loads them; none is missed or odd."""
    peft = pytest.importorskip("peft")
    first, *others = directories
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(tiny_model(name, **options), first)
        for number, other in enumerate(others):
            model.load_adapter(other, f"other{number}")
    return model.eval()


def attached(lm: tt.LanguageModel, *steerings: tt.Steering) -> Tensor:
    """Logits of the model steered by hooks."""
    with lm.steered(*steerings):
        return plain_logits(lm.model, IDS)


@contextmanager
def zeroed(*parameters: Tensor) -> Iterator[None]:
    """Parameters that are zero for a while."""
    before = [parameter.clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        yield
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)


def binary(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Units, and numbers of them that float32 holds together with their sums and products."""
    units = torch.arange(seed % 2, width, 3)
    generator = torch.Generator().manual_seed(seed)
    return units, torch.randint(-20, 20, (len(units),), generator=generator) / 16


def linear_operators(width: int, seed: int = 0) -> dict[str, tuple[Any, tuple[float, float]]]:
    """Every operator that an adapter carries, by a name, with two dials at which it shows."""
    units, gains = binary(width, seed)
    mapped = torch.randn(width, 3, generator=torch.Generator().manual_seed(seed + 1)) / width**0.5
    none = torch.zeros(len(units))
    return {
        "Scale": (Scale(units, gains, width), (1.5, -0.75)),
        "clamped Scale": (Scale(units, gains, width, clamp_sign=True), (1.5, -2.0)),
        "Shift": (Shift(units, gains, none, width), (1.0, 0.5)),
        "Ablate": (Ablate(basis(width, seed, 1)[0]), (1.0, -2.0)),
        "Ablate of rank 3": (Ablate(basis(width, seed, 3)), (1.0, 0.5)),
        "Affine": (Affine(mapped, mapped.flip(0).contiguous()), (1.0, -2.0)),
        "Clamp to zero": (Clamp(basis(width, seed, 1)[0], 0.0, 0.0), (1.0, 0.5)),
        "Rotate": (Rotate(basis(width, seed)), (70.0, -120.0)),
    }


def one(lm: tt.LanguageModel, site: str, op: str = "Scale", **options: Any) -> tt.Steering:
    """A random operator at a site."""
    seed = options.pop("seed", 0)
    return steer(lm, (site, operator(op, lm.anatomy.width(site), seed)), **options)
