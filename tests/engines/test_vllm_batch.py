"""vLLM in this process, many texts under steerings of their own: what it writes, and how likely
it finds texts, is what transformers gives in float32.

`make test-vllm` names a Python with vLLM and trimtab in TRIMTAB_VLLM and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_vllm import first_blocks

import trimtab as tt

PYTHON = os.environ.get("TRIMTAB_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRIMTAB_VLLM names no Python with vLLM"),
]


def ran(program: str, *arguments: Any) -> str:
    """What a program of this directory prints, with vLLM and these sources."""
    sources = str(Path(tt.__file__).parent.parent)
    more = {"PYTHONPATH": sources, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1"}  # fmt: skip
    given = [str(one) for one in arguments]
    done = subprocess.run(
        [str(PYTHON), *(["-m", "trimtab"] if program == "trimtab" else [program]), *given],
        capture_output=True, text=True, env={**os.environ, **more},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_eager_batches_are_what_transformers_gives(tmp_path: Path) -> None:
    first_blocks("smollm2-135m-instruct", tmp_path / "model")
    program = Path(__file__).with_name("vllm_batch.py")
    ran(str(program), tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["texts"]["vllm"] == said["texts"]["transformers"]
    assert len({tuple(one) for one in said["texts"]["vllm"]}) > len(said["texts"]["vllm"]) / 2
    assert said["file"]["vllm"] == said["file"]["transformers"]
    assert len(said["scored"]) > 40
    off = [abs(one - other) for one, other in said["scored"]]
    assert max(off) < 1e-3, max(off)
    assert said["cached"]
    for kind in ("evaluated", "swept"):
        found, expected = said[kind]["vllm"], said[kind]["transformers"]
        assert len(found) == len(expected) > 5
        for one, other in zip(found, expected, strict=True):
            assert alike(one, other), (kind, one, other)


def test_eager_fits_gates_and_comparisons(tmp_path: Path) -> None:
    first_blocks("smollm2-135m-instruct", tmp_path / "model")
    ran(str(Path(__file__).with_name("vllm_fitted.py")), tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    assert len(said["fitted"]) == 6
    assert all(off < 1e-4 for _, off in said["fitted"]), said["fitted"]
    # Where all tokens are read all of them run; of the last ones only what is not known.
    every, tokens, held_out, last = said["read"]
    assert tokens < every < tokens + held_out  # of which the probe is judged by the last ones
    assert last < tokens / 2
    for one, other in zip(said["texts"]["vllm"], said["texts"]["transformers"], strict=True):
        assert one[0] == other[0]
        for gate, wanted in zip(one[1], other[1], strict=True):
            scores, expected = gate.pop("scores"), wanted.pop("scores")
            assert scores == pytest.approx(expected, abs=1e-3)
            assert gate == wanted
    fired = {gate["fired"] for _, gates in said["texts"]["transformers"] for gate in gates}
    assert fired == {True, False}
    for one, other in zip(*said["compared"].values(), strict=True):
        assert alike(one, other), (one, other)
    assert len(said["compared"]["vllm"]) == 4
    assert all(said["timed"])
    assert all(said["swept"])
    assert any("vllm answered the rows" in note for note in said["notes"])


def test_eager_command_prints_nothing_else(tmp_path: Path) -> None:
    lm = first_blocks("smollm2-135m-instruct", tmp_path / "model")
    rows = [{"prompt": text} for text in ("Dear sir, I am", "Who", "We went to the")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    said = ran(
        "trimtab", "generate", "--model", tmp_path / "model", "--input", tmp_path / "rows.jsonl",
        "--output", tmp_path / "out.jsonl", "--engine", "vllm", "--vllm", "max_model_len=256",
        "--vllm", "enforce_eager=true", "--max-new-tokens", 9, "--raw", "--json",
    )  # fmt: skip
    assert json.loads(said)["written"] == 3
    made = [json.loads(one) for one in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = lm.generate([one["prompt"] for one in rows], max_new_tokens=9, chat=False)
    assert [one["tokens"] for one in made] == [list(one.tokens) for one in expected]


def alike(one: list[Any], other: list[Any]) -> bool:
    """Numbers up to how passes round, and the rest as it is."""
    return all(
        a == pytest.approx(b, abs=2e-3) if isinstance(a, float) else a == b
        for a, b in zip(one, other, strict=True)
    )
