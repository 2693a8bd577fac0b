"""Baked checkpoints on disk, which plain transformers reads, and baked real models."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import trimtab as tt
from helpers import PROMPTS, language_model, plain_logits, relative, steer_at, token_ids

# -- saving -----------------------------------------------------------------------------------

#: Checkpoints that are saved and read by plain transformers: model and (kind, operator) pairs.
CHECKPOINTS: dict[str, tuple[str, Sequence[tuple[str, str]]]] = {
    "llama": ("llama", [("resid", "Add"), ("attn_norm", "Add"), ("ffn_out", "Scale")]),
    "qwen2": ("qwen2", [("resid", "Add"), ("heads", "Scale")]),  # becomes Llama, tied
    "qwen2-untied": ("qwen2", [("resid", "Add"), ("embed", "Add")]),  # Llama, untied
    "mistral": ("mistral", [("resid", "Add"), ("heads", "Add")]),  # becomes Llama
    "gemma3": ("gemma3", [("final_norm", "Scale"), ("ffn_out", "Scale")]),  # untied head
    "gemma3-tied": ("gemma3", [("ffn_out", "Scale"), ("attn_out", "Add")]),
    "gpt2": ("gpt2", [("resid", "Add"), ("ffn_in", "Scale"), ("final_norm", "Add")]),
    "gpt2-untied": ("gpt2", [("embed", "Add"), ("embed", "Scale"), ("final_norm", "Scale")]),
    "qwen3_moe": ("qwen3_moe", [("ffn_in", "Scale"), ("ffn_out", "Scale"), ("heads", "Add")]),
}

#: Reads every checkpoint in a process that has never heard of trimtab.
PLAIN_READER = """
import sys
from pathlib import Path

class OutOfReach:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "trimtab":
            raise ImportError("trimtab is out of reach")

sys.meta_path.insert(0, OutOfReach())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
room = Path(sys.argv[1])
found = {}
for folder in sorted(path for path in room.iterdir() if path.is_dir()):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), (folder.name, loading)
    ids = AutoTokenizer.from_pretrained(folder)(sys.argv[2], return_tensors="pt").input_ids
    with torch.no_grad():
        found[folder.name + ".logits"] = model.eval()(ids).logits[0].clone()
    found[folder.name + ".text"] = model.generate(ids, max_new_tokens=32, do_sample=False,
                                                  eos_token_id=None, pad_token_id=0)[0].clone()
save_file(found, room / "found.safetensors")
assert "trimtab" not in sys.modules
"""


def checkpoint_parts(key: str) -> tuple[tt.LanguageModel, list[tt.Steering]]:
    name, parts = CHECKPOINTS[key]
    options = {"attention_bias": True} if key == "llama" else {}
    lm = language_model(name, **options)
    return lm, [steer_at(lm, kind, op) for kind, op in parts]


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits and texts of all saved checkpoints, as another process found them."""
    from safetensors.torch import load_file

    room = tmp_path_factory.mktemp("checkpoints")
    for key in CHECKPOINTS:
        lm, steerings = checkpoint_parts(key)
        tt.bake(lm, *steerings).save_pretrained(room / key)
    command = [sys.executable, "-I", "-c", PLAIN_READER, str(room), PROMPTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(room / "found.safetensors")


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_a_saved_checkpoint_is_read_by_plain_transformers(
    read_elsewhere: dict[str, Tensor], key: str
) -> None:
    lm, steerings = checkpoint_parts(key)
    ids = token_ids(PROMPTS[0])
    with lm.steered(*steerings):
        attached = plain_logits(lm.model, ids)
        text = lm.model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0]
    assert relative(read_elsewhere[f"{key}.logits"], attached) < 1e-4
    assert relative(attached, plain_logits(lm.model, ids)) > 1e-3
    assert read_elsewhere[f"{key}.text"].tolist() == text.tolist()


