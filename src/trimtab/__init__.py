"""trimtab steers open-weight language models at inference time."""

from trimtab import strength
from trimtab.bake import bake
from trimtab.compare import compare
from trimtab.concepts import generate_contrast
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation import evaluate
from trimtab.figures import Comparison, Evaluation, Result
from trimtab.fitting import fit
from trimtab.loading import load, wrap
from trimtab.methods import AAS, CAA, ITI, SADI, SAS, SS, STA, Ablation, ActAdd, AUSteer
from trimtab.model import Completion, LanguageModel
from trimtab.spaces import Range
from trimtab.steering import Dial, Intervention, Steering, Steerings
from trimtab.strength import within
from trimtab.sweep import sweep
from trimtab.swept import Sweep
from trimtab.tasks import load_contrast
from trimtab.versions import warn_if_untested

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
    "Range",
    "Result",
    "Steering",
    "Steerings",
    "Sweep",
    "TrimtabError",
    "TrimtabWarning",
    "bake",
    "compare",
    "evaluate",
    "fit",
    "generate_contrast",
    "load",
    "load_contrast",
    "strength",
    "sweep",
    "within",
    "wrap",
]

warn_if_untested()
