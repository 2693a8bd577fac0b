"""How the mathematics tasks are read: which number in an output is the answer."""

from __future__ import annotations

import math
import re

from trimtab.evaluation.tasks.task import Protocol

#: As the authors have it: a number ends at a thousands separator, and 3/4 is never whole.
_AS_PUBLISHED = r"[-+]?\d+(?:\.\d+)?"
#: Thousands separators belong to the number.
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"


def cut_after(output: str, trigger: str) -> str:
    """The output up to one word after the trigger, if it is there."""
    text = output.strip()
    before, found, rest = text.partition(trigger)
    if not found:
        return text
    return before + " ".join((found + rest).split()[:2])


def read_number(text: str, protocol: Protocol) -> float | None:
    """The number after "####", else the last number; None where there is none."""
    number = _AS_PUBLISHED if protocol == "paper" else _NUMBER
    marked = re.search(rf"####\s*({number})", text)
    if marked:
        return _value(marked.group(1))
    numbers = re.findall(number, text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> float | None:
    """None for a row of digits that no float can hold, which broken text has."""
    value = float(number.replace(",", ""))
    return value if math.isfinite(value) else None


def write_number(value: float) -> str:
    """A number as a person writes it: no decimals where there are none."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))
