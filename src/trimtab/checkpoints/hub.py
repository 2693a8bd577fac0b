"""Looks for a model on the hub, once and within a bounded time, before transformers asks for its
files one by one: each of those would wait long where the hub cannot be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.checkpoints.directory import CONFIG, CheckpointError
from trimtab.errors import first_line, shown

#: Seconds that the hub has to answer.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Found:
    """Where a model of the hub is: `cached` is the directory of its files where they are here
    already, `reached` whether the hub answered, `parameters` how many numbers of which type it
    says that the weights have."""

    cached: Path | None
    reached: bool
    parameters: Mapping[str, int] = field(default_factory=dict)


def find_on_hub(name: str, origin: Mapping[str, Any]) -> Found:
    """Ask the hub for a model; `origin` has revision, token, cache_dir, local_files_only."""
    # Takes a second to import, and is needed for models of the hub alone.
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    revision, token = origin.get("revision"), origin.get("token")
    try:
        file = try_to_load_from_cache(
            name, CONFIG, cache_dir=origin.get("cache_dir"), revision=revision
        )
        cached = Path(file).parent if isinstance(file, str) else None
        if origin.get("local_files_only"):
            return _from_cache(name, cached, "local_files_only says not to ask the hub")
        info = HfApi().model_info(
            name, revision=revision, token=token, timeout=_PATIENCE, expand=["safetensors"]
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            "its owner lets in who asked: accept its terms on the hub, then log in (hf auth "
            "login) or give token="
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the hub has no revision {shown(revision)} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            "the hub has no model of that name, or it is private: log in (hf auth login) or give "
            "token="
        ) from error
    except ValueError as error:  # no name that the hub takes
        raise CheckpointError(first_line(error)) from error
    except errors.HfHubHTTPError:  # it answers; transformers says what it makes of it
        return Found(cached, True)
    except Exception as error:  # the network fails in as many ways as there are libraries
        reason = first_line(error) or type(error).__name__
        return _from_cache(name, cached, f"the hub cannot be reached ({shown(reason, 150)})")
    counts = getattr(info.safetensors, "parameters", None)
    return Found(cached, True, counts or {})


def _from_cache(name: str, cached: Path | None, reason: str) -> Found:
    if cached is None:
        raise CheckpointError(f"{reason}, and it is not in the cache of the hub's files")
    return Found(cached, False)
