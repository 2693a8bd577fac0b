"""The reports below a directory of runs, read and never written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

#: What a run leaves for people, and how deep below the directory a run may be.
_PAGE, _DEEP = "report.html", 3
#: Files of a run that a page may show.
KINDS = {".html": "text/html", ".png": "image/png", ".svg": "image/svg+xml"}
_MOST = 500


def runs(directory: Path | None) -> list[dict[str, Any]]:
    """The runs with a report, the newest first: their path below the directory, what ran, when."""
    if directory is None or not directory.is_dir():
        return []
    found = []
    patterns = ["/".join(["*"] * depth + [_PAGE]) for depth in range(_DEEP + 1)]
    for page in (page for pattern in patterns for page in directory.glob(pattern)):
        if not page.resolve().is_relative_to(directory.resolve()):
            continue
        found.append({
            "path": page.parent.relative_to(directory).as_posix(),
            "changed": page.stat().st_mtime,
            **_config(page.parent / "config.json"),
        })  # fmt: skip
    return sorted(found, key=lambda run: -run["changed"])[:_MOST]


def _config(file: Path) -> dict[str, Any]:
    """What a run says of itself, as far as it can be read."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = {}
    said = said if isinstance(said, dict) else {}
    model = said.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    kind = next((key for key in ("analysis", "command", "method", "recipe", "task") if key in said),
                None)  # fmt: skip
    return {
        "what": str(said[kind])[:100] if kind else "",
        "model": str(name)[:200] if isinstance(name, str) else "",
    }


def report_file(directory: Path | None, path: str) -> tuple[Path, str]:
    """A file of a run and its media type; what is not below the directory is not there."""
    missing = TrimtabError("there is no such report")
    if directory is None or "\0" in path:
        raise missing
    root = directory.resolve()
    file = (root / path).resolve()
    kind = KINDS.get(file.suffix)
    if kind is None or not file.is_relative_to(root) or not file.is_file():
        raise missing
    return file, kind
