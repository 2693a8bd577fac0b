"""The card of a steering on the hub: what it says, and that nothing in a file can make it say or do
something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

import trimtab as tt
from steerings import MODEL, some_steering
from trimtab.exchange.card import (
    About,
    base_model_of,
    is_control_vector,
    lora_rank,
    write_card,
)
from trimtab.steering import Add, Calibration, Scale

ABOUT = About("me/joy", None, None, "ab" * 32, 1234)
HEADINGS = ["joy", "Dial", "Gain and cost", "What breaks", "Use", "How it was made", "Digests"]


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The front matter as the hub reads it, and the text."""
    empty, front, text = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


def rendered(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def headings(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [
        "".join(child.content for child in tokens[i + 1].children or ())
        for i, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def test_what_a_steering_without_measurements_says() -> None:
    front, text = parts(write_card(some_steering(), ABOUT))
    assert front == {
        "library_name": "trimtab",
        "tags": ["trimtab", "steering-vector", "austeer", "dial-alpha"],
        "trimtab": {
            "method": "austeer",
            "dial": {"name": "alpha", "unit": "", "default": 8.0, "range": [0.0, 100.0]},
            "model": {"name": "tiny", "architecture": "llama", "digest": MODEL.digest},
            "digest": some_steering().digest,
        },
    }
    assert headings(text) == HEADINGS
    assert "Strengths: not measured." in text
    assert "| gain | not measured |  |  |" in text
    assert "Where text breaks was not measured." in text
    assert 'tt.load("tiny"), tt.pull("me/joy")' in text
    assert "trimtab generate --model tiny --steer joy.safetensors 'Today I feel'" in text
    for digest in (ABOUT.sha256, some_steering().digest, MODEL.digest, "ab" * 32):
        assert digest in text


def test_base_model_and_licence_are_said_where_they_are_known() -> None:
    on_hub = some_steering(model=replace(MODEL, name="them/tiny@v1"))
    assert base_model_of(on_hub, None) == "them/tiny"
    assert base_model_of(some_steering(), None) is None
    assert base_model_of(on_hub, "a/b") == "a/b"
    front, text = parts(write_card(on_hub, replace(ABOUT, base_model="them/tiny", license="mit")))
    assert front["license"] == "mit"
    assert (front["base_model"], front["base_model_relation"]) == ("them/tiny", "adapter")
    assert "--model them/tiny@v1" in text  # the weights that it was made on
    assert "vllm serve" not in text
    scaled = some_steering(interventions=some_steering().interventions[:1])
    _, text = parts(write_card(scaled, replace(ABOUT, base_model="them/tiny")))
    assert "called `tiny` here" in text
    assert "--model tiny --steer joy.safetensors" in text
    assert "--model them/tiny --to lora -o adapter/ --force" in text
    assert "vllm serve them/tiny --enable-lora --max-lora-rank 8 --lora" in text
    local = replace(scaled, model=replace(MODEL, name="/home/x/m"))
    _, text = parts(write_card(local, replace(ABOUT, base_model="them/tiny")))
    assert "--model them/tiny --steer" in text


def test_what_was_measured_is_said_with_its_intervals() -> None:
    calibration = Calibration(
        (0.1, 0.5, 1.0), 8, "d", (1.0, 2.5, None), (0.5, 1.0, None), (-1.0, -2.0, -4.0),
        (-0.5, -1.0, -2.0),
    )  # fmt: skip
    measured = {"prompts": 8, "cost": 0.25, "breaks": 1.0, "gain": 0.4, "gain_ci95": [0.1, 0.7]}
    steering = some_steering(calibration=calibration, findings={"measured": measured})
    _, text = parts(write_card(steering, ABOUT))
    assert "| gentle | 0.1 | 1 | -1 |" in text
    assert "| strong | 1 | not measured | -4 |" in text
    assert "| gain | +0.4 | +0.1 to +0.7 | measured |" in text
    assert "| cost | +0.25 nats per token of plain text | not measured | measured |" in text
    assert "at 100, the end of the range, by 1 nats per token" in text


def test_what_was_predicted_is_said_to_be() -> None:
    predicted = {"gain": 0.5, "gain_error": 0.1, "kl": 0.01}
    _, text = parts(write_card(some_steering(findings={"predicted": predicted}), ABOUT))
    # 8 times the gain at 1, and 64 times the KL; 1.96 standard errors on either side.
    assert "| gain | +4 nats of log-odds per pair | +2.43 to +5.57 | predicted" in text
    assert "| cost | +0.64 nats per token of plain text | not measured | predicted" in text


NASTY = [
    "x\n---\nlicense: gpl\ntags: [evil]\n---\n# Owned",
    "</code></pre><script>alert(1)</script>",
    "![x](http://evil/x.png) [y](javascript:z) <http://evil> http://evil",
    "`` ` ``` ````",
    "a | b | c\n| --- |",
    "*bold* _it_ # head\n\n# head\n> quote\n- item\n1. one\n~~~\n",
    "\x1b[31m\u202ered\u2028\x00",
    "!!python/object/apply:os.system ['true']",
    "'; rm -rf / #",
    '"); import os; os.system("x',
]


@pytest.mark.parametrize("nasty", NASTY)
def test_names_of_a_file_are_shown_and_not_obeyed(nasty: str) -> None:
    steering = some_steering(
        method=nasty,
        hyperparameters={nasty: nasty},
        dial=tt.Dial(nasty, 1.0, (0.0, 2.0), nasty[:20]),
        model=replace(MODEL, name=nasty, architecture=nasty, digest=nasty),
        contrast={"name": nasty, "digest": nasty, "rows": nasty},
        versions={nasty: nasty},
        date=nasty,
    )
    card = write_card(steering, ABOUT)
    front, text = parts(card)
    assert set(front) == {"library_name", "tags", "trimtab"}
    assert front["tags"][:2] == ["trimtab", "steering-vector"]
    assert front["trimtab"]["method"].isprintable()
    assert headings(text) == HEADINGS
    html = rendered(text)
    for tag in ("<script", "<img", "<a ", "<blockquote", "<em>", "<strong", 'javascript:z)"'):
        assert tag not in html, tag
    assert all(line.isprintable() for line in card.splitlines())
    # What is to be typed stays one word of a shell, and one string of Python.
    codes = [each.content for each in MarkdownIt("commonmark").parse(text) if each.type == "fence"]
    assert len(codes) == 2
    assert len(codes[0].splitlines()) == 3
    compile(codes[0], "card", "exec")


def test_what_other_programs_take() -> None:
    vector = torch.linspace(-1, 1, 48)
    add = [tt.Intervention(f"layers.{i}.resid", Add(vector)) for i in range(3)]
    scale = Scale(torch.tensor([1]), torch.tensor([0.5]), 48)
    many = Scale(torch.arange(20), torch.ones(20), 48)
    wide = Scale(torch.arange(600), torch.ones(600), 1000)
    cases: list[tuple[list[tt.Intervention], int | None, bool]] = [
        ([add[1], add[2]], None, True),
        ([add[0], add[1]], None, False),  # control vectors begin behind the first block
        ([tt.Intervention("layers.1.resid", Add(vector), "generated")], None, False),
        ([tt.Intervention("layers.1.resid", Add(vector, "always"))], None, False),
        ([tt.Intervention("layers.1.ffn_out", scale)], 8, False),
        ([tt.Intervention(f"layers.1.{kind}", many) for kind in ("heads", "ffn_in")], 64, False),
        ([tt.Intervention("layers.1.ffn_out", wide)], None, False),
        ([tt.Intervention("layers.1.ffn_out", scale, "generated")], None, False),
        ([tt.Intervention("layers.1.ffn_out", Add(vector))], None, False),
        ([tt.Intervention("final_norm", scale)], None, False),
    ]
    for interventions, lora, control in cases:
        steering = some_steering(interventions=tuple(interventions))
        assert (lora_rank(steering), is_control_vector(steering)) == (lora, control)
        _, text = parts(write_card(steering, ABOUT))
        assert (f"--max-lora-rank {lora} " in text, "--enable-lora" in text) == (
            (lora is not None,) * 2
        )
        assert ("--control-vector" in text) == control
