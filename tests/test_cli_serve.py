"""`trimtab serve`: what is said before it serves, and that it serves and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import Command, home, refused, trimtab, work  # noqa: F401

SERVE = "serve --model model --steer every"


def test_check_says_what_would_be_served(trimtab: Command) -> None:  # noqa: F811
    said = trimtab(f"{SERVE} --check --name base").text
    assert "base+caa" in said
    assert "base+ss" in said
    found = trimtab(f"{SERVE} --steer au.safetensors@3 --check --json").json
    assert "runs" not in found["steerings"][0]
    found = trimtab(f"{SERVE} --steer au.safetensors@3 --check --engine vllm --json").json
    assert all("refused: vLLM is not" in one["runs"] for one in found["steerings"])
    dials = {one["name"]: one["dial"]["default"] for one in found["steerings"]}
    assert dials["au"] == 3
    assert len(dials) == len(list(Path("every").iterdir())) + 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--host 0.0.0.0", "TRIMTAB_API_KEY"),
        ("--steer nowhere.safetensors", "nowhere.safetensors"),
        ("--check --steer every/caa.safetensors", "two steerings are called caa"),
        ("--engine vllm", "vLLM is not installed here"),
        ("--vllm tensor_parallel_size=2", "are for --engine vllm"),
        ("--engine vllm --check --tokens 9", "leave --tokens out"),
        ("--engine vllm --check --vllm model=other", "--vllm model"),
    ],
)
def test_mistakes_get_one_line(trimtab: Command, more: str, said: str) -> None:  # noqa: F811
    refused(trimtab(f"{SERVE} {more}"), said)


def test_links_out_of_a_directory_are_refused(trimtab: Command, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "steerings"
    folder.mkdir()
    (folder / "joy.safetensors").symlink_to(Path("au.safetensors").resolve())
    refused(trimtab("serve", "--model", "model", "--steer", folder, "--check"), "leads out of")


@pytest.mark.slow
def test_it_serves_and_ends_with_ctrl_c(work: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "trimtab", *SERVE.split(), "--port", "0", "--name", "base"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        address = next(word for word in said.split() if word.startswith("http"))
        body: dict[str, Any] = {"model": "base+caa@2", "prompt": "Today", "max_tokens": 3}
        assert httpx.post(f"{address}/completions", json=body).status_code == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)
