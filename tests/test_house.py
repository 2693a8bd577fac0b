"""The house stays as it is meant to be: what is public, doors, circles, sizes of signatures."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())

#: What `import trimtab as tt` offers.
PUBLIC = [
    "AAS",
    "AUSteer",
    "Ablation",
    "AcT",
    "ActAdd",
    "AlphaSteer",
    "Answered",
    "Audit",
    "BiPO",
    "CAA",
    "Candidate",
    "Comparison",
    "Completion",
    "Condition",
    "Contrast",
    "Dial",
    "Difference",
    "Evaluation",
    "Exported",
    "ITI",
    "PSR",
    "Gate",
    "Generated",
    "Intervention",
    "Kept",
    "LanguageModel",
    "LoReFT",
    "Made",
    "Method",
    "Monitor",
    "Monitoring",
    "Probe",
    "Prompted",
    "Range",
    "RePS",
    "ReFT",
    "Result",
    "Scope",
    "SADI",
    "SAE",
    "SAS",
    "SS",
    "SSV",
    "STA",
    "SteerMoE",
    "Steering",
    "Steerings",
    "Sweep",
    "TrimtabError",
    "TrimtabWarning",
    "VLLM",
    "audit",
    "bake",
    "compare",
    "cross_entropy",
    "evaluate",
    "export",
    "fit",
    "fit_gate",
    "fit_monitor",
    "generate_contrast",
    "generate_file",
    "import_steering",
    "load",
    "load_contrast",
    "log_odds",
    "make",
    "mean_interval",
    "monitor",
    "persona_contrast",
    "pull",
    "push",
    "recipes",
    "reproduce",
    "save_gguf",
    "search",
    "strength",
    "strip",
    "sweep",
    "within",
    "wrap",
]


def test_what_is_public() -> None:
    assert sorted(trimtab.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_say_what_they_are(name: str) -> None:
    thing = getattr(trimtab, name)
    said = inspect.getdoc(thing)
    assert said, f"{name} has no docstring"
    assert not said.startswith(f"{name}("), f"{name} has only the docstring of a dataclass"


def test_the_hall_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_names_what_it_offers_and_hides_no_module(room: str) -> None:
    door = importlib.import_module(f"trimtab.{room}")
    modules = {file.stem for file in (PACKAGE / room).glob("*.py")}
    shadowed = {
        name for name in modules if name in dir(door) and not inspect.ismodule(getattr(door, name))
    }
    assert shadowed == set()


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for source in SOURCES:
        where = str(source.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{where}: {node.name}", node


def test_functions_import_nothing_of_ours() -> None:
    """Only what heavy optional libraries come with is imported where it is used."""
    inside = {
        f"{where} imports {node.module}"
        for where, function in _functions()
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab")
    }
    heavy = "evaluation.harness", "charts", "dark", "_page"  # lm-eval, matplotlib
    wrong = {one for one in inside if not one.endswith(heavy) and "evaluation.harness" not in one}
    # What a result draws and shows in a notebook is loaded when somebody looks.
    wrong = {one for one in wrong if ": plot imports" not in one and ": _repr_html_" not in one}
    # A command loads what it runs only when it runs, so that help comes at once.
    assert {one for one in wrong if not one.startswith("cli/")} == set()


def test_no_signature_is_longer_than_ten() -> None:
    long = {}
    for where, function in _functions():
        arguments = function.args
        names = [
            one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        ]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > 10:
            long[where] = count
    assert long == {}


def test_types_of_models_are_said() -> None:
    untyped = [
        f"{source.relative_to(PACKAGE)}"
        for source in SOURCES
        if "language_model: Any" in source.read_text(encoding="utf-8")
    ]
    assert untyped == []


def test_importing_loads_nothing() -> None:
    heavy = "torch", "transformers", "matplotlib", "sklearn", "pandas", "scipy", "numpy", "rich"
    program = f"import sys, trimtab; print([m for m in {heavy!r} if m in sys.modules])"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"


def test_what_answers_loads_no_pictures() -> None:
    rooms = ", ".join(f"trimtab.{name}" for name in ("serving", "chat", "evaluation"))
    program = f"import sys, {rooms}; print('matplotlib' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "False"


def test_no_file_of_tests_is_long() -> None:
    lengths = {
        file.name: len(file.read_text(encoding="utf-8").splitlines())
        for file in Path(__file__).parent.rglob("*.py")
    }
    assert {name: count for name, count in lengths.items() if count > 600} == {}


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_what_scripts_import_is_there(folder: str) -> None:
    missing = []
    for file in sorted((Path(__file__).parent.parent / folder).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab"):
                module = importlib.import_module(str(node.module))
                names = [name.name for name in node.names if not hasattr(module, name.name)]
                missing += [f"{file.name}: {node.module}.{name}" for name in names]
    assert missing == []
