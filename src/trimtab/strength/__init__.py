"""How strong a steering should be: curves over its dial, where they end, and budgets.

`trimtab.strength.ufm` is the theory behind them.
"""

from trimtab.strength import ufm
from trimtab.strength.budgets import Budget, PromptBudget, budget, calibrate
from trimtab.strength.concept import (
    ChatConceptJudge,
    ConceptCurve,
    LexiconJudge,
    concept_curve,
    lexicon,
)
from trimtab.strength.costs import CostCurve, cost_curve
from trimtab.strength.curves import Curve, TokenCurve, curve, resampled, token_log_odds
from trimtab.strength.limits import limit
from trimtab.strength.reading import Bounds, Reading, read
from trimtab.strength.within import Within, within

__all__ = [
    "Bounds",
    "Budget",
    "ChatConceptJudge",
    "ConceptCurve",
    "CostCurve",
    "Curve",
    "LexiconJudge",
    "PromptBudget",
    "Reading",
    "TokenCurve",
    "Within",
    "budget",
    "calibrate",
    "concept_curve",
    "cost_curve",
    "curve",
    "lexicon",
    "limit",
    "read",
    "resampled",
    "token_log_odds",
    "ufm",
    "within",
]
