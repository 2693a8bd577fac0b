"""Damaged GGUF files: each is refused at once, in one line, or makes a model; none takes memory or
time that the file's own size does not account for."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_packs import LAYERS, add_sentencepiece_tokenizer, write_tiny_llama
from trimtab.checkpoints import packs
from trimtab.checkpoints.gguf_header import DamagedError, check_header
from trimtab.errors import TrimtabError

U32, U64 = 2**32 - 1, 2**64 - 1


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of each kind of tokenizer."""
    room = tmp_path_factory.mktemp("good")
    write_tiny_llama(room / "bytes.gguf")
    write_tiny_llama(room / "pieces.gguf", add_tokenizer=add_sentencepiece_tokenizer)
    return [room / "bytes.gguf", room / "pieces.gguf"]


def refused_at_once(path: Path, says: str) -> None:
    began = time.process_time()
    with pytest.raises(TrimtabError, match=says) as caught:
        packs.convert_gguf(path, path.with_suffix(""))
    assert time.process_time() - began < 2
    in_one_line(str(caught.value))


def in_one_line(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 400


# -- one value at a time ------------------------------------------------------------------------


def header(
    keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


#: A header, and what is said of it.
IMPOSSIBLE: dict[str, tuple[bytes, str]] = {
    "no counts": (b"GGUF\x03\0\0\0", "ends before"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 2^32": (b"GGUF" + struct.pack("<IQQ", U32, 0, 0), "version 4294967295"),
    "tensors without end": (header(tensor_count=U64), "ends before 18446744073709551615 tensors"),
    "tensors of a year": (header(tensor_count=10**9), "ends before 1000000000 tensors"),
    "keys without end": (header(key_count=U64), "ends before 18446744073709551615 keys"),
    "a key without end": (header(text(b"a" * 9, U64), 1), "bytes of a key"),
    "a key of no text": (header(key(b"\xff\xfe", 4, b"\0" * 4), 1), "a key is not UTF-8"),
    "a string without end": (header(key(b"k", 8, text(b"a", 10**15)), 1), "bytes of 'k'"),
    "an unknown kind": (header(key(b"k", 13, b"\0" * 8), 1), "'k' is of an unknown kind, 13"),
    "bools without end": (header(key(b"k", 9, array(7, 10**9)), 1), "1000000000 items in 'k'"),
    "floats without end": (header(key(b"k", 9, array(6, U64)), 1), "items in 'k'"),
    "strings without end": (header(key(b"k", 9, array(8, 2**40)), 1), "items in 'k'"),
    "an item without end": (
        header(key(b"k", 9, array(8, 1, text(b"ab", 2**50))), 1), "an item of 'k'",
    ),
    "an item of a page": (
        header(key(b"k", 9, array(8, 1, text(b"a" * 5000))), 1), "an item of 'k' has 5000 bytes",
    ),
    "arrays in arrays": (
        header(key(b"k", 9, array(9, 1) * 50 + b"\0" * 99), 1), "'k' is of an unknown kind, 9",
    ),
    "empty arrays": (
        header(key(b"k", 9, array(9, 2**61, array(9, 0) * 9)), 1), "ends before 23058430092136939",
    ),
    "a key twice": (header(key(b"k", 0, b"\1") * 2, 2), "the key 'k' twice"),
    "a name that colours": (
        header(key(b"\x1b[31m\n", 9, array(7, 10**9)), 1), r"in '\\x1b\[31m\\n'",
    ),
    "alignment 0": (
        header(key(b"general.alignment", 4, b"\0" * 4), 1), "an alignment of 0",
    ),
    "alignment of 3": (
        header(key(b"general.alignment", 4, b"\3\0\0\0"), 1), "an alignment of 3",
    ),
    "alignment as text": (
        header(key(b"general.alignment", 8, text(b"32")), 1), "an alignment of 32",
    ),
    "no dimension": (header(tensors=tensor(b"t", []), tensor_count=1), "'t' has 0 dimensions"),
    "five dimensions": (header(tensors=tensor(b"t", [1] * 5), tensor_count=1), "has 5 dimensions"),
    "a shape without end": (
        header(tensors=tensor(b"t", [U64, U64]) + b"\0" * 64, tensor_count=1), "it should have",
    ),
    "a shape of nothing": (
        header(tensors=tensor(b"t", [4, 0]), tensor_count=1), r"has the shape \[4, 0\]",
    ),
    "half a block": (
        header(tensors=tensor(b"t", [33], kind=2), tensor_count=1), r"has the shape \[33\]",
    ),
    "an unknown type": (
        header(tensors=tensor(b"t", [4], kind=999), tensor_count=1), "unknown type, 999",
    ),
    "data elsewhere": (
        header(tensors=tensor(b"t", [4], offset=32) + b"\0" * 99, tensor_count=1),
        "begins at 32, not at 0",
    ),
    "data in one another": (
        header(tensors=tensor(b"t", [4]) + tensor(b"u", [4]) + b"\0" * 99, tensor_count=2),
        "'u' begins at 0, not at 32",
    ),
    "a tensor twice": (
        header(tensors=tensor(b"t", [8]) + tensor(b"t", [8], offset=32), tensor_count=2),
        "tensor 't' twice",
    ),
    "data too short": (header(tensors=tensor(b"t", [4]), tensor_count=1), "it should have 96"),
    "data too long": (
        header(tensors=tensor(b"t", [4]) + b"\0" * 99, tensor_count=1), "should have 96.* has 156",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_headers(name: str, tmp_path: Path) -> None:
    content, says = IMPOSSIBLE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    refused_at_once(tmp_path / "x.gguf", rf"x\.gguf is a truncated or damaged GGUF file \(.*{says}")
    assert not (tmp_path / "x").exists()


def changed(source: Path, path: Path, name: str, new: Any, at: int = -1) -> Path:
    """A copy with one value of the metadata changed in place; `at` picks one of its parts."""
    path.write_bytes(source.read_bytes())
    field = gguf.GGUFReader(path, "r+").fields[name]
    field.parts[at][0] = new
    return path


@pytest.mark.parametrize(
    ("name", "new", "says"),
    [
        ("llama.block_count", U32, "says that it has 4294967295 blocks and has 2"),
        ("llama.block_count", LAYERS + 1, "3 blocks and has 2"),
        ("llama.block_count", LAYERS - 1, "1 blocks and has 2"),  # which would be another model
        ("llama.block_count", 0, "0 blocks and has 2"),
        ("llama.embedding_length", 2**30, "cannot load"),
        ("llama.feed_forward_length", U32, "cannot load"),
        ("llama.feed_forward_length", 2**20, "by its sizes it is a model of"),
        ("llama.attention.head_count", U32, "cannot load"),
        ("llama.attention.head_count", 0, "cannot load"),
        ("llama.attention.head_count_kv", 2**24, "cannot load"),
        ("llama.attention.head_count_kv", 0, "cannot load"),
    ],
)
def test_counts_that_are_not_those_of_the_tensors(
    name: str, new: int, says: str, good: list[Path], tmp_path: Path
) -> None:
    refused_at_once(changed(good[0], tmp_path / "x.gguf", name, new), says)


def test_blocks_that_are_missing(tmp_path: Path, good: list[Path]) -> None:
    content = good[0].read_bytes()
    (tmp_path / "x.gguf").write_bytes(content.replace(b"blk.1.", b"blk.7."))
    refused_at_once(tmp_path / "x.gguf", "blocks are missing")
    # The model would have numbers drawn at random in its place.
    (tmp_path / "x.gguf").write_bytes(content.replace(b"blk.1.attn_v.", b"blk.1.attn_x."))
    refused_at_once(tmp_path / "x.gguf", r"lacks 1 of the model's tensors, .*layers\.1.*v_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path, good: list[Path]) -> None:
    content = good[0].read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:-4] + struct.pack("<f", value))
    refused_at_once(tmp_path / "x.gguf", "holds NaN or infinity")


def test_the_header_is_read_as_gguf_reads_it(good: list[Path]) -> None:
    for path in good:
        found, reader = check_header(path), gguf.GGUFReader(path)
        assert list(found.tensors) == [one.name for one in reader.tensors]
        for one in reader.tensors:
            assert found.tensors[one.name] == tuple(one.shape.tolist())
        assert found.elements == sum(one.n_elements for one in reader.tensors)
        fields = {name: one for name, one in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(found.values) == list(fields)
        for name, one in fields.items():
            value = one.contents()
            assert found.values[name] == (len(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_both_orders_and_any_alignment(
    order: gguf.GGUFEndian, alignment: int, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=order)
    writer.add_custom_alignment(alignment)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["a", "", "ünï"])
    writer.add_float64("wide", 0.1)
    writer.add_int8("small", -3)
    writer.add_bool("yes", True)
    shapes = {"a": (3, 5), "b": (1,), "c": (2, 3, 4)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = check_header(tmp_path / "x.gguf")
    assert found.tensors == {name: shape[::-1] for name, shape in shapes.items()}
    expected = {"numbers": 3, "words": 3, "wide": 0.1, "small": -3, "yes": True}
    assert {name: found.values[name] for name in expected} == expected


# -- at random ----------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A bit, a byte or a few of the header changed, cut out or put in."""
    found = bytearray(content)
    # Where the data begins, more or less; in the data nothing is seen but NaN.
    end = content.find(b"token_embd") + 2000
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(4, end)
        what = rng.randrange(8)
        if what < 3:
            found[at] ^= 1 << rng.randrange(8)
        elif what < 6:
            found[at] = rng.choice((0, 1, 127, 128, 255))
        elif what == 6:
            del found[at : at + rng.randrange(1, 9)]
        else:
            found[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(found)


@pytest.mark.slow
def test_headers_damaged_at_random(good: list[Path], tmp_path: Path) -> None:
    """The check alone, on many: it never fails in a way of its own, and never takes long."""
    rng = random.Random(13)
    contents = [path.read_bytes() for path in good]
    path, refused = tmp_path / "x.gguf", 0
    for _ in range(3000):
        path.write_bytes(damaged(rng.choice(contents), rng))
        began = time.process_time()
        try:
            check_header(path)
        except DamagedError as error:
            in_one_line(str(error))
            refused += 1
        assert time.process_time() - began < 5
    assert 1000 < refused < 2900


#: Converts damaged files under a limit of memory, and says of each what became of it.
CONVERT = """
import json, resource, sys, time, warnings
from pathlib import Path
from trimtab.checkpoints import packs
from trimtab.errors import TrimtabError
import torch, transformers, gguf
import trimtab.checkpoints.gguf
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity(60)
room = Path(sys.argv[1])
packs.convert_gguf(room / "good.gguf", room / "good")  # loads what it needs
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
for path in sorted(room.glob("damaged*.gguf")):
    began = time.process_time()
    try:
        packs.convert_gguf(path, path.with_suffix(""))
        said = None
    except TrimtabError as error:
        said = str(error)
    print(json.dumps([path.name, said, time.process_time() - began]), flush=True)
"""


def converted(sources: list[Path], room: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    (room / "good.gguf").write_bytes(sources[0].read_bytes())
    contents = [path.read_bytes() for path in sources]
    for number in range(count):
        (room / f"damaged{number}.gguf").write_bytes(damaged(rng.choice(contents), rng))
    ended = subprocess.run(
        [sys.executable, "-c", CONVERT, str(room)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert len(results) == count
    for name, said, seconds in results:
        assert seconds < 10, name  # of the processor; a good file of this size takes a tenth
        if said is not None:
            in_one_line(said)
            continue
        # What was not refused is a model that loads and whose numbers are numbers.
        model = AutoModelForCausalLM.from_pretrained((room / name).with_suffix(""))
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_files_damaged_at_random(good: list[Path], tmp_path: Path) -> None:
    converted(good, tmp_path, seed=0, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_files_damaged_at_random(seed: int, good: list[Path], tmp_path: Path) -> None:
    converted(good, tmp_path, seed=seed, count=200)
