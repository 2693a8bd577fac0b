"""The notebooks in examples/: run whole on a real model, slowly, and each cell on a tiny one."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

import trimtab as tt
from helpers import language_model

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def code(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(text: str, names: dict[str, Any]) -> Any:
    """What a cell shows: the value of its last line, where that is an expression without ;."""
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None or not isinstance(last, ast.Expr):
        return None
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return None if text.rstrip().endswith(";") else value


def test_notebooks_hold_no_outputs() -> None:
    assert [file.stem for file in NOTEBOOKS] == [
        "choose_a_strength",
        "compare_with_the_prompt",
        "first_steering",
    ]
    for file in NOTEBOOKS:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None


#: A comparison takes too long to be quick.
QUICK = [file for file in NOTEBOOKS if file.stem != "compare_with_the_prompt"]


@pytest.mark.usefixtures("measuring")
@pytest.mark.parametrize("file", QUICK, ids=lambda file: file.stem)
def test_cells_run_on_a_tiny_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = language_model("llama", max_position_embeddings=2048)
    monkeypatch.setattr(tt, "load", lambda name: lm)
    names: dict[str, Any] = {}
    shown = []
    with matplotlib.rc_context({"backend": "agg"}):
        for text in code(file):
            value = run_cell(text, names)
            if value is not None and hasattr(value, "_repr_html_"):
                shown.append(value._repr_html_())
        plt.close("all")
    assert shown
    assert not [html for html in shown if "<script" in html]


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    about = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=about).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [one for one in outputs if one.output_type == "error"] == []
    assert any("text/html" in one.get("data", {}) for one in outputs)
    assert any("image/png" in one.get("data", {}) for one in outputs)
