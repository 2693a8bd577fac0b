"""Steerings made by hand, and what is in their files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from trimtab.steering import ModelIdentity, Steering
from trimtab.steering.operators import Add, Scale, apply

NAN, INF = float("nan"), float("inf")
MODEL = ModelIdentity("tiny", "llama", 3, 48, "0123456789abcdef" * 4)


def some_steering(**changes: Any) -> Steering:
    """Two interventions, tables, and all that a method may put in."""
    units = torch.tensor([3, 0, 47])
    interventions = (
        tt.Intervention("layers.1.ffn_out", Scale(units, torch.tensor([0.5, -1.0, 0.25]), 48)),
        tt.Intervention("layers.2.resid", Add(torch.linspace(-1, 1, 48)), "generated"),
    )
    given: dict[str, Any] = {
        "method": "austeer",
        "hyperparameters": {"site": "ffn_out", "k": 3, "alpha": 8, "layers": [1], "note": None},
        "interventions": interventions,
        # A whole number, as people write it.
        "dial": tt.Dial("alpha", 8, (0, 100)),
        "model": MODEL,
        "contrast": {"name": "pairs.jsonl", "digest": "ab" * 32, "rows": 100},
        "tables": {"unit": units, "score": torch.tensor([0.9, 0.8, 0.7])},
        "findings": {"source_site": "layers.1.resid", "trials": [{"kl": 0.5, "layer": 1}]},
    }
    return Steering(**{**given, **changes})


def equal_steerings(a: Steering, b: Steering) -> None:
    names = ("method", "hyperparameters", "dial", "model", "contrast", "findings", "value")
    for name in (*names, "versions"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.date, a.setting, a.label) == (b.date, b.setting, b.label)
    assert a.tables.keys() == b.tables.keys()
    assert all(torch.equal(a.tables[name], b.tables[name]) for name in a.tables)
    assert len(a.interventions) == len(b.interventions)
    x = torch.randn(2, 5, 48)
    for one, other in zip(a.interventions, b.interventions, strict=True):
        assert (one.site, one.scope) == (other.site, other.scope)
        assert type(one.operator) is type(other.operator)
        assert torch.equal(apply(one.operator, x, 2.0), apply(other.operator, x, 2.0))


def content_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file by its specification; nothing may be left over."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def document_of(path: Path) -> dict[str, Any]:
    header, _ = content_of(path)
    # A file that a test wrote has no checksum, as those from before there was one.
    assert {"trimtab"} <= set(header["__metadata__"]) <= {"trimtab", "trimtab_sha256"}
    document: dict[str, Any] = json.loads(header["__metadata__"]["trimtab"])
    return document
