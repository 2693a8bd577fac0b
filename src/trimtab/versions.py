"""What differs between the versions of transformers that trimtab works with."""

from __future__ import annotations

import inspect
import warnings
from importlib.metadata import version

from packaging.version import Version
from torch import nn

from trimtab.errors import TrimtabWarning

#: The versions of transformers that the tests run with: the oldest one and the newest one.
OLDEST, NEWEST = "5.16", "5.24"


def warn_if_untested() -> None:
    """Say it where transformers is older or newer than what was tested."""
    used = Version(version("transformers"))
    if not Version(OLDEST).release <= used.release[:2] <= Version(NEWEST).release:
        warnings.warn(
            f"transformers {used} is outside of what trimtab is tested with, {OLDEST} to {NEWEST}: "
            "models may compute in another way than trimtab takes them to",
            TrimtabWarning,
            stacklevel=2,
        )


def cache_argument(body: nn.Module) -> str:
    """What a transformer body calls its KV cache: `past_key_values`, and `cache` from 5.24 on."""
    parameters = inspect.signature(body.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
