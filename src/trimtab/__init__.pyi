# The public names. __init__.py loads each when it is asked for.

from . import strength
from .contrasts import Contrast
from .errors import TrimtabError, TrimtabWarning
from .evaluation import evaluate, load_contrast
from .figures import Difference, Evaluation, Result
from .fitting import fit
from .methods import AAS, CAA, ITI, SADI, SAS, SS, STA, Ablation, ActAdd, AUSteer
from .model import Completion, LanguageModel, bake, load, wrap
from .steering import Dial, Intervention, Steering, Steerings
from .strength import generate_contrast, within
from .sweeps import Comparison, Range, Sweep, compare, sweep

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
    "Difference",
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
