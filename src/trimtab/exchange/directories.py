"""Directories that are there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import TrimtabError, shown
from trimtab.files import check_output, open_as_usual, put_in_place


@contextmanager
def whole_directory(
    target: Path, overwrite: bool, is_ours: Callable[[Path], bool]
) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when nothing fails. One that is there is replaced
    with `overwrite`, where `is_ours` says that it holds nothing else than what is written here."""
    check_output(target, overwrite)
    if target.exists() and not (target.is_dir() and is_ours(target)):
        raise TrimtabError(
            f"{shown(target, 200)} holds other files than those that would replace it: choose "
            "another name"
        )
    try:
        # Of a long name only the beginning, so that what is added does not make it too long.
        work = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name[:40]}."))
        try:
            new, old = work / "new", work / "old"
            new.mkdir()
            yield new
            open_as_usual(new)
            put_in_place(new, target, old)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise TrimtabError(
            f"cannot write {shown(target, 200)}: {error.strerror or error}"
        ) from error
