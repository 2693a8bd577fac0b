"""One pass over a contrast, and what a method is."""

from trimtab.fitting.activations import Pooled, Statistics, Token, UnitLength, Want, collect
from trimtab.fitting.classifiers import (
    best_threshold,
    fired_rate,
    logistic,
    rare_threshold,
    separation,
    sides_fired,
)
from trimtab.fitting.costs import Costs, kl_samples, predicted_kl, unit_costs
from trimtab.fitting.differentiable import differentiates
from trimtab.fitting.effects import Effect, HeadSums, Slope
from trimtab.fitting.fields import BetweenZeroAndOne, Count, Number, Says, check_number, plain
from trimtab.fitting.gates import fit_gate
from trimtab.fitting.gradients import with_gradients
from trimtab.fitting.labels import load_labels
from trimtab.fitting.method import (
    POSITIONS_HELP,
    Method,
    fit,
    new_steering,
    validation_part,
)
from trimtab.fitting.outcomes import Outcomes, read_outcomes, read_texts, written
from trimtab.fitting.statistics import (
    Active,
    Aurocs,
    Correlation,
    Effects,
    Largest,
    Means,
    Samples,
    SecondMoment,
    Sides,
    SignCounts,
    Totals,
)
from trimtab.fitting.stored import digest_of
