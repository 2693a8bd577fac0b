"""Runs that were begun when methods and limits had other defaults go on with those: what is in a
directory is of one kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabWarning
from trimtab.options import MAX_COST, Keep
from trimtab.reports import object_in
from trimtab.sweeps.rows import Measured

#: Which defaults a run has, as its configuration notes it; the first ones were not noted.
DEFAULTS = {"defaults": 2}
#: What methods took before where nothing was said.
_FORMER: Mapping[str, Mapping[str, Any]] = {
    "caa": {"token": "last"},
    "austeer": {"site": "ffn_out", "k": 16, "direction": "paper"},
}


def begun_before(keep: Keep) -> bool:
    """Whether a run directory was begun with the former defaults, which is warned about."""
    if keep.output is None or keep.overwrite:
        return False
    config = object_in(Path(keep.output) / "config.json")
    if config is None or DEFAULTS.keys() <= config.keys():
        return False
    warnings.warn(
        f"{keep.output} was begun when defaults were others (no limit of cost; CAA read last "
        "tokens; AUSteer scaled 16 units of ffn_out): it goes on with those",
        TrimtabWarning,
        stacklevel=3,
    )
    return True


def without_limit(measured: Measured) -> Measured:
    """What a run of before was measured by: no limit of cost, unless one is given."""
    choosing = measured.choosing
    if choosing.max_cost != MAX_COST:
        return measured
    return replace(measured, choosing=replace(choosing, max_cost=None))


def former(method: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The former defaults of a method's hyperparameters that nothing is said of."""
    defaults = _FORMER.get(method, {})
    return {name: value for name, value in defaults.items() if name not in said}
