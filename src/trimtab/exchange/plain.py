"""Bare vectors: a tensor of [units], or of [layers, units], that says nothing of its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.exchange.containers import Container, as_floats
from trimtab.exchange.vectors import Found, adds, chosen
from trimtab.model import LanguageModel


def is_tensor(container: Container) -> bool:
    """Whether a file has one tensor and nothing else."""
    return isinstance(_alone(container), Tensor)


def _alone(container: Container) -> Any:
    content = container.content
    if container.kind in ("npy", "safetensors") or (
        container.kind == "pickle" and isinstance(content, Mapping)
    ):
        return next(iter(content.values())) if len(content) == 1 else None
    return content if container.kind == "pickle" else None


def read(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """A vector at the site that is named; of several rows, row N at the site of layer N."""
    tensor = as_floats(_alone(container), container.named, (1, 2))
    if tensor.dim() == 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.dim() == 1:
        if len(sites) != 1:
            raise container.refused(
                f"it is a vector of {len(tensor)} units and says nothing of its place: name it, "
                "as in --site layers.12.resid (what block 12 puts out; blocks count from 0)"
            )
        lm.anatomy.check(sites[0])
        there = {sites[0]: (tensor, 1.0)} if tensor.any() else {}
        return adds(chosen(container, there, (), together=True))
    layers = lm.anatomy.layers
    if len(tensor) != layers or not sites:
        raise container.refused(
            f"it has {len(tensor)} rows of {tensor.shape[1]} units, and says nothing of their "
            f"places: with a row for each of the {layers} layers name the sites, as in --site "
            "layers.12.resid (row 12), or --site resid for all"
        )
    kinds = dict.fromkeys(parse_site(site)[1] if "." in site else site for site in sites)
    there = {
        f"layers.{layer}.{kind}": (row, 1.0)
        for kind in kinds
        for layer, row in enumerate(tensor)
        if row.any()
    }
    return adds(chosen(container, there, sites, together=True))
