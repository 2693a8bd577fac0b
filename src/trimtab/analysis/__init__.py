"""Looks into models and methods: which units, which layers, how many, how strong."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.analysis.ablations import ablations, heatmap
from trimtab.analysis.amounts import count, pairs
from trimtab.analysis.dials import dial, masks
from trimtab.analysis.maps import overlap, scores
from trimtab.analysis.norms import norms
from trimtab.analysis.planes import plane
from trimtab.analysis.result import Analysis
from trimtab.analysis.suppression import suppression
from trimtab.analysis.tokens import tokens
from trimtab.analysis.units import units

#: Each analysis by the name that the command line calls it.
ANALYSES: dict[str, Callable[..., Analysis]] = {
    "units": units,
    "tokens": tokens,
    "scores": scores,
    "overlap": overlap,
    "pairs": pairs,
    "count": count,
    "suppression": suppression,
    "ablations": ablations,
    "heatmap": heatmap,
    "plane": plane,
    "norms": norms,
    "dial": dial,
    "masks": masks,
}
