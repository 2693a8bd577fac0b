"""One pass over a contrast, and what a method is."""

from trimtab.fitting.activations import Statistics, Token, UnitLength, Want, collect
from trimtab.fitting.autoencoders import Features, load_features
from trimtab.fitting.method import (
    POSITIONS_HELP,
    Method,
    check_choice,
    check_number,
    check_token,
    fit,
    new_steering,
    validation_part,
)
from trimtab.fitting.statistics import Active, Means, Samples, SecondMoment, SignCounts

__all__ = [
    "POSITIONS_HELP",
    "Active",
    "Features",
    "Means",
    "Method",
    "Samples",
    "SecondMoment",
    "SignCounts",
    "Statistics",
    "Token",
    "UnitLength",
    "Want",
    "check_choice",
    "check_number",
    "check_token",
    "collect",
    "fit",
    "load_features",
    "new_steering",
    "validation_part",
]
