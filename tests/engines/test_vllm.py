"""Stock vLLM serves exported adapters: what it writes is what the attached steering writes.

`make test-vllm` sets up an environment with vLLM, names its Python in TRIMTAB_VLLM and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
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


@pytest.mark.parametrize(("name", "ranks"), [("smollm2-135m-instruct", 1), ("gemma3-270m", 2)])
def test_a_mixed_batch_of_adapters(name: str, ranks: int, tmp_path: Path) -> None:
    base = tmp_path / "model"
    lm = first_blocks(name, base)
    adapters: dict[str, str] = {}
    steered: dict[str | None, tt.Steering | None] = {None: None}
    widths = []
    for kind, (op, dials) in STEERINGS.items():
        parts = [one(lm, f"layers.{layer}.{kind}", op, seed=layer) for layer in (2, 4)]
        steering = replace(parts[0], interventions=tuple(part.interventions[0] for part in parts))
        made = tt.export(lm, steering, "lora", tmp_path / kind, dials=dials)
        for dial, file in zip(dials, made.files, strict=True):
            adapters[f"{kind}@{dial:g}"] = str(file)
            steered[f"{kind}@{dial:g}"] = steering.at(dial)
        widths += [each["rank"] for each in made.details["adapters"]]
    tokens = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    # Adapters take turns, so that the batch is mixed.
    requests = [{"tokens": ids, "adapter": variant} for ids in tokens for variant in steered]
    job = {"base": str(base), "ranks": ranks, "adapters": adapters, "rank": max(widths)}
    found = answers({**job, "new": NEW, "requests": requests}, tmp_path)
    expected = {
        variant: [
            list(out.tokens)
            for out in lm.generate(PROMPTS, chat=False, steering=steering, max_new_tokens=NEW)
        ]
        for variant, steering in steered.items()
    }
    end = lm.tokenizer.eos_token_id
    for i in range(len(PROMPTS)):
        for j, variant in enumerate(steered):
            answer = [token for token in found[i * len(steered) + j] if token != end]
            assert answer == [token for token in expected[variant][i] if token != end], variant
    for variant in adapters:
        assert expected[variant] != expected[None], variant
