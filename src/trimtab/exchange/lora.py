"""PEFT adapters: a linear steering without a constant is exactly a small LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import TrimtabError
from trimtab.exchange.request import Exported, Request


def write(request: Request, *, dials: Sequence[float] = (), precision: str = "float32") -> Exported:
    """An adapter directory; `dials` makes several, each in a directory of its own."""
    raise TrimtabError("cannot write an adapter yet")
