"""What was baked into a checkpoint: `trimtab.json` beside the weights, and a part of its card.

Plain transformers reads neither. A record is a dictionary: the steering's method, label, dial and
digest, the texts that it was fitted on, the model whose weights took it, version and date.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.files import json_object

RECORD = "trimtab.json"
CARD = "README.md"
_FORMAT = 1
_BEGIN, _END = "<!-- trimtab: what was baked -->", "<!-- end of trimtab -->"
_OURS = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@.*)?")

Record = dict[str, Any]


def read_baked(directory: Path) -> tuple[Record, ...]:
    """What a directory says was baked into it, in order; a file that says it wrongly is warned
    about and says nothing, because the weights are what they are."""
    file = directory / RECORD
    if not file.is_file():
        return ()
    try:
        content = json_object(file.read_text(encoding="utf-8"), RECORD)
        records = content.get("baked")
        if content.get("format") != _FORMAT or records is None or not _are_records(records):
            raise TrimtabError(f"{RECORD} is not of format {_FORMAT}")
    except (OSError, UnicodeDecodeError, TrimtabError) as error:
        warnings.warn(
            f"{shown(directory, 150)} does not say what was baked into it: {shown(error, 150)}",
            TrimtabWarning,
            stacklevel=4,
        )
        return ()
    return tuple(records)


def _are_records(records: Any) -> bool:
    return isinstance(records, list) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(key), str) for key in ("label", "digest"))
        and isinstance(one.get("base"), dict)
        and isinstance(one["base"].get("name"), str)
        for one in records
    )


def write_baked(directory: Path, baked: Sequence[Record], name: str, card: Path) -> None:
    """Write what was baked into a directory's files, and keep the model card that is there: `card`
    is where it lies, and `name` the heading of a new one."""
    text = card.read_text(encoding="utf-8", errors="surrogateescape") if card.is_file() else ""
    if baked:
        write_record(directory, baked)
        text = _without_ours(text) or _new_card(name, baked)
        text = f"{text.rstrip()}\n\n{_BEGIN}\n{_said(baked)}\n{_END}\n"
    elif text:
        text = _without_ours(text)
    if text:
        (directory / CARD).write_text(text, encoding="utf-8", errors="surrogateescape")


def write_record(directory: Path, baked: Sequence[Record]) -> None:
    """Write what is in the weights of a directory, or in its adapter."""
    (directory / RECORD).write_text(baked_content(baked), encoding="utf-8")


def baked_content(baked: Sequence[Record]) -> str:
    """What was baked, as files say it."""
    return json.dumps({"format": _FORMAT, "baked": list(baked)}, indent=1) + "\n"


def _without_ours(card: str) -> str:
    return _OURS.sub("\n\n", card).strip("\n") + "\n" if card.strip() else ""


def _new_card(name: str, baked: Sequence[Record]) -> str:
    """The head of a card; the hub reads the lines between the dashes."""
    lines = ["---", "library_name: transformers"]
    base = str(baked[0]["base"]["name"])
    if _HUB_ID.fullmatch(base):
        lines.append(f"base_model: {base.partition('@')[0]}")
    return "\n".join([*lines, "tags:", "- trimtab", "- steering", "---", "", f"# {shown(name)}"])


def _said(baked: Sequence[Record]) -> str:
    """The records in words."""
    many = len(baked) > 1
    lines = [
        f"These weights are those of `{shown(baked[0]['base']['name'])}` with "
        f"{len(baked) if many else 'a'} steering{'s' if many else ''} baked in by trimtab:",
        "",
        *(f"- {in_words(record)}" for record in baked),
        "",
        f"`{RECORD}` has the details.",
    ]
    return "\n".join(lines)


def in_words(record: Record) -> str:
    """One steering that was baked, for people."""
    contrast = record.get("contrast")
    texts = contrast.get("name") if isinstance(contrast, dict) else None
    fitted = f", fitted on {shown(texts)}" if texts else ""
    return f"{shown(record['label'])} (steering {shown(record['digest'][:12])}{fitted})"


def baked_already(steering: Any, name: str, baked: Sequence[Record]) -> str | None:
    """What to say where a steering is put on weights that hold it."""
    if not baked:
        return None
    digest = steering.digest
    for record in baked:
        if record["digest"] == digest:
            return (
                f"{shown(record['label'])} is baked into {shown(name)} already: the same steering "
                "on top acts a second time"
            )
    return None
