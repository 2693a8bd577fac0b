"""trimtab steers open-weight language models at inference time."""

from trimtab import strength
from trimtab.bake import bake
from trimtab.concepts import generate_contrast
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation import evaluate
from trimtab.figures import Comparison, Evaluation, Result
from trimtab.fitting import fit
from trimtab.methods import AAS, CAA, ITI, SADI, SAS, SS, STA, Ablation, ActAdd, AUSteer
from trimtab.model import Completion, LanguageModel, load, wrap
from trimtab.steering import Dial, Intervention, Steering, Steerings

__all__ = [
    "AAS",
    "CAA",
    "ITI",
    "SADI",
    "SAS",
    "SS",
    "STA",
    "AUSteer",
    "Ablation",
    "ActAdd",
    "Comparison",
    "Completion",
    "Contrast",
    "Dial",
    "Evaluation",
    "Intervention",
    "LanguageModel",
    "Result",
    "Steering",
    "Steerings",
    "TrimtabError",
    "TrimtabWarning",
    "bake",
    "evaluate",
    "fit",
    "generate_contrast",
    "load",
    "strength",
    "wrap",
]
