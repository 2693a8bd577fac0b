"""`trimtab audit`."""

from __future__ import annotations

import json
from pathlib import Path

import trimtab as tt
from commands import Command, home, listing, refused, trimtab, work

__all__ = ["home", "trimtab", "work"]


def baked(trimtab: Command, *steerings: str) -> None:
    options = " ".join(f"--steer {each}" for each in steerings)
    assert trimtab(f"bake --model model {options} -o joy").status == 0


def test_what_differs_and_what_explains_it(trimtab: Command) -> None:
    baked(trimtab, "au.safetensors@3")
    found = trimtab("audit model joy --json").json
    assert (found["differing"], found["explained"], found["steerings"]) == (1, None, [])
    (change,) = found["changes"]
    assert change["edit"]["kind"] == "scaled rows"
    assert change["edit"]["numbers"]["scaled"] == 5
    assert change["site"] == f"layers.{change['layer']}.ffn_out"
    found = trimtab("audit model joy --steer au.safetensors@3 --json").json
    assert (found["exact"], found["explained"], found["unexplained"]) == (True, 1.0, 0.0)
    found = trimtab("audit model joy --steer au.safetensors@2 --json").json
    # A gain of 3 with one of 2 explained: a third of the norm is left, to float32's last bits.
    assert abs(found["unexplained"] - 1 / 3) < 1e-4
    said = trimtab("audit model joy --steer au.safetensors@3").text
    assert (
        "1 of 30 tensors differ (1 scaled rows), and the steerings explain all of it, bit for bit"
        in said
    )
    assert "5 of 48 rows scaled by" in said
    assert trimtab("audit model model").text == "all 30 tensors are the same\n"


def test_a_steering_is_taken_out(trimtab: Command) -> None:
    baked(trimtab, "au.safetensors@3", "every/ablation.safetensors")
    both = "--steer au.safetensors@3 --steer every/ablation.safetensors"
    line = f"audit model joy {both} --strip au.safetensors@3 -o plain"
    found = trimtab(f"{line} --json").json
    assert found["exact"]
    assert found["stripped"]["how"] == "restored"
    assert found["stripped"]["output"] == "plain"
    assert tt.audit("model", "plain", tt.Steering.load("every/ablation.safetensors")).exact
    record = json.loads(Path("plain/trimtab.json").read_text())
    assert [each["method"] for each in record["baked"]] == ["ablation"]
    line = "audit model plain --strip every/ablation.safetensors -o bare"
    said = trimtab(line).text
    assert "Saved bare without ablation" in said
    assert "put back from BASE, to the bit" in said
    assert not Path("bare/trimtab.json").exists()
    assert not tt.audit("model", "bare").changes


def test_what_is_refused(trimtab: Command, work: Path) -> None:
    baked(trimtab, "au.safetensors@3")
    left = listing(work)
    refused(trimtab("audit model gpt2"), "cannot be compared: the one is llama, the other gpt2")
    refused(trimtab("audit model nowhere"), "nowhere")
    refused(trimtab("audit model joy --strip au.safetensors@3"), "--output DIR go together")
    refused(trimtab("audit model joy -o x"), "--output DIR go together")
    refused(trimtab("audit model joy --strip au.safetensors@3 -o joy --overwrite"), "came from")
    refused(trimtab("audit model joy --strip au.safetensors@3 -o pairs.jsonl"), "exists")
    refused(trimtab("audit model joy --strip every/caa.safetensors -o x --json"), "does not hold")
    refused(trimtab("audit other joy --steer au.safetensors"), "this steering was made for")
    assert listing(work) == left
