"""`trimtab serve`: what is said before it serves, and that it serves and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import trimtab as tt
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
    ("version", "more", "tiers"),
    [
        ("0.32.0", "", {"caa": 2, "au": 2, "iti": 2}),
        ("0.32.0", "--tier lora", {"caa": None, "au": 1, "iti": None}),
        ("0.40.0", "", {"caa": None, "au": 1, "iti": None}),
        ("0.40.0", "--tier plugin", {"caa": None, "au": None, "iti": None}),
    ],
)
def test_check_says_how_vllm_steers(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, version: str, more: str,  # noqa: F811
    tiers: dict[str, int | None],
) -> None:  # fmt: skip
    """By the plugin in a vLLM that it is tested with, and else by adapters."""
    monkeypatch.setattr("trimtab.engines.plugin.vllm_version", lambda: version)
    monkeypatch.setattr("trimtab.engines.vllm_version", lambda: version)
    asked = f"{SERVE} --steer au.safetensors@3 --check --engine vllm --json {more}"
    told = trimtab(asked).json
    found = told["steerings"]
    flag = told.get("vllm_serve", ["none"])[0]
    assert flag == {1: "--enable-lora", 2: "--additional-config", None: "none"}[tiers["au"]]
    by_name = {one["name"]: one for one in found}
    assert {name: by_name[name]["tier"] for name in tiers} == tiers
    assert all(one["runs"].startswith(("tier", "refused: ")) for one in found)


def test_check_says_how_vllms_own_command_is_started(trimtab: Command) -> None:  # noqa: F811
    check = "serve --model model --steer au.safetensors@3 --check --engine vllm"
    *_, line = trimtab(f"{check} --tier lora").text.strip().splitlines()
    assert line == (
        "TRIMTAB_STEERINGS=DIR VLLM_PLUGINS=trimtab_lora VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "
        "vllm serve MODEL --enable-lora --max-lora-rank 8 --lora-target-modules down_proj"
    )
    *_, line = trimtab(f"{check} --tier plugin --hook final_norm").text.strip().splitlines()
    assert line.startswith("TRIMTAB_STEERINGS=DIR VLLM_PLUGINS=trimtab vllm serve MODEL --add")
    assert '"final_norm": ["model.norm", "output"]' in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--host 0.0.0.0", "TRIMTAB_API_KEY"),
        ("--steer nowhere.safetensors", "nowhere.safetensors"),
        ("--check --steer every/caa.safetensors", "two steerings are called caa"),
        ("--engine vllm", "vLLM is not installed here"),
        ("--engine vllm --tier lora", "vLLM is not installed here"),
        ("--vllm tensor_parallel_size=2", "are for --engine vllm"),
        ("--tier lora", "are for --engine vllm"),
        ("--engine vllm --check --tier lora --vllm enable_lora=true", "--vllm enable_lora"),
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


@contextmanager
def serving(
    command: str = SERVE, port: int = 0, log: Any = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process, and its address; it is ended after the block."""
    line = [sys.executable, "-m", "trimtab", *command.split(), "--port", str(port)]
    with subprocess.Popen(
        [*line, "--name", "base"],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=dict(os.environ),
    ) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            yield server, next(word for word in said.split() if word.startswith("http"))
        finally:
            server.kill()


BODY: dict[str, Any] = {"model": "base+caa@2", "prompt": "Today", "max_tokens": 3}


@pytest.mark.usefixtures("work")
def test_steerings_for_other_weights_act_where_they_are_forced() -> None:
    caa = tt.Steering.load("every/caa.safetensors")
    assert caa.model is not None
    other = replace(caa, model=replace(caa.model, digest="ab" * 32))
    other.save("other.safetensors")
    command = "serve --model model --steer other.safetensors --steer every/caa.safetensors --force"
    with serving(command) as (_, address):
        answers = [
            httpx.post(f"{address}/completions", json={**BODY, "model": f"base+{name}",
                                                       "temperature": 0})
            for name in ("other@2", "caa@2", "other@kl=0.1", "caa@kl=0.1")
        ]  # fmt: skip
    assert [one.status_code for one in answers] == [200] * 4
    forced, own, forced_kl, own_kl = (one.json()["choices"][0] for one in answers)
    assert forced["text"] == own["text"]
    assert forced_kl["steering"][0]["dial"] == own_kl["steering"][0]["dial"]


@pytest.mark.usefixtures("work")
def test_the_log_says_nothing_of_what_clients_ask(tmp_path: Path) -> None:
    """Warnings are for whoever starts the server, and only until it answers."""
    steering = {"name": "caa", "dial": 98765, "scope": 'answer | between("secret", "word")'}
    body = {**BODY, "model": "base", "steering": [steering]}
    command = f"{SERVE} --steer au.safetensors@54321"
    with (tmp_path / "log").open("w") as log, serving(command, log=log) as (_, address):
        answer = httpx.post(f"{address}/completions", json=body)
    assert answer.status_code == 200, answer.text
    said = (tmp_path / "log").read_text()
    assert "54321 is outside the sensible range" in said
    assert "98765" not in said
    assert "secret" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_it_serves_and_ends_with_ctrl_c() -> None:
    with serving() as (server, address):
        assert httpx.post(f"{address}/completions", json=BODY).status_code == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_killed_it_ends_each_answer_with_an_error_and_begins_anew() -> None:
    """A client sees a connection that breaks, and no answer that looks whole; the port is free."""
    with serving() as (server, address):
        asked = {**BODY, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{address}/completions", json=asked, timeout=30) as answer:
            lines = answer.iter_lines()
            read = [next(lines)]
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                read += lines
        assert "data: [DONE]" not in read
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{address}/completions", json=BODY)
    with serving(port=int(address.split(":")[-1].split("/")[0])) as (_, again):
        assert again == address
        assert httpx.post(f"{again}/completions", json=BODY).status_code == 200
