"""The command line's beginnings: version, `python -m`, completion, hints, what is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from commands import Command, home, refused, trimtab, work
from helpers import few_quick
from trimtab.cli.app import build

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, **more
    )


def test_the_version(trimtab: Command) -> None:
    assert trimtab("--version").text.strip() == tt.__version__
    assert version("trimtab") == tt.__version__
    assert "--version" in trimtab("--help").text


def test_python_m_trimtab() -> None:
    ran = run("-m", "trimtab", "--version")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, tt.__version__, "")
    ran = run("-m", "trimtab", "nonsense")
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--version"], ["torch", "numpy"]),
        (["--help"], ["torch", "numpy"]),
        (["models"], ["torch", "transformers"]),
        (["inspect", "DIR"], ["torch", "transformers"]),
    ],
)
def test_what_need_not_be_imported(words: list[str], heavy: list[str], tmp_path: Path) -> None:
    (tmp_path / "trimtab.json").write_text(
        '{"format": 1, "baked": [{"label": "caa", "digest": "00", "base": {"name": "m"}}]}'
    )
    words = [str(tmp_path) if word == "DIR" else word for word in words]
    program = (
        "import sys\nfrom trimtab.cli import main\ntry:\n    main(sys.argv[1:])\n"
        f"except SystemExit as ended:\n    print(ended.code, [m for m in {heavy!r} if m in "
        "sys.modules])"
    )
    ran = run("-c", program, *words)
    assert ran.stdout.splitlines()[-1] == "0 []", ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shell", few_quick(["bash", "zsh", "fish"], "bash"))
def test_completion(shell: Any, tmp_path: Path) -> None:
    script = build(None).generate_completion(shell=shell)
    for word in ("generate", "inspect", "strength", "quantise", "steer"):
        assert word in script
    env = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": ""}
    ran = run("-m", "trimtab", "--install-completion", "--shell", shell, env=env)
    assert ran.returncode == 0, ran.stderr
    written = [path for path in tmp_path.rglob("*trimtab*") if path.is_file()]
    assert [path.read_text() for path in written] == [script]


def test_completion_is_in_the_help(trimtab: Command) -> None:
    text = " ".join(trimtab("--help").text.split())
    assert "--install-completion" in text
    assert "bash, zsh or fish" in text


@pytest.mark.parametrize("given", ["--alpha 3", "--alpha=3", "--dial 3", "--strength 2"])
def test_the_dial_is_said_with_the_steering(trimtab: Command, given: str) -> None:
    line = f"generate --model model --steer au.safetensors {given} Hello"
    refused(trimtab(line), given.split("=")[0].split()[0], "--steer FILE@3")


def test_other_unknown_options_are_as_they_were(trimtab: Command) -> None:
    said = refused(trimtab("generate --model model --alfa 3 Hello"), "--alfa")
    assert "FILE@3" not in said
    assert "FILE@3" not in refused(trimtab("models --alpha 3"))
