"""Numbers only: intervals, paired tests, records and what is computed from them."""

from trimtab.figures.intervals import (
    Estimate,
    auroc_interval,
    mean_interval,
    rate_interval,
    weighted_interval,
)
from trimtab.figures.metrics import (
    METRICS,
    Metric,
    bare_name,
    metric_of,
    more_is_better,
    on_task,
    with_unit,
    words_for,
)
from trimtab.figures.records import (
    VIOLATION,
    Record,
    Result,
    are_rates,
    comparisons_of,
    estimate_of,
    flips_of,
    in_order,
    over_settings,
    paired,
    results_of,
)
from trimtab.figures.several import changes_of, differences
from trimtab.figures.significance import (
    Difference,
    corrected,
    holm,
    paired_difference,
    paired_p,
)
