"""Steering files made to harm: text that would command a terminal, and mutations of everything."""

from __future__ import annotations

import json
import random
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from helpers import language_model
from steering_documents import (
    LARGEST,
    MODEL,
    as_of_old,
    content,
    document_of,
    every,
    good,
    in_one_line,
    refused,
)
from trimtab.anatomy import parse_site
from trimtab.cli import main
from trimtab.errors import one_line, shown
from trimtab.steering import Steering

__all__ = ["good"]  # fixtures, which pytest finds by their names here

# -- text of files ------------------------------------------------------------------------------

ESCAPES = "\x1b[31mred\x1b[0m\x07\r\n\t\x9b2J\u202e\u2028\udc80"


def test_what_is_shown() -> None:
    assert shown("plain ünï 漢字 °") == "plain ünï 漢字 °"
    assert shown(ESCAPES).isprintable()
    assert shown(ESCAPES).startswith("\\x1b[31mred\\x1b[0m\\x07\\r\\n\\t\\x9b2J\\u202e")
    assert one_line("x" * 500) == "x" * 500
    for text in ("x" * 101, "\x1b" * 5000, "/deep" * 900):
        assert len(shown(text)) <= 100
        assert len(shown(text, 40)) <= 40
        assert shown(text)[:20] == one_line(text)[:20]
        assert shown(text)[-20:] == one_line(text)[-20:]
    assert shown(None) == "None"


