"""Files: paths as users write them, the cache, writes that are whole or not at all, JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

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


def exists(path: Path) -> bool:
    """Whether there is something of that name, as far as one may look."""
    try:
        return path.exists()
    except OSError:  # a name that is too long, a directory that may not be searched
        return False


# It can only be read by setting it, which threads must not do at the same time.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_whole(path: Path, content: bytes, overwrite: bool = False) -> Path:
    """Write a file through a temporary one beside it, so that it is there whole or not at all."""
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
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise TrimtabError(
                f"cannot write {shown(path, 200)}: {error.strerror or error}"
            ) from error
        raise
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file, for records."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
