"""The directory of a run: what was asked, the records as they come, where it ran, the results.

`config.json` says what was asked for; `records.jsonl` has one line for each example, written as
they are finished, a batch at a time; `environment.json` says on what; `results.json` is the end. A
run that was interrupted, at any point, is opened again with the same configuration and goes on. One
that fails before its first record leaves nothing, and loses nothing that it was to overwrite.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from trimtab.errors import TrimtabError
from trimtab.steering import write_whole

_PACKAGES = ("trimtab", "torch", "transformers", "numpy", "scipy", "scikit-learn", "lm-eval")
#: What every record has; a line without them is not ours.
_KEYS = {"task", "protocol", "steering", "index", "values", "seconds"}

#: Files that runs leave in a directory, beside the pictures and the records of parts.
_LEFT = (
    "config.json",
    "environment.json",
    "records.jsonl",
    "results.json",
    "report.html",
    "best.safetensors",
    *(f"study.db{end}" for end in ("", "-journal", "-wal", "-shm")),
)


class Run:
    """An open run directory; without one, records are only kept in memory."""

    def __init__(
        self, path: str | Path | None, config: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.config = json.loads(json.dumps(config))  # as it comes back from the file
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, Any]] = []
        self._lock: FileLock | None = None
        self._overwrite, self._begun, self._made = overwrite, False, False
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        try:
            self._made = _make_directory(path)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise TrimtabError(f"{path} is in use by another process") from error
        except OSError as error:
            raise TrimtabError(f"cannot write to {path}: {error.strerror or error}") from error
        try:
            if not self._overwrite:
                check_config(path, self.config)
                self.records = self._read_records(path / "records.jsonl")
        except BaseException:
            self.close()
            raise

    def _read_records(self, file: Path) -> list[dict[str, Any]]:
        """The records so far; a last line that was cut off in the middle is dropped."""
        if not file.exists():
            return []
        whole, records = 0, []
        content = file.read_bytes()
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            records.append(_record(line, f"{file}, line {number}", _KEYS))
            whole += len(line) + 1
        if whole < len(content):
            with file.open("r+b") as opened:
                opened.truncate(whole)
        return records

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep the records of a batch."""
        lines = [line_of(record) for record in records]
        if self.path is not None:
            self._write_lines(lines)
        self.records += map(json.loads, lines)  # as they come back from the file

    def _write_lines(self, lines: Sequence[str]) -> None:
        assert self.path is not None
        self._begin()
        try:
            with (self.path / "records.jsonl").open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrimtabError(
                f"cannot write {self.path / 'records.jsonl'}: {error.strerror or error}"
            ) from error

    def finish(
        self, results: dict[str, Any], report: Callable[[dict[str, Any]], str] | None = None
    ) -> None:
        """Write the results, and the page that `report` makes, given the environment."""
        if self.path is not None:
            if not self.records:
                self._begin()
            self._write("results.json", results)
            if report is not None:
                content = report(environment()).encode()
                write_whole(self.path / "report.html", content, overwrite=True)

    def _begin(self) -> None:
        """Before the first record is written: what was asked, and on what it runs."""
        if self._begun:
            return
        assert self.path is not None
        self._write("environment.json", environment())  # fails on a full disk, with nothing lost
        if self._overwrite:
            for name in ("report.html", "results.json", "records.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        self._write("config.json", self.config)
        self._begun = True

    def _write(self, name: str, content: dict[str, Any]) -> None:
        assert self.path is not None
        write_json(self.path / name, content)

    def close(self) -> None:
        """Let another process have the directory; one that was made for nothing goes."""
        if self._lock is None or self.path is None:
            return
        if self._made and not self._begun:
            with suppress(OSError):  # what lm-eval has answered stays
                (self.path / ".lock").unlink()
                self.path.rmdir()
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SharedRun:
    """A run directory that several processes may work in: a file for each part of the work,
    written whole when it is done. Without a path nothing is kept."""

    def __init__(
        self, path: str | Path | None, config: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.config = json.loads(json.dumps(config))  # as it comes back from the file
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        try:
            _make_directory(self.path)
            with FileLock(self.path / ".lock", timeout=60):
                if overwrite:
                    self._clear()
                else:
                    check_config(self.path, self.config)
                if not (self.path / "config.json").exists():
                    write_json(self.path / "environment.json", environment())
                    write_json(self.path / "config.json", self.config)
        except Timeout as error:
            raise TrimtabError(f"{self.path} is in use by another process") from error
        except OSError as error:
            reason = error.strerror or error
            raise TrimtabError(f"cannot write to {self.path}: {reason}") from error

    def _clear(self) -> None:
        """Take away what an earlier run left, and nothing else."""
        assert self.path is not None
        for name in _LEFT:
            (self.path / name).unlink(missing_ok=True)
        for pattern in ("records/*.jsonl", "pictures/*.svg", "pictures/*.png"):
            for file in self.path.glob(pattern):
                file.unlink()

    def keep(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """The records of one part of the work."""
        if self.path is None:
            return
        directory = self.path / "records"
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise TrimtabError(f"cannot write to {directory}: {error.strerror or error}") from error
        lines = "".join(line_of(record) + "\n" for record in records)
        write_whole(directory / f"{name}.jsonl", lines.encode(), overwrite=True)

    def kept(self, name: str) -> list[dict[str, Any]] | None:
        """The records of a part that is done, or None."""
        if self.path is None:
            return None
        file = self.path / "records" / f"{name}.jsonl"
        try:
            lines = file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrimtabError(f"{file} cannot be read: {error.strerror or error}") from error
        if lines.pop():
            raise TrimtabError(f"{file} is cut off at its end: delete it, and it is made again")
        return [_record(line, f"{file}, line {i}") for i, line in enumerate(lines, 1)]

    def finish(
        self, results: dict[str, Any], report: Callable[[dict[str, Any]], str] | None = None
    ) -> None:
        """Write the results, and the page that `report` makes, given the environment."""
        if self.path is None:
            return
        write_json(self.path / "results.json", results)
        if report is not None:
            page = report(environment()).encode()
            write_whole(self.path / "report.html", page, overwrite=True)


def _make_directory(path: Path) -> bool:
    """The directory of a run; whether it was not there."""
    if path.exists() and not path.is_dir():
        raise TrimtabError(f"{path} is a file: name a directory for the run")
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    return made


def _record(line: bytes, where: str, keys: Set[str] = frozenset()) -> dict[str, Any]:
    """A line of a file of records, which has these keys."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{where} is damaged: {error}") from error
    if not (isinstance(record, dict) and record.keys() >= keys):
        raise TrimtabError(f"{where} is damaged: it is not a record")
    return record


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with a run of another configuration."""
    known = _read_config(path)
    if known is None or known == config:
        return
    differing = sorted(
        key for key in known.keys() | config.keys() if known.get(key) != config.get(key)
    )
    raise TrimtabError(
        f"{path} holds a run with another configuration, which differs in "
        f"{', '.join(differing)}: choose another directory, or pass --overwrite"
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.exists():
        if (path / "records.jsonl").exists():
            raise TrimtabError(f"{path} has records but no config.json: choose another one")
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrimtabError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TrimtabError(f"{file} is not a JSON object")
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, written whole."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    write_whole(path, text.encode(), overwrite=True)


def line_of(record: dict[str, Any]) -> str:
    """A record as one line of JSON, which has no NaN and no infinity."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise TrimtabError(
            f"{record['task']}, example {record['id']}, with {record['steering'] or 'no steering'}:"
            " a figure is NaN or infinite; the model's numbers overflow, so try --dtype float32, "
            "or a smaller dial"
        ) from error


def environment() -> dict[str, Any]:
    """What a run ran on: versions, machine, threads."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }
