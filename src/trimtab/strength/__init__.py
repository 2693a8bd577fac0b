"""How strong a steering should be: curves over its dial, where they end, and budgets.

`trimtab.strength.theory.ufm` is the theory behind them.
"""

from trimtab.dials import (
    BUDGETS,
    Budget,
    PromptBudget,
    Turning,
    Within,
    budget,
    calibrate,
    dial_limits,
    divergence,
    within,
)
from trimtab.evaluation import Continuations, NextTokens, TokenKL, neutral
from trimtab.strength import theory
from trimtab.strength.all_curves import (
    Beside,
    ConceptAsked,
    CostAsked,
    Refits,
    TaskAsked,
    document,
    follow,
    spaced,
)
from trimtab.strength.concept import (
    ChatConceptJudge,
    ConceptCurve,
    ConceptJudge,
    LexiconJudge,
    concept_curve,
    lexicon,
)
from trimtab.strength.costs import CostCurve, cost_curve
from trimtab.strength.curves import Curve, TokenCurve, curve
from trimtab.strength.limits import limit
from trimtab.strength.page import write_curves
from trimtab.strength.pictures import Accuracy, Curves, draw
from trimtab.strength.reading import Reading, read
from trimtab.strength.refitting import at_layers, method_of, resampled, token_log_odds
from trimtab.strength.samples import TextsAsked
from trimtab.strength.theory import ufm
from trimtab.writing import Negatives, generate_contrast
