"""What differs between the versions of transformers that trimtab works with.

One thing stands elsewhere: how a GGUF file is asked for, in `checkpoints/gguf.py`.
"""

from __future__ import annotations

import inspect
import warnings
from importlib.metadata import version
from typing import Any

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


def caps_attention(model: Any) -> bool:
    """Whether attention's scores are capped, which scaled dot-product attention does not do."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def mend_attention(model: Any) -> None:
    """Have a soft-cap on attention take part in the computation, with a warning.

    Before 5.21 transformers lets Gemma 2 and VaultGemma run with scaled dot-product attention,
    which leaves their soft-cap out without a word; later versions refuse that.
    """
    used = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if used == "sdpa" and caps_attention(model):
        model.set_attn_implementation("eager")
        warnings.warn(
            "scaled dot-product attention leaves out this model's soft-cap on attention: it runs "
            "with eager attention instead",
            TrimtabWarning,
            stacklevel=4,
        )
