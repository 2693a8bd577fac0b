"""Where a dial should stand: what each dial does to the next token, and which one a budget allows.

It is below methods, so that what they fit knows its own dial.
"""

from trimtab.dials.budgets import (
    BUDGETS,
    Budget,
    PromptBudget,
    all_budgets,
    budget,
    calibrate,
    dials_for,
)
from trimtab.dials.measuring import measured
from trimtab.dials.rule import Within, within
from trimtab.dials.solving import check_budgets, searched
from trimtab.dials.turning import (
    Turning,
    check_turns,
    dial_limits,
    divergence,
    entropy,
    idle_dial,
    read_at_dial,
)
