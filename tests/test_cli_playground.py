"""`trimtab playground`: what is said before the page is there, and that it is there and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from commands import Command, home, refused, trimtab, work  # noqa: F401

PLAY = "playground --model model --steer every"


def test_check_says_what_would_be_shown(trimtab: Command) -> None:  # noqa: F811
    assert "caa: caa at " in trimtab(f"{PLAY} --check").text
    found = trimtab(f"{PLAY} --steer au.safetensors@3 --check --json").json
    dials = {one["name"]: one["dial"]["default"] for one in found["steerings"]}
    assert dials["au"] == 3
    assert len(dials) == len(list(Path("every").iterdir())) + 1
    assert found["model"] == "model"
    assert found["refused"] == {}


def test_of_a_directory_what_is_no_steering_is_left_out(
    trimtab: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "caa.safetensors").symlink_to(Path("caa.safetensors").resolve())
    said = trimtab("playground", "--model", "model", "--steer", tmp_path, "--check").text
    assert "left out broken.safetensors" in said
    assert "leads out of" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--steer nowhere.safetensors", "nowhere.safetensors"),
        ("--steer every/caa.safetensors", "two steerings are called caa"),
        ("--runs nowhere", "no such directory"),
        ("--host 203.0.113.1", "cannot listen on"),
    ],
)
def test_mistakes_get_one_line(trimtab: Command, more: str, said: str) -> None:  # noqa: F811
    refused(trimtab(f"{PLAY} {more}"), said)


@pytest.mark.slow
def test_it_is_there_and_ends_with_ctrl_c(work: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "trimtab", *PLAY.split(), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as page:
        assert page.stdout is not None
        said = page.stdout.readline()
        address = next(word for word in said.split() if word.startswith("http"))
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(f"{address}api/about").json()["model"] == "model"
        page.send_signal(signal.SIGINT)
        assert page.wait(30) in (0, 130)
