"""Looks into models and methods: which units, which layers, how many, how strong."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.papers.austeer.ablations import ablations, heatmap
from trimtab.papers.austeer.amounts import count, pairs
from trimtab.papers.austeer.effect.analysis import effect
from trimtab.papers.austeer.maps import overlap, scores
from trimtab.papers.austeer.suppression import suppression
from trimtab.papers.austeer.tokens import tokens
from trimtab.papers.austeer.units import units
from trimtab.papers.result import StudyResult
from trimtab.papers.rotations.dials import dial, masks
from trimtab.papers.rotations.norms import norms
from trimtab.papers.rotations.planes import plane

#: Each analysis by the name that the command line calls it.
ANALYSES: dict[str, Callable[..., StudyResult]] = {
    "units": units,
    "tokens": tokens,
    "scores": scores,
    "overlap": overlap,
    "pairs": pairs,
    "count": count,
    "suppression": suppression,
    "ablations": ablations,
    "heatmap": heatmap,
    "effect": effect,
    "plane": plane,
    "norms": norms,
    "dial": dial,
    "masks": masks,
}
