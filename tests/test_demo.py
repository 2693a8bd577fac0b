"""The demonstration, end to end: on a tiny model, and slowly on the real one."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab as tt
from commands import Command, failing, listing, refused, trimtab, with_other, write_rows
from tiny import tiny_model, tiny_tokenizer
from trimtab.cli import demonstration as demo
from trimtab.cli import main
from trimtab.reading.likelihood import log_odds

__all__ = ["trimtab"]  # a fixture, which pytest finds by its name here

FEELINGS = ("happy", "sad", "good", "bad", "kind", "clever", "strong", "great")
SUBJECTS = ("Today I feel", "She said that he was", "The film was", "People think that it is")
FILES = {"demo.json", "demo.png", "austeer.safetensors", "caa.safetensors", "model"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose texts may be as long as those of the demonstration."""
    home = tmp_path_factory.mktemp("home")
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    config = home / "model" / "tokenizer_config.json"
    settings = {**json.loads(config.read_text()), "model_max_length": 4096}
    config.write_text(json.dumps(settings))
    return home


def prepare(folder: Path, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a small contrast; the demonstration made small to match."""
    patch.delenv("FORCE_COLOR", raising=False)
    patch.chdir(folder)
    (folder / "model").symlink_to(home / "model")
    parts = ["train"] * 6 + ["validation"] * 4 + ["test"] * 6
    pairs = [
        {
            "prompt": SUBJECTS[i % 4],
            "positive": f" {FEELINGS[i % 8]} {i}.",
            "negative": f" not {FEELINGS[(i + 3) % 8]}.",
            "part": part,
        }
        for i, part in enumerate(parts)
    ]
    write_rows("pairs.jsonl", pairs)
    write_rows("train.jsonl", pairs[:6])
    write_rows("unpaired.jsonl", [{"text": t, "label": t} for t in ("positive", "negative")])
    patch.setattr(demo, "COST_LIMIT", 1000.0)  # a random model has nothing to lose
    patch.setattr(demo, "UNITS", (4, 8))
    patch.setattr(demo, "ALPHAS", (1.0, 2.0))


@pytest.fixture
def work(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, home, monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def done(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory `out` that a demonstration has filled, with what it printed beside it."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, home, patch)
        streams = io.StringIO(), io.StringIO()
        with (
            redirect_stdout(streams[0]),
            redirect_stderr(streams[1]),
            pytest.raises(SystemExit) as ended,
        ):
            main(shlex.split(f"{DEMO} --json"))
        assert (ended.value.code, streams[1].getvalue()) == (0, "")
    (folder / "printed.json").write_text(streams[0].getvalue(), encoding="utf-8")
    return folder


@pytest.fixture
def numbers(done: Path) -> Any:
    """The one JSON object that this demonstration printed."""
    return json.loads((done / "printed.json").read_text(encoding="utf-8"))


DEMO = "demo --model model --contrast pairs.jsonl --device cpu -o out"


def check_files(folder: Path, numbers: dict[str, Any]) -> None:
    """Everything that a demonstration promises to leave, and nothing else."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8")) == numbers
    with Image.open(folder / "demo.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape
    assert 1000 < width < 4000
    assert 500 < height < 2000
    assert 0.01 < (pixels < 250).mean() < 0.5  # drawn on, and not all over
    for method in ("austeer", "caa"):
        assert tt.Steering.load(folder / f"{method}.safetensors").method == method
    baked = numbers["baked"]
    assert baked["same_tokens"] == baked["tokens"] > 0


def test_demo(done: Path, numbers: dict[str, Any]) -> None:
    check_files(done / "out", numbers)
    names = [result["name"] for result in numbers["results"]]
    assert names == ["unsteered", "AUSteer, signed", "AUSteer, paper", "CAA"]
    for result in numbers["results"]:
        gain, cost = result["gain"], result["cost"]
        assert gain["n"] == 6
        assert cost["n"] > 1
        for interval in (gain, cost):
            assert interval["low"] <= interval["value"] <= interval["high"]
        assert 0 <= result["preferred"] <= 1
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert numbers["results"][0]["gain"] == {**zero, "n": 6}
    assert [chosen["method"] for chosen in numbers["chosen"]] == ["austeer", "caa"]
    assert numbers["contrast"]["name"] == "pairs.jsonl"
    assert len(numbers["texts"]) == 3 * len(demo.PROMPTS)
    assert numbers["steerings"] == ["out/austeer.safetensors", "out/caa.safetensors"]
    assert numbers["picture"] == "out/demo.png"


def test_its_numbers_are_those_of_its_files(
    done: Path, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it left can be loaded, and gives on the test part the gain that it reports."""
    monkeypatch.chdir(done)
    lm = tt.load("model", device="cpu")
    test = tt.load_contrast("pairs.jsonl").part("test")
    results = {result["name"]: result for result in numbers["results"]}
    base = log_odds(lm, test)
    for name, method, chosen in zip(
        ("AUSteer, signed", "CAA"), ("austeer", "caa"), numbers["chosen"], strict=True
    ):
        steering = tt.Steering.load(f"out/{method}.safetensors")
        assert steering.setting == chosen["dial"]
        gain = log_odds(lm, test, steering) - base
        assert results[name]["gain"]["value"] == pytest.approx(float(gain.mean()), abs=1e-4)
        preferred = float((base + gain > 0).double().mean())
        assert results[name]["preferred"] == pytest.approx(preferred)
    # The checkpoint is the AUSteer steering.
    plain = AutoModelForCausalLM.from_pretrained("out/model")
    ids = AutoTokenizer.from_pretrained("out/model")("Today I feel", return_tensors="pt").input_ids
    with torch.no_grad(), lm.steered(tt.Steering.load("out/austeer.safetensors")):
        torch.testing.assert_close(plain(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_settings_are_chosen_on_validation(
    trimtab: Command, work: Path, numbers: dict[str, Any]
) -> None:
    """Other test pairs give other results, and the same choice."""
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    for row in rows:
        if row["part"] == "test":
            row["positive"], row["negative"] = row["negative"], row["positive"]
    write_rows("pairs.jsonl", rows)
    other = trimtab(f"{DEMO} --json").json
    assert other["chosen"] == numbers["chosen"]
    for a, b in zip(numbers["results"][1:], other["results"][1:], strict=True):
        assert b["gain"]["value"] == pytest.approx(-a["gain"]["value"], abs=1e-4)


def test_demo_in_words_and_again_into_its_own_directory(
    trimtab: Command, work: Path, done: Path
) -> None:
    shutil.copytree(done / "out", work / "out")
    (work / "out" / "demo.png").write_bytes(b"an old picture")
    text = trimtab(DEMO).text
    for words in (
        "Fitting 7 steerings on 6 pairs, in one pass",
        "on 4 validation pairs",
        "On 6 held-out pairs",
        "AUSteer, signed",
        "Text message to my sister:",
        "chosen: austeer k=",
        "chosen: caa layer=",
        "picture     out/demo.png",
        "checkpoint  out/model",
        "done in",
    ):
        assert words in text
    numbers = json.loads((work / "out" / "demo.json").read_text(encoding="utf-8"))
    check_files(work / "out", numbers)
    tokens = numbers["baked"]["tokens"]
    assert f"the same {tokens} of {tokens} tokens" in text
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("output", ["out", "a/b"])
def test_into_an_empty_directory_and_a_deep_one(
    trimtab: Command, work: Path, numbers: dict[str, Any], output: str
) -> None:
    (work / "out").mkdir()
    found = trimtab(with_other(DEMO, f"-o {output} --json")).json
    check_files(work / output, found)
    assert found["results"] == numbers["results"]  # and it can be repeated


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-o mine", ("mine holds other things than a demo",)),
        ("-o pairs.jsonl", ("pairs.jsonl", "not a directory")),
        ("-o pairs.jsonl/out", ("pairs.jsonl/out", "not a directory")),
        ("--contrast train.jsonl", ("train.jsonl", "no validation rows")),
        ("--contrast unpaired.jsonl", ("unpaired.jsonl", "unpaired")),
        ("--contrast nowhere.jsonl", ("nowhere.jsonl",)),
        ("--contrast builtin:nowhere", ("'nowhere'",)),
        ("--model ./nowhere", ("./nowhere",)),
        ("--dtype int8", ("'int8'",)),
        ("--device gpu9", ("'gpu9'",)),
        ("--colour red", ("--colour",)),
    ],
)
@pytest.mark.parametrize("earlier", [False, True], ids=["", "over an earlier one"])
def test_bad_input(
    trimtab: Command, work: Path, options: str, words: tuple[str, ...], earlier: bool
) -> None:
    """Refused before the work, and before an earlier demonstration is touched."""
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("years of work")
    if earlier:
        (work / "out").mkdir()
        (work / "out" / "demo.json").write_text('{"seconds": 1}')
    before = listing(work)
    refused(trimtab(with_other(DEMO, options)), *words)
    assert listing(work) == before


def test_no_permission_is_said_before_the_work(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Patched, because root may write everywhere.
    monkeypatch.setattr("trimtab.cli.demonstration.os.access", lambda path, mode: False)
    refused(trimtab(DEMO), "cannot write out", "permission")
    assert not (work / "out").exists()


def test_nothing_within_the_cost_limit(
    trimtab: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "COST_LIMIT", -1000.0)
    ran = trimtab(f"{DEMO} --json")
    refused(ran, "no setting of austeer keeps its cost within")
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("target", "error", "status", "words"),
    [
        ("trimtab.cli.demonstration._measure", KeyboardInterrupt(), 130, "interrupted"),
        ("trimtab.cli.demonstration._bake", KeyboardInterrupt(), 130, "interrupted"),
        ("os.replace", KeyboardInterrupt(), 130, "interrupted"),
        ("os.replace", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left"),
    ],
)
def test_ended_in_the_middle(
    trimtab: Command,
    work: Path,
    done: Path,
    numbers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    error: BaseException,
    status: int,
    words: str,
) -> None:
    """No half of a file; old numbers never stand beside new files; and it can be run again."""
    shutil.copytree(done / "out", work / "out")
    before = listing(work)
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(error))
        refused(trimtab(f"{DEMO} --json"), words, status=status)
    if target != "trimtab.cli.demonstration._bake":
        assert listing(work) == before
        return
    assert {path.name for path in (work / "out").iterdir()} == FILES
    assert json.loads((work / "out" / "demo.json").read_text()) == {}
    again = trimtab(f"{DEMO} --json").json
    check_files(work / "out", again)
    assert again["results"] == numbers["results"]


def test_units_scaled_up_and_down_are_drawn_apart(work: Path) -> None:
    """The picture's legend counts what `inspect` says."""
    lm = tt.load("model", device="cpu")
    contrast = tt.load_contrast("pairs.jsonl")
    steering = tt.AUSteer(site="heads", k=8, direction="paper").fit(lm, contrast)
    axes = Figure().subplots()
    steering.plot(axes)
    up = int((steering.tables["gain"] >= 0).sum())
    _, labels = axes.get_legend_handles_labels()
    assert labels == [f"scaled up ({up})", f"scaled down ({8 - up})"]
    assert "8 of 192 units" in axes.get_title()


@pytest.mark.slow
def test_real_demo(
    smollm2: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SmolLM2, as `make demo` runs it: both methods gain, and baking loses nothing."""
    monkeypatch.setattr("trimtab.cli.demo.open_model", lambda *arguments: smollm2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split("demo --device cpu --json"))
    assert ended.value.code == 0
    numbers = json.loads(capsys.readouterr().out)
    check_files(tmp_path / "trimtab-demo", numbers)
    results = {result["name"]: result for result in numbers["results"]}
    for name in ("AUSteer, signed", "CAA"):
        assert results[name]["gain"]["n"] == 100
        assert results[name]["gain"]["low"] > 0
        assert results[name]["preferred"] > results["unsteered"]["preferred"]
    for chosen in numbers["chosen"]:
        assert chosen["validation"]["cost"] <= demo.COST_LIMIT
