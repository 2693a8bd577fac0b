"""Where the trials of a sweep are kept: an Optuna storage of a file, of a server, or in memory."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from trimtab.errors import TrimtabError

#: What reading a damaged study raises, in Optuna and in SQLAlchemy's conversions.
DAMAGES = (LookupError, TypeError, ValueError, AttributeError, AssertionError)


def import_optuna() -> Any:
    """Optuna, quiet; it is an extra."""
    try:
        import optuna
    except ImportError as error:
        raise TrimtabError("a sweep needs optuna: pip install 'trimtab[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_storage(storage: Any) -> Any:
    """An Optuna storage: of a URL, in the SQLite file of a path, or in memory (None)."""
    optuna = import_optuna()
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if not isinstance(storage, str | Path):
        return storage
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError

    text = str(storage)
    file = None if "://" in text else Path(text).absolute()
    # Workers on one SQLite file wait for each other.
    options: dict[str, Any] = {}
    if file is not None:  # by its name and not in a URL, in which some characters mean something
        url = "sqlite:///study.db"
        options = {"creator": partial(sqlite3.connect, file, timeout=60, check_same_thread=False)}
    else:
        url = text.replace("{", "{{").replace("}", "}}")  # else Optuna would fill them in
        if url.startswith("sqlite"):
            options = {"connect_args": {"timeout": 60}}
    for again in range(20):
        try:
            opened = optuna.storages.RDBStorage(url, engine_kwargs=options)
            opened.url = text
            return opened
        except (SQLAlchemyError, ImportError, RuntimeError, *DAMAGES) as error:
            # Of workers that make the tables at the same time one is first.
            if again < 19 and (isinstance(error, IntegrityError) or "already exists" in str(error)):
                time.sleep(0.1)
                continue
            raise TrimtabError(
                f"cannot open the storage {_without_password(text)}{_reason(error, text)}"
            ) from error
    raise AssertionError


def _reason(error: Exception, url: str) -> str:
    """What a database says, if it cannot hold the password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in url:
        return f": {error.__cause__ or error}".strip().splitlines()[0]
    try:
        secrets = [make_url(url).password, *make_url(url).query.values()]
    except (ArgumentError, ValueError):
        return ": write it as in sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
    lines = str(error.__cause__ or error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if any(str(secret) in first for secret in secrets if secret):
        return f": {type(error).__name__}"
    return f": {first}"


def storage_name(database: Any) -> str:
    """A storage for messages."""
    return _without_password(str(getattr(database, "url", "memory")))


def _without_password(url: str) -> str:
    """A URL for messages: who and where, and nothing that could be secret; a path as it is."""
    if "://" not in url:
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return f"{url.partition('://')[0]}://..."


def one_by_one(database: Any) -> contextlib.AbstractContextManager[Any]:
    """The lock in the directory of an SQLite file, as runs have it; others lock their own rows."""
    from sqlalchemy.engine import make_url

    url = str(getattr(database, "url", ""))
    file = url if "://" not in url else (make_url(url).database if "sqlite" in url else None)
    if not file or file == ":memory:":
        return contextlib.nullcontext()
    return FileLock(Path(file).parent / ".lock")
