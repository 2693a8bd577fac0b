# The public names. __init__.py loads each when it is asked for.

from . import strength
from .contrasts import Contrast
from .errors import TrimtabError, TrimtabWarning
from .evaluation import evaluate, load_contrast
from .exchange import Exported, export, save_gguf
from .figures import Difference, Result, mean_interval
from .fitting import Method, fit
from .methods import AAS, CAA, ITI, SADI, SAS, SS, STA, Ablation, ActAdd, AUSteer
from .model import Completion, LanguageModel, bake, load, wrap
from .papers import recipes, reproduce
from .reading import cross_entropy, log_odds
from .reports import Evaluation
from .steering import Dial, Intervention, Scope, Steering, Steerings
from .strength import generate_contrast, within
from .sweeps import Candidate, Comparison, Range, Sweep, compare, sweep

__version__: str

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
    "Candidate",
    "Comparison",
    "Completion",
    "Contrast",
    "Dial",
    "Difference",
    "Evaluation",
    "Exported",
    "Intervention",
    "LanguageModel",
    "Method",
    "Range",
    "Result",
    "Scope",
    "Steering",
    "Steerings",
    "Sweep",
    "TrimtabError",
    "TrimtabWarning",
    "bake",
    "compare",
    "cross_entropy",
    "evaluate",
    "export",
    "fit",
    "generate_contrast",
    "load",
    "load_contrast",
    "log_odds",
    "mean_interval",
    "recipes",
    "reproduce",
    "save_gguf",
    "strength",
    "sweep",
    "within",
    "wrap",
]
