"""What a writer or a judge replied, read with care: it may be anything, of any length."""

from __future__ import annotations

import json
import re
from typing import Any

#: A reply is read up to here, in characters; and of what it lists so much.
_READ, _LISTED = 100_000, 1000
#: A question in a list that is no JSON: `3. "Why is the sky blue?"`.
_LISTED_QUESTION = re.compile(r'[\s\-*\d.)"]*(\w.*[?\uff1f\u061f])[\s",]*')


def listed(reply: str, key: str) -> list[Any]:
    """What a reply lists under a key of its first JSON object; nothing where there is none."""
    text = reply[:_READ]
    start = text.find("{")
    while start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get(key), list):
            return list(found[key][:_LISTED])
        start = text.find("{", start + 1) if found is None and start < _READ // 10 else -1
    return []


def listed_questions(reply: str) -> list[str]:
    """The questions of a reply: those of its JSON, else its lines that end as one."""
    found = [each for each in listed(reply, "questions") if isinstance(each, str)]
    if found:
        return found
    lines = reply[:_READ].splitlines()[:_LISTED]
    matches = [_LISTED_QUESTION.fullmatch(line) for line in lines if len(line) <= _LISTED]
    return [match[1] for match in matches if match]


def score(reply: str) -> float | None:
    """A number from 0 to 100 with which a reply begins; None for anything else."""
    found = re.match(r"\s*(\d{1,3}(?:\.\d{1,3})?)(?![\d.]*\d)", reply[:_LISTED])
    value = float(found[1]) if found else 101.0
    return value if value <= 100 else None


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON may escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
