"""A server over vLLM for tests: `trimtab serve --engine vllm` in the environment that has both."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import trimtab as tt
from tiny import tiny_model, tiny_tokenizer

PYTHON = os.environ.get("TRIMTAB_VLLM")
#: The key that changes steerings.
CHANGE = {"Authorization": "Bearer changes"}
NEW = 10
#: The sources under test, whatever the environment has.
SOURCES = str(Path(tt.__file__).parents[1])


@dataclass
class Served:
    """A server that runs: clients of it, its process, and its log."""

    client: httpx.Client
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return str(self.client.base_url)

    @property
    def health(self) -> int:
        return self.client.get(self.client.base_url.join("/health")).status_code


def written(
    lm: tt.LanguageModel, steerings: Mapping[str, tt.Steering], folder: Path
) -> tuple[Path, Path]:
    """A model and a directory of steerings by name, in a folder."""
    directory = folder / "steerings"
    directory.mkdir()
    for name, steering in steerings.items():
        steering.save(directory / f"{name}.safetensors")
    return lm.save_pretrained(folder / "model"), directory


@contextmanager
def served(
    lm: tt.LanguageModel, steerings: Mapping[str, tt.Steering], folder: Path, *options: str
) -> Iterator[Served]:
    """Serve a model as `base`, with steerings by name."""
    base, directory = written(lm, steerings, folder)
    command = [str(PYTHON), "-m", "trimtab", "serve", "--model", str(base), "--name", "base"]
    command += ["--steer", str(directory), "--engine", "vllm", "--port", "0"]
    command += ["--vllm", "enforce_eager=true", "--vllm", "block_size=32", *options]
    environment = {
        **os.environ,
        "PYTHONPATH": SOURCES,
        "TRIMTAB_ADMIN_KEY": "changes",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    said, log = folder / "said", folder / "log"
    with said.open("w") as out, log.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    try:
        while "Ctrl-C" not in said.read_text():
            assert process.poll() is None, log.read_text()[-6000:]
            time.sleep(0.5)
        address = next(word for word in said.read_text().split() if word.startswith("http"))
        with httpx.Client(base_url=f"{address}/", timeout=300) as opened:
            yield Served(opened, process, log)
    finally:
        process.terminate()
        process.wait(60)


def tiny_llama() -> tt.LanguageModel:
    """A tiny Llama whose heads are as wide as vLLM's kernels take them."""
    made = tt.wrap(
        tiny_model("llama", head_dim=32, hidden_size=64, num_hidden_layers=4),
        tiny_tokenizer(), "tiny",
    )  # fmt: skip
    made.model.generation_config.eos_token_id = None
    return made


def text_of(lm: tt.LanguageModel, prompt: Any, *steerings: tt.Steering, new: int = NEW) -> str:
    """What generate writes of it alone."""
    chat = not isinstance(prompt, str)
    (done,) = lm.generate([prompt], chat=chat, steering=[list(steerings)], max_new_tokens=new)
    return done.text


def asked(prompt: Any, /, **more: Any) -> dict[str, Any]:
    """The body of a request for a completion."""
    return {"model": "base", "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}
