"""trimtab steers open-weight language models at inference time."""

from trimtab.bake import bake
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import fit
from trimtab.methods import CAA, AUSteer
from trimtab.model import Completion, LanguageModel, load, wrap
from trimtab.steering import Dial, Intervention, Steering

__all__ = [
    "CAA",
    "AUSteer",
    "Completion",
    "Contrast",
    "Dial",
    "Intervention",
    "LanguageModel",
    "Steering",
    "TrimtabError",
    "TrimtabWarning",
    "bake",
    "fit",
    "load",
    "wrap",
]
