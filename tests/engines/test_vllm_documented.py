"""Commands of vLLM as the docs have them: vLLM's own parser takes each, with nothing of its own
started."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vllm_server import PYTHON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]

#: A value of each argument of the engine that takes no number.
VALUES = {"enforce_eager": [], "model_impl": ["auto"], "compilation_config": ['{"mode": 0}']}
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "serving.md"


def commands() -> list[list[str]]:
    """What stands after `vllm` in lines that run it, without what is set before it."""
    text = DOCS.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\w+=\S+ +)*vllm (serve .*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def engine_arguments() -> list[str]:
    """The names of arguments that the docs hand to vLLM's engine by --vllm."""
    return re.findall(r"--vllm ([a-z_]+)", DOCS.read_text())


def test_each_flag_is_vllms_own(tmp_path: Path) -> None:
    every = commands()
    # Arguments of the engine are flags of the command, too.
    for name in engine_arguments():
        every.append(["serve", "MODEL", f"--{name.replace('_', '-')}", *VALUES.get(name, ["1"])])
    every.append(["serve", "MODEL", "--no-such-flag"])
    asked, said = tmp_path / "asked.json", tmp_path / "said.json"
    asked.write_text(json.dumps(every))
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    command = [str(PYTHON), str(HERE / "vllm_parsed.py"), str(asked), str(said)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: list[Any] = json.loads(said.read_text())
    every.pop()
    assert isinstance(found.pop(), str)  # or the parser would take anything
    wrong = [(words, one) for words, one in zip(every, found, strict=True) if isinstance(one, str)]
    assert not wrong
    assert len(commands()) >= 6
    sizes = {one["data_parallel_size"] for one in found}
    assert {"1", "2"} <= sizes
