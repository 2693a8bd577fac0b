"""What other packages add: the example package, and packages that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HeliumConfig, HeliumForCausalLM

import trimtab as tt
from tiny import tiny_tokenizer
from trimtab import plugins
from trimtab.methods import explain
from trimtab.plugins import Extended
from trimtab.steering.artifact import ModelIdentity
from trimtab.steering.operators import Add, from_tensors

PLUGIN = Path(__file__).parent.parent / "examples" / "trimtab_plugin"

#: Runs command lines one after the other, and says of each its exit status.
RUN = """
import json, sys
from trimtab.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        print(json.dumps({"status": ended.code or 0}), flush=True)
"""


def installed(room: Path) -> Path:
    """The example package as pip installs it, without pip: its files and what it says of itself."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    shutil.copytree(PLUGIN / "trimtab_plugin", room / "trimtab_plugin")
    info = room / f"trimtab_plugin-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return room


def tiny_helium(path: Path) -> None:
    """An architecture that trimtab itself does not know."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = HeliumConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    HeliumForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.mark.slow
def test_a_package_adds_a_method_an_operator_a_task_and_an_architecture(tmp_path: Path) -> None:
    room = tmp_path / "site"
    room.mkdir()
    path = os.pathsep.join([str(installed(room)), os.environ.get("PYTHONPATH", "")])
    tiny_helium(tmp_path / "helium")
    model = ["--model", "helium", "--json"]
    commands = [
        ["fit", "pull", *model, "-c", "task:next", "--layer", "1", "-o", "pull.safetensors"],
        ["inspect", "pull.safetensors"],
        ["evaluate", *model, "--task", "next", "--steer", "pull.safetensors@1", "--limit", "4"],
        ["sweep", "pull", *model, "--task", "next", "--limit", "2", "-o", "run"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.count('{"status": 0}') == 4, done.stdout + done.stderr
    fitted, words, *others = done.stdout.split('{"status": 0}')
    assert json.loads(fitted)["interventions"][0]["operator"] == "Pull"
    assert words.strip().startswith("Pull draws layers.1.ffn_out toward its mean")
    assert json.loads(others[0])["results"][0]["task"] == "next"
    assert set(json.loads(others[1])["best"]["params"]) == {"layer", "amount"}


def test_without_the_package_its_operator_is_refused_and_its_method_described() -> None:
    with pytest.raises(tt.TrimtabError, match="unknown operator 'Pull': install the package"):
        from_tensors("Pull", {})
    identity = ModelIdentity("tiny", "llama", 2, 8, "ab")
    added = (tt.Intervention("layers.0.resid", Add(torch.ones(8))),)
    steering = tt.Steering("pull", {}, added, tt.Dial("a", 1, (0, 1)), identity)
    assert explain(steering)[0] == "pull: Add on 8 units of layers.0.resid."


# -- packages that fail ---------------------------------------------------------------------------


class _Package:
    """The distribution of an entry point, as far as it is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name


def extended(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str, str]) -> Extended[Any]:
    """Numbers by name: `one` is our own; `points` are (name, value, package)."""
    found = []
    for name, value, package in points:
        point = EntryPoint(name, value, "trimtab.numbers")
        vars(point)["dist"] = _Package(package)
        found.append(point)
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)
    return Extended("number", {"one": 1}, lambda added, name: isinstance(added, float))


def test_what_loads_stands_after_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = extended(monkeypatch, ("pi", "math:pi", "maths"), ("e", "math:e", "maths"))
    assert list(numbers) == ["one", "e", "pi"]
    assert len(numbers) == 3
    assert numbers["pi"] == pytest.approx(3.14159, abs=1e-5)
    assert "two" not in numbers
    with pytest.raises(KeyError):
        numbers["two"]


def test_packages_are_not_read_for_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = extended(monkeypatch)
    monkeypatch.setattr(plugins, "entry_points", None)
    assert numbers["one"] == 1
    assert "one" in numbers


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (("bad", "no_such_module:X", "broken"), "ModuleNotFoundError: No module named"),
        (("bad", "math:no_such_name", "broken"), "AttributeError"),
        (("bad", "math:sqrt", "broken"), "math:sqrt is no number of that name"),
        (("one", "math:pi", "broken"), "there is another number of that name"),
        (("e", "math:pi", "other"), "there is another number of that name"),
    ],
)
def test_what_fails_is_named_and_the_rest_works(
    point: tuple[str, str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = extended(monkeypatch, point, ("e", "math:e", "maths"))
    name, _, package = point
    with pytest.warns(tt.TrimtabWarning) as warned:
        assert list(numbers) == ["one", "e"]
    (message,) = [str(warning.message) for warning in warned]
    assert message.startswith(f"the number {name} of the package {package} is left out: ")
    assert reason in message
    assert "\n" not in message
    assert numbers["one"] == 1  # no shadow falls on our own
    assert list(numbers) == ["one", "e"]  # said once
    if name == "bad":
        with pytest.raises(tt.TrimtabError, match="the number bad of the package broken"):
            numbers["bad"]
