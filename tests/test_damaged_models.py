"""A model's directory that is damaged in any way ends in one line: no traceback, no hub, no model
of which a part is made up."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab as tt
from tiny import TINY, tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    tried: list[Any] = []

    def connect(self: Any, address: Any) -> None:
        tried.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


def damaged(source: Path, target: Path, damage: Damage) -> Path:
    shutil.copytree(source, target)
    damage(target)
    return target


def one_line_error(folder: Path, **options: Any) -> str:
    with pytest.raises(tt.TrimtabError) as caught:
        tt.load(folder, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# -- what damages --------------------------------------------------------------------------------


def config(**values: Any) -> Damage:
    """Other values in config.json."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | values))

    return damage


def without(key: str) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        del content[key]
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def tensors(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, {"format": "pt"})

    return damage


def tokenizer(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | values))

    return damage


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, Damage] = {
    # the configuration: not there, not JSON, no configuration
    "no config": gone("config.json"),
    "config is a folder": folder_instead("config.json"),
    "config of no bytes": write("config.json", b""),
    "config cut": cut("config.json", 0.5),
    "config of bytes": write("config.json", bytes(range(256))),
    "config of a byte order mark": write("config.json", b"\xff\xfe{\x00}\x00"),
    "config a list": write("config.json", "[]"),
    "config a number": write("config.json", "12"),
    "config null": write("config.json", "null"),
    "config a text": write("config.json", '"llama"'),
    "config empty": write("config.json", "{}"),
    "config deep": write("config.json", "[" * 100_000),
    "config a deep value": write("config.json", '{"a":' * 90_000 + "1" + "}" * 90_000),
    # values of wrong types, or absurd ones
    "no type": without("model_type"),
    "type null": config(model_type=None),
    "type a number": config(model_type=3),
    "type a list": config(model_type=["llama"]),
    "type an object": config(model_type={}),
    "type unknown": config(model_type="made_up"),
    "type of no decoder": config(model_type="clip"),
    "another architecture's type": config(model_type="gpt2"),
    "hidden size a text": config(hidden_size="48"),
    "hidden size null": config(hidden_size=None),
    "hidden size a float": config(hidden_size=48.5),
    "hidden size a list": config(hidden_size=[48]),
    "hidden size 0": config(hidden_size=0),
    "hidden size negative": config(hidden_size=-48),
    "hidden size other": config(hidden_size=64),
    "heads 0": config(num_attention_heads=0),
    "heads that do not divide": config(num_attention_heads=5),
    "key heads 0": config(num_key_value_heads=0),
    "key heads a text": config(num_key_value_heads="two"),
    "layers a text": config(num_hidden_layers="three"),
    "layers negative": config(num_hidden_layers=-1),
    "layers 0": config(num_hidden_layers=0),
    "layers fewer": config(num_hidden_layers=2),
    "layers more": config(num_hidden_layers=4),
    "layers a billion": config(num_hidden_layers=10**9),
    "layers true": config(num_hidden_layers={"a": 1}),
    "vocabulary other": config(vocab_size=401),
    "vocabulary a trillion": config(vocab_size=10**12),
    "vocabulary negative": config(vocab_size=-1),
    "vocabulary a text": config(vocab_size="many"),
    "activation unknown": config(hidden_act="made_up"),
    "activation a number": config(hidden_act=5),
    "activation null": config(hidden_act=None),
    "rope a text": config(rope_parameters="yes"),
    "rope unknown": config(rope_parameters={"rope_type": "made_up"}),
    "rope without theta": config(rope_parameters={"rope_type": "default"}, rope_theta=None),
    "epsilon a text": config(rms_norm_eps="small"),
    "attention unknown": config(attn_implementation="made_up"),
    "attention from the hub": config(attn_implementation="somebody/attention"),
    "quantised by a text": config(quantization_config="4bit"),
    "code of its own": config(
        model_type="made_up", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    ),
    # the weights
    "no weights": gone(WEIGHTS),
    "weights a folder": folder_instead(WEIGHTS),
    "weights of no bytes": write(WEIGHTS, b""),
    "weights of seven bytes": write(WEIGHTS, b"\x01" * 7),
    "weights cut to half": cut(WEIGHTS, 0.5),
    "weights cut at the end": cut(WEIGHTS, 0.999),
    "weights cut in the header": cut(WEIGHTS, 0.001),
    "weights of text": write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "weights with an endless header": write(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
    "weights with a list": write(WEIGHTS, header(b"[]")),
    "weights without tensors": write(WEIGHTS, header(b"{}")),
    "pickled weights": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    "a tensor missing": tensors(lambda held: held.pop(Q)),
    "the LM head missing": tensors(lambda held: held.pop("lm_head.weight")),
    "the embeddings missing": tensors(lambda held: held.pop("model.embed_tokens.weight")),
    "a norm missing": tensors(lambda held: held.pop("model.norm.weight")),
    "a tensor under another name": tensors(lambda held: held.update({"q": held.pop(Q)})),
    "a tensor transposed": tensors(lambda held: held.update({Q: held[Q].T.contiguous()})),
    "a tensor of one dimension": tensors(
        lambda held: held.update({Q: held[Q].reshape(-1).clone()})
    ),
    "a tensor of no elements": tensors(lambda held: held.update({Q: torch.zeros(0, 48)})),
    "another model's tensors": tensors(lambda held: (held.clear(), held.update(a=torch.ones(2)))),
    # the tokenizer
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "tokenizer cut": cut("tokenizer.json", 0.5),
    "tokenizer of bytes": write("tokenizer.json", bytes(range(256))),
    "tokenizer a list": write("tokenizer.json", "[]"),
    "tokenizer empty": write("tokenizer.json", "{}"),
    "tokenizer without a model": tokenizer(model=None),
    "tokenizer of a model unknown": tokenizer(model={"type": "made_up"}),
    "tokenizer's tokens a list": tokenizer(added_tokens=5),
    "tokenizer's configuration cut": cut("tokenizer_config.json", 0.5),
    "tokenizer's configuration a list": write("tokenizer_config.json", "[]"),
    "tokenizer's class a number": write("tokenizer_config.json", '{"tokenizer_class": 7}'),
}

SHARDED: dict[str, Damage] = {
    "a shard missing": lambda folder: sorted(folder.glob("model-*"))[1].unlink(),
    "a shard cut": lambda folder: cut(sorted(folder.glob("model-*"))[1].name, 0.5)(folder),
    "a shard of no bytes": lambda folder: sorted(folder.glob("model-*"))[1].write_bytes(b""),
    "no index": gone(INDEX),
    "index cut": cut(INDEX, 0.5),
    "index a list": write(INDEX, "[]"),
    "index empty": write(INDEX, "{}"),
    "index with a number": write(INDEX, '{"weight_map": {"a": 1}}'),
    "index with a list": write(INDEX, '{"weight_map": ["a"]}'),
    "index of a file elsewhere": write(INDEX, '{"weight_map": {"a": "../tiny/model.safetensors"}}'),
    "index of a missing file": write(INDEX, '{"weight_map": {"a": "a.safetensors"}}'),
    "index without a tensor": lambda folder: _index(folder, lambda places: places.pop(Q)),
    "index with a tensor more": lambda folder: _index(
        folder, lambda places: places.update(more=places[Q])
    ),
}


def _index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_directory_is_one_line(
    whole: Path, tmp_path: Path, no_network: list[Any], kind: str
) -> None:
    one_line_error(damaged(whole, tmp_path / "model", DAMAGES[kind]))
    assert not no_network


@pytest.mark.parametrize("kind", [k for k in SHARDED if k != "index without a tensor"])
def test_a_damaged_sharded_directory_is_one_line(
    sharded: Path, tmp_path: Path, no_network: list[Any], kind: str
) -> None:
    one_line_error(damaged(sharded, tmp_path / "model", SHARDED[kind]))
    assert not no_network


def test_what_is_whole_is_loaded(whole: Path, sharded: Path, no_network: list[Any]) -> None:
    for folder in (whole, sharded):
        with warnings.catch_warnings():
            warnings.simplefilter("error", tt.TrimtabWarning)
            held = tt.load(folder, device="cpu").model.state_dict()
        expected = tiny_model("llama").state_dict()
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], expected[name]) for name in held)
    assert not no_network


