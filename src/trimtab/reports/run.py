"""The directory of a run: what was asked, the records as they come, where it ran, the results.

`config.json` says what was asked for; `records.jsonl` has one line for each example, written as
they are finished, a batch at a time; `environment.json` says on what; `results.json` is the end. A
run that was interrupted, at any point, is opened again with the same configuration and goes on. One
that fails before its first record leaves nothing, and loses nothing that it was to overwrite.

What is missing is made again; what is damaged is refused in one line. So every record has a
checksum over itself, its place and the configuration, is of the form that records have, and is
there once. The checksums have no key: they tell what was damaged, edited or brought from elsewhere,
but not who computes them anew. Records from before there were checksums are taken without.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.errors import TrimtabError
from trimtab.files import Journal, check_directory, json_digest, make_directory, write_whole

_PACKAGES = ("trimtab", "torch", "transformers", "numpy", "scipy", "scikit-learn", "lm-eval")
#: How long a path is at most for which the files of a run below it can be made.
_LONGEST_PATH = 3500

#: What a run's environment says where each of its lines has a checksum from the first on.
_ALL_SEALED = {"records": "each line has a checksum"}
#: Of how an environment is known, also one from before there were checksums.
_ENVIRONMENT = {"date", "python", "platform", "packages"}
#: What comes of the work of a run.
_MADE = (
    "records.jsonl",
    "results.json",
    "report.html",
    "best.safetensors",
    "unsearched.safetensors",
)
#: Files that runs leave in a directory, beside the pictures and the records of parts, and beside
#: what tells that a directory is a run's.
_LEFT = (*_MADE, *(f"study.db{end}" for end in ("", "-journal", "-wal", "-shm")))
#: The pictures of runs, by name: those of a recipe with its part before them.
PICTURES = [
    "ablations", "auroc", "coherence", "combinations", "cosines", "count", "curve", "curves",
    "dial", "differences", "footprint", "front", "gain-and-cost", "gain-by-k", "heatmap", "line",
    "masks", "norms", "overlap", "overview", "pairs", "panels", "predicted", "projections",
    "suppression", "tasks", "tokens", "trials", "units",
]  # fmt: skip
#: The first line of the LaTeX tables of runs, by which they and the CSV beside them are known.
TABLE_MARK = "% A table of a run of trimtab; needs \\usepackage{booktabs}.\n"
_PICTURE = re.compile(rf"(.+-)?({'|'.join(PICTURES)}|scores-[\w-]+|figure-(\d|b1))")
#: The records of parts, by name: of trials, of the unsteered model and of dials.
_PART = re.compile(r"(unsteered|unsearched|\d{5,}|.+-[-+.e\d]+)-(validation|test|plain-text)")

#: The tokens of a text are its weight: more than these is no text.
_HEAVIEST = 1e12

Finite = Annotated[float, Field(allow_inf_nan=False)]
#: A value of which the square is finite, so that there is a variance.
Bounded = Annotated[Finite, Field(ge=-1e150, le=1e150)]


class Scored(BaseModel):
    """The form of a record of an example."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str
    protocol: str
    steering: str | None
    index: Annotated[int, Field(ge=0)]
    id: str
    values: dict[str, Bounded | None]
    seconds: Annotated[Finite, Field(ge=0)]
    prompt: Any = None
    output: Any = None
    prediction: Any = None
    target: Any = None
    answer: str | None = None
    gate: Any = None
    weight: Annotated[Finite, Field(gt=0, le=_HEAVIEST)] = 1.0
    n: Annotated[int, Field(ge=0)] = 0
    figures: dict[str, Finite] = {}

    @model_validator(mode="after")
    def _figures_have_a_number(self) -> Scored:
        """Figures over a whole task stand alone, beside how many examples they are of."""
        if self.figures and (self.values or "n" not in self.model_fields_set):
            raise ValueError("figures have an n, and no values beside them")
        return self


