"""Numbers only: intervals, paired tests, records and what is computed from them."""

from trimtab.figures.intervals import Estimate, mean_interval, rate_interval, weighted_interval
from trimtab.figures.metrics import METRICS, Metric, bare_name, metric_of
from trimtab.figures.records import (
    VIOLATION,
    Evaluation,
    Record,
    Result,
    estimate_of,
    paired,
    summarise,
)
from trimtab.figures.significance import (
    Difference,
    corrected,
    holm,
    paired_difference,
    paired_p,
)
