"""What is written is the model, nothing else is lost for it, and a kill leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import trimtab as tt
from helpers import (
    language_model,
    plain_logits,
    refused_in_one_line,
    relative,
    steer,
    steer_at,
    token_ids,
)
from tiny import TINY, tiny_model
from trimtab.steering.operators import Add, Scale

IDS = token_ids("Today I feel sad because of the rain")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_steered_model_is_not_written(name: str, tmp_path: Path) -> None:
    """The file would hold the unsteered one."""
    lm = language_model(name)
    with lm.steered(steer_at(lm, "ffn_out")):
        refused_in_one_line(lambda: lm.save_pretrained(tmp_path / "m"), "while it is steered")
    assert not list(tmp_path.iterdir())
    lm.save_pretrained(tmp_path / "m")


def test_a_model_of_other_tensors_is_not_written(tmp_path: Path) -> None:
    """What plain transformers would fill with random numbers, or leave out."""
    lm = language_model("llama")
    mlp = lm.model.model.layers[1].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)  # its key is up_proj.0.weight
    refused_in_one_line(lambda: lm.save_pretrained(tmp_path / "m"), "up_proj")
    more = language_model("llama")
    more.model.model.norm.shift = nn.Parameter(torch.ones(2))
    refused_in_one_line(lambda: more.save_pretrained(tmp_path / "m"), r"norm\.shift")
    wide = language_model("llama")
    wide.model.lm_head = nn.Linear(48, 410, bias=False)
    refused_in_one_line(lambda: wide.save_pretrained(tmp_path / "m"), r"lm_head\.weight")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_is_all_of_the_architecture(name: str, tmp_path: Path) -> None:
    lm = language_model(name)
    baked = tt.bake(lm, steer_at(lm, "ffn_out", "Scale"))
    folder = baked.save_pretrained(tmp_path / "m")
    attention = lm.model.config._attn_implementation  # older versions would leave out a soft-cap
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention
    )
    assert not any(found.values())
    assert relative(plain_logits(model.eval(), IDS), plain_logits(baked.model, IDS)) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# -- weights that overflow -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["ffn_out", "heads", "embed", "final_norm", "ffn_in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_not_baked(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    lm = language_model(name, dtype=dtype)
    site = lm.anatomy.sites(kind, (1,))[0]
    width = lm.anatomy.width(site)
    huge = 1e38 if dtype is torch.float32 else 1e5
    steering = steer(lm, (site, Scale(torch.arange(width), torch.full((width,), huge), width)))
    with pytest.warns(tt.TrimtabWarning, match="outside the sensible range"):
        turned = steering.at(1e4)
    refused_in_one_line(lambda: tt.bake(lm, turned), rf"{site}: with the dial at 10000 .*infinite")
    tt.bake(lm, steering.at(0.0))


def test_a_bias_that_is_not_finite_is_not_baked() -> None:
    lm = language_model("gpt2")
    steering = steer(lm, ("layers.1.resid", Add(torch.full((48,), 3e38))))
    refused_in_one_line(lambda: tt.bake(lm, steering.at(10.0)), r"layers\.1\.resid.*dial at 10")


# -- where it is written -------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["notes.txt", "training.safetensors", "x/y.txt", ".hidden"])
def test_other_peoples_files_are_never_lost(tmp_path: Path, foreign: str) -> None:
    lm = language_model("llama")
    target = lm.save_pretrained(tmp_path / "m")
    (target / foreign).parent.mkdir(exist_ok=True)
    (target / foreign).write_text("mine")
    before = listing(tmp_path)
    for model in (lm, tt.bake(lm, steer_at(lm, "ffn_out", "Scale"))):
        refused_in_one_line(
            lambda model=model: model.save_pretrained(target, overwrite=True),
            foreign.split("/")[0].replace(".", r"\."),
        )
    assert listing(tmp_path) == before


def test_the_files_of_a_checkpoint_are_replaced_together(tmp_path: Path) -> None:
    """Shards of an older, larger model would be read before the new file, or beside it."""
    old = tiny_model("llama", seed=1)
    old.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    (tmp_path / "m/merges.txt").write_text("old")
    lm = language_model("llama")
    lm.save_pretrained(tmp_path / "m", overwrite=True)
    fresh = lm.save_pretrained(tmp_path / "fresh")
    assert listing(tmp_path / "m") == listing(fresh)


def test_a_file_or_another_directory_is_not_replaced(tmp_path: Path) -> None:
    lm = language_model("llama")
    (tmp_path / "file").write_text("mine")
    save = lm.save_pretrained
    refused_in_one_line(lambda: save(tmp_path / "file", overwrite=True), "not a directory")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("mine")
    refused_in_one_line(lambda: save(tmp_path / "tokenizer", overwrite=True), "not a model's")
    (tmp_path / "empty").mkdir()
    assert save(tmp_path / "empty", overwrite=True) == tmp_path / "empty"


#: Ways to name the directory of the model itself, one inside it and one around it.
WAYS: dict[str, Callable[[Path], str]] = {
    "itself": lambda here: "model",
    "absolute": lambda here: str(here / "model"),
    "dots": lambda here: "model/../model",
    "slash": lambda here: "./model/",
    "a link": lambda here: "link",
    "through a link": lambda here: "around/model",
    "inside": lambda here: "model/baked",
    "inside a link": lambda here: "link/baked",
    "around": lambda here: ".",
    "around, absolute": lambda here: str(here),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "home"
    here.mkdir()
    language_model("llama").save_pretrained(here / "model")
    (here / "link").symlink_to("model")
    (tmp_path / "home/around").symlink_to(here)
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opened", ["model", "link"])
def test_a_model_is_never_written_over_itself(home: Path, way: str, opened: str) -> None:
    before = listing(home)
    lm = tt.load(opened, device="cpu")
    for model in (lm, tt.bake(lm, steer_at(lm, "ffn_out", "Scale"))):
        for overwrite in (True, False):
            refused_in_one_line(
                lambda m=model, o=overwrite: m.save_pretrained(WAYS[way](home), overwrite=o),
                "where the model came from",
            )
    assert listing(home) == before


@pytest.mark.parametrize("way", ["itself", "a link", "inside", "around", "dots"])
def test_the_command_line_neither(home: Path, way: str, capsys: Any) -> None:
    from trimtab.cli import main

    lm = tt.load("model", device="cpu")
    steer_at(lm, "ffn_out", "Scale").save(home / "s.safetensors")
    before = listing(home)
    command = ["bake", "-m", "model", "-s", "s.safetensors", "-o", WAYS[way](home), "--overwrite"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "where the model came from" in capsys.readouterr().err
    assert listing(home) == before


# -- processes that are killed ---------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import trimtab as tt
from helpers import language_model
moment, target = sys.argv[1], Path(sys.argv[2])
lm = language_model("llama", seed=1)
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
def renamed(self, goal):
    if moment == "before the first rename" or self.name == "model":
        die()
    done = rename(self, goal)
    if moment == "after the first rename":
        die()
    return done
if moment == "while writing":
    type(lm.tokenizer).save_pretrained = die
Path.rename = renamed
lm.save_pretrained(target, overwrite=True)
"""


