"""What runs the model, for commands that ask it about many texts at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from trimtab.cli.common import trusting
from trimtab.cli.options import Opened
from trimtab.cli.values import read_named
from trimtab.errors import TrimtabError
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.model import LanguageModel
    from trimtab.serving import VLLM

#: What vLLM writes goes where other logs go, and is said of what matters.
LOGS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


@dataclass(frozen=True, kw_only=True)
class Running:
    """What runs the model."""

    heading = "Engine"

    engine: Literal["transformers", "vllm"] = option(
        "transformers, or vllm (the extra vllm), which takes all texts at once.", "transformers"
    )
    vllm: Sequence[str] = option(
        "NAME=VALUE: an argument of vLLM's engine, as in max_model_len=4096; repeat.", ()
    )

    @property
    def elsewhere(self) -> bool:
        """Whether vLLM runs it; refuses what is said for nothing, and a vLLM that is not there."""
        if self.engine == "transformers":
            for item in fields(self):  # all others are vLLM's
                if item.name != "engine" and getattr(self, item.name):
                    raise TrimtabError(f"--{item.name} is for --engine vllm")
            return False
        from trimtab.engines import untested

        if reason := untested():
            raise TrimtabError(f"{reason}: leave --engine out, and transformers runs the model")
        return True


@dataclass(frozen=True, kw_only=True)
class Hooked(Running):
    """The same, and where it may be steered."""

    hook: Sequence[str] = option(
        "With vllm, a kind of sites (resid, ffn_out ...) beside those of each method's first "
        "setting; repeat.",
        (),
    )


def read_beside(opened: Any) -> Any:
    """How the model is read where vLLM runs it: beside it, not where it will be."""
    import torch

    if opened.quantise or opened.device_map or opened.device not in ("auto", "cpu"):
        raise TrimtabError("vLLM places the model itself: leave --device and --quantise out")
    dtype = opened.dtype
    if dtype == "auto" and torch.cuda.is_available():
        dtype = "checkpoint"
    return replace(opened, device="cpu", dtype=dtype)


@contextmanager
def opened_engine(
    running: Running, language_model: LanguageModel, opened: Opened, hooks: Sequence[str] = ()
) -> Iterator[VLLM | None]:
    """vLLM on the model's weights, as long as the block lasts; None where transformers runs it."""
    if not running.elsewhere:
        yield None
        return
    from trimtab.model import directory_of, has_adapters
    from trimtab.serving import VLLM

    for name, value in LOGS.items():
        os.environ.setdefault(name, value)
    given: dict[str, Any] = {"revision": opened.revision} if opened.revision else {}
    if trusting.get():
        given["trust_remote_code"] = True
    source = None
    if not (language_model.baked or has_adapters(language_model.model)):
        source = directory_of(opened.model) or opened.model
    arguments = {**given, **read_named("--vllm", running.vllm)}
    strange = [name for name in ("hooks", "steerings", "force") if name in arguments]
    if strange:
        raise TrimtabError(f"--vllm {strange[0]}: vLLM has no such argument")
    with VLLM(language_model, hooks=hooks, model=source, **arguments) as engine:
        yield engine
