"""Baked checkpoints say what was baked; files that are written have the usual modes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab as tt
from commands import Command, home, refused, trimtab, warnings_of, work
from helpers import PROMPTS, language_model, warned

__all__ = ["home", "trimtab", "work"]  # fixtures, which pytest finds by their names here


@pytest.fixture
def baked(work: Path) -> Path:
    lm = tt.load("model", device="cpu")
    steering = tt.Steering.load("au.safetensors").at(3)
    return tt.bake(lm, steering).save_pretrained(work / "baked")


def test_a_checkpoint_says_what_was_baked(baked: Path, home: Path) -> None:
    content = json.loads((baked / "trimtab.json").read_text())
    assert content["format"] == 1
    (record,) = content["baked"]
    steering, lm = tt.Steering.load(home / "au.safetensors").at(3), tt.load(home / "model")
    assert record["method"] == "austeer"
    assert record["label"] == steering.label
    assert record["dial"] == {"name": "alpha", "value": 3.0, "unit": ""}
    assert record["digest"] == steering.digest
    assert record["base"]["digest"] == lm.identity.digest
    assert record["contrast"] == steering.contrast
    assert record["trimtab"] == tt.__version__
    assert record["date"].startswith("20")

    card = (baked / "README.md").read_text()
    head, _, rest = card.removeprefix("---\n").partition("---\n")
    assert "library_name: transformers" in head
    assert "base_model" not in head  # a directory of this machine says nothing to others
    assert "# baked" in rest
    assert "those of `model` with a steering baked in by trimtab" in rest
    assert steering.label in rest
    assert steering.digest[:12] in rest

    # Plain transformers knows nothing of all that.
    AutoTokenizer.from_pretrained(baked)
    AutoModelForCausalLM.from_pretrained(baked)


def test_a_hub_model_is_the_base_of_the_card(tmp_path: Path) -> None:
    lm = language_model("llama")
    lm.name = "owner/name@v2"
    steering = tt.CAA(layer=1).fit(lm, tt.Contrast.from_pairs([("I am", " well", " ill")]))
    card = tt.bake(lm, steering).save_pretrained(tmp_path / "m") / "README.md"
    assert "base_model: owner/name\n" in card.read_text()


def test_what_is_baked_is_known_again(baked: Path, home: Path) -> None:
    again = tt.load(baked, device="cpu")
    (record,) = again.baked
    steering = tt.Steering.load(home / "au.safetensors").at(-2)
    (said,) = warned(lambda: again.logits(PROMPTS, steering=steering, force=True))
    assert "is baked into" in said
    assert "acts a second time" in said
    other = tt.Steering.load(home / "caa.safetensors")
    assert warned(lambda: again.logits(PROMPTS, steering=other, force=True)) == []

    # More on top: the record grows, in order, and says each one's base.
    twice = tt.bake(again, other, force=True)
    assert [one["method"] for one in twice.baked] == ["austeer", "caa"]
    assert twice.baked[0] == record
    assert twice.baked[1]["base"]["name"] == str(baked)


def test_a_card_that_is_there_is_kept(baked: Path, home: Path) -> None:
    lm, other = tt.load(home / "model"), tt.Steering.load(home / "caa.safetensors")
    (baked / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n")
    for _ in range(2):
        tt.bake(lm, other).save_pretrained(baked, overwrite=True)
    card = (baked / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n")
    assert card.count("baked in by trimtab") == 1
    assert other.label in card
    # A model without a steering has no such part, and keeps the rest.
    lm.save_pretrained(baked, overwrite=True)
    assert (baked / "README.md").read_text().strip().endswith("My own words.")
    assert not (baked / "trimtab.json").exists()


def test_a_plain_checkpoint_has_no_record(tmp_path: Path) -> None:
    target = language_model("llama").save_pretrained(tmp_path / "m")
    assert not {"README.md", "trimtab.json"} & {file.name for file in target.iterdir()}


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "baked": [1]}'])
def test_a_damaged_record_is_warned_about(baked: Path, content: str) -> None:
    (baked / "trimtab.json").write_text(content)
    said = warned(lambda: tt.load(baked, device="cpu").logits(PROMPTS))
    assert len(said) == 1
    assert "does not say what was baked into it" in said[0]


def test_inspecting_a_checkpoint(trimtab: Command, baked: Path) -> None:
    text = trimtab("inspect baked").text
    assert "model, into which were baked" in text
    assert "austeer alpha=3 (steering " in text
    found = trimtab("inspect baked --json").json
    assert found == {"baked": json.loads((baked / "trimtab.json").read_text())["baked"]}
    refused(trimtab("inspect model"), "does not say that something is baked into it")


def test_the_command_says_in_the_directory_what_it_baked(trimtab: Command, work: Path) -> None:
    trimtab("bake --model model --steer au.safetensors@5 -o x --json")
    assert json.loads((work / "x/trimtab.json").read_text())["baked"][0]["dial"]["value"] == 5
    # Over a directory that has a record and a card.
    trimtab("bake --model model --steer caa.safetensors -o x --overwrite --json")
    assert json.loads((work / "x/trimtab.json").read_text())["baked"][0]["method"] == "caa"
    assert len(warnings_of(trimtab("generate -m x --steer caa.safetensors --force Hi"))) == 1


# -- modes -------------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


@pytest.mark.slow
def test_everything_that_is_written_has_the_usual_modes(work: Path, home: Path) -> None:
    """In a process of its own, because the umask is of a process."""
    out = work / "out"
    out.mkdir()
    model = home / "model"
    (work / "prompts.jsonl").write_text('{"prompt": "Today I feel"}\n')
    program = f"""
import os, warnings
os.umask(0o027)
warnings.simplefilter("ignore")
import trimtab as tt
lm = tt.load({str(model)!r}, device="cpu")
contrast = tt.Contrast.from_pairs([("I am", " well", " ill"), ("It is", " good", " bad")])
(steering,) = tt.fit([tt.CAA(layer=1)], lm, contrast, cache={str(out / "cache")!r})
steering.save({str(out / "it.safetensors")!r})
lm.save_pretrained({str(out / "plain")!r})
tt.bake(lm, steering).save_pretrained({str(out / "baked")!r})
tt.evaluate(lm, ["coherence:{work / "prompts.jsonl"}"], steering=steering, max_new_tokens=2,
            output={str(out / "run")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})
    found = modes(out)
    assert {"baked/model.safetensors", "run/records.jsonl", "it.safetensors"} <= found.keys()
    folders = {name for name in found if (out / name).is_dir()}
    wrong = {
        name: oct(mode)
        for name, mode in found.items()
        if mode != (0o750 if name in folders else 0o640)
    }
    assert wrong == {}