@pytest.mark.parametrize(
    ("moment", "existing"),
    [
        pytest.param("while writing", True, marks=pytest.mark.slow),
        pytest.param("while writing", False, marks=pytest.mark.slow),
        pytest.param("before the first rename", True, marks=pytest.mark.slow),
        ("after the first rename", True),
    ],
)
def test_a_killed_save_is_swept_and_the_old_model_comes_back(
    tmp_path: Path, moment: str, existing: bool
) -> None:
    lm = language_model("llama")
    target = tmp_path / "m [1]"  # brackets mean something in a pattern
    if existing:
        lm.save_pretrained(target)
    before = listing(tmp_path)
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED.format(tests=tests), moment, str(target)]
    assert subprocess.run(command, check=False, timeout=300).returncode == -9
    assert len(listing(tmp_path)) > len(before)
    assert target.is_dir() is (existing and moment != "after the first rename")
    if existing:
        # Who opens it next finds the old model.
        assert tt.load(target, device="cpu").identity.digest == lm.identity.digest
        refused_in_one_line(lambda: lm.save_pretrained(target), "exists")
        assert listing(tmp_path) == before
    lm.save_pretrained(target, overwrite=existing)
    assert [path.name for path in tmp_path.iterdir()] == ["m [1]"]


def test_what_somebody_works_at_is_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """Two savers of one directory at once: neither removes the other's work."""
    first, second = language_model("llama"), language_model("llama", seed=1)
    save = type(first.tokenizer).save_pretrained

    def meanwhile(self: Any, folder: Path) -> Any:
        monkeypatch.setattr(type(first.tokenizer), "save_pretrained", save)
        second.save_pretrained(tmp_path / "m")
        return save(self, folder)

    monkeypatch.setattr(type(first.tokenizer), "save_pretrained", meanwhile)
    refused_in_one_line(lambda: first.save_pretrained(tmp_path / "m"), "exists")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert tt.load(tmp_path / "m", device="cpu").identity.digest == second.identity.digest


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_a_name_that_cannot_be_is_one_line(name: str, tmp_path: Path) -> None:
    lm = language_model("llama")
    refused_in_one_line(lambda: lm.save_pretrained(tmp_path / name), "cannot write")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["words.model", "data.tiktoken", "notes.json", "x.safetensors"])
def test_files_of_others_that_look_alike_are_not_lost(name: str, tmp_path: Path) -> None:
    lm = language_model("llama")
    target = lm.save_pretrained(tmp_path / "model")
    (target / name).write_text("mine")
    refused_in_one_line(lambda: lm.save_pretrained(target, overwrite=True), name)
    assert (target / name).read_text() == "mine"


@pytest.mark.parametrize("content", [b"{}", b"", b"texts of mine", None])
def test_a_steering_replaces_no_other_file(content: bytes | None, tmp_path: Path) -> None:
    lm = language_model("llama")
    steering = steer_at(lm, "resid")
    path = tmp_path / "it.safetensors"
    if content is None:  # the weights of a model
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    refused_in_one_line(lambda: steering.save(path, overwrite=True), "not a steering")
    assert path.read_bytes() == before
    path.unlink()
    steering.save(path)
    steering.at(2).save(path, overwrite=True)
    assert tt.Steering.load(path).setting == 2
