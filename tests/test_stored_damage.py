"""A pass kept on disk: resumed after a kill, right when damaged, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from helpers import language_model
from stored_passes import (
    UNIT,
    check_equal,
    check_same,
    contrast_of,
    small_batches,
    some_wants,
    watched,
)
from trimtab.fitting.activations import Want, collect
from trimtab.fitting.statistics import Means, Samples
from trimtab.reading.packing import encode_contrast

__all__ = ["small_batches"]  # fixtures, which pytest finds by their names here

# -- killed, and run again --------------------------------------------------------------------

#: Fits with a cache, slowly; notes the rows of each batch before it is run.
SLOW_FIT = """
import json, sys, time
import torch
import trimtab as tt
from helpers import language_model
from trimtab.model import is_asking
from stored_passes import PAIRS
from test_stored_damage import RESUMED

cache, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.set_num_threads(2)
tt.LanguageModel.batch_tokens = 150
lm = language_model("llama")

def note(module, args, kwargs):
    if is_asking():
        return
    with open(log, "a") as file:
        file.write(json.dumps(kwargs["input_ids"].tolist()) + "\\n")
    time.sleep(seconds)

lm.anatomy.body.register_forward_pre_hook(note, with_kwargs=True)
fitted = tt.fit(RESUMED, lm, tt.Contrast.from_pairs(PAIRS), cache=cache)
for number, steering in enumerate(fitted):
    steering.save(f"{log}.{number}.safetensors")
