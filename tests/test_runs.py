"""The directory of a run: records that outlive any interruption, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers import refused_in_one_line
from trimtab import TrimtabError
from trimtab.reports import run as runs_module
from trimtab.reports.run import Run

#: A run that one process has alone.
alone = partial(Run, alone=True)
CONFIG: dict[str, Any] = {"tasks": ["copa"], "limit": 4, "protocols": ("trimtab",)}


def record(index: int, **more: Any) -> dict[str, Any]:
    return {
        "steering": None,
        "task": "copa",
        "protocol": "trimtab",
        "index": index,
        "id": f"row {index}",
        # Several bytes a character, a line separator, and a number that has no short decimal.
        "output": f"é\u2028\u4e2d {index}",
        "values": {"accuracy": 1 / 3, "answered": None},
        "seconds": 0.25,
    } | more


RECORDS = [record(i) for i in range(3)]


def without_checksum(line: str) -> dict[str, Any]:
    found = json.loads(line)
    assert len(found.pop("checksum")) == 16
    return dict(found)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run but the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of three records."""
    with alone(tmp_path / "run", CONFIG) as run:
        run.append(RECORDS[:2])
        run.append(RECORDS[2:])
        run.finish({"results": []})
    return tmp_path / "run"


# -- what it writes -------------------------------------------------------------------------------


def test_what_a_run_leaves(finished: Path) -> None:
    assert set(content(finished)) == {
        "config.json",
        "environment.json",
        "records.jsonl",
        "results.json",
    }
    written = (finished / "records.jsonl").read_text(encoding="utf-8")
    assert [without_checksum(line) for line in written.split("\n")[:-1]] == RECORDS
    assert json.loads((finished / "config.json").read_text()) == {
        "tasks": ["copa"],
        "limit": 4,
        "protocols": ["trimtab"],
    }
    assert json.loads((finished / "results.json").read_text()) == {"results": []}


def test_records_in_memory_are_those_of_the_file(finished: Path) -> None:
    with alone(None, CONFIG) as run:
        run.append([record(0, prompt=(("user", "Hello"),))])
    assert run.records == [record(0, prompt=[["user", "Hello"]])]
    with alone(finished, CONFIG) as run:
        assert run.records == RECORDS


def test_records_are_there_as_soon_as_they_are_kept(tmp_path: Path) -> None:
    with alone(tmp_path / "run", CONFIG) as run:
        for count in (1, 2, 3):
            run.append(RECORDS[count - 1 : count])
            lines = (tmp_path / "run" / "records.jsonl").read_bytes().split(b"\n")
            assert len(lines) == count + 1
            assert json.loads((tmp_path / "run" / "config.json").read_text())["limit"] == 4


def test_the_environment_has_versions_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "PERSPECTIVE_API_KEY"):
        monkeypatch.setenv(name, "not-to-be-told")
    with alone(tmp_path / "run", CONFIG) as run:
        run.append(RECORDS)
        run.finish({})
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["packages"]["transformers"] == transformers.__version__
    assert {"trimtab", "numpy", "scipy", "scikit-learn"} <= set(found["packages"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == torch.get_num_threads()
    for data in content(tmp_path / "run").values():
        assert b"not-to-be-told" not in data


# -- going on -------------------------------------------------------------------------------------


def test_cut_anywhere_it_goes_on_to_the_same_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "environment", dict)  # which takes most of the time
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    whole = (finished / "records.jsonl").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    sizes = {*range(0, len(whole), 7), *(end + near for end in ends for near in (-1, 0, 1))}
    for size in sorted(sizes):
        (cut / "config.json").write_bytes((finished / "config.json").read_bytes())
        (cut / "records.jsonl").write_bytes(whole[:size])
        with alone(cut, CONFIG) as run:
            complete = whole[:size].count(b"\n")
            assert run.records == RECORDS[:complete], size
            run.append(RECORDS[complete:])
        assert (cut / "records.jsonl").read_bytes() == whole, size


def test_a_run_without_records_begins(finished: Path) -> None:
    (finished / "records.jsonl").unlink()
    with alone(finished, CONFIG) as run:
        assert run.records == []
        run.append(RECORDS)
    with alone(finished, CONFIG) as run:
        assert run.records == RECORDS


def test_the_directory_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "run", CONFIG) as run:
        run.append(RECORDS[:1])
        raise KeyboardInterrupt
    with alone(tmp_path / "run", CONFIG) as run:
        assert run.records == RECORDS[:1]


