"""A steering over its dial by every measure that is asked for: next tokens, cost, concept, task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import evaluate
from trimtab.model import LanguageModel
from trimtab.options import Bounds, Sampling, Tracing
from trimtab.steering import Steering
from trimtab.strength.concept import ConceptJudge, concept_curve
from trimtab.strength.costs import cost_curve
from trimtab.strength.curves import curve
from trimtab.strength.pictures import Accuracy, Curves
from trimtab.strength.reading import read
from trimtab.strength.samples import Sample, TextsAsked, samples


@dataclass(frozen=True)
class CostAsked:
    """The cross-entropy of `tokens` tokens of texts at some dials."""

    texts: Sequence[str]
    dials: Sequence[float]
    tokens: int


@dataclass(frozen=True)
class ConceptAsked:
    """How often completions of prompts show a concept at some dials, as the judge says."""

    judge: ConceptJudge
    prompts: Sequence[Any]
    dials: Sequence[float]
    samples: int
    sampling: Sampling
    any_of: bool = False


@dataclass(frozen=True)
class TaskAsked:
    """The first metric of a task at some dials, on the first `limit` examples."""

    task: str
    dials: Sequence[float]
    limit: int | None = None
    data: str | None = None


@dataclass(frozen=True)
class Beside:
    """What is measured beside the next token."""

    cost: CostAsked | None = None
    concept: ConceptAsked | None = None
    task: TaskAsked | None = None
    texts: TextsAsked | None = None


@dataclass(frozen=True)
class Refits:
    """Steerings fitted on resampled contrasts, for error bars; and the contrast, for log-odds."""

    resamples: Sequence[Steering] = ()
    contrast: Contrast | None = None


def follow(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    name: str,
    *,
    tracing: Tracing = Tracing(),
    bounds: Bounds = Bounds(),
    beside: Beside = Beside(),
    refits: Refits = Refits(),
    chat: bool | None = None,
    force: bool = False,
) -> Curves:
    """All curves of one steering, and what they say, under a name for pictures."""
    cost = concept = accuracy = None
    if beside.task is not None:  # first, because it finds out whether there is such a task
        accuracy = _accuracy(language_model, steering, beside.task, force)
    tokens = curve(
        language_model,
        steering,
        prompts,
        tracing=tracing,
        bounds=bounds,
        chat=chat,
        resamples=refits.resamples,
        contrast=refits.contrast,
        force=force,
    )
    if beside.cost is not None:
        texts, dials, most = beside.cost.texts, beside.cost.dials, beside.cost.tokens
        cost = cost_curve(language_model, steering, texts, dials, limit_tokens=most, force=force)
    if beside.concept is not None:
        asked = beside.concept
        concept = concept_curve(
            language_model,
            steering,
            asked.prompts,
            asked.judge,
            asked.dials,
            samples=asked.samples,
            sampling=asked.sampling,
            any_of=asked.any_of,
            chat=chat,
            force=force,
        )
    reading = read(tokens, cost, concept, bounds)
    written: tuple[Sample, ...] = ()
    if beside.texts is not None:
        spot, texts_asked = reading.sweet_spot, beside.texts
        written = samples(
            language_model, steering, prompts, spot, texts_asked, chat=chat, force=force
        )
    return Curves(name, reading, tokens, cost, concept, accuracy, written)


def spaced(low: float, high: float, points: int) -> list[float]:
    """Evenly spaced dials, and 0 where it lies between them."""
    if points < 2:
        raise TrimtabError(f"a curve needs 2 points or more, not {points}")
    dials = [low + (high - low) * i / (points - 1) for i in range(points)]
    near = 1e-9 * (high - low)
    inner = [dial for dial in dials if abs(dial) > near]
    return sorted([*inner, 0.0]) if low <= 0 <= high else dials


def _accuracy(
    language_model: LanguageModel, steering: Steering, asked: TaskAsked, force: bool
) -> Accuracy:
    # Not at(), which warns of each dial that is outside the sensible range.
    alternatives = {f"{dial:.12g}": replace(steering, value=dial) for dial in asked.dials}
    done = evaluate(
        language_model,
        asked.task,
        steering=alternatives,
        data=asked.data,
        limit=asked.limit,
        force=force,
    )
    first = done.results[0]
    results = [done.value(first.task, first.metric, name).estimate for name in alternatives]
    clear = tuple(result for result in results if result is not None)
    if len(clear) < len(results):
        raise TrimtabError(f"{asked.task} gave no clear answer at one of the dials: narrow --range")
    dials = tuple(asked.dials)
    return Accuracy(first.task, first.metric, dials, clear, float(first.value or 0))


def document(curves: Curves) -> dict[str, Any]:
    """All curves of one steering as JSON."""
    parts = {
        "curve": curves.tokens,
        "cost": curves.cost,
        "concept": curves.concept,
        "accuracy": curves.accuracy,
        "reading": curves.reading,
    }
    named = {name: None if part is None else part.as_json() for name, part in parts.items()}
    written = [sample.as_json() for sample in curves.samples]
    return {"name": curves.name, **named, "samples": written}
