"""The hub's own library, and what it says where something goes wrong: one line, without the token
and without the exceptions that carry it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from trimtab.errors import TrimtabError, first_line, shown

_Answer = TypeVar("_Answer")
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: An address, of which only the beginning is repeated: storages sign theirs behind it.
_ADDRESS = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_SECRET = re.compile(r"hf_\w+|(?i:bearer)\s+\S+|//[^/@\s]+@")


def check_repo(repo: str) -> None:
    """Refuse what is no name of a repository, before the hub is asked."""
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise TrimtabError(f"{shown(repo)} is no repository of the hub: write OWNER/NAME")


def api_of(token: str | None, endpoint: str | None) -> Any:
    """The library's client for a hub, with a token or with the one that it knows."""
    # Takes a second to import.
    from huggingface_hub import HfApi

    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # The libraries below would repeat what no header can hold.
        raise TrimtabError("the token has characters that no token has: copy it again")
    own = version("trimtab")
    return HfApi(endpoint=endpoint, token=token, library_name="trimtab", library_version=own)


def asked(api: Any, what: str, ask: Callable[[], _Answer], revision: str | None = None) -> _Answer:
    """What the hub answers; whatever its library raises, in one line that has no token in it."""
    try:
        return ask()
    except TrimtabError:
        raise
    except Exception as error:  # the network fails in as many ways as there are libraries
        reason = _reason(error, api, what, revision)
    # Outside: the exception carries the request with its header, and must not come along.
    raise TrimtabError(reason)


def _shown(text: object, api: Any) -> str:
    """What a library or a server says, as a message may repeat it: without tokens, which go before
    its middle does, so that no half of one is left."""
    said = str(text)
    for token in _tokens(api):
        said = said.replace(token, "[token]")
    return shown(_SECRET.sub("[token]", _ADDRESS.sub(r"\1", said)), 150)


def _tokens(api: Any) -> set[str]:
    """Those that the library may have sent."""
    from huggingface_hub import get_token

    return {token for token in (api.token, get_token()) if isinstance(token, str) and token}


_LOGIN = "log in (hf auth login) or set HF_TOKEN"
_BY_STATUS = {
    401: f"does not know this token: {_LOGIN}",
    402: "wants to be paid for it: see the settings of your account there",
    403: "does not allow it: use a token that may do so, and a name whose owner you are or belong "
    "to",
    404: "does not have it, or it is private: look at its name, and " + _LOGIN,
    409: "has one of that name already, or somebody else is writing it: choose another name, or "
    "overwrite (--overwrite)",
    412: "has it changed meanwhile: run it again",
    413: "finds it too large",
    429: "is asked too often: wait some minutes and run it again",
}


def _reason(error: Exception, api: Any, what: str, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: the hub is not asked, because HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"{what}: its owner lets in who asked: accept its terms on the hub, and {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: the hub has no revision {shown(revision)} of it"
    # The library speaks of its cache, or of the file, before it says why.
    cause: BaseException = error
    while cause.__cause__ is not None and _status_of(cause) is None:
        cause = cause.__cause__
    code = _status_of(cause)
    if isinstance(error, errors.RepositoryNotFoundError) or (code == 401 and not _tokens(api)):
        return f"{what}: the hub {_BY_STATUS[404]}"
    if code is not None:
        said = getattr(cause, "server_message", None)
        detail = f" ({_shown(said, api)})" if said else ""
        if code >= 500:
            return f"{what}: the hub fails with error {code}{detail}: run it again later"
        return f"{what}: the hub {_BY_STATUS.get(code, f'answers with error {code}')}{detail}"
    if "Consistency check failed" in str(error):
        return f"{what}: the file did not arrive whole: run it again"
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{what}: {shown(error.filename)}: {error.strerror}"
    said = _shown(first_line(cause) or type(cause).__name__, api)
    if "xet" in str(cause):  # hubs of other people may not know it
        return (
            f"{what}: large files do not go to this hub by xet ({said}): set HF_HUB_DISABLE_XET=1 "
            "and run it again"
        )
    if isinstance(error, ValueError):  # what the library or the hub makes of a request or a card
        return f"{what}: {said}"
    return (
        f"{what}: the hub cannot be reached ({said}): look at the network, and at HF_ENDPOINT if "
        "it is set"
    )


def _status_of(error: BaseException) -> int | None:
    """The status that a server answered with, where that is what went wrong."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