def test_what_fails_before_its_first_record_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError), alone(tmp_path / "run", CONFIG):
        raise TrimtabError("the prompt is too long")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(TrimtabError), alone(tmp_path / "run", CONFIG):
        raise TrimtabError("the prompt is too long")
    assert content(tmp_path / "run") == {"mine.txt": b"mine"}


# -- another configuration ------------------------------------------------------------------------


def test_another_configuration_is_refused_naming_what_differs(finished: Path) -> None:
    before = content(finished)
    other = {"tasks": ["copa"], "limit": 5, "protocols": ["trimtab"], "seed": 1}
    refused_in_one_line(lambda: alone(finished, other), "differs in limit, seed: .*--overwrite")
    assert content(finished) == before
    with alone(finished, CONFIG) as run:  # and the refusal does not keep the directory
        assert run.records == RECORDS


def test_overwrite_begins_anew_and_touches_only_its_own_files(finished: Path) -> None:
    (finished / "notes.txt").write_text("mine")
    (finished / "plots").mkdir()
    (finished / "report.html").write_text("old")
    other = {**CONFIG, "limit": 1}
    with alone(finished, other, overwrite=True) as run:
        assert run.records == []
        run.append(RECORDS[:1])
        assert set(content_of_files(finished)) == {
            "config.json",
            "environment.json",
            "notes.txt",
            "records.jsonl",
        }
    assert (finished / "notes.txt").read_text() == "mine"
    assert (finished / "plots").is_dir()
    with alone(finished, other) as run:
        assert run.records == RECORDS[:1]
    refused_in_one_line(lambda: alone(finished, CONFIG), "limit")


def content_of_files(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_file() and p.name != ".lock"]


def test_overwrite_loses_nothing_before_there_is_something_new(finished: Path) -> None:
    before = content(finished)
    with (
        pytest.raises(TrimtabError, match="no such task"),
        alone(finished, {"limit": 9}, overwrite=True),
    ):
        raise TrimtabError("no such task")
    assert content(finished) == before


# -- what is damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b'{"task": "copa", "ind',
        b"",
        b"\xff\xfe",
        b"5",
        b'{"task": "copa", "protocol": "trimtab"}',
    ],
)
def test_a_damaged_line_in_the_middle_is_refused(finished: Path, line: bytes) -> None:
    file = finished / "records.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    before = content(finished)
    refused_in_one_line(lambda: alone(finished, CONFIG), "records.jsonl, line 2 is damaged")
    assert content(finished) == before


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read"), ("[]", "is not a JSON object")]
)
def test_a_damaged_configuration_is_refused(finished: Path, text: str, says: str) -> None:
    (finished / "config.json").write_text(text)
    refused_in_one_line(lambda: alone(finished, CONFIG), f"config.json {says}")


