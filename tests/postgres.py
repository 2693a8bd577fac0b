"""A PostgreSQL server of the test's own, where Debian's package is installed: on a Unix socket, in
a directory of its own, as another user where the tests run as root, whom the server refuses."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_USERS = ("postgres", "nobody")


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database; skips the test where there can be no server."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    programs = found[-1].parent
    room = Path(tempfile.mkdtemp(prefix="trimtab-postgres-"))
    try:
        run = _as_another(room)
        data = room / "data"
        made = run(programs / "initdb", "-D", data, "-U", "trimtab", "-A", "trust", "--no-sync")
        if made.returncode:
            pytest.skip(f"initdb: {made.stderr.strip()[-200:]}")
        options = f"-F -k {room} -c listen_addresses="
        started = run(
            programs / "pg_ctl", "-w", "-D", data, "-l", room / "log", "-o", options, "start"
        )
        if started.returncode:
            pytest.skip(f"pg_ctl: {(room / 'log').read_text()[-200:]}")
        try:
            yield f"postgresql+psycopg://trimtab:hush@/postgres?host={room}"
        finally:
            run(programs / "pg_ctl", "-w", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _as_another(room: Path):  # type: ignore[no-untyped-def]
    """Runs commands, as a user who may own a server; `room` becomes that user's."""
    before: list[str] = []
    if os.geteuid() == 0:
        known = {user.pw_name: user for user in pwd.getpwall()}
        user = next((known[name] for name in _USERS if name in known), None)
        if user is None or shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user for it")
        os.chown(room, user.pw_uid, user.pw_gid)
        before = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        words = [*before, *map(str, command)]
        # The server must not hold on to pipes of the test.
        with (room.parent / f"{room.name}.said").open("w+") as said:
            ended = subprocess.run(
                words, cwd="/", stdout=said, stderr=said, stdin=subprocess.DEVNULL, timeout=60
            )
            said.seek(0)
            text = said.read()
        (room.parent / f"{room.name}.said").unlink()
        return subprocess.CompletedProcess(words, ended.returncode, text, text)

    return run
