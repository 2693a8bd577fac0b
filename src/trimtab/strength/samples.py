"""What a steered model writes at a few dials, beside what it writes unsteered: curves in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trimtab.dials import idle_dial
from trimtab.model import LanguageModel
from trimtab.steering import Steering
from trimtab.strength.reading import SweetSpot


@dataclass(frozen=True)
class TextsAsked:
    """Greedy completions of the first `prompts` prompts, `max_new_tokens` tokens long."""

    prompts: int = 2
    max_new_tokens: int = 40


@dataclass(frozen=True)
class Sample:
    """One completion: at which dial (None: unsteered), and what that dial is."""

    prompt: Any
    dial: float | None
    place: str
    text: str

    def as_json(self) -> dict[str, Any]:
        """For `trimtab strength curve --json`."""
        return asdict(self)


def samples(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    spot: SweetSpot | None,
    asked: TextsAsked,
    *,
    chat: bool | None = None,
    force: bool = False,
) -> tuple[Sample, ...]:
    """Completions of prompts, unsteered and at the dials that `told_dials` names."""
    dials: dict[str, float | None] = {"unsteered": None, **told_dials(steering, spot)}
    rows = [(prompt, *each) for prompt in prompts[: asked.prompts] for each in dials.items()]
    if not rows:
        return ()
    written = language_model.generate(
        [prompt for prompt, _, _ in rows],
        # Not at(), which warns of each dial that is outside the sensible range.
        steering=[None if dial is None else replace(steering, value=dial) for *_, dial in rows],
        chat=chat,
        force=force,
        max_new_tokens=asked.max_new_tokens,
    )
    return tuple(
        Sample(prompt, dial, place, one.text)
        for (prompt, place, dial), one in zip(rows, written, strict=True)
    )


def told_dials(steering: Steering, spot: SweetSpot | None) -> dict[str, float]:
    """Dials by what they are: the end of the sweet spot and half of the way there; without a sweet
    spot the same of the dial as it stands."""
    idle = idle_dial(steering)
    end, name = steering.setting, "where the dial stands"
    if spot is not None:
        end, name = spot.best, "the end of the sweet spot"
    if idle is None or idle == end:
        return {name: end}
    return {f"half way to {name}": (idle + end) / 2, name: end}