class Run:
    """The directory of a run. Without a path, records are only kept in memory.

    One process has it `alone` from the beginning on and appends to one file of records; otherwise
    several may work in it, each part of the work in a file of its own, which is written whole when
    it is done. Nothing is made before the first records are kept or `begin` is called, so that what
    fails or is interrupted before leaves nothing.
    """

    def __init__(
        self,
        path: str | Path | None,
        config: dict[str, Any],
        overwrite: bool = False,
        *,
        alone: bool = False,
    ) -> None:
        self.config = json.loads(json.dumps(config))  # as it comes back from the file
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, Any]] = []
        self._overwrite, self._alone = overwrite, alone
        self._begun, self._made, self._all_sealed = False, False, True
        if self.path is None:
            return
        with self._one_line():
            _check_path(self.path)
            check_directory(self.path)
            self._check(self.path)
        self._lock = FileLock(self.path / ".lock")
        self._journal = Journal(self.path / "records.jsonl", self._salt)
        if alone:
            self._take(self.path)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Whatever stands against writing to the directory."""
        try:
            yield
        except Timeout as error:
            raise TrimtabError(f"{self.path} is in use by another process") from error
        except OSError as error:
            reason = error.strerror or error
            raise TrimtabError(f"cannot write to {self.path}: {reason}") from error

    def _check(self, path: Path) -> None:
        """Whether the run may be in a directory, as what is in it stands now."""
        if self._overwrite:
            check_overwritable(path)
        else:
            self.config = check_config(path, self.config)

    @property
    def _salt(self) -> str:
        """What the checksums of all lines have of the configuration."""
        return json_digest(self.config, sort_keys=True, allow_nan=False)[:16]

    def _take(self, path: Path) -> None:
        """Have the directory for this process, with the records that are there."""
        with self._one_line():
            self._made = not path.exists()
            try:
                path.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
            except OSError:
                if self._made:
                    _remove_empty(path)
                raise
        try:
            self._check(path)
            if not self._overwrite and self._journal.path.exists():
                self._all_sealed = _says_all_sealed(path)
                self.records = self._read_records()
        except BaseException:
            self.close()
            raise

    def _read_records(self) -> list[dict[str, Any]]:
        journal, places = self._journal, set()
        records = journal.read() or []
        if journal.unsealed and self._all_sealed:
            journal.refuse("it has no checksum", 1)
        for number, record in enumerate(records, 1):
            _check_scored(journal, number, record)
            place = tuple(record[key] for key in ("task", "protocol", "steering", "index"))
            if place in places:
                journal.refuse("its example has another line already", number)
            places.add(place)
        return records

    def check(self, reason: Callable[[dict[str, Any]], str]) -> None:
        """Refuse records for which there is a `reason` that they do not belong to what is asked."""
        for number, record in enumerate(self.records, 1):
            why = reason(record)
            if why and self.path is not None:
                self._journal.refuse(why, number)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep the records of a batch."""
        plain = [json.loads(line_of(record)) for record in records]  # as they come back
        if self.path is not None:
            self.begin()
            self._journal.append(plain)
        self.records += plain

    def begin(self) -> None:
        """Before anything is kept: what was asked, and on what it runs."""
        if self._begun or self.path is None:
            return
        with self._one_line():
            self.path.mkdir(parents=True, exist_ok=True)
            with self._lock.acquire(timeout=60):  # once more, where it is taken already
                self._check(self.path)  # something else may have come meanwhile
                anew = self._overwrite or not (self.path / "config.json").exists()
                if anew or self._alone:
                    note = _ALL_SEALED if self._all_sealed else {}
                    # The first thing to fail on a full disk, with nothing lost.
                    write_json(self.path / "environment.json", environment() | note)
                if self._overwrite:
                    self._clear(self.path)
                if anew:
                    write_json(self.path / "config.json", self.config)
        self._begun = True

    def _clear(self, path: Path) -> None:
        """Take away what an earlier run left, and nothing else."""
        pictures = [*path.glob("pictures/*.svg"), *path.glob("pictures/*.png")]
        made = [file for file in pictures if _PICTURE.fullmatch(file.stem)]
        made += [file for file in path.glob("records/*.jsonl") if _is_part(file)]
        for file in path.glob("tables/*.tex"):
            if file.read_bytes().startswith(TABLE_MARK.encode()):
                made += [file, file.with_suffix(".csv")]
        for file in (*made, *(path / name for name in _LEFT)):
            file.unlink(missing_ok=True)

    # -- parts of the work ------------------------------------------------------------------------

    def _part(self, name: str) -> Journal | None:
        """Where the records of a part are."""
        if self.path is None:
            return None
        file = self.path / "records" / f"{name}.jsonl"
        return Journal(file, f"{self._salt} {name}", whole=True)

    def keep(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """The records of one part of the work."""
        part = self._part(name)
        if part is None:
            return
        plain = [json.loads(line_of(record)) for record in records]
        self.begin()
        make_directory(part.path.parent)
        part.replace(plain)

    def kept(self, name: str) -> list[dict[str, Any]] | None:
        """The records of a part that is done, or None."""
        part = self._part(name)
        if part is None or (self._overwrite and not self._begun):
            return None
        records = part.read()
        if part.unsealed and _says_all_sealed(part.path.parents[1]):
            part.refuse("it has no checksum", 1)
        return records

    def scored(
        self, name: str, reason: Callable[[list[dict[str, Any]]], str]
    ) -> list[dict[str, Any]] | None:
        """The records of examples of a part that is done, or None; those for which there is a
        `reason` that they are not what was asked for are refused."""
        part, records = self._part(name), self.kept(name)
        if part is None or records is None:
            return None
        for number, record in enumerate(records, 1):
            _check_scored(part, number, record)
        why = reason(records)
        if why:
            part.refuse(why)
        return records

    def refuse(self, name: str, reason: str) -> None:
        """Say that the records of a part are damaged."""
        part = self._part(name)
        if part is not None:
            part.refuse(reason)

    # -- the end ----------------------------------------------------------------------------------

    def finish(
        self, results: dict[str, Any], report: Callable[[dict[str, Any]], str] | None = None
    ) -> None:
        """Write the results, and the page that `report` makes, given the environment."""
        if self.path is None:
            return
        self.begin()
        write_json(self.path / "results.json", results)
        if report is not None:
            page = report(environment()).encode()
            write_whole(self.path / "report.html", page, overwrite=True)

    def close(self) -> None:
        """Let another process have the directory; one that was made for nothing goes."""
        if self.path is None or not self._alone:
            return
        if self._made and not self._begun:
            _remove_empty(self.path)
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_overwritable(path: Path) -> None:
    """Refuse to overwrite a directory in which there is something, and not a run."""
    if not path.is_dir():
        return
    names = {file.name for file in path.iterdir()} - {".lock"}
    # A run that was killed as it began has an environment alone.
    begun = names == {"environment.json"}
    known = not _has_foreign_environment(path) if begun else _is_run(path)
    if names and not known:
        raise TrimtabError(f"{path} is not a run's directory: overwriting replaces only those")


def _is_run(path: Path) -> bool:
    """Whether a directory is that of a run; a model's has a config.json too."""
    config = object_in(path / "config.json")
    return config is not None and "model_type" not in config and _is_environment(path)


def _is_environment(path: Path) -> bool:
    """Whether the environment.json of a directory is a run's."""
    found = object_in(path / "environment.json")
    return found is not None and (
        found.keys() >= _ENVIRONMENT or _ALL_SEALED.items() <= found.items()
    )


def _has_foreign_environment(path: Path) -> bool:
    """Whether there is an environment.json that no run wrote; an empty one is nobody's."""
    file = path / "environment.json"
    return file.exists() and file.stat().st_size > 0 and not _is_environment(path)


def object_in(file: Path) -> dict[str, Any] | None:
    """What a file holds, where that is a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _says_all_sealed(path: Path) -> bool:
    """Whether each line of a run must have a checksum; before there were any, none has."""
    file = path / "environment.json"
    if not file.exists():
        return False
    found = object_in(file)
    if found is None:
        raise TrimtabError(f"{file} is damaged: choose another directory, or pass --overwrite")
    return _ALL_SEALED.items() <= found.items()


def _is_part(file: Path) -> bool:
    """Whether a file is the records of a part: by its name, or by its first line."""
    if _PART.fullmatch(file.stem):
        return True
    with file.open("rb") as opened:
        line = opened.readline()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"task", "id", "steering"} <= record.keys()


def _check_path(path: Path) -> None:
    """Refuse what cannot be the directory of a run."""
    text = str(path)
    if "\0" in text or not _is_text(text):
        raise TrimtabError(f"{text!r} is not UTF-8 text: name another directory")
    if len(os.fsencode(path.absolute())) > _LONGEST_PATH:
        raise TrimtabError(f"the path {text[:60]}... is too long: name another directory")
    if path.exists() and not path.is_dir():
        raise TrimtabError(f"{path} is a file: name a directory for the run")


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: not where it is of bytes that were no text."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _remove_empty(path: Path) -> None:
    """Remove a directory in which there is nothing but its lock."""
    with suppress(OSError):
        if all(file.name == ".lock" for file in path.iterdir()):
            (path / ".lock").unlink(missing_ok=True)
            path.rmdir()


def _check_scored(journal: Journal, number: int, record: dict[str, Any]) -> None:
    """Refuse what is not a record of an example."""
    try:
        Scored.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        journal.refuse(f"it is not a record ({key[:60]}: {first['msg'].lower()})", number)


def check_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run in a directory, which must be this one."""
    known = _read_config(path)
    if known is None:
        return config
    if known != config:
        if not _is_run(path):
            raise TrimtabError(f"{path} is not a run's directory: choose another one")
        differing = sorted(
            key for key in known.keys() | config.keys() if known.get(key) != config.get(key)
        )
        raise TrimtabError(
            f"{path} holds a run with another configuration, which differs in "
            f"{', '.join(differing)}: choose another directory, or pass --overwrite"
        )
    return known


def _read_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.exists():
        names = ("records.jsonl", "records/*.jsonl", "study.db")
        if any(list(path.glob(name)) for name in names):
            raise TrimtabError(f"{path} has records but no config.json: choose another one")
        held = [name for name in _MADE if (path / name).exists()]
        if held:  # somebody's own, which would be lost at the end
            raise TrimtabError(f"{path} holds {held[0]} but no config.json: choose another one")
        if _has_foreign_environment(path):
            raise TrimtabError(f"{path} holds an environment.json of no run: choose another one")
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrimtabError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TrimtabError(f"{file} is not a JSON object")
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, written whole."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    if not _is_text(text):
        raise TrimtabError(
            f"cannot write {path}: a name in it is not UTF-8 text; name files and steerings anew"
        )
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
