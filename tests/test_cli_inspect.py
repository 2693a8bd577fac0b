"""`trimtab inspect`: units, planes, choices and dials of every method, as JSON and in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trimtab as tt
from commands import EVERY, Command, home, trimtab, warnings_of, work
from trimtab.methods import METHODS

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

# -- inspect -----------------------------------------------------------------------------------


def test_inspect_lists_units_in_rank_order(trimtab: Command, home: Path) -> None:
    units = trimtab("inspect au.safetensors@-3 --json")
    assert len(warnings_of(units)) == 1  # the dial is out of its range
    units = json.loads(units.out)["units"]
    steering = tt.Steering.load(home / "au.safetensors")
    tables = {name: table.tolist() for name, table in steering.tables.items()}
    assert len(units) == 5
    for rank, unit in enumerate(units):
        layer = tables["layer"][rank]
        assert unit == {
            "site": f"layers.{layer}.ffn_out",
            "layer": layer,
            "unit": tables["unit"][rank],
            "score": tables["score"][rank],
            "r_pos": tables["r_pos"][rank],
            "r_neg": tables["r_neg"][rank],
            "gamma": -3 * tables["gain"][rank],
        }
        assert unit["score"] == max(unit["r_pos"], unit["r_neg"])
    order = [(-unit["score"], unit["layer"], unit["unit"]) for unit in units]
    assert order == sorted(order)


def test_inspect_at_the_dial_as_fitted(trimtab: Command) -> None:
    found = trimtab("inspect au.safetensors --json").json
    assert found["dial"]["value"] == found["dial"]["default"] == 2
    turned = trimtab("inspect au.safetensors@6 --json").json
    assert turned["dial"]["value"] == 6
    assert turned["dial"]["default"] == 2
    for one, three in zip(found["units"], turned["units"], strict=True):
        assert three["gamma"] == pytest.approx(3 * one["gamma"])


def test_inspect_in_words(trimtab: Command) -> None:
    text = trimtab("inspect au.safetensors --top 2").text
    assert "AUSteer changes 5 single units of ffn_out" in text
    assert "r_pos" in text
    assert "... and 3 more (--top)" in text
    assert "r_pos" not in trimtab("inspect au.safetensors --top 0").text
    assert "acts on generated tokens only" in trimtab("inspect late.safetensors").text


@pytest.mark.parametrize(("dial", "words"), [(4, "{up} are scaled up, {down} down"),
                                             (-4, "{down} are scaled up, {up} down"),
                                             (0, "0 are scaled up, 0 down")])  # fmt: skip
def test_inspect_counts_what_the_dial_does(
    trimtab: Command, home: Path, dial: int, words: str
) -> None:
    gain = tt.Steering.load(home / "au.safetensors").tables["gain"]
    up, down = int((gain > 0).sum()), int((gain < 0).sum())
    assert words.format(up=up, down=down) in trimtab(f"inspect au.safetensors@{dial}").out


#: What each method's `inspect --json` has beside what all have, and words of its text.
INSPECTED: dict[str, tuple[set[str], str]] = {
    "actadd": (set(), "ActAdd adds one vector"),
    "caa": (set(), "CAA adds a vector"),
    "iti": ({"heads"}, "3 attention heads"),
    "sadi": ({"units"}, "SADI multiplies 4 single units of ffn_in"),
    "ablation": (set(), "(7 sites)"),
    "sas": ({"plane", "layers"}, "Standard Angular Steering"),
    "aas": ({"plane", "layers"}, "Adaptive Angular Steering"),
    "act": (set(), "AcT maps every unit"),
    "ss": ({"plane", "layers"}, "Selective Steering"),
    "austeer": ({"units"}, "AUSteer changes 4 single units"),
}
COMMON = {
    "method", "hyperparameters", "dial", "interventions", "model", "contrast", "findings",
    "versions", "date", "calibration", "scope", "gate",
}  # fmt: skip


def test_what_was_fitted_is_inspected() -> None:
    assert set(INSPECTED) == set(EVERY) <= set(METHODS)


@pytest.mark.parametrize("method", EVERY)
def test_inspect_of_every_method(trimtab: Command, home: Path, method: str) -> None:
    more, words = INSPECTED[method]
    found = trimtab(f"inspect every/{method}.safetensors --json").json
    steering = tt.Steering.load(home / "every" / f"{method}.safetensors")
    assert set(found) == COMMON | more
    assert found["method"] == method
    assert found["model"] == vars(steering.model)
    dial = steering.dial
    assert found["dial"] == {
        "name": dial.name, "unit": dial.unit, "default": dial.default, "range": list(dial.range),
        "value": dial.default,
    }  # fmt: skip
    assert [i["site"] for i in found["interventions"]] == [i.site for i in steering.interventions]
    assert all(
        set(i) == {"site", "operator", "size", "positions", "scope"} for i in found["interventions"]
    )
    assert all(i["size"] > 0 for i in found["interventions"])
    text = trimtab(f"inspect every/{method}.safetensors").text
    assert words in text
    assert f"Dial {dial.name}: {dial.default:g}{dial.unit} now" in text
    assert ("rank" in text) is bool(more & {"units", "heads", "features"})


def test_inspect_of_planes_and_choices(trimtab: Command) -> None:
    rotated = trimtab("inspect every/ss.safetensors@20 --json").json
    assert rotated["plane"]["source_site"] == rotated["findings"]["source_site"]
    assert rotated["plane"]["basis_norms"] == pytest.approx([1, 1], abs=1e-6)
    assert rotated["plane"]["basis_dot"] == pytest.approx(0, abs=1e-6)
    sites = {i["site"].split(".")[1] for i in rotated["interventions"]}
    assert rotated["layers"] == sorted(map(int, sites))
    assert rotated["dial"] == {
        "name": "theta", "unit": "°", "default": 30, "range": [-360, 360], "value": 20,
    }  # fmt: skip
    heads = trimtab("inspect every/iti.safetensors --json").json["heads"]
    assert len(heads) == 3
    assert all(set(head) == {"site", "layer", "head", "accuracy", "sigma"} for head in heads)
    units = trimtab("inspect every/sadi.safetensors@5 --json").json["units"]
    assert all(set(unit) == {"site", "layer", "unit", "score", "gamma"} for unit in units)
    assert {unit["gamma"] for unit in units} == {5}
    assert trimtab("inspect every/ablation.safetensors --json").json["findings"] == {
        "source_site": "layers.0.resid", "token": -1,
    }  # fmt: skip


def test_a_file_whose_name_ends_like_a_dial(trimtab: Command, work: Path, home: Path) -> None:
    (work / "joy@7").symlink_to(home / "au.safetensors")
    assert trimtab("inspect joy@7 --json").json["dial"]["value"] == 2
    assert trimtab("inspect joy@7@7 --json").json["dial"]["value"] == 7
