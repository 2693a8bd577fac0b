"""Steerings on the hub: one repository each, its file and its card, and nothing else.

`push` writes them, `pull` reads the file and checks it as any other, `search` finds what others
pushed. A token goes into the header of a request and nowhere else: what libraries and servers say
is repeated without it, and without the exceptions that carry requests.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import TrimtabError, first_line, shown
from trimtab.exchange.card import CARD, OWN, STEERING, TAG, About, base_model_of, write_card
from trimtab.files import exists, user_path
from trimtab.reports import Presented, Table
from trimtab.steering import Steering
from trimtab.terminal import status

_Answer = TypeVar("_Answer")
#: Seconds that the hub has for its first answer.
_PATIENCE = 10.0
#: Bytes of the largest steering that is fetched. Those of one layer have some kilobytes.
_LARGEST = 1 << 30
#: What the hub itself puts into a new repository.
_EMPTY = {".gitattributes"}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: An address, of which only the beginning is repeated: storages sign theirs behind it.
_ADDRESS = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_SECRET = re.compile(r"hf_\w+|(?i:bearer)\s+\S+|//[^/@\s]+@")
#: The hub spells licences so; what it does not know it says itself.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True)
class Pushed:
    """What was written: the repository, its address, the commit, and the names of the files."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Pulled:
    """A steering of the hub: what it is, the bytes of its file, and the commit that it is of."""

    repo: str
    commit: str
    steering: Steering
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


# -- write ----------------------------------------------------------------------------------------


