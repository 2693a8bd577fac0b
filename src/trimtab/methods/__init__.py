"""One file a method. A method is a frozen dataclass of its hyperparameters that says which
statistics it wants (`wants`) and makes a steering from them (`build`)."""

from __future__ import annotations

from typing import Any

from trimtab.methods.austeer import AUSteer
from trimtab.methods.caa import CAA

#: Methods by the name that the command line uses.
METHODS: dict[str, type[Any]] = {"austeer": AUSteer, "caa": CAA}

__all__ = ["CAA", "METHODS", "AUSteer"]