def test_records_without_a_configuration_are_refused(finished: Path) -> None:
    (finished / "config.json").unlink()
    refused_in_one_line(lambda: alone(finished, CONFIG), "no config.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_not_finite_is_refused(tmp_path: Path, value: float, kept: bool) -> None:
    bad = record(2, values={"perplexity": value}, steering="caa@9")
    with alone(tmp_path / "run" if kept else None, CONFIG) as run:
        run.append(RECORDS[:1])
        refused_in_one_line(
            lambda: run.append([RECORDS[1], bad]), "copa, example row 2, with caa@9"
        )
        assert run.records == RECORDS[:1]
    if kept:
        with alone(tmp_path / "run", CONFIG) as run:
            assert run.records == RECORDS[:1]


# -- where it cannot write ------------------------------------------------------------------------


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    refused_in_one_line(lambda: alone(tmp_path / "run", CONFIG), "is a file")
    refused_in_one_line(lambda: alone(tmp_path / "run" / "below", CONFIG), "cannot write to")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not stop the superuser, as whom tests may run.
    def denied(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    refused_in_one_line(
        lambda: alone(tmp_path / "run", CONFIG), "cannot write to .*Permission denied"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop the superuser")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    refused_in_one_line(
        lambda: alone(tmp_path / "run", CONFIG), "cannot write to .*Permission denied"
    )


class _FullDisk(io.RawIOBase):
    """A file with room for some bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = bytes(data)[: self.room]
        self.room -= len(taken)
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(taken))

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())


@pytest.mark.parametrize("room", [0, 1, 100, 300])
def test_a_full_disk_loses_at_most_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = opened(self, mode, *rest, **options)
        if mode != "ab":
            return file
        return io.BufferedWriter(_FullDisk(file, room))

    with alone(tmp_path / "run", CONFIG) as run:
        run.append(RECORDS[:1])
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", full)
            refused_in_one_line(lambda: run.append(RECORDS[1:]), "cannot write .*No space left")
        assert run.records == RECORDS[:1]
    with alone(tmp_path / "run", CONFIG) as run:
        known = run.records
        assert known == RECORDS[: len(known)]
        assert len(known) < 3
        run.append(RECORDS[len(known) :])
    lines = (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").split("\n")
    assert [without_checksum(line) for line in lines[:-1]] == RECORDS


def test_a_full_disk_does_not_cost_what_was_to_be_overwritten(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(finished)

    def full(path: Path, content: bytes, overwrite: bool = False) -> Path:
        raise TrimtabError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(runs_module, "write_whole", full)
    with alone(finished, {"limit": 9}, overwrite=True) as run:
        refused_in_one_line(lambda: run.append(RECORDS), "No space left")
    assert content(finished) == before


# -- two at once ----------------------------------------------------------------------------------


def test_a_directory_in_use_is_refused(finished: Path) -> None:
    before = content(finished)
    with alone(finished, CONFIG):
        refused_in_one_line(lambda: alone(finished, CONFIG), "in use by another process")
        refused_in_one_line(lambda: alone(finished, CONFIG, overwrite=True), "in use by another")
    with alone(finished, CONFIG) as run:
        assert run.records == RECORDS
    assert content(finished) == before


_OTHER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_directory_in_use_by_another_process(finished: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OTHER, str(finished)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        try:
            refused_in_one_line(lambda: alone(finished, CONFIG), "in use by another process")
        finally:
            other.kill()
    with alone(finished, CONFIG) as run:  # a process that was killed holds nothing
        assert run.records == RECORDS


# -- a directory that several share ---------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a directory but the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_parts_are_kept_whole_and_found_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run", CONFIG)
    assert run.kept("one") is None
    run.keep("one", RECORDS)
    run.keep("none", [])
    again = Run(tmp_path / "deep" / "run", CONFIG)
    assert again.kept("one") == RECORDS  # with its line separators
    assert again.kept("none") == []
    assert again.kept("two") is None
    again.keep("one", RECORDS[:1])
    assert run.kept("one") == RECORDS[:1]
    run.finish({"best": 1}, lambda environment: f"<p>{environment['python']}</p>")
    left = files_of(tmp_path / "deep" / "run")
    assert set(left) == {
        "config.json",
        "environment.json",
        "records/none.jsonl",
        "records/one.jsonl",
        "report.html",
        "results.json",
    }
    assert left["report.html"] == f"<p>{sys.version.split()[0]}</p>".encode()
    assert json.loads(left["results.json"]) == {"best": 1}
    assert json.loads(left["config.json"]) == run.config


def test_without_a_directory_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(None, CONFIG)
    run.keep("one", RECORDS)
    run.finish({"best": 1}, lambda environment: "page")
    assert run.kept("one") is None
    assert run.config["protocols"] == ["trimtab"]
    assert list(tmp_path.iterdir()) == []


def test_a_shared_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", CONFIG)
    run.keep("one", RECORDS)
    before = files_of(tmp_path / "run")
    other = {**CONFIG, "limit": 5, "seed": 1}
    refused_in_one_line(
        lambda: Run(tmp_path / "run", other), "differs in limit, seed: .*--overwrite"
    )
    assert files_of(tmp_path / "run") == before
    assert Run(tmp_path / "run", CONFIG).kept("one") == RECORDS  # and it is not locked


def test_overwrite_clears_what_runs_leave_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, CONFIG)
    run.keep("one", RECORDS)
    run.finish({}, lambda environment: "old")
    (folder / "pictures").mkdir()
    left = ("study.db", "study.db-journal", "study.db-wal", "best.safetensors", "records.jsonl")
    for name in (*left, "pictures/heatmap.svg", "pictures/heatmap.png"):
        (folder / name).write_text("old")
    own = ("notes.txt", "study.db.bak", "pictures/notes.md", "records/table.csv", "mine/one.jsonl")
    (folder / "mine").mkdir()
    for name in own:
        (folder / name).write_text("mine")
    other = {**CONFIG, "limit": 5}
    again = Run(folder, other, overwrite=True)
    assert again.kept("one") is None
    assert set(files_of(folder)) > set(left)  # nothing is lost before there is something new
    again.begin()
    assert again.kept("one") is None
    files = files_of(folder)
    assert set(files) == {*own, "config.json", "environment.json"}
    assert json.loads(files["config.json"]) == again.config
    assert all(files[name] == b"mine" for name in own)
    refused_in_one_line(lambda: Run(folder, CONFIG), "differs in limit")


@pytest.mark.parametrize("line", [b'{"task": "copa", "ind', b"", b"\xff\xfe", b"5", b"[" * 90_000])
def test_a_damaged_part_is_refused_in_one_line(tmp_path: Path, line: bytes) -> None:
    run = Run(tmp_path / "run", CONFIG)
    run.keep("one", RECORDS)
    file = tmp_path / "run" / "records" / "one.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    refused_in_one_line(lambda: run.kept("one"), "one.jsonl, line 2 is damaged")
    file.write_bytes(b"\n".join(lines)[:-5])
    refused_in_one_line(
        lambda: run.kept("one"), "one.jsonl is damaged: it is cut off at its end; delete it"
    )
    file.unlink()
    file.mkdir()
    refused_in_one_line(lambda: run.kept("one"), "one.jsonl cannot be read: Is a directory")


def test_a_shared_run_refuses_what_is_not_finite(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", CONFIG)
    bad = record(2, values={"log_odds": math.nan}, steering="caa@9")
    refused_in_one_line(
        lambda: run.keep("one", [RECORDS[0], bad]), "copa, example row 2, with caa@9"
    )
    assert run.kept("one") is None


def test_a_damaged_configuration_of_a_shared_run_is_refused(tmp_path: Path) -> None:
    Run(tmp_path / "run", CONFIG).begin()
    (tmp_path / "run" / "config.json").write_text("{")
    refused_in_one_line(lambda: Run(tmp_path / "run", CONFIG), "config.json cannot be read")


def test_a_file_where_a_shared_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    refused_in_one_line(lambda: Run(tmp_path / "run", CONFIG), "is a file: name a directory")
    refused_in_one_line(lambda: Run(tmp_path / "run" / "a", CONFIG), "cannot write to")
    assert (tmp_path / "run").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "records").write_text("mine")
    run = Run(tmp_path / "other", CONFIG)
    refused_in_one_line(lambda: run.keep("one", RECORDS), "cannot write to .*records")


@pytest.mark.parametrize("kind", [alone, Run])
def test_no_permission_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    # Permissions do not stop the superuser, as whom tests may run.
    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    def opened(path: Path) -> None:
        run = kind(path, CONFIG)
        run.begin()

    for name in ("mkdir", "exists"):  # of the directory itself, and of the one that it is in
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, denied)
            refused_in_one_line(
                lambda: opened(tmp_path / "run"), "cannot write to .*Permission denied"
            )


_SHARING = """
import json, sys
from trimtab.reports import Run
config, records = json.loads(sys.stdin.readline())
print("ready", flush=True)
sys.stdin.readline()
for turn in range(30):
    run = Run(sys.argv[1], config)
    run.keep(f"theirs-{turn}", records)
    run.keep("both", records)
assert run.kept("both") == records
"""


def test_two_processes_open_one_directory_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", _SHARING, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(json.dumps([CONFIG, RECORDS]).encode() + b"\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"ready\n"
        other.stdin.write(b"go\n")
        other.stdin.flush()
        for turn in range(30):
            run = Run(folder, CONFIG)
            run.keep(f"ours-{turn}", RECORDS)
            run.keep("both", RECORDS)
        assert other.wait() == 0
    for name in (
        "both",
        *(f"{whose}-{turn}" for whose in ("ours", "theirs") for turn in range(30)),
    ):
        assert run.kept(name) == RECORDS
    assert len(files_of(folder)) == 2 + 61
