"""The two ways in which trimtab speaks up: an error that ends the work, a warning that does not.

Every message is one line for a person: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import errno
import typing
from collections.abc import Iterable
from typing import Any


class TrimtabError(Exception):
    """A mistake in what the user gave, or a precondition that does not hold."""


class TrimtabWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a `Literal` allows, also where it stands among other types."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    return tuple(word for part in typing.get_args(kind) for word in choices(part))


def check_list(what: str, given: object, instead: str = "") -> None:
    """Refuse one thing where several of a kind are to be; `instead` is what else may be written."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TrimtabError(f"{what}s must be a list: write [{what}]{instead}")


def check_choice(what: str, value: object, kind: Any) -> None:
    """Refuse a value that is none of a `Literal`."""
    if value not in choices(kind):
        raise TrimtabError(f"{what} is {value!r}: known are {', '.join(choices(kind))}")


def not_finite(what: str, dtype: Any) -> TrimtabError:
    """NaN or infinity where a model computes with `dtype`."""
    precision = str(dtype).removeprefix("torch.")
    remedy = "its weights may be damaged, or the dial of a steering on it too large"
    if precision == "float16":  # ends at 65,504, which many models exceed by themselves
        remedy = "load the model in float32 or bfloat16 (--dtype float32)"
    return TrimtabError(f"{what} in {precision}: {remedy}")


def one_line(text: object) -> str:
    """Text of a file or a server without what a terminal would obey: control characters, line ends
    and marks that turn the writing direction are spelled out, as Python does."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def shown(text: object, limit: int = 100) -> str:
    """Such text as a message may repeat it: on one line, and of no more than `limit` characters.

    What is too long loses its middle, because a path says most at its ends.
    """
    whole = one_line(text)
    half = limit // 2 - 2
    return whole if len(whole) <= limit else f"{whole[:half]}...{whole[-half:]}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first one, with the next where that only leads to it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])


def os_reason(error: BaseException) -> str:
    """Why writing to the cache failed, and what to do."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; free some space, or set TRIMTAB_CACHE to a directory with more"
    return f"{getattr(error, 'strerror', None) or error}; TRIMTAB_CACHE sets another directory"