# -- what is missing, made up, unused ------------------------------------------------------------


def saved(name: str, folder: Path) -> Path:
    tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    """At the beginning, in a block, at the end; transformers fills in random numbers."""
    folder = saved(name, tmp_path / "model")
    held = load_file(folder / WEIGHTS)
    names = sorted(held)
    for key in (names[0], names[len(names) // 2], names[-1]):
        save_file({k: v for k, v in held.items() if k != key}, folder / WEIGHTS, {"format": "pt"})
        message = one_line_error(folder)
        assert "missing from the files" in message
        if "experts" not in key:  # those are fused when they are loaded
            assert key in message
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    assert tt.load(folder, device="cpu").anatomy.name == tiny_model(name).config.model_type


def test_many_missing_tensors_are_counted(whole: Path, tmp_path: Path) -> None:
    def drop(held: dict[str, Any]) -> None:
        for key in [key for key in held if "layers.1." in key]:
            del held[key]

    message = one_line_error(damaged(whole, tmp_path / "model", tensors(drop)))
    assert "9 tensors are missing" in message
    assert "layers.1.input_layernorm" in message
    assert "..." in message


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = saved("qwen2", tmp_path / "model")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tt.TrimtabWarning)
        tt.load(folder, device="cpu")


def test_tensors_that_nothing_uses_are_warned_about(whole: Path, tmp_path: Path) -> None:
    change = tensors(lambda held: held.update({"vision.patch.weight": torch.ones(3)}))
    folder = damaged(whole, tmp_path / "model", change)
    with pytest.warns(tt.TrimtabWarning, match="does not use.*vision.patch.weight") as caught:
        lm = tt.load(folder, device="cpu")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert torch.equal(lm.model.lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_warned_about(
    whole: Path, tmp_path: Path, value: float
) -> None:
    folder = damaged(whole, tmp_path / "model", tensors(lambda held: held[Q][3, 4].fill_(value)))
    dtype = "float16" if value == 1e30 else "float32"  # what float16 cannot hold
    with pytest.warns(tt.TrimtabWarning, match=rf"NaN or infinite.*\(1: {Q}\)"):
        tt.load(folder, device="cpu", dtype=dtype)


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "a tensor missing",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("hidden size a text", "type a list", "config deep", "layers fewer")
        ),
    ],
)
def test_the_command_line_says_it_in_one_line(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = damaged(whole, tmp_path / "model", DAMAGES[kind])
    ran = process("generate", "--model", str(folder), "Hello")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("trimtab: cannot load the model")
    assert ran.stderr.count("\n") == 1


# -- code that comes with a model ----------------------------------------------------------------

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


def with_code(folder: Path, marker: Path, model_type: str) -> None:
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config(model_type=model_type, auto_map=names)(folder)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "code.py", folder / "custom_generate" / "generate.py")
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written["auto_map"] = {"AutoTokenizer": [None, "code.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("model_type", "answers"),
    [
        pytest.param("made_up", "y\n" * 99, id="made_up-yes"),
        pytest.param("made_up", "", id="made_up-silence", marks=pytest.mark.slow),
        pytest.param("llama", "y\n" * 99, id="llama-yes", marks=pytest.mark.slow),
        pytest.param("llama", "", id="llama-silence", marks=pytest.mark.slow),
    ],
)
def test_no_code_of_a_directory_runs(
    whole: Path, tmp_path: Path, model_type: str, answers: str
) -> None:
    """Neither with yes on standard input, nor without. Where transformers has the architecture
    itself, its own code is used."""
    folder, marker = tmp_path / "model", tmp_path / "ran"
    damaged(whole, folder, lambda folder: with_code(folder, marker, model_type))
    options = ["--max-new-tokens", "2", "--device", "cpu"]
    ran = process("generate", "--model", str(folder), *options, "Hi", answers=answers)
    assert not marker.exists()
    assert ran.returncode == (0 if model_type == "llama" else 2)
    assert "[y/N]" not in ran.stdout + ran.stderr
    if model_type == "made_up":
        assert "--trust-remote-code" in ran.stderr
        assert ran.stderr.count("\n") == 1
    ran = process("generate", "--model", str(folder), *options, "Hi", "--trust-remote-code")
    assert marker.exists()


def test_only_true_is_trust(whole: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    damaged(whole, folder, lambda folder: with_code(folder, marker, "made_up"))
    for answer in (False, None, "yes", 1):
        assert "trust_remote_code=True" in one_line_error(folder, trust_remote_code=answer)
    assert not marker.exists()


def process(*arguments: str, answers: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from trimtab.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, input=answers
    )
