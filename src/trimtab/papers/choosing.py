"""Studies that choose settings on validation rows: compare and sweep, with figures by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.evaluation import Asked, from_answers, load_contrast, task_name
from trimtab.model import LanguageModel
from trimtab.papers.result import StudyResult, Value, contrast_of, value_of
from trimtab.sweeps import (
    Candidate,
    Sweep,
    comparison_pictures,
    default_candidate,
    sweep,
    sweep_pictures,
)
from trimtab.sweeps import compare as compare_methods


def compare(
    language_model: LanguageModel,
    methods: Sequence[str | Mapping[str, Any]],
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    data: str | None = None,
    timed: bool = False,
    seed: int = 0,
    output: Path | None = None,
    **options: Any,
) -> StudyResult:
    """`trimtab.compare` with methods as a recipe writes them: a name, or {name, method, space,
    fixed}, whose space is by default that of the method's paper."""
    found = compare_methods(
        language_model,
        [_candidate(language_model, one) for one in methods],
        task,
        contrast=contrast_of(contrast, data),
        data=data,
        timed=timed,
        seed=seed,
        output=output,
        **{"max_cost": None, **options},  # papers set no limit
    )
    values = {"unsteered": value_of(found.unsteered["test"])}
    values |= {row.name: value_of(row.test) for row in found.rows if row.test is not None}
    asked = () if found.prompts is None else found.prompts.rows
    values |= {row.name: value_of(row.test) for row in asked if row.test is not None}
    pictures = comparison_pictures(found)
    return StudyResult(found.as_json(), values, found.tables(), pictures, found.notes)


def _candidate(language_model: LanguageModel, one: str | Mapping[str, Any]) -> str | Candidate:
    if isinstance(one, str):
        return one
    given = one["method"], one.get("fixed", {}), one.get("name", "")
    if "space" not in one:
        return default_candidate(language_model, *given)
    return Candidate(given[0], one["space"], *given[1:])


def sweep_of(
    language_model: LanguageModel,
    method: str,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    nearest: int | None = None,
    data: str | None = None,
    seed: int = 0,
    output: Path | None = None,
    **options: Any,
) -> StudyResult:
    """`trimtab.sweep`; `nearest` fits on so many right answers of the task's train rows, each
    against the nearest wrong one (AUSteer, appendix B.1)."""
    source = contrast_of(contrast, data)
    if nearest is not None:
        source = _nearest_wrong(task_name(task), nearest, data)
    found = sweep(
        language_model,
        method,
        task,
        contrast=source,
        data=data,
        seed=seed,
        output=output,
        # Papers set no limit, and sweep to choose; prompts stand beside methods that are compared.
        **{"max_cost": None, "baselines": False, **options},
    )
    return StudyResult(
        found.as_json(), _sweep_values(found), found.tables()[:1], sweep_pictures(found),
        found.notes,
    )  # fmt: skip


def _nearest_wrong(task: str, most: int, data: str | None) -> Contrast:
    """Right answers of a task's train rows, each against the most similar other one."""
    pairs = load_contrast(f"task:{task}", data=data).train.pairs[:most]
    rows = [(pair.prompt, pair.positive) for pair in pairs]
    return from_answers(rows, wrong="similar", name=f"{task}, nearest wrong answers")


def _sweep_values(found: Sweep) -> dict[str, Value]:
    values = {"unsteered": value_of(found.unsteered["test"])}
    best = found.best
    if best is not None:
        values[found.method] = Value(best.test, best.test_ci95, best.test_n, True)
        values |= {name: Value(_plain(value)) for name, value in best.params.items()}
    if found.oracle is not None:
        oracle = found.oracle
        values["oracle"] = Value(oracle.test, oracle.test_ci95, oracle.test_n, True)
        values |= {f"{name}, oracle": Value(_plain(value)) for name, value in oracle.params.items()}
    return values


def _plain(value: Any) -> float | str:
    return value if isinstance(value, int | float) else str(value)
