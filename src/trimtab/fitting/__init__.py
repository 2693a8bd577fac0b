"""One pass over a contrast, and what a method is."""

from trimtab.fitting.activations import Statistics, Summed, Token, UnitLength, Want, collect
from trimtab.fitting.autoencoders import FeatureEffects, Features, load_features
from trimtab.fitting.costs import Costs, kl_samples, predicted_kl, unit_costs
from trimtab.fitting.effects import Effect, HeadSums, Slope
from trimtab.fitting.fields import BetweenZeroAndOne, Count, Number, Says, check_number, plain
from trimtab.fitting.gates import fit_gate
from trimtab.fitting.method import (
    POSITIONS_HELP,
    Method,
    fit,
    new_steering,
    validation_part,
)
from trimtab.fitting.statistics import (
    Active,
    Effects,
    Means,
    Samples,
    SecondMoment,
    Sides,
    SignCounts,
    Totals,
)