def push(
    steering: Steering | str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Write a steering, or its file as it is (FILE@DIAL with its dial turned), to a repository
    OWNER/NAME of the hub, which is made where there is none, with a card that says what is known
    of the steering.

    `base_model` is the model's id on the hub, where the steering does not name it so; `license` is
    the one that you give the steering. A repository that holds a steering is overwritten where
    `overwrite` says so, one that holds anything else never. Without a `token` the one that the
    library of the hub knows is taken (hf auth login, or HF_TOKEN); `endpoint` is another hub's
    address (HF_ENDPOINT). Raises TrimtabError.
    """
    _check_repo(repo)
    if license is not None and not _LICENSE.fullmatch(license):
        raise TrimtabError(
            f"{shown(license)} is no name of a licence as the hub spells them: apache-2.0, mit, "
            "cc-by-4.0, other ..."
        )
    content, loaded = _file_of(steering)
    digest = hashlib.sha256(content).hexdigest()
    base = base_model_of(loaded, base_model)
    card = write_card(loaded, About(repo, base, license, digest, len(content)))

    files = {STEERING: content, CARD: card.encode()}
    message = f"A steering by {shown(loaded.method, 40)}"
    api = _api(token, endpoint)

    def write() -> str:
        from huggingface_hub import CommitOperationAdd

        parent = _parent(api, repo, overwrite)
        if parent is None:
            api.create_repo(repo, private=private)
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, added, commit_message=message, parent_commit=parent)
        return str(commit.oid)

    with status(f"writing {repo} to the hub"):
        commit = _asked(api, repo, write)
    return Pushed(repo, f"{api.endpoint}/{repo}", commit, tuple(files), digest)


def _file_of(steering: Steering | str | Path) -> tuple[bytes, Steering]:
    """The bytes of a steering's file, and the steering that they are."""
    with tempfile.TemporaryDirectory() as room:
        place = Path(room) / STEERING
        if not isinstance(steering, Steering):
            path = user_path(steering)
            if exists(path):
                # What is read is what is checked, whatever happens to the file meanwhile.
                loaded = Steering.load(path)
                content = path.read_bytes()
                place.write_bytes(content)
                if Steering.load(place).digest != loaded.digest:
                    raise TrimtabError(f"{shown(path, 200)} changed while it was read: try again")
                return content, loaded
            steering = Steering.read(str(steering))
        steering.save(place)
        return place.read_bytes(), Steering.load(place)


def _parent(api: Any, repo: str, overwrite: bool) -> str | None:
    """The commit that is written on; None where there is no repository yet. What is there and must
    not be replaced is refused."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.model_info(repo, timeout=_PATIENCE)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    files = {each.rfilename for each in info.siblings or ()} - _EMPTY
    if files and not overwrite:
        raise TrimtabError(
            f"{repo} exists on the hub: choose another name, or overwrite (--overwrite)"
        )
    if files and STEERING not in files:
        raise TrimtabError(
            f"{repo} holds no steering, and overwriting replaces only those: choose another name"
        )
    return str(info.sha) if info.sha else None


# -- read -----------------------------------------------------------------------------------------


def pull(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Steering:
    """The steering in a repository OWNER/NAME of the hub, after every check that a file gets.

    `revision` is a branch, tag or commit. A steering for another model is refused where it is used.
    `token` and `endpoint` as for `push`. Raises TrimtabError.
    """
    return fetched(repo, revision=revision, token=token, endpoint=endpoint).steering


def fetched(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Pulled:
    """The same with the bytes of its file and the commit: nothing of the repository but that one
    file is fetched, and nothing of it is left on the disk."""
    _check_repo(repo)
    api = _api(token, endpoint)
    with tempfile.TemporaryDirectory() as room:

        def read() -> tuple[Path, str]:
            info = api.model_info(repo, revision=revision, timeout=_PATIENCE, files_metadata=True)
            size = _size_of(info, repo)
            # By its commit, so that what is fetched is what was looked at.
            path = Path(api.hf_hub_download(repo, STEERING, revision=info.sha, local_dir=room))
            _check_fetched(path, Path(room), repo, size)
            return path, str(info.sha)

        with status(f"reading {repo} from the hub"):
            path, commit = _asked(api, repo, read, revision)
        try:
            steering = Steering.load(path)
        except TrimtabError as error:
            said = str(error).replace(str(path), f"{repo}/{STEERING}")
            raise TrimtabError(said) from error
        return Pulled(repo, commit, steering, path.read_bytes())


def _size_of(info: Any, repo: str) -> int:
    """How many bytes the steering's file has, before it is fetched."""
    files = {each.rfilename: each.size for each in info.siblings or ()}
    if STEERING not in files:
        raise TrimtabError(f"{repo} holds no steering of trimtab: there is no {STEERING} in it")
    size = files[STEERING]
    if not isinstance(size, int) or size > _LARGEST:
        counted = f"{size / 1e9:.1f} GB" if isinstance(size, int) else "of an unknown size"
        raise TrimtabError(
            f"{STEERING} of {repo} is {counted}: steerings of up to {_LARGEST / 1e9:.1f} GB are "
            "fetched"
        )
    return size


def _check_fetched(path: Path, room: Path, repo: str, size: int) -> None:
    inside = room.resolve() == path.parent.resolve()
    if path.is_symlink() or not path.is_file() or not inside or path.stat().st_size != size:
        raise TrimtabError(f"{STEERING} of {repo} did not arrive as it is on the hub: try again")


# -- find -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A steering that is on the hub, as its card and the hub have it; "" and None where neither
    says it."""

    repo: str
    base_model: str
    model: str
    method: str
    dial: str
    likes: int | None
    downloads: int | None
    changed: str


@dataclass(frozen=True, repr=False)
class Listing(Presented):
    """What `search` found, those that were changed last first."""

    found: tuple[Listed, ...]
    more: bool

    @property
    def summary(self) -> str:
        """How many were found."""
        count = len(self.found)
        said = f"{count} steering{'' if count == 1 else 's'}"
        return f"the first {said} of more" if self.more else said

    def tables(self) -> list[Table]:
        """A row for each."""
        rows = [
            [
                one.repo, one.base_model or one.model, one.method, one.dial,
                "" if one.likes is None else one.likes,
                "" if one.downloads is None else one.downloads, one.changed[:10],
            ]
            for one in self.found
        ]  # fmt: skip
        heads = ["repository", "model", "method", "dial", "likes", "downloads", "changed"]
        return [Table("Steerings on the hub", heads, rows)]

    def as_json(self) -> dict[str, Any]:
        return {"steerings": [asdict(one) for one in self.found], "more": self.more}


def search(
    words: str = "",
    *,
    model: str | None = None,
    limit: int = 30,
    token: str | None = None,
    endpoint: str | None = None,
) -> Listing:
    """Steerings on the hub whose names have these words; with `model` those for one: by its id on
    the hub, or by the name that it had where they were made. At most `limit`. Raises TrimtabError.
    """
    if limit < 1:
        raise TrimtabError(f"limit is {limit}: it must be 1 or more")
    of_hub = model is not None and _REPO.fullmatch(model) is not None
    tags = [TAG, "steering-vector", *([f"base_model:{model}"] if of_hub else [])]
    api = _api(token, endpoint)

    def ask() -> Listing:
        listed = api.list_models(
            filter=tags,
            search=" ".join(words.split()) or None,
            sort="last_modified",
            expand=["cardData", "downloads", "lastModified", "likes"],
        )
        every = (_listed(each) for each in listed)
        wanted = (one for one in every if model is None or of_hub or one.model == model)
        found = tuple(islice(wanted, limit + 1))
        return Listing(found[:limit], len(found) > limit)

    with status("asking the hub"):
        return _asked(api, "the list of steerings", ask)


def _listed(info: Any) -> Listed:
    card = info.card_data.to_dict() if info.card_data is not None else {}
    own = _mapping(card.get(OWN))
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    changed = info.last_modified
    return Listed(
        repo=shown(info.id),
        base_model=shown(base) if isinstance(base, str) else "",
        model=_word(_mapping(own.get("model")), "name"),
        method=_word(own, "method"),
        dial=_word(_mapping(own.get("dial")), "name"),
        likes=info.likes,
        downloads=info.downloads,
        changed="" if changed is None else changed.isoformat(timespec="seconds"),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _word(mapping: dict[str, Any], name: str) -> str:
    value = mapping.get(name)
    return shown(value) if isinstance(value, str) else ""


# -- what goes wrong ------------------------------------------------------------------------------


def _check_repo(repo: str) -> None:
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise TrimtabError(f"{shown(repo)} is no repository of the hub: write OWNER/NAME")


def _api(token: str | None, endpoint: str | None) -> Any:
    # Takes a second to import.
    from huggingface_hub import HfApi

    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # The libraries below would repeat what no header can hold.
        raise TrimtabError("the token has characters that no token has: copy it again")
    return HfApi(endpoint=endpoint, token=token, library_name="trimtab")


def _asked(api: Any, what: str, ask: Callable[[], _Answer], revision: str | None = None) -> _Answer:
    """What the hub answers; whatever its library raises, in one line that has no token in it."""
    try:
        return ask()
    except TrimtabError:
        raise
    except Exception as error:  # the network fails in as many ways as there are libraries
        reason = _reason(error, api, what, revision)
    # Outside: the exception carries the request with its header, and must not come along.
    raise TrimtabError(_without_token(reason, api))


def _without_token(text: str, api: Any) -> str:
    for token in _tokens(api):
        text = text.replace(token, "[token]")
    return _SECRET.sub("[token]", _ADDRESS.sub(r"\1", text))


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
        detail = f" ({shown(said, 150)})" if said else ""
        if code >= 500:
            return f"{what}: the hub fails with error {code}{detail}: run it again later"
        return f"{what}: the hub {_BY_STATUS.get(code, f'answers with error {code}')}{detail}"
    if "Consistency check failed" in str(error):
        return f"{what}: the file did not arrive whole: run it again"
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{what}: {shown(error.filename)}: {error.strerror}"
    said = shown(first_line(cause) or type(cause).__name__, 150)
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