def _hostile(text: str) -> dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]]:
    """Edits that put a text where a file may have one, and make something wrong there."""

    def operator(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["interventions"][0]["operator"] = text

    def site(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["interventions"][0]["site"] = text

    def layer(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["interventions"][0]["site"] = "layers.77.resid"
        document["model"]["name"] = text

    def positions(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["interventions"][0]["positions"] = text

    def field(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["interventions"][0]["fields"][text] = 1

    def key(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document[text] = 1

    def tensor(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[text] = torch.ones(1)

    def nan(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"table.{text}"] = torch.tensor([float("nan")])

    def half(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"table.{text}"] = torch.ones(1).half()

    def own(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"0.{text}"] = torch.ones(1)

    edits = (operator, site, layer, positions, field, key, tensor, nan, half, own)
    return {one.__name__: one for one in edits}


@pytest.mark.parametrize("text", [ESCAPES[:-1], "x" * 100_000, "\x1b" * 90], ids=len)
@pytest.mark.parametrize("name", _hostile(""))
def test_text_of_a_file_reaches_no_terminal(
    name: str, text: str, good: Path, tmp_path: Path
) -> None:
    document, tensors = document_of(good), load_file(good)
    _hostile(text)[name](document, tensors)
    bad = as_of_old(tmp_path / "bad.safetensors", document, tensors)
    refused(lambda: Steering.load(bad), "bad")


def test_names_of_a_file_reach_no_terminal(tmp_path: Path) -> None:
    strange = replace(
        every(),
        method=ESCAPES[:-1],
        dial=tt.Dial(ESCAPES[:-1], 1.0, (0.0, 2.0), ESCAPES[:-1]),
        value=None,
        model=replace(MODEL, name=ESCAPES[:-1] * 50, architecture=ESCAPES[:-1]),
        calibration=None,
    )
    loaded = Steering.load(strange.save(tmp_path / "x.safetensors"))
    assert loaded.method == strange.method  # which stays what it was
    assert loaded.label.isprintable()
    assert str(loaded.model).isprintable()
    lm = language_model("llama")
    refused(lambda: loaded.check_fits(lm.anatomy, lm.identity), "sizes do not fit")
    refused(lambda: loaded.at(1e300), "the dial")
    refused(lambda: loaded.at(kl=0.1), "not calibrated")
    with pytest.warns(tt.TrimtabWarning) as said:
        loaded.at(3)
    in_one_line(str(said[0].message))


def test_inspect_prints_no_more_than_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = replace(
        every(),
        method=ESCAPES[:-1],
        dial=tt.Dial(ESCAPES[:-1], 1.0, (0.0, 2.0), ESCAPES[:-1]),
        model=replace(MODEL, name=ESCAPES[:-1]),
        contrast={"name": ESCAPES[:-1], "rows": 3},
        tables={"unit": torch.tensor([1]), ESCAPES[:-1]: torch.tensor([1])},
        value=None,
    )
    path = strange.save(tmp_path / "x.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path)])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "\\x1b[31mred" in printed
    assert all(line.isprintable() for line in printed.split("\n"))


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a/" * 3000, "\x1b[31m.safetensors", "nul\0", "\udc80", "y" * 300 + "@3"]
)
def test_paths_that_cannot_be(path: str) -> None:
    refused(lambda: Steering.load(path), "no such steering file|cannot read|No such")
    refused(lambda: Steering.read(path), "no such steering file|cannot read|no number")


def test_a_long_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 115 + ".safetensors")  # 242 bytes of the 255 that there may be
    assert Steering.load(every().save(path)).label == every().label
    refused(lambda: every().save(tmp_path / ("z" * 300)), "cannot write .*name too long")


# -- mutations ----------------------------------------------------------------------------------


def _mutated_value(value: Any, rng: random.Random) -> Any:
    others = [
        None, True, 0, -1, 1, 1e39, -1e300, 0.5, float("nan"), float("inf"), 10**400, "", "x",
        "\x1b[31m", "a" * 3000, [], {}, [1, 2], {"a": 1}, "layers.1.resid", "layers.٣.resid",
    ]  # fmt: skip
    if isinstance(value, bool):
        others.append(not value)
    elif isinstance(value, int | float) and abs(value) < 1e300:
        others += [value + 1, -value, value * 1e30, value / 3]
    elif isinstance(value, str):
        others += [value[:-1], value + value, value.upper()]
    elif isinstance(value, list) and value:
        others += [value[::-1], value[1:], value + value[:1]]
    return rng.choice(others)


def _mutate_json(value: Any, rng: random.Random) -> Any:
    """Something inside changed, taken out or put in."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return _mutated_value(value, rng)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    found: Any = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.1:
        del found[key]
    elif rng.random() < 0.05 and isinstance(found, dict):
        found["\x1b[2J" * rng.randrange(1, 200)] = 1
    else:
        found[key] = _mutate_json(value[key], rng)
    return found


def _mutate_tensors(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    what = rng.randrange(9)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[rng.choice(["x", "table.", "9.vector", f"{name}.x", "\x1b[31m"])] = tensor.clone()
    elif what == 2:
        tensors[name] = tensor.to(rng.choice([torch.float64, torch.int32, torch.float16]))
    elif what == 3:
        tensors[name] = tensor[..., 1:].contiguous()
    elif what == 4:
        tensors[name] = tensor[None].contiguous()
    elif what == 5:
        tensors[name] = torch.zeros_like(tensor)
    else:
        flat = tensor.clone().flatten()
        values = [0, -1, 48, 1e38, float("nan"), float("inf"), 0.5]
        flat[rng.randrange(len(flat))] = rng.choice(
            values[:3] if tensor.dtype == torch.int64 else values
        )
        tensors[name] = flat.reshape(tensor.shape)


def _mutated(path: Path, good: Path, rng: random.Random) -> bool:
    """Write a damaged copy; whether it has a checksum still."""
    what = rng.randrange(4)
    if what == 0:
        raw = bytearray(good.read_bytes())
        (length,) = struct.unpack("<Q", raw[:8])
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(8 + length) if rng.random() < 0.6 else rng.randrange(len(raw))
            raw[at] = rng.choice((0, 255, raw[at] ^ (1 << rng.randrange(8)), rng.randrange(256)))
        if rng.random() < 0.1:
            del raw[rng.randrange(len(raw)) :]
        path.write_bytes(raw)
        return True
    if what == 1:  # the header that says where the tensors are
        header, data = content(good)
        header = _mutate_json(header, rng)
        raw_header = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw_header)) + raw_header + data)
        return True
    document, tensors = document_of(good), load_file(good)
    if what == 2:
        for _ in range(rng.choice((1, 1, 2))):
            document = _mutate_json(document, rng)
    else:
        _mutate_tensors(tensors, rng)
    save_file(tensors, path, {"trimtab": json.dumps(document)})
    return False


def _follows_the_rules(loaded: Steering, path: Path) -> None:
    """What a steering must be, each rule said anew; and saved again it is the same file."""
    assert loaded.interventions
    assert loaded.acts
    low, high = loaded.dial.range
    assert -LARGEST <= low <= high <= LARGEST
    assert abs(loaded.setting) <= LARGEST
    for one in loaded.interventions:
        one.operator.check()
        assert one.operator.width <= 10**8
        layer, kind = parse_site(one.site)
        assert one.site == (kind if layer is None else f"layers.{layer}.{kind}")
        assert layer is None or layer < loaded.model.layers
    if loaded.calibration is not None:
        for column in ("positive", "positive_worst5", "negative", "negative_worst5"):
            dials = [abs(dial) for dial in getattr(loaded.calibration, column) if dial is not None]
            assert dials == sorted(dials)
    in_one_line(loaded.label)
    first = loaded.save(path, overwrite=True).read_bytes()
    again = Steering.load(path)
    assert again.save(path, overwrite=True).read_bytes() == first
    assert again.digest == loaded.digest


def mutations(good: Path, room: Path, seed: int, count: int) -> None:
    rng, bad = random.Random(seed), room / "bad.safetensors"
    read = unchecked = 0
    original = good.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tt.TrimtabWarning)
        expected = Steering.load(good)
        for _ in range(count):
            checked = _mutated(bad, good, rng)
            try:
                loaded = Steering.load(bad)
            except tt.TrimtabError as error:
                in_one_line(str(error))
                continue
            _follows_the_rules(loaded, room / "again.safetensors")
            read += 1
            has_checksum = b"trimtab_sha256" in bad.read_bytes()[:20_000]
            if checked and has_checksum:  # whatever was changed, the steering is not
                assert (room / "again.safetensors").read_bytes() == original
                assert loaded.digest == expected.digest
            else:
                unchecked += 1
    assert 0 < read < count
    assert unchecked  # files without a checksum are read, by their rules


@pytest.mark.slow
def test_mutations(good: Path, tmp_path: Path) -> None:
    mutations(good, tmp_path, seed=0, count=2000)


@pytest.mark.slow
def test_many_mutations(good: Path, tmp_path: Path) -> None:
    mutations(good, tmp_path, seed=1, count=30_000)
