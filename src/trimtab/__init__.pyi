# The public names. __init__.py loads each when it is asked for.

from . import strength
from .batches import Generated, generate_file
from .contrasts import Contrast
from .dials import within
from .errors import TrimtabError, TrimtabWarning
from .evaluation import Prompted, evaluate, load_contrast
from .exchange import (
    Audit,
    Exported,
    audit,
    export,
    import_steering,
    pull,
    push,
    save_gguf,
    search,
    strip,
)
from .figures import Difference, Result, mean_interval
from .fitting import Method, fit, fit_gate
from .methods import (
    AAS,
    CAA,
    ITI,
    PSR,
    SADI,
    SAE,
    SAS,
    SS,
    SSV,
    STA,
    Ablation,
    AcT,
    ActAdd,
    AlphaSteer,
    AUSteer,
    BiPO,
    LoReFT,
    Probe,
    ReFT,
    RePS,
    SteerMoE,
)
from .model import Completion, Kept, LanguageModel, bake, load, wrap
from .monitoring import Answered, Monitor, Monitoring, fit_monitor, monitor
from .papers import recipes, reproduce
from .reading import cross_entropy, log_odds
from .reports import Evaluation
from .serving import VLLM
from .steering import Condition, Dial, Gate, Intervention, Scope, Steering, Steerings
from .sweeps import Candidate, Comparison, Range, Sweep, compare, sweep
from .wishes import Made, make
from .writing import generate_contrast, persona_contrast

__version__: str

__all__ = [
    "AAS",
    "CAA",
    "ITI",
    "PSR",
    "SADI",
    "SAE",
    "SAS",
    "SS",
    "SSV",
    "STA",
    "VLLM",
    "AUSteer",
    "Ablation",
    "AcT",
    "ActAdd",
    "AlphaSteer",
    "Answered",
    "Audit",
    "BiPO",
    "Candidate",
    "Comparison",
    "Completion",
    "Condition",
    "Contrast",
    "Dial",
    "Difference",
    "Evaluation",
    "Exported",
    "Gate",
    "Generated",
    "Intervention",
    "Kept",
    "LanguageModel",
    "LoReFT",
    "Made",
    "Method",
    "Monitor",
    "Monitoring",
    "Probe",
    "Prompted",
    "Range",
    "ReFT",
    "RePS",
    "Result",
    "Scope",
    "SteerMoE",
    "Steering",
    "Steerings",
    "Sweep",
    "TrimtabError",
    "TrimtabWarning",
    "audit",
    "bake",
    "compare",
    "cross_entropy",
    "evaluate",
    "export",
    "fit",
    "fit_gate",
    "fit_monitor",
    "generate_contrast",
    "generate_file",
    "import_steering",
    "load",
    "load_contrast",
    "log_odds",
    "make",
    "mean_interval",
    "monitor",
    "persona_contrast",
    "pull",
    "push",
    "recipes",
    "reproduce",
    "save_gguf",
    "search",
    "strength",
    "strip",
    "sweep",
    "within",
    "wrap",
]
