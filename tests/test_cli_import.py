"""`trimtab import`, and `trimtab export` of what other tools know, as users run them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from exchanged import FOREIGN, WRITTEN, vector
from helpers import language_model
from tiny import tiny_tokenizer
from trimtab.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    language_model("llama").model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_a_control_vector(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.safetensors"
    status, out, _ = run(capsys, "import", FOREIGN / "repeng.gguf", "-m", model, "-o", file)
    assert status == 0
    assert "It acts at layers.0.resid, layers.1.resid." in out
    assert "It adds a vector to the residual stream after each of the blocks 0-1" in out
    assert "repeng.gguf (repeng, SHA-256" in out
    assert "Strengths, by how far" in out  # its dial was measured
    steering = tt.Steering.load(file)
    assert torch.equal(steering.interventions[1].operator.added, vector(1))
    status, out, _ = run(capsys, "inspect", file)
    assert status == 0
    assert "repeng.gguf (repeng" in out


def test_as_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", model, "--no-measure", "--json", "-o", tmp_path / "x.safetensors")
    source = FOREIGN / "activation-steering.svec"
    status, out, err = run(capsys, "import", source, "--site", "layers.1.resid", *words)
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["method"] == "imported"
    assert said["output"] == str(tmp_path / "x.safetensors")
    assert said["dial"] == {
        "name": "alpha",
        "unit": "",
        "default": 1.0,
        "range": [-20.0, 20.0],
        "value": 1.0,
    }
    (intervention,) = said["interventions"]
    assert (intervention["site"], intervention["operator"]) == ("layers.1.resid", "Add")
    assert said["model"]["hidden_size"] == 48
    assert said["contrast"] == {}
    assert said["hyperparameters"]["format"] == "svec"


@pytest.mark.parametrize("name", WRITTEN)
def test_out_and_in(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    source, options = FOREIGN / "repeng.gguf", ("-m", model, "--no-measure", "--site")
    assert run(capsys, "import", source, *options, "layers.1.resid", "-o", first)[0] == 0
    out = tmp_path / WRITTEN[name]
    words = ("--model", model, "--to", name, "-o", out, "--json")
    status, printed, _ = run(capsys, "export", f"{first}@2", *words)
    assert status == 0
    said = json.loads(printed)
    assert (said["format"], said["files"]) == (name, [str(out)])
    assert (said["exact"], said["left_out"]) == (True, [])
    assert run(capsys, "import", out, *options, "resid", "-o", second)[0] == 0
    steering = tt.Steering.load(second)
    (each,) = steering.interventions
    assert torch.equal(steering.setting * each.operator.added, 2 * vector(1))


def test_mistakes_leave_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    torch.save(vector(1), tmp_path / "bare.pt")
    (tmp_path / "mine.txt").write_text("mine")
    vectors = FOREIGN / "repeng.gguf"
    mistakes = {
        "cannot read": (tmp_path / "none.gguf", "-o", file),
        "--site layers.12.resid": (tmp_path / "bare.pt", "-o", file),
        "layer 9 is out of range": (tmp_path / "bare.pt", "--site", "layers.9.resid", "-o", file),
        "it does not hold": (vectors, "--from", "lm-eval", "-o", file),
        "known are lora, gguf": (vectors, "--from", "onnx", "-o", file),
        "is a directory": (vectors, "--overwrite", "-o", tmp_path),
        "exists": (vectors, "-o", tmp_path / "mine.txt"),
        "is not a steering": (vectors, "--overwrite", "-o", tmp_path / "mine.txt"),
        "no directory": (vectors, "-o", tmp_path / "none" / "x.safetensors"),
        "may run code": (FOREIGN / "steering-vectors-object.pt", "-o", file),
    }
    for says, words in mistakes.items():
        status, out, err = run(capsys, "import", *words, "-m", model)
        assert (status, out) == (2, ""), (says, out, err)
        assert says in err, err
        assert err.count("\n") == 1
        assert not file.exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pt", "mine.txt"]


def test_help_has_the_commands_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    names = re.findall(r"^│ ([a-z]+)  ", out, re.MULTILINE)
    known = ["inspect", "bake", "export", "import", "evaluate"]
    assert [name for name in names if name in known] == known
    status, out, _ = run(capsys, "import", "--help")
    assert status == 0
    assert "Example: trimtab import vector.gguf" in " ".join(out.split())
