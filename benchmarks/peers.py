"""Other libraries as contenders: each in its own environment, as a process that waits its turn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clock import Took

import trimtab as tt
from trimtab.files import cache_dir

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A library, the transformers that it works with, and its batch size in texts."""

    name: str
    version: str
    transformers: str
    batch_size: int

    @property
    def requirements(self) -> list[str]:
        return [f"{self.name}=={self.version}", f"transformers=={self.transformers}"]


PEERS = (
    Peer("steering-vectors", "0.12.2", transformers="4.57.6", batch_size=16),
    Peer("repeng", "0.4.0", transformers="5.23.0", batch_size=32),
)


def environment(peer: Peer, say: Callable[[str], None]) -> Path:
    """The Python of the peer's environment in the user's cache, made on first use."""
    home = cache_dir() / "benchmarks" / f"{peer.name}-{peer.version}"
    python = home / "bin" / "python"
    made = home / "requirements.txt"  # written last: an unfinished environment has none
    wanted = "\n".join([TORCH, *peer.requirements]) + "\n"
    if made.is_file() and made.read_text(encoding="utf-8") == wanted:
        return python
    say(f"making an environment for {peer.name} {peer.version} (once)")
    shutil.rmtree(home, ignore_errors=True)
    # -P: no module that lies in the working directory is taken for venv or pip.
    _call(peer, [sys.executable, "-P", "-m", "venv", str(home)])
    # torch first and by itself, at its pinned version: pip then never considers another one.
    for packages in ([TORCH], peer.requirements):
        pip = [str(python), "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _call(peer, [*pip, *packages])
    made.write_text(wanted, encoding="utf-8")
    return python


def _call(peer: Peer, command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ran.returncode:
        lines = (ran.stderr or ran.stdout).strip().splitlines() or ["no reason given"]
        raise tt.TrimtabError(f"cannot make an environment for {peer.name}: {lines[-1]}")


class Process:
    """A running peer.py."""

    def __init__(self, peer: Peer, python: Path, job: dict[str, Any], room: Path) -> None:
        self.name = peer.name
        file, self.errors = room / f"{peer.name}.json", room / f"{peer.name}.txt"
        file.write_text(json.dumps(job), encoding="utf-8")
        with self.errors.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [python, Path(__file__).with_name("peer.py"), file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.versions: dict[str, str] = self._read()["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> dict[str, Any]:
        print(command, file=self.process.stdin, flush=True)
        return self._read()

    def run(self) -> Took:
        """One round, by the process's own clock."""
        taken = self.ask("run")
        return Took(taken["cpu"], taken["wall"])

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it may have died
            self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # anything else is the library's own talk
                said: dict[str, Any] = json.loads(line)
                return said
        lines = self.errors.read_text(encoding="utf-8").strip().splitlines()
        raise tt.TrimtabError(f"{self.name} failed: {lines[-1] if lines else 'it said nothing'}")


@contextmanager
def running(
    peers: tuple[Peer, ...],
    model: Path,
    job: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[list[Process]]:
    """Every peer, with the model loaded and something to do (see peer.py)."""
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        older = _for_transformers_4(model, room / "model")
        processes: list[Process] = []
        try:
            for peer in peers:
                python = environment(peer, say)
                own = {
                    "peer": peer.name,
                    "model": str(older if peer.transformers.startswith("4.") else model),
                    "batch_size": peer.batch_size,
                }
                processes.append(Process(peer, python, {**job, **own}, room))
            yield processes
        finally:
            for process in processes:
                process.close()


def _for_transformers_4(model: Path, copy: Path) -> Path:
    """The same checkpoint with the configuration that transformers 4 reads.

    It does not know rope_parameters and would silently take the default rope_theta, nor the
    tokenizer class of transformers 5.
    """
    copy.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "tokenizer_config.json"):
            (copy / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return copy
