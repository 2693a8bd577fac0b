"""Settings chosen on validation rows and reported on test rows; methods compared."""

from trimtab.sweeps.compare_methods import Candidate, compare, default_candidate
from trimtab.sweeps.comparison import Comparison
from trimtab.sweeps.comparison_page import comparison_pictures, effects, spent, worth
from trimtab.sweeps.effect import Effect, Trial, plain_texts
from trimtab.sweeps.metering import Used, metered, overhead
from trimtab.sweeps.result import Sweep
from trimtab.sweeps.rows import Bench, Measured, contrast_for, more_is_better
from trimtab.sweeps.space import Params, Range, label, setting, shown
from trimtab.sweeps.sweep_method import sweep
from trimtab.sweeps.sweep_page import sweep_pictures

__all__ = [
    "Bench",
    "Candidate",
    "Comparison",
    "Effect",
    "Measured",
    "Params",
    "Range",
    "Sweep",
    "Trial",
    "Used",
    "compare",
    "comparison_pictures",
    "contrast_for",
    "default_candidate",
    "effects",
    "label",
    "metered",
    "more_is_better",
    "overhead",
    "plain_texts",
    "setting",
    "shown",
    "spent",
    "sweep",
    "sweep_pictures",
    "worth",
]
