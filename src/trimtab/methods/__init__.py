"""One file a method. A method is a frozen dataclass of its hyperparameters that says which
statistics it wants (`wants`) and makes a steering from them (`build`)."""

from __future__ import annotations

from trimtab.fitting import Method
from trimtab.methods.ablation import Ablation
from trimtab.methods.actadd import ActAdd
from trimtab.methods.angular import (
    AAS,
    SAS,
    SS,
    Candidates,
    candidate_wants,
    candidates,
    discriminative,
    plane_of,
    sites_of,
    unit_means,
)
from trimtab.methods.austeer import AUSteer, rank
from trimtab.methods.caa import CAA
from trimtab.methods.iti import ITI
from trimtab.methods.sadi import SADI
from trimtab.methods.sta import STA

#: Methods by the name that the command line uses.
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ActAdd, CAA, ITI, SADI, STA, Ablation, SAS, AAS, SS, AUSteer)
}

__all__ = [
    "AAS",
    "CAA",
    "ITI",
    "METHODS",
    "SADI",
    "SAS",
    "SS",
    "STA",
    "AUSteer",
    "Ablation",
    "ActAdd",
    "Candidates",
    "candidate_wants",
    "candidates",
    "discriminative",
    "plane_of",
    "rank",
    "sites_of",
    "unit_means",
]
