"""The methods by the names that the command line uses."""

from __future__ import annotations

from trimtab.fitting import Method
from trimtab.methods.ablation import Ablation
from trimtab.methods.actadd import ActAdd
from trimtab.methods.angular import AAS, SAS, SS
from trimtab.methods.austeer import AUSteer
from trimtab.methods.caa import CAA
from trimtab.methods.iti import ITI
from trimtab.methods.sadi import SADI
from trimtab.methods.sta import STA

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ActAdd, CAA, ITI, SADI, STA, Ablation, SAS, AAS, SS, AUSteer)
}
