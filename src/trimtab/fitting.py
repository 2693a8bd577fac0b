"""From methods to steerings: one pass over the contrast, whatever the methods want of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from trimtab.activations import collect
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.steering import Dial, Intervention, Steering


def fit(
    methods: Sequence[Any],
    language_model: Any,
    contrast: Contrast,
    *,
    max_length: int | None = None,
) -> list[Steering]:
    """Fit several methods on one contrast; the model runs over it once.

    Uses the rows of part "train", or all rows where none names a part. `max_length` is the
    longest text in tokens (default: what the model takes).
    """
    train = contrast.train
    wants = [want for method in methods for want in method.wants(language_model.anatomy)]
    statistics = collect(language_model, train, wants, max_length=max_length)
    return [method.build(language_model, train, statistics) for method in methods]


def new_steering(
    method: Any,
    language_model: Any,
    contrast: Contrast,
    interventions: Sequence[Intervention],
    dial: Dial,
    tables: dict[str, Tensor] | None = None,
) -> Steering:
    """A method's result, with where it came from."""
    return Steering(
        method=method.name,
        hyperparameters=_plain(asdict(method)),
        interventions=tuple(interventions),
        dial=dial,
        model=language_model.identity,
        contrast={"name": contrast.name, "digest": contrast.digest, "rows": len(contrast)},
        tables=tables or {},
    )


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise TrimtabError(f"{what} is {value!r}: known are {', '.join(known)}")


def check_number(what: str, value: float) -> None:
    """Refuse NaN and infinity."""
    if not math.isfinite(value):
        raise TrimtabError(f"{what} must be a finite number, not {value}")


def _plain(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as they come back from a file."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in hyperparameters.items()
    }
