"""Files: paths as users write them, the cache, writes that are whole or not at all, JSON lines, and
the journal that keeps what is finished of work that may be interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from trimtab.errors import TrimtabError, shown


def user_path(text: str | Path) -> Path:
    """A path, with ~ as the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise TrimtabError(f"{text}: there is no home directory of that name") from error


def cache_dir() -> Path:
    """$TRIMTAB_CACHE, else $XDG_CACHE_HOME/trimtab, else ~/.cache/trimtab."""
    own = os.environ.get("TRIMTAB_CACHE", "")
    # The XDG rule: a relative path counts as not set.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if own:
            found = Path(own).expanduser().absolute()
        else:
            found = (shared if shared.is_absolute() else Path.home() / ".cache") / "trimtab"
        str(found).encode()  # libraries take no path that is not UTF-8
        found.is_dir()  # names that are too long, directories that may not be searched
    except RuntimeError as error:
        raise _no_cache(own or "~/.cache", "there is no such home directory") from error
    except UnicodeEncodeError as error:
        raise _no_cache(own or str(shared), "its name is not UTF-8 text") from error
    except OSError as error:
        raise _no_cache(own or str(shared), error.strerror or str(error)) from error
    return found


def _no_cache(where: str, why: str) -> TrimtabError:
    return TrimtabError(
        f"the cache {shown(where)} cannot be used: {why}; TRIMTAB_CACHE sets another directory"
    )


def state_dir() -> Path:
    """$XDG_STATE_HOME/trimtab, else ~/.local/state/trimtab: what a user did, and may look up."""
    shared = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG rule: a relative path counts as not set.
    return (shared if shared.is_absolute() else user_path("~/.local/state")) / "trimtab"


def exists(path: Path) -> bool:
    """Whether there is something of that name, as far as one may look."""
    try:
        return path.exists()
    except OSError:  # a name that is too long, a directory that may not be searched
        return False


def check_output(path: Path, overwrite: bool) -> None:
    """Before hours of work, not after: an output that exists, or that cannot be written."""
    if path.exists() and not overwrite:
        raise TrimtabError(f"{path} exists: choose another name, or pass overwrite (--overwrite)")
    if not path.absolute().parent.is_dir():
        raise TrimtabError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise TrimtabError(f"cannot write {path}: no permission to write in {path.parent}")


def check_directory(path: Path) -> None:
    """Before the work, too: a directory that cannot be made, or not be written to."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise TrimtabError(f"cannot write to {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise TrimtabError(f"cannot write to {path}: no permission to write in {there}")


def make_directory(path: Path) -> None:
    """A directory, with those that it is in."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrimtabError(f"cannot write to {path}: {error.strerror or error}") from error


# It can only be read by setting it, which threads must not do at the same time.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_whole(path: Path, content: bytes, overwrite: bool = False) -> Path:
    """Write a file through a temporary one beside it, so that it is there whole or not at all."""
    with whole_file(path, overwrite) as temporary:
        temporary.write_bytes(content)
    return path


@contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` to write into, which takes its place when nothing fails."""
    if exists(path) and not overwrite:
        raise TrimtabError(
            f"{shown(path, 200)} exists: choose another name, or pass overwrite (--overwrite)"
        )
    try:
        # Of a long name only the beginning, so that what is added does not make it too long.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    except OSError as error:
        raise TrimtabError(f"cannot write {shown(path, 200)}: {error.strerror or error}") from error
    try:
        os.close(handle)
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise TrimtabError(
                f"cannot write {shown(path, 200)}: {error.strerror or error}"
            ) from error
        raise


def put_in_place(new: Path, place: Path, aside: Path) -> None:
    """Rename a directory to where it belongs. What is there goes aside, and comes back if that
    fails."""
    if place.exists():
        place.rename(aside)
    try:
        new.rename(place)
    except BaseException:
        if aside.exists():
            aside.rename(place)
        raise


def open_as_usual(directory: Path) -> None:
    """Let others read the files of a directory as the user's umask says: safetensors writes through
    private temporary ones, and leaves them so."""
    for file in directory.rglob("*"):
        os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_UMASK)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, for records."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(content: Any, **form: Any) -> str:
    """SHA-256 of what comes of JSON; `form` is how `json.dumps` writes it."""
    return hashlib.sha256(json.dumps(content, **form).encode()).hexdigest()


def checksum(record: Mapping[str, Any], place: str) -> str:
    """A checksum over a record and the place where it belongs. It has no key."""
    return json_digest([place, record], sort_keys=True, allow_nan=False)[:16]


def parse_json(text: str, where: str) -> Any:
    """Strict JSON: no NaN, no half of a surrogate pair."""
    try:
        value = json.loads(text)
        # JSON can escape half a surrogate pair, which is no text; Python reads NaN, which is none.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{where} is not JSON: {error}") from error
    return value


def json_object(line: str, where: str) -> dict[str, Any]:
    """A line of JSONL."""
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise TrimtabError(f"{where} is not a JSON object")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line."""
    rows = []
    try:
        # Iterating over the file, not str.splitlines(): texts may hold U+2028 and the like.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json_object(line, f"{path}, line {number}"))
    except OSError as error:
        raise TrimtabError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{path} is not UTF-8 text: {error}") from error
    return rows


class Journal:
    """A file of JSON objects, one a line, that keeps what is finished of some work.

    A line is on the disk when `append` returns. One that was cut off at the end, by a process that
    was killed, is forgotten; anything else that is not as it was written is refused in one line,
    which ends with the `remedy`. `place` says where the lines belong and goes into the checksum of
    each; None, and they have none. Lines from before there were checksums may come first:
    `unsealed` is how many. A `whole` file is written at once, so that a cut is damage, and the
    place of a line has its number and how many there are.
    """

    def __init__(
        self,
        path: Path,
        place: str | None = None,
        *,
        whole: bool = False,
        remedy: str = "delete it, and it is made again",
    ) -> None:
        self.path, self.place, self.whole, self.remedy = path, place, whole, remedy
        self.unsealed = 0
        self._torn_at: int | None = None  # where a line begins that was cut off

    def read(self) -> list[dict[str, Any]] | None:
        """The lines that are there; None where there is no file."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrimtabError(f"{self.path} cannot be read: {error.strerror or error}") from error
        *lines, rest = content.split(b"\n")
        if rest and self.whole:
            self.refuse("it is cut off at its end")
        self._torn_at = len(content) - len(rest) if rest else None
        rows = [self._parsed(line, number) for number, line in enumerate(lines, 1)]
        if self.place is not None:
            self._unseal(rows)
        return rows

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to the end."""
        content = self._lines(rows)
        try:
            if self._torn_at is not None:
                os.truncate(self.path, self._torn_at)
                self._torn_at = None
            with self.path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrimtabError(f"cannot write {self.path}: {error.strerror or error}") from error

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole file anew."""
        write_whole(self.path, self._lines(rows), overwrite=True)
        self._torn_at = None

    def refuse(self, reason: str, number: int | None = None) -> NoReturn:
        """Say that the file, or one of its lines, is damaged."""
        where = self.path if number is None else f"{self.path}, line {number}"
        said = " ".join(reason.split())[:200]
        raise TrimtabError(f"{where} is damaged: {said}; {self.remedy}")

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = ""
        for number, row in enumerate(rows, 1):
            place = self._place_of(number, len(rows))
            sealed = row if place is None else {**row, "checksum": checksum(row, place)}
            text += json.dumps(sealed, ensure_ascii=False, allow_nan=False) + "\n"
        return text.encode()

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            return json_object(line.decode(), "it")
        except (UnicodeDecodeError, TrimtabError) as error:
            self.refuse(str(error), number)

    def _unseal(self, rows: Sequence[dict[str, Any]]) -> None:
        """Compare the checksums of lines and take them off."""
        self.unsealed = 0
        for number, row in enumerate(rows, 1):
            place = self._place_of(number, len(rows))
            known = row.pop("checksum", None)
            if known is None and self.unsealed == number - 1:
                self.unsealed += 1
            elif known is None:
                self.refuse("it has no checksum", number)
            elif known != checksum(row, str(place)):
                self.refuse("it was changed, or belongs elsewhere", number)
        if self.whole and self.unsealed not in (0, len(rows)):
            self.refuse("some of its lines have no checksum")

    def _place_of(self, number: int, count: int) -> str | None:
        return f"{self.place} {number}/{count}" if self.whole else self.place
