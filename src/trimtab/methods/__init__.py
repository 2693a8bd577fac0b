"""One file a method. A method is a frozen dataclass of its hyperparameters that says which
statistics it wants (`wants`), makes a steering from them (`build`), and knows the grid that is
searched by default, which hyperparameter is its dial, and the words for what its steerings do."""

from __future__ import annotations

from trimtab.methods.ablation import Ablation
from trimtab.methods.act import AcT
from trimtab.methods.actadd import ActAdd
from trimtab.methods.alphasteer import AlphaSteer
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
from trimtab.methods.austeer import AUSTEER_GRID, AUSteer
from trimtab.methods.bipo import BiPO
from trimtab.methods.caa import CAA
from trimtab.methods.contents import describe, explain, gate_in_words
from trimtab.methods.iti import ITI
from trimtab.methods.known import METHODS
from trimtab.methods.loreft import LoReFT
from trimtab.methods.probe import Probe
from trimtab.methods.psr import PSR
from trimtab.methods.ranking import rank
from trimtab.methods.reft import ReFT
from trimtab.methods.reps import RePS
from trimtab.methods.sadi import SADI
from trimtab.methods.sae import SAE
from trimtab.methods.ssv import SSV
from trimtab.methods.sta import STA
from trimtab.methods.steermoe import SteerMoE
