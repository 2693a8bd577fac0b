"""Other people's files, mutated: an error of one line, or a steering that can be saved; nothing is
run, and nothing takes memory or time that the file's own size does not account for."""

from __future__ import annotations

import base64
import copy
import io
import json
import pickle
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from exchanged import FOREIGN, WRITTEN, imported, vector
from helpers import add, language_model, refused_in_one_line, steer
from trimtab.exchange import READERS
from trimtab.steering.operators import Scale

#: Every format that is read, by the file that is mutated.
FILES = {
    **WRITTEN,
    "transformer-lens": "hooks.pt",
    "neuronpedia": "neuronpedia.json",
    "tensor": "bare.npy",
}
#: Mutations of each file: in the quick run, and in the long one.
FEW, MANY = 300, 2000
#: What a value may become.
HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        3,
        10**30,
        1e39,
        -1e39,
        0.5,
        "",
        "x" * 1000,
        "\x1b[31m\u202e",
        "nan",
        [],
        {},
    ),
    *([[]], {"data": 1}, "layers.1", "blocks.1.hook_resid_pre", "torch.bfloat16", [10**9, 10**9]),
)


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def room(lm: tt.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file of each format."""
    room = tmp_path_factory.mktemp("good")
    steering = steer(lm, ("layers.1.resid", add(48, 1))).at(2)
    for name, file in WRITTEN.items():
        tt.export(lm, steering, name, room / file)
    torch.save({"blocks.2.hook_resid_pre": vector(1)}, room / "hooks.pt")
    record = {"hookName": "blocks.2.hook_resid_pre", "vector": vector(1).tolist(), "modelId": "x"}
    (room / "neuronpedia.json").write_text(json.dumps({"vector": record}))
    np.save(room / "bare.npy", vector(1).numpy())
    return room


def test_every_format_is_mutated() -> None:
    assert FILES.keys() == READERS.keys()


# -- mutations ------------------------------------------------------------------------------------


def _bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut off, put in, or taken from elsewhere."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.randrange(len(found))
        if chance.random() < 0.5:  # near the beginning, where headers are
            at = min(at, chance.randrange(200))
        kind = chance.randrange(4)
        if kind == 0:
            found[at] = chance.randrange(256)
        elif kind == 1 and len(found) > 20:
            del found[at : at + chance.choice((1, 4, len(found)))]
        elif kind == 2:
            found[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8))))
        else:
            found[at : at + 8] = chance.choice((b"\xff" * 8, b"\0" * 8, bytes(found[:8])))
        if not found:
            break
    return bytes(found)


def _changed(value: Any, chance: random.Random) -> Any:
    """A value with one part of it made hostile, taken away or renamed."""
    if isinstance(value, Tensor) and chance.random() < 0.6:
        return _tensor(value, chance)
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed, part = dict(value), chance.random()
        if part < 0.15:
            del changed[key]
        elif part < 0.35:
            changed[chance.choice((99, -1, "99", "-1", "layers.2", "x", "\x1b"))] = changed.pop(key)
        else:
            changed[key] = _changed(changed[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], _changed(value[at], chance), *value[at + chance.randrange(2) :]]
    return copy.deepcopy(chance.choice(HOSTILE))


def _tensor(tensor: Tensor, chance: random.Random) -> Tensor:
    """Tensors that are not what they seem."""
    made: list[Callable[[], Tensor]] = [
        lambda: tensor * float("nan"),
        lambda: tensor * 1e38 * 1e10,
        lambda: tensor.double() * 1e300,
        lambda: tensor[:-1],
        lambda: tensor[..., None],
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.bool(),
        lambda: torch.zeros_like(tensor),
        lambda: torch.zeros(0),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(1).expand(10**9, 48),
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: tensor.to_sparse(),
        lambda: tensor.bfloat16(),
        lambda: tensor.half(),
        lambda: torch.empty(48, device="meta"),
        lambda: tensor.expand(4, *tensor.shape),
    ]
    return chance.choice(made)()


def _values(path: Path, chance: random.Random) -> bytes | None:
    """The file with another value in it; None of containers whose bytes alone are mutated."""
    if path.suffix == ".pt":
        return _pickled(_changed(torch.load(path, weights_only=True), chance))
    if path.suffix in (".json", ".svec"):
        return json.dumps(_changed(json.loads(path.read_text()), chance)).encode()
    if path.suffix == ".safetensors":
        return _safetensors(path, chance)
    return None


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _safetensors(path: Path, chance: random.Random) -> bytes:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    cfg = _changed(json.loads(metadata["cfg"]), chance)
    tensors = {}
    for name, tensor in load_file(path).items():
        other = chance.choice(("layer9.v", "x", "layer1.V", "layer01.v"))
        changed = chance.choice((tensor[:3], tensor.half(), -tensor))
        tensors[name if chance.random() < 0.8 else other] = (
            tensor if chance.random() < 0.5 else changed
        ).clone()
    return save(tensors, {"cfg": json.dumps(cfg)})


def _mutations(path: Path, count: int) -> Iterator[bytes]:
    chance = random.Random(path.name)
    content = path.read_bytes()
    for number in range(count):
        changed = _values(path, chance) if number % 2 else None
        yield _bytes(content, chance) if changed is None else changed


def _taken_or_refused(path: Path, lm: tt.LanguageModel, **options: Any) -> bool:
    """Whether a file is read; an error is one line, and a steering passes what `save` checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", tt.TrimtabWarning)
        try:
            steering = imported(path, lm, **options)
        except tt.TrimtabError as error:
            said = str(error)
            assert said.isprintable(), repr(said)
            assert len(said) < 600
            return False
    steering.save(path.with_name("saved.safetensors"), overwrite=True)
    steering.check_fits(lm.anatomy, lm.identity)
    return True


@pytest.mark.parametrize("name", FILES)
def test_mutated_files(name: str, room: Path, lm: tt.LanguageModel, tmp_path: Path) -> None:
    _check_mutations(name, room, lm, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_mutated_files(name: str, room: Path, lm: tt.LanguageModel, tmp_path: Path) -> None:
    _check_mutations(name, room, lm, tmp_path, MANY)


def _check_mutations(
    name: str, room: Path, lm: tt.LanguageModel, tmp_path: Path, count: int
) -> None:
    good = room / FILES[name]
    options = {"site": "layers.1.resid"} if name in ("tensor", "persona-vectors") else {}
    assert _taken_or_refused(good, lm, **options)
    path, read = tmp_path / good.name, 0
    for content in _mutations(good, count):
        path.write_bytes(content)
        began = time.process_time()
        read += _taken_or_refused(path, lm, **options)
        assert time.process_time() - began < 2
    assert 0 < read < count


def _in_adapter(good: Path, room: Path, chance: random.Random) -> Path:
    """An adapter's directory with one of its files mutated, or left out."""
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(good, room)
    file = chance.choice([path for path in room.rglob("*") if path.is_file()])
    if file.suffix == ".json" and chance.random() < 0.7:
        file.write_text(json.dumps(_changed(json.loads(file.read_text()), chance)))
    elif chance.random() < 0.05:
        file.unlink()
    else:
        file.write_bytes(_bytes(file.read_bytes(), chance))
    return room


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutated_adapters(count: int, lm: tt.LanguageModel, tmp_path: Path) -> None:
    units = torch.arange(0, 64, 3)
    steering = steer(lm, ("layers.1.heads", Scale(units, vector(1, len(units)), 64))).at(2)
    tt.export(lm, steering, "lora", tmp_path / "good")
    chance = random.Random(0)
    for _ in range(count):
        mutated = _in_adapter(tmp_path / "good", tmp_path / "mutated", chance)
        _taken_or_refused(mutated, lm)


# -- one by one -----------------------------------------------------------------------------------


class _Runs:
    """What a pickle may do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_run(lm: tt.LanguageModel, tmp_path: Path) -> None:
    torch.save({"layers.1": _Runs(tmp_path / "ran")}, tmp_path / "x.pt")
    refused_in_one_line(lambda: imported(tmp_path / "x.pt", lm), "which may run code")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    refused_in_one_line(lambda: imported(tmp_path / "old.pt", lm), "not a file of torch.save")
    np.save(tmp_path / "x.npy", np.array([_Runs(tmp_path / "ran")]), allow_pickle=True)
    refused_in_one_line(lambda: imported(tmp_path / "x.npy", lm), "NumPy array")
    torch.save(vector(1), tmp_path / "y.pt", _use_new_zipfile_serialization=False)
    refused_in_one_line(lambda: imported(tmp_path / "y.pt", lm), "PyTorch 1.6")
    assert not (tmp_path / "ran").exists()


def test_archives_that_are_none_of_torch(lm: tt.LanguageModel, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." + b"\0" * 10**6)
    refused_in_one_line(lambda: imported(tmp_path / "x.pt", lm), "compressed")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/other", b"")
    refused_in_one_line(lambda: imported(tmp_path / "x.pt", lm), "did not write it")
    np.savez(tmp_path / "x.npz", vector(1).numpy())
    refused_in_one_line(lambda: imported(tmp_path / "x.npz", lm), "did not write it")


def test_a_size_that_a_pickle_claims(lm: tt.LanguageModel, tmp_path: Path) -> None:
    """A storage of more numbers than there are bytes."""
    torch.save({"blocks.1.hook_resid_post": vector(1)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (code,) = (name for name in parts if name.endswith("data.pkl"))
    parts[code] = parts[code].replace(b"K0", b"J\x00\x00\x00\x40")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    refused_in_one_line(lambda: imported(tmp_path / "y.pt", lm), "damaged")


@pytest.mark.parametrize(("start", "most"), [(b"GGUF", 1 << 28), (b"{", 1 << 26)])
def test_a_large_file_is_not_read(
    start: bytes, most: int, lm: tt.LanguageModel, tmp_path: Path
) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(start)
        file.truncate(most + 1)
    refused_in_one_line(lambda: imported(tmp_path / "x", lm), "is it a model")


def test_deep_json(lm: tt.LanguageModel, tmp_path: Path) -> None:
    for text in (
        "[" * 10**5,
        '{"directions":' * 10**4,
        '{"directions": {"1": ' + "9" * 5000 + "}}",
    ):
        (tmp_path / "x.json").write_text(text)
        refused_in_one_line(lambda: imported(tmp_path / "x.json", lm), "x.json")


def test_an_array_that_claims_more_than_there_is(lm: tt.LanguageModel, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(48, dtype=np.float32))
    content = (tmp_path / "x.npy").read_bytes().replace(b"(48,), }", b"(10**9,),}"[:8])
    (tmp_path / "y.npy").write_bytes(content)
    refused_in_one_line(lambda: imported(tmp_path / "y.npy", lm, site="layers.1.resid"), "damaged")
    large = (tmp_path / "x.npy").read_bytes().replace(b"(48,)", b"(9999999999,)")
    (tmp_path / "y.npy").write_bytes(large)
    refused_in_one_line(lambda: imported(tmp_path / "y.npy", lm, site="layers.1.resid"), "damaged")


def test_zstd_that_claims_little_and_gives_much(lm: tt.LanguageModel, tmp_path: Path) -> None:
    good = json.loads((FOREIGN / "vllm-lens.json").read_text())
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (1 << 28))
    good["activations"]["data"] = base64.b64encode(bomb).decode()
    (tmp_path / "x.json").write_text(json.dumps(good))
    refused_in_one_line(lambda: imported(tmp_path / "x.json", lm), "should have 384 bytes")
    good["activations"]["data"] = base64.b64encode(b"\x28\xb5\x2f\xfd junk").decode()
    (tmp_path / "x.json").write_text(json.dumps(good))
    refused_in_one_line(lambda: imported(tmp_path / "x.json", lm), "damaged")


def test_no_path_is_taken_from_a_file(lm: tt.LanguageModel, tmp_path: Path) -> None:
    """A link that a file's name is; names in it stay names."""
    save_file({"blocks.../../etc/passwd": vector(1)}, tmp_path / "x.safetensors")
    refused_in_one_line(lambda: imported(tmp_path / "x.safetensors", lm), "the hook is")
