"""Stock llama.cpp runs exported adapters, control vectors and baked GGUF files: what it writes is
what the attached steering writes.

`make test-llamacpp` fetches llama.cpp as node-llama-cpp brings it, names that folder in
TRIMTAB_LLAMACPP and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from adapters import one
from gguf_files import tiny

FOLDER = os.environ.get("TRIMTAB_LLAMACPP")
pytestmark = pytest.mark.skipif(not FOLDER, reason="TRIMTAB_LLAMACPP names no folder of llama.cpp")

PROMPTS = ["Text message to my sister:\n", "The weather today is", "Dear sir, I"]
#: A text whose tokens llama.cpp makes by what the file says of the tokenizer.
TEXT = "She  looked at   the map\n\n and 12345 Größe, 日本 🎉 I'VE <b>"
NEW = 16
#: Operators at sites, each with a dial at which it shows.
STEERINGS = {
    "heads": ("Scale", 0.8),
    "ffn_out": ("Scale", 0.6),
    "attn_norm": ("Rotate", 30.0),
}


def answers(requests: list[dict[str, Any]], folder: Path) -> list[dict[str, list[int]]]:
    """What llama.cpp writes, in a process of its own."""
    given, found = folder / "job.json", folder / "answers.json"
    given.write_text(json.dumps({"requests": requests, "new": NEW, "threads": 1}))
    program = Path(__file__).with_name("llamacpp_answers.mjs")
    ran = subprocess.run(
        ["node", program, given, found], capture_output=True, text=True, cwd=FOLDER
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    written: list[dict[str, list[int]]] = json.loads(found.read_text())
    return written


def greedy(lm: tt.LanguageModel, ids: list[int], steering: tt.Steering | None) -> list[int]:
    """The likeliest tokens, one after the other, of the attached model."""
    given = torch.tensor([ids])
    with torch.no_grad(), lm.steered(*([steering] if steering else [])):
        for _ in range(NEW):
            given = torch.cat((given, lm.model(given).logits[:, -1:].argmax(-1)), 1)
    written: list[int] = given[0, len(ids) :].tolist()
    return written


def shortfall(
    lm: tt.LanguageModel, ids: list[int], written: list[int], steering: tt.Steering | None
) -> float:
    """By how much any of the tokens that were written falls short of the likeliest: llama.cpp keeps
    keys and values in half precision, so that of two near ties it may take the other
    one."""
    with torch.no_grad(), lm.steered(*([steering] if steering else [])):
        logits = lm.model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
    chosen = logits[range(len(written)), written]
    return float((logits.max(-1).values - chosen).max())


def check(
    lm: tt.LanguageModel,
    wanted: list[tuple[list[int], tt.Steering | None]],
    found: list[list[int]],
) -> None:
    """What was written is what the attached steering writes, token by token, near ties apart; and
    the steerings show."""
    expected = [greedy(lm, ids, steering) for ids, steering in wanted]
    for (ids, steering), written in zip(wanted, found, strict=True):
        assert len(written) == NEW
        assert shortfall(lm, ids, written, steering) < 0.05
    same = sum(written == other for written, other in zip(found, expected, strict=True))
    assert same >= 0.8 * len(found)
    assert len({tuple(tokens) for tokens in expected}) > len(PROMPTS)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m"])
def test_adapters_and_baked_files(name: str, tmp_path: Path) -> None:
    lm = tt.load(name, device="cpu", dtype=torch.float32)
    base = str(tt.save_gguf(lm, tmp_path / "base.gguf"))
    runs: list[tuple[str, str | None, tt.Steering | None]] = [(base, None, None)]
    for kind, (op, dial) in STEERINGS.items():
        if name.startswith("gemma") and kind == "ffn_out":
            continue  # a norm writes it
        steering = one(lm, f"layers.5.{kind}", op).at(dial)
        adapter, baked = tmp_path / f"{kind}.lora.gguf", tmp_path / f"{kind}.gguf"
        tt.export(lm, steering, "gguf-lora", adapter)
        tt.save_gguf(tt.bake(lm, steering), baked)
        runs += [(base, str(adapter), steering), (str(baked), None, steering)]
    tokens = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    requests = [
        {"model": model, "adapter": adapter, "tokens": ids, "text": TEXT}
        for ids in tokens
        for model, adapter, _ in runs
    ]
    found = answers(requests, tmp_path)
    wanted = [(ids, steering) for ids in tokens for _, _, steering in runs]
    check(lm, wanted, [one_found["tokens"] for one_found in found])
    plain = lm.tokenizer(TEXT, add_special_tokens=False).input_ids
    for one_found in found:
        assert one_found["text"][-len(plain) :] == plain


#: Phi-3's frequencies, of which those for long texts act beyond so few tokens.
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
}  # fmt: skip


@pytest.mark.parametrize("original", [4, 512])
def test_phi_3s_rotary_frequencies(original: int, tmp_path: Path) -> None:
    rope = {**LONG_ROPE, "original_max_position_embeddings": original}
    size = {"original_max_position_embeddings": original, "max_position_embeddings": 1024}
    lm = tiny("phi3", rope_parameters=rope, **size)
    base = str(tt.save_gguf(lm, tmp_path / "base.gguf"))
    tokens = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    requests = [{"model": base, "adapter": None, "tokens": ids, "text": TEXT} for ids in tokens]
    found = [one_found["tokens"] for one_found in answers(requests, tmp_path)]
    plain = tiny("phi3", max_position_embeddings=1024)
    for ids, written in zip(tokens, found, strict=True):
        assert len(ids) > 4
        assert shortfall(lm, ids, written, None) < 0.01
        assert shortfall(plain, ids, written, None) > 0.05


#: Of tiny models: mixtures, and what has q, k and v in one, or gate and up.
TINY = ("mixtral", "qwen2_moe", "qwen3_moe", "phi3", "gpt2")
OF_TINY = {
    "heads": ("Scale", 1.5),
    "ffn_in": ("Scale", 2.0),
    "ffn_norm": ("Rotate", 60.0),
    "router": ("Scale", 3.0),
}


def tiny_runs(
    lm: tt.LanguageModel, name: str, folder: Path
) -> list[tuple[str, str | None, tt.Steering | None]]:
    """A model as it is, with each steering's adapter, and baked: its file, an adapter's, and what
    is steered."""
    base = str(tt.save_gguf(lm, folder / "base.gguf"))
    runs: list[tuple[str, str | None, tt.Steering | None]] = [(base, None, None)]
    for kind, (op, dial) in OF_TINY.items():
        if kind == "router" and name in ("phi3", "gpt2"):
            continue
        steering = one(lm, f"layers.1.{kind}", op).at(dial)
        adapter, baked = folder / f"{kind}.lora.gguf", folder / f"{kind}.gguf"
        tt.export(lm, steering, "gguf-lora", adapter)
        tt.save_gguf(tt.bake(lm, steering), baked)
        runs += [(base, str(adapter), steering), (str(baked), None, steering)]
    return runs


@pytest.mark.parametrize("name", TINY)
def test_mixtures_and_fused_weights(name: str, tmp_path: Path) -> None:
    lm = tiny(name)
    runs = tiny_runs(lm, name, tmp_path)
    tokens = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    requests = [
        {"model": model, "adapter": adapter, "tokens": ids, "text": TEXT}
        for ids in tokens
        for model, adapter, _ in runs
    ]
    found = [one_found["tokens"] for one_found in answers(requests, tmp_path)]
    wanted = [(ids, steering) for ids in tokens for _, _, steering in runs]
    for (ids, steering), written in zip(wanted, found, strict=True):
        assert len(written) == NEW
        assert shortfall(lm, ids, written, steering) < 0.01
    assert len({tuple(written) for written in found}) > len(PROMPTS) * (len(runs) // 2 - 1)
    # Without the steering those tokens are none that the model would write.
    lost = [
        shortfall(lm, ids, written, None)
        for (ids, one), written in zip(wanted, found, strict=True)
        if one
    ]
    assert sum(short > 0.05 for short in lost) > len(lost) / 2


@pytest.mark.parametrize("name", TINY)
def test_control_vectors_of_tiny_models(name: str, tmp_path: Path) -> None:
    lm = tiny(name)
    base = str(tt.save_gguf(lm, tmp_path / "base.gguf"))
    steering = one(lm, "layers.1.resid", "Add").at(3.0)
    tt.export(lm, steering, "gguf", tmp_path / "v.gguf")
    tokens = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    requests = [{"vector": str(tmp_path / "v.gguf"), "tokens": ids} for ids in tokens]
    found = answers_under_vectors({"model": base, "requests": requests}, tmp_path)
    for ids, written in zip(tokens, found, strict=True):
        assert shortfall(lm, ids, written, steering) < 0.01
        assert shortfall(lm, ids, written, None) > 0.05


def answers_under_vectors(job: dict[str, Any], folder: Path) -> list[list[int]]:
    """What llama.cpp writes under control vectors, in a process of its own."""
    (library,) = Path(str(FOLDER)).glob("node_modules/@node-llama-cpp/linux-x64/bins/linux-x64")
    given, found = folder / "job.json", folder / "answers.json"
    given.write_text(json.dumps({"folder": str(library), "new": NEW, **job}))
    program = Path(__file__).with_name("llamacpp_vector.py")
    ran = subprocess.run([sys.executable, program, given, found], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    written: list[list[int]] = json.loads(found.read_text())
    return written


@pytest.mark.parametrize(
    ("name", "dials"), [("smollm2-135m-instruct", (6.0, -6.0)), ("gemma3-270m", (30.0, -30.0))]
)
def test_control_vectors(name: str, dials: tuple[float, float], tmp_path: Path) -> None:
    lm = tt.load(name, device="cpu", dtype=torch.float32)
    base = str(tt.save_gguf(lm, tmp_path / "base.gguf"))
    parts = [one(lm, f"layers.{layer}.resid", "Add", seed=layer) for layer in (1, 7, 11)]
    steering = replace(parts[0], interventions=tuple(part.interventions[0] for part in parts))
    runs: list[tuple[str | None, tt.Steering | None]] = [(None, None)]
    for dial in dials:
        vector = tmp_path / f"{dial:g}.gguf"
        tt.export(lm, steering.at(dial), "gguf", vector)
        runs.append((str(vector), steering.at(dial)))
    tokens = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    requests = [{"vector": vector, "tokens": ids} for ids in tokens for vector, _ in runs]
    wanted = [(ids, attached) for ids in tokens for _, attached in runs]
    check(lm, wanted, answers_under_vectors({"model": base, "requests": requests}, tmp_path))
