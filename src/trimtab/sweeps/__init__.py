"""Settings chosen on validation rows and reported on test rows; methods compared."""

from trimtab.sweeps.asked_tables import prompt_tables
from trimtab.sweeps.asking import Asking, Behaviour, askings, ladder
from trimtab.sweeps.begun import DEFAULTS, begun_before
from trimtab.sweeps.compare_methods import Candidate, compare, default_candidate
from trimtab.sweeps.comparison import Comparison
from trimtab.sweeps.comparison_page import comparison_pictures
from trimtab.sweeps.effect import Effect, Trial
from trimtab.sweeps.metering import Used, metered, overhead
from trimtab.sweeps.parts import contrast_for
from trimtab.sweeps.plain_text import cost_interval
from trimtab.sweeps.result import Sweep
from trimtab.sweeps.rows import Measured, TaskRows, choose
from trimtab.sweeps.space import Params, Range, label, setting, shown
from trimtab.sweeps.sweep_method import sweep
from trimtab.sweeps.sweep_page import sweep_pictures
from trimtab.sweeps.values import (
    FINE,
    Values,
    difference_of,
    mean_of,
    values_of,
)
