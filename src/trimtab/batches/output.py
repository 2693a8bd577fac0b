"""What comes of a file of prompts: JSONL that grows row by row, and goes on where it stopped.

Beside OUTPUT stands OUTPUT.settings.json, which says of what its rows come. Whoever asks for the
same again goes on; whoever asks for something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab.batches.rows import Row
from trimtab.errors import TrimtabError, shown
from trimtab.files import Journal, check_output, parse_json, write_whole


class Output:
    """The rows that are there, and those that come; as a context it is this process's alone.

    `settings` are what the rows come of, by name, in JSON's own types.
    """

    def __init__(
        self, path: Path, rows: Sequence[Row], settings: Mapping[str, Any], overwrite: bool
    ) -> None:
        self.path, self.rows = path, rows
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._overwrite, self._begun = overwrite, False
        #: What was written of each row, by its line.
        self.done: dict[int, dict[str, Any]] = {}
        self._side = path.with_name(f"{path.name}.settings.json")
        self._journal = Journal(path, remedy="choose another name, or pass --overwrite")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        check_output(path, overwrite=True)
        if not overwrite and path.exists():
            self._take()

    def __enter__(self) -> Output:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise TrimtabError(f"{self.path} is being written by another process") from error
        except OSError as error:
            reason = error.strerror or error
            raise TrimtabError(f"cannot write {self.path}: {reason}") from error
        if not self._overwrite and self.path.exists():
            self._take()  # once more, because another may have gone on with it
        return self

    def __exit__(self, *error: object) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def missing(self, row: Row) -> bool:
        """Whether nothing was written of a row."""
        return row.line not in self.done

    def append(self, row: Row, made: Mapping[str, Any]) -> None:
        """What came of a row, which is on the disk when this returns."""
        if not self._begun:
            self._begin()
        named = {} if row.id is None else {"id": row.id}
        record = {"line": row.line, **named, "prompt": row.given, **made}
        self._journal.append([record])
        self.done[row.line] = record

    def finish(self) -> None:
        """Put the rows in the order of the input, once all are there."""
        lines = [row.line for row in self.rows]
        if lines != list(self.done):
            self.done = {line: self.done[line] for line in lines}
            self._journal.replace(list(self.done.values()))

    def _begin(self) -> None:
        if self._overwrite:
            self.path.unlink(missing_ok=True)
        if self._overwrite or not self.path.exists():
            content = json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n"
            write_whole(self._side, content.encode(), overwrite=True)
        self._begun = True

    def _take(self) -> None:
        """Read what is there, if it comes of the same."""
        another = "choose another name, or pass --overwrite"
        try:
            before = parse_json(self._side.read_text(encoding="utf-8"), str(self._side))
        except (OSError, UnicodeDecodeError) as error:
            raise TrimtabError(
                f"{self.path} exists, and {self._side.name}, which would say of what it comes, "
                f"cannot be read: {another}"
            ) from error
        if not isinstance(before, dict):
            raise TrimtabError(f"{self._side} is damaged: {another}")
        for name in dict.fromkeys([*self.settings, *before]):
            old, new = before.get(name), self.settings.get(name)
            if old != new:
                raise TrimtabError(
                    f"{self.path} comes of other settings ({name}: {shown(json.dumps(old), 60)} "
                    f"there, {shown(json.dumps(new), 60)} now): {another}"
                )
        self.done = {}
        wanted = {row.line: row for row in self.rows}
        for number, record in enumerate(self._journal.read() or [], 1):
            row = wanted.get(record.get("line", 0))
            if row is None or record.get("prompt") != row.given or record.get("id") != row.id:
                self._journal.refuse("it is of no row of the input", number)
            if row.line in self.done:
                self._journal.refuse(f"line {row.line} of the input has a row already", number)
            if not isinstance(record.get("text", record.get("error")), str):
                self._journal.refuse("it has neither a text nor an error", number)
            self.done[row.line] = record
