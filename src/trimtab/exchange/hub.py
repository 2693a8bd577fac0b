"""Steerings on the hub: one repository each, its file and its card, and nothing else.

`push` writes them, `pull` reads the file and checks it as any other. A token goes into the header
of a request and nowhere else.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.card import CARD, STEERING, About, base_model_of, write_card
from trimtab.exchange.hub_client import api_of, asked, check_repo
from trimtab.files import exists, user_path
from trimtab.steering import Steering
from trimtab.terminal import status

#: Seconds that the hub has for its first answer.
_PATIENCE = 10.0
#: Bytes of the largest steering that is fetched. Those of one layer have some kilobytes.
_LARGEST = 1 << 30
#: What the hub itself puts into a new repository.
_EMPTY = {".gitattributes"}
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
    check_repo(repo)
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
    api = api_of(token, endpoint)

    def write() -> str:
        from huggingface_hub import CommitOperationAdd

        parent = _parent(api, repo, overwrite)
        if parent is None:
            api.create_repo(repo, private=private)
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, added, commit_message=message, parent_commit=parent)
        return str(commit.oid)

    with status(f"writing {repo} to the hub"):
        commit = asked(api, repo, write)
    return Pushed(repo, f"{api.endpoint}/{repo}", commit, tuple(files), digest)


def card_of(file: str | Path, repo: str) -> str:
    """The card that `push` would write beside a steering's file in a repository OWNER/NAME."""
    check_repo(repo)
    content, loaded = _file_of(file)
    digest = hashlib.sha256(content).hexdigest()
    return write_card(loaded, About(repo, base_model_of(loaded, None), None, digest, len(content)))


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
    check_repo(repo)
    api = api_of(token, endpoint)
    with tempfile.TemporaryDirectory() as room:

        def read() -> tuple[Path, str]:
            info = api.model_info(repo, revision=revision, timeout=_PATIENCE, files_metadata=True)
            size = _size_of(info, repo)
            # By its commit, so that what is fetched is what was looked at.
            path = Path(api.hf_hub_download(repo, STEERING, revision=info.sha, local_dir=room))
            _check_fetched(path, Path(room), repo, size)
            return path, str(info.sha)

        with status(f"reading {repo} from the hub"):
            path, commit = asked(api, repo, read, revision)
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
