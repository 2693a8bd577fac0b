"""What README and docs show: Python blocks as one script a file, `trimtab` lines too.

All of it is run on a real model, slowly. What is quick are README's script on a tiny model, and for
every page that the names, arguments, commands and options in it exist.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from cyclopts import CycloptsError

import trimtab as tt
from helpers import language_model
from trimtab.cli import main
from trimtab.cli.app import build

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def script(page: Path) -> str:
    return "\n".join(blocks(page, "python"))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `trimtab` line but `trimtab demo`, which has its own slow test."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    split = [shlex.split(line) for line in lines if line.startswith("trimtab ")]
    return [words[1:] for words in split if words[1] != "demo"]


def test_every_page_is_found() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "guide.md", "methods.md"}
    assert blocks(PAGES[0], "python")


@pytest.mark.slow
@pytest.mark.usefixtures("measuring")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    exec(compile(script(page), str(page), "exec"), {"__name__": "docs"})
    for words in commands(page):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, (words, capsys.readouterr().err)


@pytest.mark.usefixtures("measuring")
def test_readme_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lm = language_model("llama", max_position_embeddings=2048)
    monkeypatch.setattr(tt, "load", lambda name: lm)
    exec(compile(script(PAGES[0]), "README.md", "exec"), {"__name__": "docs"})
    assert Path("formal2.safetensors").is_file()
    assert Path("formal-model/config.json").is_file()


def values(tree: ast.AST) -> dict[str, Any]:
    """What the imports of a script bind, by name."""
    bound: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                bound[alias.asname or alias.name] = getattr(module, alias.name)
    return bound


def value(node: ast.expr, bound: dict[str, Any]) -> Any:
    """What a dotted name says, None where it begins with no import."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        before = value(node.value, bound)
        return None if before is None else getattr(before, node.attr)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_arguments_exist(page: Path) -> None:
    tree = ast.parse(script(page))
    bound = values(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value(node, bound)  # raises AttributeError where there is no such name
        if isinstance(node, ast.Call) and (called := value(node.func, bound)) is not None:
            names = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(called).bind_partial(*node.args, **names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    for words in commands(page):
        build(words).parse_args(words)


def test_an_option_that_does_not_exist_is_seen() -> None:
    words = ["inspect", "joy.safetensors", "--no-such-option", "1"]
    with pytest.raises(CycloptsError, match="no-such-option"):
        build(words).parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