"""
RESUMED = [
    tt.CAA(layer=(0, 2), token="last"),
    tt.CAA(layer=1, variant="pca", token="answer"),
    tt.SADI(k=3),
    tt.AUSteer(k=4, site="ffn_out", direction="paper"),
]


@contextmanager
def _slow_fit(cache: Path, log: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that fits with this cache."""
    folder = str(Path(__file__).parent)
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_FIT, str(cache), str(log), str(seconds)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_for_batches(process: subprocess.Popen[bytes], log: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(_logged(log)) < count:
        if process.poll() is not None:
            assert process.stderr
            pytest.fail(f"ended early: {process.stderr.read().decode()[-2000:]}")
        assert time.monotonic() < until, "the other process does not come on"
        time.sleep(0.02)


def _logged(log: Path) -> list[list[tuple[int, ...]]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [[tuple(row) for row in json.loads(line)] for line in lines]


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    with _slow_fit(cache, log, seconds=0.3) as process:
        _wait_for_batches(process, log, 4)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = _logged(log)
    lm, contrast = language_model("llama"), contrast_of()
    plain = tt.fit(RESUMED, lm, contrast)
    with watched(lm) as run:
        resumed = tt.fit(RESUMED, lm, contrast, cache=cache)
    check_same(resumed, plain)
    # Each text once, but those that were in flight.
    times = Counter(row for batch in (*before, *run.batches) for row in batch)
    assert len(times) == len(contrast)
    twice = {row for row, count in times.items() if count > 1}
    assert max(times.values()) <= 2
    assert twice <= set(before[-1])
    assert 0 < run.rows < len(contrast)
    with watched(lm) as run:
        check_same(tt.fit(RESUMED, lm, contrast, cache=cache), plain)
    assert not run.modules


def test_interrupted_and_run_again(tmp_path: Path) -> None:
    """Ctrl-C at every batch in turn: each run goes one batch further."""
    lm, contrast = language_model("llama"), contrast_of()
    plain = tt.fit(RESUMED, lm, contrast)
    body, batches = lm.anatomy.body, []

    def interrupt(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        batches.append([tuple(row) for row in kwargs["input_ids"].tolist()])
        if len(batches) % 2 == 0:
            raise KeyboardInterrupt

    handle = body.register_forward_pre_hook(interrupt, with_kwargs=True)
    runs = 0
    while True:
        runs += 1
        try:
            found = tt.fit(RESUMED, lm, contrast, cache=tmp_path)
            break
        except KeyboardInterrupt:
            assert runs < 30
    handle.remove()
    assert runs > 3
    check_same(found, plain)
    assert len(batches) == 2 * (runs - 1) + len(batches) % 2
    assert len({row for batch in batches for row in batch}) == len(contrast)


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    lm, contrast = language_model("llama"), contrast_of()
    plain = tt.fit(RESUMED, lm, contrast)
    with _slow_fit(cache, log, seconds=0.05) as process:
        _wait_for_batches(process, log, 1)
        handle = lm.anatomy.body.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        here = tt.fit(RESUMED, lm, contrast, cache=cache)
        handle.remove()
        assert process.wait(timeout=120) == 0
    check_same(here, plain)
    there = [tt.Steering.load(f"{log}.{number}.safetensors") for number in range(len(RESUMED))]
    check_same(there, plain)
    with watched(lm) as run:
        check_same(tt.fit(RESUMED, lm, contrast, cache=cache), plain)
    assert not run.modules


# -- damage -----------------------------------------------------------------------------------


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


ROW = 2 * 48 * 4  # bytes of a row of layers.1.resid

#: What is done to the file of one pick; which rows of it are lost.
DAMAGES: dict[str, tuple[str, Callable[[Path], None], set[int]]] = {
    "a byte": ("f32", lambda path: _flip(path, 5 * ROW + 7), {5}),
    "the last byte": ("f32", lambda path: _flip(path, 18 * ROW - 1), {17}),
    "the first byte": ("f32", lambda path: _flip(path, 0), {0}),
    "a checksum": ("crc", lambda path: _flip(path, 4 * 5), {5}),
    "no checksum": ("crc", lambda path: path.write_bytes(bytes(4 * 18)), set(range(18))),
    "cut within a row": ("f32", lambda path: _truncate(path, 15 * ROW + 9), {15, 16, 17}),
    "cut between rows": ("f32", lambda path: _truncate(path, 16 * ROW), {16, 17}),
    "checksums cut": ("crc", lambda path: _truncate(path, 4 * 16 + 1), {16, 17}),
    "zeros": ("f32", lambda path: path.write_bytes(bytes(18 * ROW)), set(range(18))),
    "rows lost": ("f32", lambda path: path.unlink(), set(range(18))),
    "checksums lost": ("crc", lambda path: path.unlink(), set(range(18))),
    "empty": ("f32", lambda path: path.write_bytes(b""), set(range(18))),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_rows_are_run_again(what: str, tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    want, other = Want("layers.1.resid", "last", Samples), Want("layers.2.resid", "last", Samples)
    plain = collect(lm, contrast, [want, other])
    with watched(lm) as run:
        collect(lm, contrast, [want, other], cache=tmp_path)
    ending, damage, lost = DAMAGES[what]
    (file,) = tmp_path.glob(f"*/layers.1.resid.-1.{ending}")
    damage(file)
    order = encode_contrast(lm, contrast, None)
    texts = {row.tokens: row.index for row in order}
    batches = [{texts[_bare(row, texts)] for row in batch} for batch in run.batches]
    with watched(lm) as run:
        check_equal(collect(lm, contrast, [want, other], cache=tmp_path), plain)
    # The batches that hold a lost row, and of those only the site that is lost.
    assert run.rows == sum(len(batch) for batch in batches if batch & lost)
    assert run.rows > 0
    assert run.modules["model.layers.2"] == 0
    with watched(lm) as run:
        check_equal(collect(lm, contrast, [want, other], cache=tmp_path), plain)
    assert not run.modules


def _bare(row: tuple[int, ...], texts: dict[tuple[int, ...], int]) -> tuple[int, ...]:
    """A row without its padding."""
    return next(row[:length] for length in range(len(row), 0, -1) if row[:length] in texts)


def test_a_row_in_the_place_of_another(tmp_path: Path) -> None:
    """Whole rows swapped have whole contents; their checksums tell."""
    lm, contrast = language_model("llama"), contrast_of()
    want = Want("layers.1.resid", "last", Samples)
    plain = collect(lm, contrast, [want], cache=tmp_path)
    (file,) = tmp_path.glob("*/*.f32")
    content = file.read_bytes()
    assert content[:ROW] != content[ROW : 2 * ROW]
    file.write_bytes(content[ROW : 2 * ROW] + content[:ROW] + content[2 * ROW :])
    check_equal(collect(lm, contrast, [want], cache=tmp_path), plain)


# -- what it looks like, and what it refuses --------------------------------------------------


def test_the_files(tmp_path: Path) -> None:
    """As the format says, so that others can read them."""
    lm, contrast = language_model("llama"), contrast_of()
    wants = [Want("layers.1.resid", "last", Samples), Want("embed", "mean", Means, read=UNIT)]
    found = collect(lm, contrast, wants, cache=tmp_path)
    (room,) = tmp_path.iterdir()
    names = {f"{pick}.{end}" for pick in ("layers.1.resid.-1", "embed.mean.unit")
             for end in ("f32", "crc")}  # fmt: skip
    assert {path.name for path in room.iterdir()} == {"pass.json", *names}
    about = json.loads((room / "pass.json").read_text())
    assert about["model"]["digest"] == lm.identity.digest
    assert (about["dtype"], about["texts"]) == ("torch.float32", 36)
    stored = torch.frombuffer(
        bytearray((room / "layers.1.resid.-1.f32").read_bytes()), dtype=torch.float32
    )
    texts, labels, _ = found[wants[0]].texts()
    stored = stored.view(18, 2, 48)
    for side, positive in ((0, True), (1, False)):
        error = (stored[:, side] - texts[labels == positive]).abs()
        assert (error <= 2**-10 * stored[:, side].abs().amax(-1, keepdim=True)).all()


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_reading_changes_nothing(tmp_path: Path) -> None:
    lm, contrast, wants = language_model("llama"), contrast_of(), some_wants()
    collect(lm, contrast, wants, cache=tmp_path)
    before = _digests(tmp_path)
    assert len(before) == 1 + 2 * len({want.pick for want in wants})
    collect(lm, contrast, wants, cache=tmp_path)
    assert _digests(tmp_path) == before


def _check_refused(cache: Path, match: str) -> None:
    lm = language_model("llama")
    with watched(lm) as run, pytest.raises(tt.TrimtabError, match=match) as error:
        tt.CAA(layer=1, token="last").fit(lm, contrast_of(), cache=cache)
    assert "\n" not in str(error.value)
    assert not run.modules


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_is_a_file(inside: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    _check_refused(file / "cache" if inside else file, f"^cannot use the cache {file}")
    assert file.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_cache_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        _check_refused(tmp_path, "^cannot use the cache .*: Permission denied$")
    finally:
        tmp_path.chmod(0o700)


def test_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the model runs, in spite of the check."""
    lm, contrast = language_model("llama"), contrast_of()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.fitting.stored._write_at", full)
        with pytest.raises(tt.TrimtabError, match="^cannot write to the cache .*: No space left"):
            tt.CAA(layer=1, token="last").fit(lm, contrast, cache=tmp_path)
    plain = tt.CAA(layer=1, token="last").fit(lm, contrast)
    check_same([tt.CAA(layer=1, token="last").fit(lm, contrast, cache=tmp_path)], [plain])


def test_reading_fails(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    tt.CAA(layer=1, token="last").fit(lm, contrast, cache=tmp_path)
    (file,) = tmp_path.glob("*/*.f32")
    file.unlink()
    file.mkdir()
    with pytest.raises(tt.TrimtabError, match="^cannot read the cache .*: Is a directory$"):
        tt.CAA(layer=1, token="last").fit(lm, contrast, cache=tmp_path)


def _free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 18 * ROW - 1)
    _check_refused(tmp_path, f"^the cache {tmp_path} needs 0.0 GB.*disk has 0.0 GB: name another")
    _free(monkeypatch, 18 * ROW)
    lm, contrast = language_model("llama"), contrast_of()
    tt.CAA(layer=1, token="last").fit(lm, contrast, cache=tmp_path)
    # What is there needs no room.
    _free(monkeypatch, 0)
    tt.CAA(layer=1, token="last").fit(lm, contrast, cache=tmp_path)
    with pytest.raises(tt.TrimtabError, match="needs"):
        tt.CAA(layer=2, token="last").fit(lm, contrast, cache=tmp_path)


def test_a_few_rows_need_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    _free(monkeypatch, 3 * ROW)
    tt.ActAdd(layer=1, pairs=3).fit(lm, contrast, cache=tmp_path)
    with pytest.raises(tt.TrimtabError, match="needs"):
        tt.ActAdd(layer=2, pairs=4).fit(lm, contrast, cache=tmp_path)


def test_rows_exchanged_with_their_checksums_are_run_again(tmp_path: Path) -> None:
    lm, contrast = language_model("llama"), contrast_of()
    want = Want("layers.1.resid", "last", Samples)
    plain = collect(lm, contrast, [want], cache=tmp_path)
    for ending, size in (("f32", ROW), ("crc", 4)):
        (file,) = tmp_path.glob(f"*/*.{ending}")
        content = file.read_bytes()
        file.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    check_equal(collect(lm, contrast, [want], cache=tmp_path), plain)
