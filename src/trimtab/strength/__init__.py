"""How strong a steering should be: curves over its dial, their limits, and budgets."""

from trimtab.strength.budget import Budget, PromptBudget, budget, calibrate
from trimtab.strength.curves import Curve, TokenCurve, curve, resampled, token_log_odds

__all__ = [
    "Budget",
    "Curve",
    "PromptBudget",
    "TokenCurve",
    "budget",
    "calibrate",
    "curve",
    "resampled",
    "token_log_odds",
]
