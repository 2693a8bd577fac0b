"""A hub on this machine that speaks the API of the real one, as far as its library asks for it.

Repositories, files and commits are in memory. Large files go through the LFS protocol to another
address, as the real hub's go to a storage that must never see a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

USER, TOKEN = "me", "hf_canaryCANARYcanary0123456789"


@dataclass
class Repo:
    """What a repository holds, and its commits, the last one last."""

    files: dict[str, bytes]
    private: bool = False
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    likes: int = 3
    downloads: int = 7


@dataclass
class Seen:
    method: str
    path: str
    host: str
    token: str | None


@dataclass
class Hub:
    """The state of the server, and how it is told to fail: `faults` has statuses by a part of the
    path, `says` the words of these errors, `cut` the bytes that files lack when they are sent."""

    url: str = ""
    storage: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    says: str = ""
    cut: int = 0

    def add(self, name: str, files: dict[str, bytes], **about: Any) -> Repo:
        self.repos[name] = Repo({".gitattributes": b"", **files}, **about)
        return self.repos[name]

    def asked(self, part: str) -> list[Seen]:
        return [each for each in self.seen if part in each.path]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.storage = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the library takes for the real one, with a token kept as login keeps it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "token").write_text(TOKEN)
    with running() as hub:
        for name, value in {
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        # Between its tries the library waits for seconds.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # -- what every request goes through --------------------------------------------------------

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.place, self.asked = unquote(parts.path), parse_qs(parts.query)
        bearer = self.headers.get("Authorization", "")
        self.token = bearer.removeprefix("Bearer ") or None
        self.state.seen.append(
            Seen(self.command, self.place, self.headers.get("Host", ""), self.token)
        )
        for part, status in self.state.faults.items():
            if part in self.place:
                return self.error(status, self.state.says.replace("{token}", bearer))
        if self.place.startswith("/storage/"):
            return self.stored()
        if self.token not in (None, TOKEN):
            return self.error(401, "Invalid credentials in Authorization header")
        for pattern, handle in (
            (r"/api/models", self.listed),
            (r"/api/repos/create", self.created),
            (r"/api/validate-yaml", self.validated),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.committed),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolved),
        ):
            match = re.fullmatch(pattern, self.place)
            if match:
                return handle(*match.groups())
        return self.error(404, "no such endpoint")

    def reply(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        for name, text in {"Content-Length": str(len(body)), **named}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, message: str, code: str = "") -> None:
        more = {"X_Error_Code": code} if code else {}
        self.reply({"error": message}, status, X_Error_Message=message, **more)

    def found(self, name: str) -> Repo | None:
        """A repository that this token may see; an error has been sent where there is none."""
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and self.token != TOKEN):
            if self.token is None:
                self.error(401, "Invalid username or password.")
            else:
                self.error(404, "Repository not found", "RepoNotFound")
            return None
        return repo

    # -- endpoints ------------------------------------------------------------------------------

    def listed(self) -> None:
        found = []
        for name, repo in self.state.repos.items():
            card = _front_matter(repo.files.get("README.md", b""))
            tags = [*(card.get("tags") or ()), f"base_model:{card.get('base_model')}"]
            searched = self.asked.get("search", [""])[0]
            if set(self.asked.get("filter", ())) <= set(tags) and searched in name:
                found.append(
                    {"id": name, "cardData": card, "likes": repo.likes,
                     "downloads": repo.downloads, "lastModified": "2026-11-20T10:00:00.000Z"}
                )  # fmt: skip
        self.reply(found)

    def created(self) -> None:
        about = json.loads(self.content)
        name = f"{about.get('organization') or USER}/{about['name']}"
        if self.token is None:
            return self.error(401, "Invalid username or password.")
        if not name.startswith(f"{USER}/"):
            return self.error(403, "You don't have the rights to create a model under this name")
        if name in self.state.repos:
            return self.error(409, "You already created this model repo")
        self.state.add(name, {}, private=about.get("visibility") == "private")
        return self.reply({"url": f"{self.state.url}/{name}"})

    def validated(self) -> None:
        try:
            _front_matter(json.loads(self.content)["content"].encode())
        except yaml.YAMLError as error:
            return self.reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self.reply({"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None) -> None:
        repo = self.found(name)
        if repo is None:
            return
        if revision not in (None, "main", *repo.commits):
            return self.error(404, "Invalid rev id", "RevisionNotFound")
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": _sha(content)}
            for path, content in repo.files.items()
        ]
        self.reply({"id": name, "sha": repo.commits[-1], "siblings": siblings, "tags": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.found(name) is None:
            return
        files = [
            {"path": each["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
            for each in json.loads(self.content)["files"]
        ]  # fmt: skip
        self.reply({"files": files})

    def batch(self, name: str) -> None:
        if self.found(name) is None:
            return
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.state.storage}/storage/{each['oid']}"}}}
            for each in json.loads(self.content)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def stored(self) -> None:
        key = self.place.rpartition("/")[2]
        if self.command == "PUT":
            self.state.objects[key] = self.content
            return self.reply(b"")
        content = self.state.objects[key]
        return self.reply(content[: len(content) - self.state.cut])

    def committed(self, name: str, revision: str) -> None:
        repo = self.found(name)
        if repo is None:
            return
        head, *operations = map(json.loads, self.content.decode().splitlines())
        if head["value"].get("parentCommit") not in (None, repo.commits[-1]):
            return self.error(412, "A commit has happened since. Please refresh and try again.")
        for each in operations:
            value = each["value"]
            if each["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            else:
                repo.files[value["path"]] = self.state.objects[value["oid"]]
        repo.commits.append(_sha(self.content))
        self.reply({"commitUrl": f"{self.state.url}/{name}", "commitOid": repo.commits[-1]})

    def resolved(self, name: str, revision: str, path: str) -> None:
        repo = self.found(name)
        if repo is None:
            return
        if path not in repo.files:
            return self.error(404, "Entry not found", "EntryNotFound")
        content = repo.files[path]
        key = hashlib.sha256(content).hexdigest()
        about = {"X_Repo_Commit": repo.commits[-1], "ETag": f'"{_sha(content)}"'}
        if not path.endswith(".safetensors"):
            return self.reply(content, **about)
        self.state.objects[key] = content
        return self.reply(
            b"", 302, **about, Location=f"{self.state.storage}/storage/{key}",
            X_Linked_Etag=f'"{key}"', X_Linked_Size=str(len(content)),
        )  # fmt: skip


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _front_matter(card: bytes) -> dict[str, Any]:
    match = re.match(rb"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}
