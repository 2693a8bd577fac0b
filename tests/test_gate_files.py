"""Gates in files: in a steering's, and as a file of their own."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import trimtab as tt
from helpers import refused_in_one_line
from steerings import MODEL, document_of, equal_steerings, some_steering
from trimtab.steering import Condition, Gate, Steering, read_gate


def some_gate(kind: Any = "two-pass", **changes: Any) -> Gate:
    first = Condition("layers.1.ffn_out", torch.linspace(-1, 1, 48), 0.25, name="asks")
    second = Condition(
        "layers.0.resid", torch.ones(48), -0.5, "below", "probe", 0.75, "user", "sums"
    )  # type: ignore[arg-type]
    given: dict[str, Any] = {
        "rule": ("and", 0, ("not", 1)),
        "model": MODEL,
        "contrast": {"name": "requests.jsonl", "digest": "cd" * 32, "rows": 10},
        "findings": {"test": {"f1": 0.9}},
    }
    return Gate((first, second), kind, **{**given, **changes})


def equal_gates(a: Gate, b: Gate) -> None:
    assert json.dumps(a.as_json()) == json.dumps(b.as_json())
    assert a.rule == b.rule
    for one, other in zip(a.conditions, b.conditions, strict=True):
        assert torch.equal(one.direction, other.direction)
        assert one.reads == other.reads
    scores = [torch.randn(50), torch.randn(50)]
    assert torch.equal(a.decide(scores), b.decide(scores))


def test_a_gate_comes_back_from_its_file(tmp_path: Path) -> None:
    gate = some_gate()
    path = gate.save(tmp_path / "gate.safetensors")
    found = Gate.load(path)
    equal_gates(gate, found)
    assert (found.model, found.contrast) == (gate.model, gate.contrast)
    assert str(found) == str(gate)
    refused_in_one_line(lambda: gate.save(path), "exists")
    again = gate.save(path, overwrite=True)
    assert again.read_bytes() == path.read_bytes()


def test_a_steering_keeps_its_gate(tmp_path: Path) -> None:
    steering = some_steering().gated(some_gate())
    path = steering.save(tmp_path / "gated.safetensors")
    found = Steering.load(path)
    equal_steerings(steering, found)
    assert found.gate is not None
    assert steering.gate is not None
    equal_gates(steering.gate, found.gate)
    assert document_of(path)["format"] == 3
    assert found.digest == steering.digest
    assert found.label.endswith("gated")
    plain = some_steering()
    assert steering.digest != plain.digest == steering.gated(None).digest
    other = replace(some_gate(), rule=("or", 0, 1))
    assert some_steering().gated(other).digest != steering.digest
    # Without one a file is what it was.
    assert document_of(plain.save(tmp_path / "plain.safetensors"))["format"] == 1
    assert "gate" not in document_of(tmp_path / "plain.safetensors")


def test_each_kind_of_file_is_told_from_the_other(tmp_path: Path) -> None:
    gate, steering = tmp_path / "g.safetensors", tmp_path / "s.safetensors"
    some_gate().save(gate)
    some_steering().save(steering)
    refused_in_one_line(lambda: Steering.load(gate), "not a trimtab steering: it is a gate")
    refused_in_one_line(lambda: Gate.load(steering), "not a trimtab gate: it is a steering")
    refused_in_one_line(lambda: some_gate().save(steering, overwrite=True), "is not a gate")
    refused_in_one_line(lambda: some_steering().save(gate, overwrite=True), "is not a steering")
    refused_in_one_line(lambda: Gate.load(tmp_path / "none"), "no such gate file")


def _edited(path: Path, edit: Any) -> Path:
    """A gate's file with its document and tensors changed, without a checksum."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["trimtab_gate"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(document, tensors)
    out = path.with_name("edited.safetensors")
    save_file(tensors, out, {"trimtab_gate": json.dumps(document)})
    return out


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d, t: d.update(format=2), "format"),
        (lambda d, t: d.update(more=1), "more"),
        (lambda d, t: d["gate"].update(kind="once"), "kind"),
        (lambda d, t: d["gate"].update(rule=["and", 0, 7]), "no rule"),
        (lambda d, t: d["gate"].update(rule=["xor", 0, 1]), "no rule"),
        (lambda d, t: d["gate"].update(conditions=[]), "conditions"),
        (lambda d, t: d["gate"]["conditions"][0].update(site="layers.x.resid"), "unknown site"),
        (lambda d, t: d["gate"]["conditions"][0].update(threshold="high"), "threshold"),
        (lambda d, t: d["gate"]["conditions"][0].update(reads="generated"), "cannot read"),
        (lambda d, t: d["gate"]["conditions"][0].update(reads="all &"), "missing"),
        (lambda d, t: t.pop("1"), "'1' is missing"),
        (lambda d, t: t.update({"9": torch.ones(3)}), "none of them"),
        (lambda d, t: t.update({"0": torch.full((48,), torch.nan)}), "NaN"),
        (lambda d, t: t.update({"0": torch.zeros(48)}), "direction"),
        (lambda d, t: t.update({"0": torch.ones(4, 12)}), "direction"),
        (lambda d, t: t.update({"0": torch.ones(48, dtype=torch.float64)}), "float32"),
    ],
)
def test_what_a_gate_file_must_not_say(tmp_path: Path, edit: Any, says: str) -> None:
    path = some_gate().save(tmp_path / "g.safetensors")
    refused_in_one_line(lambda: Gate.load(_edited(path, edit)), says)


def test_mutated_files_are_gates_or_one_line(tmp_path: Path) -> None:
    content = some_gate().save(tmp_path / "g.safetensors").read_bytes()
    draw, path = random.Random(0), tmp_path / "m.safetensors"
    refused: list[str] = []
    for _ in range(300):
        mutated = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        path.write_bytes(mutated[: draw.choice([len(mutated), draw.randrange(len(mutated))])])
        try:
            Gate.load(path)
        except tt.TrimtabError as error:
            refused.append(str(error))
    assert len(refused) > 290  # in the others nothing was changed
    assert all(len(each.splitlines()) == 1 for each in refused)


def test_gates_are_read_from_one_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = Gate((Condition("layers.0.resid", torch.ones(4), 0.0, name="a"),))
    two = Gate((Condition("layers.0.resid", torch.ones(4), 1.0, name="b"),))
    one.save("a.st")
    two.save("b.st")
    one.save("a & b")  # a file of that name is that file
    assert read_gate("a.st").rule == 0
    assert read_gate("a & b").rule == 0
    assert read_gate("a.st&!b.st").rule == ("and", 0, ("not", 1))
    assert read_gate("!(a.st | b.st) & a.st").rule == ("and", ("not", ("or", 0, 1)), 2)
    assert read_gate("a.st | b.st & a.st").rule == ("or", 0, ("and", 1, 2))
    for text, says in (
        ("a.st &", "a file is missing"),
        ("a.st b.st", "cannot stand"),
        ("(a.st", "not closed"),
        ("& a.st", "a file is missing"),
        ("!" * 50 + "a.st", "more than 32"),
        ("c.st", "no such gate file"),
        ("", "a file is missing"),
    ):
        refused_in_one_line(lambda text=text: read_gate(text), says)
    latched = one.of_kind("latched")
    refused_in_one_line(lambda: latched & two, "decide at different times")
