"""How large a request may be, and what ends one that is larger."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.types import Message, Receive, Scope

from trimtab.serving.library import LARGEST

#: Bytes of a request, but of one that brings a steering.
_LARGEST_BODY = 4 * 2**20


class TooLargeError(HTTPException):
    """A body has more bytes than are taken: of FastAPI's kind, which takes any other error while it
    reads a body for a mistake in its JSON."""

    def __init__(self, most: int) -> None:
        super().__init__(413, f"a request may have {most} bytes")


def room(scope: Scope) -> int:
    """How many bytes a request may have."""
    return LARGEST if scope["method"] == "PUT" else _LARGEST_BODY


def refused_length(scope: Scope, headers: dict[bytes, bytes]) -> str | None:
    """Why a request is too large by what its headers (names in lower case) say of it."""
    length = headers.get(b"content-length", b"0")
    fits = length.isdigit() and int(length) <= room(scope)
    return None if fits else TooLargeError(room(scope)).detail


def limited(receive: Receive, most: int) -> Receive:
    """The same messages, as long as their bodies are not too large together."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most:
                raise TooLargeError(most)
        return message

    return counted
