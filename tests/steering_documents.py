"""A steering file with all that a file can hold, its document, and refusals in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import trimtab as tt
from helpers import CALIBRATION, basis
from trimtab.steering import ModelIdentity, Steering
from trimtab.steering.operators import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Force,
    Respond,
    Rotate,
    Scale,
    SetFeatures,
    Shift,
    Turn,
)

LARGEST = torch.finfo(torch.float32).max
MODEL = ModelIdentity("tiny", "llama", 3, 48, "0123456789abcdef" * 4)


def every() -> Steering:
    """A steering with all that a file can hold."""
    units, halves = torch.tensor([3, 0, 47]), torch.full((3,), 0.5)
    operators = (
        ("layers.0.ffn_out", Scale(units, torch.tensor([0.5, -1.0, 0.25]), 48)),
        ("layers.0.heads", Scale(units, torch.tensor([0.5, -1.0, 0.25]), 48, absolute=True)),
        ("layers.1.resid", Add(torch.linspace(-1, 1, 48))),
        ("layers.1.attn_norm", Ablate(basis(48, rows=1)[0])),
        ("layers.2.ffn_norm", Rotate(basis(48, 1))),
        ("layers.2.attn_norm", Turn(basis(48, 2), adaptive=True)),
        ("final_norm", Turn(basis(48, 3))),
        ("layers.0.attn_out", Affine(*torch.ones(2, 48, 2), c=torch.linspace(-1, 1, 48))),
        ("layers.0.resid", Shift(units, halves, halves, 48, torch.zeros(3), torch.ones(3))),
        ("layers.1.heads", Clamp(basis(48, 4, rows=1)[0], -0.5, 2.0)),
        ("layers.1.ffn_norm", Ablate(basis(48, 5))),
        ("layers.1.attn_out", Respond(torch.linspace(-1, 1, 48), torch.ones(48), -0.5)),
        ("layers.2.router", Force(torch.tensor([1]), torch.tensor([0, 5]), 8)),
        (
            "layers.2.resid",
            SetFeatures(basis(48, 6), *torch.ones(2, 2), basis(48, 7), "at_least", halves[:2]),
        ),
        ("layers.2.resid", Add(torch.linspace(-1, 1, 48), "cap")),
    )
    interventions = [tt.Intervention(site, one, "last") for site, one in operators]
    interventions[-1] = replace(interventions[-1], weight=-0.5)
    return Steering(
        method="austeer",
        hyperparameters={"site": "ffn_out", "k": 3, "alpha": 8, "layers": [1], "note": None},
        interventions=tuple(interventions),
        dial=tt.Dial("alpha", 8.0, (-100.0, 100.0), "°"),
        model=MODEL,
        contrast={"name": "pairs.jsonl", "digest": "ab" * 32, "rows": 100},
        tables={"unit": units, "score": torch.tensor([0.9, 0.8, 0.7])},
        findings={"source_site": "layers.1.resid", "trials": [{"kl": 0.5}]},
        value=12.0,
        calibration=CALIBRATION,
        date="2026-01-01T00:00:00+00:00",
    )


def content(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def document_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content(path)[0]["__metadata__"]["trimtab"])
    return found


def as_of_old(path: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A file as it was written before there were checksums."""
    save_file(tensors, path, {"trimtab": json.dumps(document)})
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every().save(tmp_path_factory.mktemp("good") / "good.safetensors")


def refused(action: Callable[[], Any], says: str) -> None:
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        action()
    in_one_line(str(caught.value))


def in_one_line(message: str) -> None:
    assert message.isprintable(), repr(message)
    assert len(message) < 400
