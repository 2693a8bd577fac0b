"""What `help()` says of a method: its formula, its source, its fields, an example that runs."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import trimtab as tt
from autoencoders import CONTRAST, autoencoder, tiny_lm
from commands import Command, home, trimtab, work
from helpers import language_model
from trimtab.fitting import Method
from trimtab.methods import METHODS

__all__ = ["autoencoder", "home", "trimtab", "work"]  # fixtures

matplotlib.use("agg")


@pytest.mark.parametrize("name", METHODS)
def test_it_has_formula_source_fields_and_example(name: str) -> None:
    said = inspect.getdoc(METHODS[name]) or ""
    first, formula, *_ = said.split("\n\n")
    assert first.endswith(".")
    assert "<-" in formula or "x_i" in formula
    assert formula.startswith("    ")
    assert any(source in said for source in ("arXiv", "ACL", "NeurIPS", "ICLR"))
    assert f">>> steering = tt.{METHODS[name].__name__}(" in said
    for each in fields(METHODS[name]):  # type: ignore[arg-type]
        default = "" if each.default is MISSING else f" = {each.default!r}"
        assert f"\n    {each.name}{default}\n        {each.metadata['help']}" in said
    assert all(len(line) <= 100 or line.startswith("        ") for line in said.splitlines())


@pytest.mark.parametrize("name", METHODS)
def test_its_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoencoder: Callable[..., Path]
) -> None:
    if name in ("sta", "sae"):
        autoencoder(path=tmp_path / "my-sae")
    monkeypatch.chdir(tmp_path)
    lm = language_model("qwen3_moe") if name == "steermoe" else tiny_lm()
    given = {"tt": tt, "lm": lm, "contrast": CONTRAST}
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(METHODS[name]) or "", given, name, None, None
    )
    assert len(test.examples) >= 2
    said: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=said.append)
    assert failed == 0, "".join(said)


def test_a_method_of_ones_own_has_its_fields_too() -> None:
    @dataclass(frozen=True)
    class Mine(tt.CAA):
        """Mine: as CAA, but mine."""

        more: int = field(default=3, metadata={"help": "How much more."})
        name = "mine"

    said = Mine.__doc__ or ""
    assert said.startswith("Mine: as CAA, but mine.\n\nFields:\n")
    assert "    more = 3\n        How much more." in said
    assert "    alpha = None\n" in said
    assert said.count("Fields:") == 1

    class Wordless(Method):
        name = "wordless"

    assert Wordless.__doc__ is None


@pytest.mark.parametrize("name", ["caa", "austeer", "ss"])
def test_the_command_line_says_each_thing_once(name: str, trimtab: Command) -> None:
    said = " ".join(trimtab(f"fit {name} --help").out.split())
    first = (inspect.getdoc(METHODS[name]) or "").partition("\n\n")[0]
    assert said.count(" ".join(first.split())) == 1
    assert "Fields:" not in said
    assert ">>>" not in said
    positions: Any = {each.name: each for each in fields(METHODS[name])}  # type: ignore[arg-type]
    assert said.count(positions["positions"].metadata["help"][:16]) == 1
