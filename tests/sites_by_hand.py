"""All sites of tiny models, as hooks see them and as the formulas give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from helpers import IDS, MISSING
from reference import reference
from tiny import tiny_model
from trimtab.anatomy import KINDS, Anatomy
from trimtab.anatomy.hooks import hooked


def capture(model: Any, sites: list[str], ids: list[int] = IDS) -> dict[str, Tensor]:
    """What hooks see at some sites in one pass over one sequence, each [tokens, units]."""
    seen: dict[str, Tensor] = {}
    places = Anatomy(model)

    def reader(site: str) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            seen[site] = x[0].clone()

        return read

    with torch.no_grad(), hooked(model, {places.point(site): reader(site) for site in sites}):
        seen["logits"] = model(torch.tensor([ids]), use_cache=False).logits[0]
    return seen


@cache
def both(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All sites of a tiny model: as hooks see them, and as the formulas give them."""
    model = tiny_model(name)
    places = Anatomy(model)
    kinds = [kind for kind in KINDS if kind not in MISSING[name]]
    seen = capture(model, [site for kind in kinds for site in places.sites(kind)])
    expected, logits = reference(name, model, IDS)
    return seen, {**expected, "logits": logits}
