"""Files of rows, whoever wrote them: JSON lines, a JSON array, or CSV with commas, semicolons or
tabs. What is no such file, or is not there, is said with what to do."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.contrasts.images import is_address
from trimtab.contrasts.rows import COLUMNS
from trimtab.errors import TrimtabError, shown
from trimtab.files import json_object, parse_json, user_path

#: The endings of files with rows of named columns.
TABLES = (".jsonl", ".json", ".csv", ".tsv")
_CSV = (".csv", ".tsv")
#: Columns whose cells in CSV may hold messages.
_CONVERSATIONS = (
    *("prompt", "text", "question", "chosen", "rejected"),
    *("goal", "instruction", "behavior"),
)
#: How a list of JSON objects begins; JSON's blanks are these four.
_MESSAGES = re.compile(r"\ufeff?[ \t\r\n]*\[[ \t\r\n]*\{")


def read_table(
    path: str | Path, what: str = "the contrast", columns: Sequence[str] = COLUMNS
) -> list[dict[str, Any]]:
    """The rows of a file by its ending and its beginning; by `columns` the delimiter of CSV is
    told."""
    place = user_path(path)
    if place.suffix.lower() in _CSV:
        return read_csv(place, what, columns)
    return read_json(place, what)


def read_json(path: str | Path, what: str = "the contrast") -> list[dict[str, Any]]:
    """One JSON object a line, or one array of them."""
    rows = _json_rows(path, what)
    _place_images(rows, user_path(path).parent)
    return rows


def _json_rows(path: str | Path, what: str) -> list[dict[str, Any]]:
    text = _text(path, what)
    if text.lstrip(" \t\r\n").startswith("["):
        found = parse_json(text, str(path))
        for number, row in enumerate(found, 1):
            if not isinstance(row, dict):
                raise TrimtabError(f"{path}, row {number} is not a JSON object")
        return list(found)
    try:
        # Iterating over a file, not str.splitlines(): texts may hold U+2028 and the like.
        return [
            json_object(line, f"{path}, line {number}")
            for number, line in enumerate(io.StringIO(text, newline="\n"), 1)
            if line.strip()
        ]
    except TrimtabError:
        if _is_one_object(text):
            raise TrimtabError(
                f"{path} is one JSON object over several lines: write an array of rows, "
                "[{...}, {...}], or one row a line"
            ) from None
        raise


def _is_one_object(text: str) -> bool:
    """Whether a text is a JSON object that is written over several lines."""
    try:
        return "\n" in text.strip() and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_csv(
    path: str | Path, what: str = "the contrast", columns: Sequence[str] = COLUMNS
) -> list[dict[str, Any]]:
    """CSV whose header names columns, with whichever of comma, semicolon and tab gives most of
    those that are known."""
    text = _text(path, what)
    delimiter = _delimiter(text, columns)
    try:
        # Strict, or a quote that nobody closes would swallow the rest of the file.
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        lines.fieldnames = [_column(name, columns) for name in lines.fieldnames or ()]
        rows = list(lines)
    except csv.Error as error:
        named = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
        raise TrimtabError(
            f"{path} cannot be read as CSV with {named} between its columns: {error}"
        ) from error
    for number, row in enumerate(rows, 1):
        if None in row:
            raise TrimtabError(
                f"{path}, row {number} has more cells than the header has columns: put texts with "
                f"{delimiter!r} in them between quotes"
            )
    read = [
        {
            key: _cell(value, f"{path}, row {number}, {key}")
            if key in _CONVERSATIONS and isinstance(value, str)
            else value
            for key, value in row.items()
            if value is not None and (key, value) != ("part", "")
        }
        for number, row in enumerate(rows, 1)
    ]
    _place_images(read, user_path(path).parent)
    return read


def _place_images(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Have the paths of images in messages, which a file names as seen from its own folder, be as
    seen from here."""
    for row in rows:
        for messages in row.values():
            for message in messages if isinstance(messages, list) else ():
                parts = message.get("content") if isinstance(message, dict) else None
                for part in parts if isinstance(parts, list) else ():
                    if isinstance(part, dict) and part.get("type") == "image":
                        _place_image(part, folder)


def _place_image(part: dict[str, Any], folder: Path) -> None:
    for key in ("image", "path"):
        path = part.get(key)
        if isinstance(path, str) and not is_address(path):
            part[key] = str(folder / user_path(path))


def meant_file(path: str | Path) -> str:
    """Which file beside it a name that is none may mean, as the end of a message; or nothing."""
    place = user_path(path)
    try:
        beside = [each for each in place.parent.iterdir() if each.is_file()]
    except OSError:
        beside = []
    near = [each for each in beside if _likeness(each.stem, place.stem) >= 0.7]
    best = max(near, key=lambda each: _likeness(each.name, place.name), default=None)
    return f"; did you mean {shown(best)}?" if best is not None else ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _text(path: str | Path, what: str) -> str:
    place = user_path(path)
    try:
        with place.open(encoding="utf-8-sig", newline="") as opened:
            return opened.read()
    except OSError as error:
        meant = meant_file(path) if isinstance(error, FileNotFoundError) else ""
        raise TrimtabError(f"cannot read {what} {path}: {error.strerror}{meant}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{path} is not UTF-8 text: {error}") from error


def _delimiter(text: str, columns: Sequence[str]) -> str:
    """What stands between the columns of the header; a comma where none says more."""

    def known(delimiter: str) -> tuple[int, int]:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        except csv.Error:
            return (0, 0)
        return (sum(name.strip().lower() in columns for name in header), len(header))

    return max((",", ";", "\t"), key=known)


def _column(name: str, columns: Sequence[str]) -> str:
    """The name of a column, without the blanks and capitals that spreadsheets give it."""
    plain = name.strip().lower()
    return plain if plain in columns else name.strip()


def _cell(text: str, where: str) -> Any:
    """A cell of CSV: messages, where it begins as a list of JSON objects does, or text."""
    return parse_json(text.lstrip("\ufeff"), where) if _MESSAGES.match(text) else text
