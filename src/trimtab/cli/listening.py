"""Where a server of ours listens."""

from __future__ import annotations

import socket

from trimtab.errors import TrimtabError

#: The names of this machine alone.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bound_to(host: str, port: int) -> socket.socket:
    """A socket that listens, or one line that says why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # who comes before the server runs waits, and is not turned away
    except OSError as error:
        bound.close()
        raise TrimtabError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; name another --port"
        ) from error
    return bound


def as_address(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host
