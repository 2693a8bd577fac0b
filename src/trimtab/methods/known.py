"""The methods by the names that the command line uses: trimtab's own, and installed packages'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.fitting import Method
from trimtab.methods.ablation import Ablation
from trimtab.methods.act import AcT
from trimtab.methods.actadd import ActAdd
from trimtab.methods.alphasteer import AlphaSteer
from trimtab.methods.angular import AAS, SAS, SS
from trimtab.methods.austeer import AUSteer
from trimtab.methods.bipo import BiPO
from trimtab.methods.caa import CAA
from trimtab.methods.iti import ITI
from trimtab.methods.loreft import LoReFT
from trimtab.methods.probe import Probe
from trimtab.methods.psr import PSR
from trimtab.methods.reft import ReFT
from trimtab.methods.reps import RePS
from trimtab.methods.sadi import SADI
from trimtab.methods.sae import SAE
from trimtab.methods.ssv import SSV
from trimtab.methods.sta import STA
from trimtab.methods.steermoe import SteerMoE
from trimtab.plugins import Extended

_OWN = (
    *(ActAdd, CAA, ITI, SADI, STA, SAE, Ablation, SAS, AAS, SS, AUSteer, AcT, AlphaSteer, Probe),
    SteerMoE,
    *(SSV, BiPO, RePS, ReFT, LoReFT, PSR),
)


def _is_method(added: Any, name: str) -> bool:
    return isinstance(added, type) and issubclass(added, Method) and added.name == name


METHODS: Mapping[str, type[Method]] = Extended(
    "method", {method.name: method for method in _OWN}, _is_method
)
