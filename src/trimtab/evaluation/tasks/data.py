"""Reads the rows of data sets: from a directory of JSONL files that the user has, else the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError, first_line
from trimtab.files import read_jsonl, user_path

#: The environment variable that names the directory, where no argument does.
VARIABLE = "TRIMTAB_DATA"

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


#: One line of a data file.
Row = Mapping[str, Any]


#: What a row must have: the type of each column, several types, or the values that there are.
Columns = Mapping[str, type | tuple[type, ...] | frozenset[Any]]


@dataclass(frozen=True)
class Source:
    """Where a part of a data set is: a file under the data directory, or a data set of the hub.

    `fallback` is a file that stands in where `file` is absent; `rename` turns a row of the hub into
    a row of the file.
    """

    file: str
    fallback: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "test"
    rename: Callable[[Row], Row] = dict
    keep: Callable[[Row], bool] = lambda row: True  # which rows of the hub belong to it


def data_directory(data: str | None) -> Path | None:
    """The user's directory of data sets, if there is one."""
    name = data or os.environ.get(VARIABLE)
    if not name:
        return None
    path = user_path(name)
    if not path.is_dir():
        raise TrimtabError(f"{name} is not a directory of data sets (--data, or {VARIABLE})")
    return path


def source_file(source: Source, data: str | None) -> Path | None:
    """The local file of a source, or of what stands in for it."""
    if Path(source.file).is_absolute():
        return Path(source.file)
    directory = data_directory(data)
    if directory is None:
        return None
    for name in filter(None, (source.file, source.fallback)):
        if (directory / name).is_file():
            return directory / name
    return None


def read_rows(
    name: str,
    source: Source,
    columns: Mapping[str, Any],
    data: str | None,
    read: Callable[[Path], Sequence[Row]] | None = None,
) -> list[Row]:
    """The rows of a source, each checked for the columns that its task needs."""
    path = source_file(source, data)
    if path is not None:
        found = (read or read_jsonl)(path)
        where = str(path)
    else:
        where = f"the data set {source.hub} of the hub"
        found = _from_hub(name, source, data)
    if not found:
        raise TrimtabError(f"{where} has no rows")
    # Not every data set numbers its rows.
    rows: list[Row] = [{"id": index, **row} for index, row in enumerate(found)]
    for number, row in enumerate(rows, 1):
        check_row(row, columns, f"{where}, row {number}")
    return rows


def check_row(row: Row, columns: Mapping[str, Any], where: str) -> None:
    """Refuse a row that lacks a column, or has the wrong kind of value there.

    A column has a type, several types, or a set of the values that there are.
    """
    for column, kind in columns.items():
        if column not in row:
            raise TrimtabError(f"{where}: {column!r} is missing (it needs {', '.join(columns)})")
        value = row[column]
        if isinstance(kind, frozenset):
            if not any(type(value) is type(known) and value == known for known in kind):
                wanted = ", ".join(sorted(map(repr, kind)))
                raise TrimtabError(
                    f"{where}: {column!r} must be one of {wanted}, not {value!r:.60}"
                )
            continue
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
            raise TrimtabError(f"{where}: {column!r} must be {wanted}, not {value!r:.60}")


def _from_hub(name: str, source: Source, data: str | None) -> list[Row]:
    """The same rows from the hub, where it can be reached."""
    wanted = f"{name} needs {source.file}: name its directory with --data or {VARIABLE}"
    directory = data_directory(data)
    if directory is not None:
        wanted = f"{name} needs {source.file}, which is not in {directory}"
    if source.hub is None:
        raise TrimtabError(wanted)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TrimtabError(
            f"{wanted}; or install trimtab[eval], which reads {source.hub} from the hub"
        ) from error
    try:
        rows = load_dataset(source.hub, source.hub_config, split=source.hub_split)
        return [row for row in map(source.rename, rows) if source.keep(row)]
    # Whatever goes wrong on the way to the hub, the advice is the same.
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise TrimtabError(f"{wanted}; the hub's {source.hub} failed: {reason}") from error
