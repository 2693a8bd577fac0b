"""Vectors for features from SAE-TS's effects: the authors' formula, its limits, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import trimtab as tt
from autoencoders import tiny_lm, vector_of
from commands import Command, home, refused, trimtab, work
from helpers import refused_in_one_line, relative
from trimtab.exchange import Target

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

SITE = "layers.1.resid"


def _effects(features: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W": torch.randn(48, features, generator=generator),
        "b": torch.randn(features, generator=generator),
    }


def _imported(path: Path, **options: Any) -> tt.Steering:
    options = {"site": SITE, "measure": False, "target": Target({4: 1.0}), **options}
    return tt.import_steering(path, tiny_lm(), **options)


def test_the_vector_of_the_authors(tmp_path: Path) -> None:
    effects = _effects()
    torch.save(effects, tmp_path / "adapter.pt")
    save_file(effects, tmp_path / "adapter.safetensors")
    target = Target({4: 1.0, 7: -0.5}, correction=0.8)
    steering = _imported(tmp_path / "adapter.pt", target=target)
    w, b = (effects[name].double() for name in "Wb")
    toward, always = w[:, 4] - 0.5 * w[:, 7], w @ b
    toward, always = toward / toward.norm(), always / always.norm()
    expected = toward - 0.8 * always
    assert relative(vector_of(steering), expected / expected.norm()) < 1e-6
    assert (steering.dial.default, steering.interventions[0].site) == (1.0, SITE)
    assert steering.hyperparameters["format"] == "sae-ts"
    assert steering.hyperparameters["features"] == "4=1,7=-0.5"
    other = _imported(tmp_path / "adapter.safetensors", target=target, format="sae-ts")
    assert torch.equal(vector_of(other), vector_of(steering))


def test_where_a_feature_answers_to_itself_alone_it_is_its_row(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(_effects()["W"], dim=0)
    torch.save({"W": rows, "b": torch.zeros(9)}, tmp_path / "adapter.pt")
    assert relative(vector_of(_imported(tmp_path / "adapter.pt")), rows[:, 4]) < 1e-6


def _with(**changed: Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save({**_effects(), **changed}, folder / "adapter.pt")
        return folder / "adapter.pt"

    return write


@pytest.mark.parametrize(
    ("write", "options", "says"),
    [
        (_with(), {"target": None}, "name those that you want more of"),
        (_with(), {"site": ()}, "does not say of which site"),
        (_with(), {"target": Target({9: 1.0})}, "features 0 to 8, and no 9"),
        (_with(b=torch.zeros(8)), {}, "W has the shape"),
        (_with(W=torch.zeros(47, 9)), {}, "has 48 units"),
        (_with(W=torch.zeros(48, 9)), {}, "no vector has any effect"),
        (_with(b=torch.full((9,), torch.nan)), {}, "NaN or infinity"),
        (_with(b=torch.eye(9)[4]), {}, "what every steering does"),
    ],
)
def test_what_is_no_map_of_effects_is_refused(
    tmp_path: Path, write: Any, options: dict[str, Any], says: str
) -> None:
    refused_in_one_line(lambda: _imported(write(tmp_path), **options), says)


def test_on_the_command_line(trimtab: Command) -> None:
    torch.save(_effects(), "adapter.pt")
    line = f"import adapter.pt --model model --site {SITE} --no-measure -o out.safetensors"
    refused(trimtab(line), "--features 14455")
    refused(trimtab(f"{line} --features 4,4"), "write numbers, each once")
    refused(trimtab(f"{line} --features 4=x"), "'x' is no number")
    torch.save(_effects()["W"][:, 0], "alone.pt")
    refused(trimtab(f"{line.replace('adapter', 'alone')} --features 4"), "of SAE-TS only")
    assert "It acts at layers.1.resid" in trimtab(f"{line} --features 4,7=-0.5").text
    made = tt.Steering.load("out.safetensors")
    assert made.hyperparameters["features"] == "4=1,7=-0.5"
