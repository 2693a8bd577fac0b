"""Stock vLLM serves exported adapters: what it writes is what the attached steering writes.

`make test-vllm` sets up an environment with vLLM, names its Python in TRIMTAB_VLLM and runs this.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from adapters import one

PYTHON = os.environ.get("TRIMTAB_VLLM")
pytestmark = pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM")

PROMPTS = ["Text message to my sister:\n", "The weather today is", "Dear sir, I", "She told me"]
LAYERS, NEW = 6, 16
#: Operators at sites of two blocks, each with two dials at which it shows.
STEERINGS = {
    "heads": ("Scale", (0.5, -0.3)),
    "ffn_out": ("Scale", (0.4, -0.4)),
    "attn_norm": ("Rotate", (100.0, -100.0)),
}


def first_blocks(name: str, folder: Path) -> tt.LanguageModel:
    """A real model of a few blocks only, which are enough and faster, saved to a directory."""
    lm = tt.load(name, device="cpu", dtype=torch.float32)
    model: Any = lm.model
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    tt.wrap(model, lm.tokenizer, "cut").save_pretrained(folder)
    return tt.load(folder, device="cpu", dtype=torch.float32)


def answers(job: dict[str, Any], folder: Path) -> list[list[int]]:
    """What vLLM writes, in a process of its own."""
    given, found = folder / "job.json", folder / "answers.json"
    given.write_text(json.dumps(job))
    program = Path(__file__).with_name("vllm_answers.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(PYTHON), program, given, found], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    written: list[list[int]] = json.loads(found.read_text())
    return written


def exported(
    lm: tt.LanguageModel, folder: Path, blocks: tuple[int, ...]
) -> tuple[dict[str, str], dict[str | None, tt.Steering | None], int]:
    """Adapters' directories by name; the steering of each name, and none of None; the largest
    rank."""
    adapters: dict[str, str] = {}
    steered: dict[str | None, tt.Steering | None] = {None: None}
    widths = []
    for kind, (op, dials) in STEERINGS.items():
        parts = [one(lm, f"layers.{layer}.{kind}", op, seed=layer) for layer in blocks]
        steering = replace(parts[0], interventions=tuple(part.interventions[0] for part in parts))
        made = tt.export(lm, steering, "lora", folder / kind, dials=dials)
        for dial, file in zip(dials, made.files, strict=True):
            adapters[f"{kind}@{dial:g}"] = str(file)
            steered[f"{kind}@{dial:g}"] = steering.at(dial)
        widths += [each["rank"] for each in made.details["adapters"]]
    return adapters, steered, max(widths)


def compare(
    lm: tt.LanguageModel,
    steered: dict[str | None, tt.Steering | None],
    found: dict[str | None, list[list[int]]],
) -> None:
    """What was written of each variant is what the attached steering writes, which shows."""
    end, plain = lm.tokenizer.eos_token_id, None
    for variant, steering in steered.items():
        written = lm.generate(PROMPTS, chat=False, steering=steering, max_new_tokens=NEW)
        expected = [[token for token in out.tokens if token != end] for out in written]
        answers = [[token for token in tokens if token != end] for tokens in found[variant]]
        assert answers == expected, variant
        assert variant is None or expected != plain, variant
        plain = plain or expected


@pytest.mark.parametrize(
    ("name", "ranks", "compiled"),
    [
        ("smollm2-135m-instruct", 1, False),
        ("smollm2-135m-instruct", 1, True),
        ("gemma3-270m", 2, False),
    ],
)
def test_a_mixed_batch_of_adapters(name: str, ranks: int, compiled: bool, tmp_path: Path) -> None:
    base = tmp_path / "model"
    lm = first_blocks(name, base)
    adapters, steered, rank = exported(lm, tmp_path, (2, 4))
    tokens = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    # Adapters take turns, so that the batch is mixed.
    requests = [{"tokens": ids, "adapter": variant} for ids in tokens for variant in steered]
    job = {"base": str(base), "ranks": ranks, "compiled": compiled, "rank": rank}
    found = answers({**job, "adapters": adapters, "new": NEW, "requests": requests}, tmp_path)
    compare(lm, steered, {name: found[i :: len(steered)] for i, name in enumerate(steered)})


@contextmanager
def serving(base: Path, rank: int, folder: Path) -> Iterator[str]:
    """The address of a stock server of a model, that takes adapters while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    # As in vllm_answers.py, one more than there are.
    command += ["--enable-lora", "--max-loras", "7", "--max-lora-rank", str(rank)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        while not answers_at(address):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def answers_at(address: str) -> bool:
    """Whether a server is ready."""
    try:
        return bool(urllib.request.urlopen(f"{address}/health").status == 200)
    except OSError:
        return False


def post(address: str, path: str, content: dict[str, Any]) -> bytes:
    """What a server answers."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    answered: bytes = urllib.request.urlopen(request).read()
    return answered


def test_a_server_loads_adapters_while_it_runs(tmp_path: Path) -> None:
    lm = tt.load("smollm2-135m-instruct", device="cpu", dtype=torch.float32)
    base = tmp_path / "model"
    lm.save_pretrained(base)
    adapters, steered, rank = exported(lm, tmp_path, (2, 9, 28))
    tokens = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]

    with serving(base, rank, tmp_path) as address:
        for adapter, directory in adapters.items():
            loaded = {"lora_name": adapter, "lora_path": directory}
            post(address, "/v1/load_lora_adapter", loaded)

        def written(model: str | None, ids: list[int]) -> list[int]:
            content = {"model": model or "base", "prompt": ids, "temperature": 0}
            content |= {"max_tokens": NEW, "return_token_ids": True}
            answered = json.loads(post(address, "/v1/completions", content))
            found: list[int] = answered["choices"][0]["token_ids"]
            return found

        asked = [(variant, ids) for ids in tokens for variant in steered]
        with ThreadPoolExecutor(len(asked)) as pool:  # all at once: one mixed batch
            found = list(pool.map(written, *zip(*asked, strict=True)))
    compare(lm, steered, {name: found[i :: len(steered)] for i, name in enumerate(steered)})