def test_an_existing_directory_is_not_overwritten_unasked(tmp_path: Path) -> None:
    lm = language_model("llama")
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("mine")
    with pytest.raises(tt.TrimtabError, match=r"exists.*--overwrite"):
        tt.bake(lm).save_pretrained(target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert tt.bake(lm).save_pretrained(target, overwrite=True) == target
    assert (target / "model.safetensors").is_file()
    assert (target / "tokenizer.json").is_file()
    assert (target / "config.json").read_text() != "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), SafetensorError("No space left on device")],
)
@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, part: str, existing: bool
) -> None:
    """Real writes of safetensors raise their own error on a full disk."""
    lm = language_model("llama")
    target = tmp_path / "model"
    if existing:
        target.mkdir()
        (target / "config.json").write_text("mine")
    owner = type(lm.model if part == "model" else lm.tokenizer)

    def half(self: Any, folder: Path, **options: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "half.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(owner, "save_pretrained", half)
    with pytest.raises(tt.TrimtabError, match="cannot write .*No space left") as caught:
        lm.save_pretrained(target, overwrite=existing)
    assert "\n" not in str(caught.value)
    if existing:
        assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if existing else [])


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")

    def interrupted(self: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(lm.tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_old_directory_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama")
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("mine")
    rename = Path.rename

    def stubborn(self: Path, goal: Path) -> Any:
        if self.name == "model" and self != target:  # the new one
            raise OSError(5, "Input/output error")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(tt.TrimtabError, match="cannot write .*Input/output error"):
        lm.save_pretrained(target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    lm = language_model("llama")
    with pytest.raises(tt.TrimtabError, match="cannot write .*No such file or directory"):
        lm.save_pretrained(tmp_path / "missing" / "model")
    assert not list(tmp_path.iterdir())


# -- real models ------------------------------------------------------------------------------

REAL_PAIRS = [
    (f"{who} came home and said that the day was", good, bad)
    for who, good, bad in itertools.product(
        ("She", "He", "My brother", "The old captain"),
        (" wonderful.", " lovely, really."),
        (" terrible.", " awful, really."),
    )
]


def check_real(lm: tt.LanguageModel, *steerings: tt.Steering) -> None:
    """Attached and baked on real weights: logits of two prompts, and 32 greedy tokens of one."""
    prompts = ["She looked at the map and", "Today I feel"]
    baked = tt.bake(lm, *steerings)
    with lm.steered(*steerings):
        attached = lm.logits(prompts)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = lm.tokenizer(prompts[0], return_tensors="pt").input_ids
        text = lm.model.generate(ids, max_new_tokens=32, **options)[0].tolist()
    assert relative(baked.logits(prompts), attached) < 1e-4
    assert relative(lm.logits(prompts), attached) > 0.01
    following = plain_logits(baked.model, text).argmax(-1).tolist()
    assert following[-33:-1] == text[-32:]


METHODS = {
    "austeer-heads": tt.AUSteer(site="heads", k=20, alpha=4.0, direction="paper"),
    "austeer-ffn_out": tt.AUSteer(site="ffn_out", k=20, alpha=4.0, direction="paper"),
    "caa": tt.CAA(layer=12, token="last"),
}


@pytest.fixture(scope="module")
def fitted(smollm2: tt.LanguageModel) -> dict[str, tt.Steering]:
    steerings = tt.fit(list(METHODS.values()), smollm2, tt.Contrast.from_pairs(REAL_PAIRS))
    return dict(zip(METHODS, steerings, strict=True))


@pytest.mark.parametrize(
    "method",
    [
        method if method == "caa" else pytest.param(method, marks=pytest.mark.slow)
        for method in METHODS
    ],
)
def test_smollm2_baked_equals_attached(
    smollm2: tt.LanguageModel, fitted: dict[str, tt.Steering], method: str
) -> None:
    check_real(smollm2, fitted[method])


@pytest.mark.slow
@pytest.mark.parametrize("site", ["heads", "ffn_out", "ffn_in"])
def test_gemma3_baked_equals_attached(gemma3: tt.LanguageModel, site: str) -> None:
    method = tt.AUSteer(site=site, k=20, alpha=4.0, direction="paper")
    check_real(gemma3, method.fit(gemma3, tt.Contrast.from_pairs(REAL_PAIRS)))
