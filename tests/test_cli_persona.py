"""`trimtab contrast persona`: the command line of a contrast for a trait."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import trimtab as tt
from commands import Command, home, refused, save_model, trimtab, work
from services import serving, tossing
from trimtab.writing import persona

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here


@pytest.fixture
def model(work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(persona, "FEWEST", 1)
    monkeypatch.setattr(persona, "SEES", 0.0)  # a coin judges
    save_model(work / "long", name="llama", max_position_embeddings=2048)
    config = work / "long" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 2048}))
    return "long"


def test_a_contrast_from_a_wish(trimtab: Command, model: str) -> None:
    wish = shlex.quote("answers in one short sentence")
    small = "--pairs 2 --questions 20 --max-new-tokens 5"
    with serving(tossing) as service:
        command = (
            f"contrast persona {wish} --model {model} {small} --judge chat:j "
            f"--judge-url {service.url}"
        )
        found = trimtab(f"{command} -o a.jsonl --json").json
        contrast = tt.Contrast.from_jsonl("a.jsonl")
        assert found.items() >= contrast.made.items()  # type: ignore[union-attr]
        expected = ("a.jsonl", "a.made.json", len(contrast), contrast.sizes)
        assert tuple(found[key] for key in ("contrast", "made", "rows", "parts")) == expected
        assert found["counts"]["written"] == 40
        text = trimtab(f"{command} -o b.jsonl").text
        refused(trimtab(f"{command} -o a.jsonl"), "a.jsonl exists", "--overwrite")
    assert Path("b.jsonl").read_bytes() == Path("a.jsonl").read_bytes()
    assert "+ Answer in one short sentence.\n  - Answer in several long paragraphs." in text
    assert "train: How do I boil an egg?" in text
    assert f"kept {len(contrast)} of 40 pairs of answers (dropped: " in text
    assert "instructions from templates 2; questions from built in 20" in text
    fitted = trimtab(f"fit caa --model {model} -c a.jsonl --alpha 1 -o a.safetensors --json").json
    assert fitted["contrast"]["made"]["wish"] == "answers in one short sentence"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--writer magic", ["--writer magic", "templates, local:MODEL, or chat:NAME"]),
        ("--writer chat:x", ["--writer-url"]),
        ("--judge chat:x", ["--judge chat:x", "--judge-url"]),
        ("--judge templates", ["--judge templates: write local:MODEL"]),
        ("--pairs 1 --questions 2", ["make 1 rows to fit on", "10 are needed"]),
        ("--pairs 0", ["--pairs"]),
    ],
)
def test_what_is_refused(
    options: str, says: list[str], trimtab: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persona, "FEWEST", 10)
    refused(trimtab(f"contrast persona formal --model {model} -o a.jsonl {options}"), *says)
    assert not Path("a.jsonl").exists()
