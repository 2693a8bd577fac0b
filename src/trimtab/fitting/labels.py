"""What features of an autoencoder are about, in the words of whoever looked at them.

Beside a local autoencoder's cfg.json may lie, or a file may be named with,

    labels.json           {"12": "words of joy", ...}
    explanations.json     a list of objects with `index` and `description`, as Neuronpedia's
                          export of an autoencoder's explanations has them
    explanations.jsonl    the same, one object a line

No hub and no website is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError, one_line
from trimtab.files import exists, parse_json, read_jsonl, user_path

#: The names that are looked for, the first that is there.
_NAMES = ("labels.json", "explanations.json", "explanations.jsonl")
#: Bytes that a file may have, and characters of a label that are kept.
_LARGEST, _LONGEST = 1 << 28, 120


def load_labels(autoencoder: str, file: str | None = None) -> dict[int, str]:
    """Labels by the feature's number: of a file, or of one beside a local autoencoder; none where
    there is no such file. Raises TrimtabError for a file that holds something else."""
    if file is not None:
        return _read(user_path(file))
    folder = user_path(autoencoder)
    path = next((folder / name for name in _NAMES if exists(folder / name)), None)
    return {} if path is None else _read(path)


def _read(path: Path) -> dict[int, str]:
    try:
        if path.stat().st_size > _LARGEST:
            raise TrimtabError(f"the labels {path} are too large: at most {_LARGEST:,} bytes")
        if path.suffix.lower() == ".jsonl":
            return _labels(_explained(read_jsonl(path), path), path)
        content = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TrimtabError(f"cannot read the labels {path}: {error}") from error
    if isinstance(content, dict):
        return _labels(content.items(), path)
    return _labels(_explained(content, path), path)


def _explained(rows: Any, path: Path) -> Iterable[tuple[Any, Any]]:
    """Numbers and descriptions of a list of explanations."""
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise _other(path)
    return [(row.get("index"), row.get("description")) for row in rows]


def _labels(found: Iterable[tuple[Any, Any]], path: Path) -> dict[int, str]:
    """Of a feature that is explained several times the first is kept."""
    labels: dict[int, str] = {}
    for number, label in found:
        if not (isinstance(label, str) and str(number).isascii() and str(number).isdecimal()):
            raise _other(path)
        if label.strip():
            labels.setdefault(int(number), " ".join(one_line(label).split())[:_LONGEST])
    return labels


def _other(path: Path) -> TrimtabError:
    return TrimtabError(
        f"{path} has no labels of features: write {{NUMBER: TEXT}}, or objects with index and "
        "description"
    )
