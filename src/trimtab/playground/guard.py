"""Who may ask, and what a page may do.

Another site that is open in the same browser can send requests here, under this machine's own
address or under a name of its own that it points here. So the host name is checked, where a page
says that it comes from elsewhere it is refused, and what changes something has to be JSON or bytes,
which a foreign page cannot send unasked. Pages run no script but ours and load nothing from
elsewhere.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from http.cookies import SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serving import host_name, limited, refused_length, room

_COOKIE = "trimtab"
_SENT = (b"application/json", b"application/octet-stream")
#: Everything is ours, and nobody puts our pages into theirs. A report has its own styles and
#: pictures in it, no script, and is shown inside our page.
_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox allow-popups"
)
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-cache",
}


@dataclass(frozen=True)
class Access:
    """The names that the page is reached by, None for any, and the key that whoever asks has to
    have, None where everybody on this machine may."""

    hosts: tuple[str, ...] | None = ("localhost", "127.0.0.1", "::1")
    key: str | None = None


class Guard:
    """Refuses what may not ask, and says in each answer what a page may do."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = _REPORT_POLICY if scope["path"].startswith("/reports/") else _POLICY
                own = {**_HEADERS, b"content-security-policy": policy.encode()}
                kept = [pair for pair in message["headers"] if pair[0].lower() not in own]
                message = {**message, "headers": [*kept, *own.items()]}
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._brings_key(scope):
            answer = RedirectResponse("/", 303)
            key = self._access.key or ""
            answer.set_cookie(_COOKIE, key, httponly=True, samesite="strict")
            await answer(scope, receive, guarded)
            return
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _error(*refusal)(scope, receive, guarded)
            return
        await self._app(scope, limited(receive, room(scope)), guarded)

    def _brings_key(self, scope: Scope) -> bool:
        """Whether somebody opens the address that was printed, with the key in it."""
        key = self._access.key
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        return (
            key is not None
            and (scope["method"], scope["path"]) == ("GET", "/")
            and hmac.compare_digest(given.encode(), key.encode())
        )

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Why a request is not taken, before its body is read."""
        hosts = self._access.hosts
        if hosts is not None and host_name(headers) not in map(str.lower, hosts):
            return 400, "this playground does not go by that host name (--allow-host adds one)"
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            return 403, "this request comes from another site's page"
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and scope["path"] != "/":
            return 403, "this request comes from another site's page"
        key = self._access.key
        if key is not None and not _has_cookie(headers.get(b"cookie", b""), key):
            return 401, "open the address with the key that trimtab playground printed"
        if scope["method"] not in ("GET", "HEAD"):
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind not in _SENT:
                return 415, "send application/json"
        larger = refused_length(scope, headers)
        return None if larger is None else (413, larger)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _has_cookie(given: bytes, key: str) -> bool:
    found = SimpleCookie(given.decode("latin-1")).get(_COOKIE)
    return found is not None and hmac.compare_digest(found.value.encode(), key.encode())


def event(content: dict[str, object]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
