"""Writes a model as a plain checkpoint with its tokenizer, whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimtab.errors import TrimtabError


def save_checkpoint(language_model: Any, directory: str | Path, overwrite: bool = False) -> Path:
    """Write weights, configuration and tokenizer to a directory, which is returned."""
    target = Path(directory)
    if target.exists() and not overwrite:
        raise TrimtabError(f"{target} exists: choose another name, or overwrite (--overwrite)")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as room:
            inside, old = Path(room) / "model", Path(room) / "old"
            language_model.model.save_pretrained(inside)
            language_model.tokenizer.save_pretrained(inside)
            if target.exists():
                target.rename(old)  # goes with the temporary directory
            try:
                inside.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrimtabError(f"cannot write {target}: {reason}") from error
    return target
