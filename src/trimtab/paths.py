"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import TrimtabError


def user_path(text: str | Path) -> Path:
    """A path, with ~ as the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise TrimtabError(f"{text}: there is no home directory of that name") from error
