"""`trimtab gate`, and `--gate` wherever a command steers: what it does is what Python's does."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import trimtab as tt
from commands import GENERATE, PROMPTS, Command, home, same_as_python, trimtab, work
from test_gate_fit import planted, texts

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here

FIT = "gate fit --model model --contrast texts.jsonl --raw"


@pytest.fixture
def fitted(trimtab: Command, work: Path) -> Path:
    planted().to_jsonl(work / "texts.jsonl")
    (work / "others.txt").write_text("\n".join(texts("quite", 10)) + "\n")
    line = f"{FIT} --site layers.0.attn_norm --kind latched --unrelated others=others.txt -o g.st"
    found = trimtab(f"{line} --json").json
    assert found["gate"]["kind"] == "latched"
    assert found["gate"]["findings"]["unrelated"]["others"]["n"] == 10
    assert found["model"]["architecture"] == "llama"
    assert found["contrast"]["rows"] == 48
    return work / "g.st"


def test_a_gate_is_fitted_checked_and_put_to_work(
    trimtab: Command, home: Path, work: Path, fitted: Path
) -> None:
    gate = tt.Gate.load(fitted)
    said = trimtab(f"{FIT} --site layers.0.attn_norm --kind latched -o h.st").text
    assert "On its test texts it fires at" in said
    assert tt.Gate.load("h.st").conditions[0].threshold == gate.conditions[0].threshold
    asks = [*texts("please", 2, 3), *texts("never", 2, 3)]
    checked = trimtab("gate", "check", "g.st", "--model", "model", "--raw", "--json", *asks).json
    fires = [each["fired"] for each in checked["prompts"]]
    table = trimtab("gate", "check", "g.st", "--model", "model", "--raw", *asks).text
    assert f"fires at {sum(fires)} of 4 prompts" in table
    au = tt.Steering.load(home / "au.safetensors").scoped("generated").gated(gate).at(40)
    line = [*shlex.split(GENERATE), *PROMPTS, "--json", "-s", "au.safetensors@40"]
    found = trimtab(*line, "--scope", "generated", "--gate", "g.st").json["outputs"]
    same_as_python(
        [{k: v for k, v in each.items() if k != "gate"} for each in found],
        ["au.safetensors@40"],
        steering=au,
    )
    for each in found:
        (decided,) = each["gate"]
        assert decided["kind"] == "latched"
        assert decided["thresholds"] == [pytest.approx(gate.conditions[0].threshold)]
        assert isinstance(decided["fired"], bool)
    shown = trimtab(*line[:-3], "-s", "au.safetensors@40", "--scope", "last", "--gate", "g.st")
    assert shown.text.count("gate ") == len(PROMPTS)
    assert f"against {gate.conditions[0].threshold:.3g}" in shown.text
    # Into a file, and out of it again.
    trimtab("bake --model model -s au.safetensors -o plain")
    (scoped := tt.Steering.load(home / "au.safetensors").scoped("last")).save(work / "last.st")
    assert trimtab("gate put last.st g.st -o gated.st --json").json["gate"]["kind"] == "latched"
    described = trimtab("inspect gated.st --json").json
    assert described["gate"] == json.loads(json.dumps(gate.as_json()))
    assert "It acts where its gate fires" in trimtab("inspect gated.st").text
    assert tt.Steering.load("gated.st").digest == scoped.gated(gate).digest
    trimtab("gate put gated.st none -o free.st")
    assert tt.Steering.load("free.st").gate is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{GENERATE} Hi --gate g.st", "name one with --steer"),
        (f"{GENERATE} Hi -s au.safetensors --gate 'g.st &'", "a file is missing"),
        (f"{GENERATE} Hi -s au.safetensors --gate no.st", "no such gate file"),
        (f"{GENERATE} Hi -s au.safetensors --gate au.safetensors", "it is a steering"),
        (f"{GENERATE} Hi -s au.safetensors --gate g.st", "acts on earlier ones"),
        ("bake --model model -s au.safetensors --scope last --gate g.st -o b", "cannot bake a g"),
        (f"{FIT} -o g.st", "exists"),
        ("gate check other.st --model model Hi", "gate was made for"),
        (f"{FIT} --kind once -o x.st", "kind"),
        (f"{FIT} --score dot -o x.st", "score"),
        (f"{FIT} --reads generated -o x.st", "cannot read"),
        (f"{FIT} --unrelated others -o x.st", "NAME="),
        (f"{FIT} --unrelated others=no.txt -o x.st", "no.txt"),
    ],
)
def test_mistakes(trimtab: Command, work: Path, fitted: Path, line: str, says: str) -> None:
    gate = tt.Gate.load(fitted)
    assert gate.model is not None
    replace(gate, model=replace(gate.model, digest="0" * 64)).save(work / "other.st")
    found = trimtab(line)
    assert found.status == 2
    assert says in found.err
    assert len(found.err.splitlines()) == 1
    assert not (work / "x.st").exists()
    assert not (work / "b").exists()


def test_a_new_gate_comes_with_a_scope_that_the_old_one_forbids(
    trimtab: Command, home: Path, work: Path, fitted: Path
) -> None:
    latched = tt.Gate.load(fitted)
    late = tt.Steering.load(home / "au.safetensors").scoped("last").gated(latched)
    late.save(work / "late.st")
    line = [*shlex.split(GENERATE), *PROMPTS, "--json", "-s", "late.st@40", "--scope", "all"]
    assert "acts on earlier ones" in trimtab(*line).err
    found = trimtab(*line, "--gate", "none").json["outputs"]
    same_as_python(found, ["late.st@40"], steering=late.gated(None).scoped("all").at(40))
