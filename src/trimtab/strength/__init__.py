"""How strong a steering should be: curves over its dial, their limits, and budgets."""

from trimtab.strength.budget import Budget, PromptBudget, budget, calibrate

__all__ = ["Budget", "PromptBudget", "budget", "calibrate"]
