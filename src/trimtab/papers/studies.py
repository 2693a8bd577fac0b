"""Studies that recipes name: functions of a model and plain arguments, each of which
gives a `StudyResult`.

Those of `analyses.py` are taken as they are there; the others are in the files beside this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.papers.analyses import ANALYSES
from trimtab.papers.choosing import compare, sweep_of
from trimtab.papers.detection import detection
from trimtab.papers.effects import cost, harness, incoherence, sheet
from trimtab.papers.facts import footprint, overview, prompts, sizes
from trimtab.papers.layer_curves import layer_curves
from trimtab.papers.recipe import described
from trimtab.papers.result import StudyResult, Value, contrast_of
from trimtab.papers.steering_table import steering_table
from trimtab.papers.strength.curves import curves
from trimtab.papers.strength.one_layer import one_layer
from trimtab.papers.strength.theory import theory
from trimtab.reports import Run

Study = Callable[..., Any]

STUDIES: dict[str, Study] = {
    "compare": compare,
    "sweep": sweep_of,
    "curves": curves,
    "one-layer": one_layer,
    "theory": theory,
    "sizes": sizes,
    "prompts": prompts,
    "footprint": footprint,
    "overview": overview,
    "cost": cost,
    "coherence": incoherence,
    "harness": harness,
    "sheet": sheet,
    "detection": detection,
    "steering-table": steering_table,
    "layer-curves": layer_curves,
}
#: Those that no model takes part in.
WITHOUT_MODEL = frozenset(("theory", "sizes", "prompts"))

__all__ = ["STUDIES", "WITHOUT_MODEL", "Study", "StudyResult", "Value", "find_study", "run_study"]


def find_study(name: str) -> Study:
    """A study by its name: one of ours, or an analysis."""
    if name in STUDIES:
        return STUDIES[name]
    if name not in ANALYSES:
        known = ", ".join([*STUDIES, *ANALYSES])
        raise TrimtabError(f"unknown study {name!r}: known are {known}")
    found: Study = ANALYSES[name]
    return found


def run_study(
    name: str, language_model: LanguageModel | None, args: Mapping[str, Any], **shared: Any
) -> StudyResult:
    """Run a study with its own arguments and with those of `shared` (data, seed, output) that it
    takes."""
    study = find_study(name)
    takes = inspect.signature(study).parameters
    given = {key: value for key, value in shared.items() if key in takes and key not in args}
    own = dict(args)
    if "max_cost" in takes:  # of the analyses; papers set no limit
        own.setdefault("max_cost", None)
    if "run" in takes:  # an analysis that keeps what it has done
        assert language_model is not None
        model = language_model.described
        config = {"study": name, "args": described(own), "seed": shared.get("seed"), "model": model}
        given["run"] = Run(shared.get("output"), config)
    if name not in STUDIES:
        own = _with_contrasts(own, shared.get("data"))
    result: StudyResult = study(language_model, **own, **given)
    return result


def _with_contrasts(args: dict[str, Any], data: str | None) -> dict[str, Any]:
    """The arguments of an analysis, its contrasts read."""
    if "contrast" in args:
        args["contrast"] = contrast_of(args["contrast"], data)
    if "contrasts" in args:
        args["contrasts"] = {
            name: contrast_of(source, data) for name, source in args["contrasts"].items()
        }
    return args
