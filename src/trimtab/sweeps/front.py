"""Trade-offs: the trials that no other beats both in what they do and in what they change."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import TrimtabError
from trimtab.sweeps.result import Trial


def front(trials: Sequence[Trial], maximise: bool) -> tuple[Trial, ...]:
    """The trials that no other one equals in both value and KL and beats in one, from the least KL
    to the most; of equal ones the first."""
    sign = -1.0 if maximise else 1.0
    ordered = sorted(
        (trial.kl, sign * trial.value, trial.number, trial)
        for trial in trials
        if trial.state == "complete" and trial.value is not None and trial.kl is not None
    )
    found: list[tuple[float, Trial]] = []
    for _, value, _, trial in ordered:
        if not found or value < found[-1][0]:  # it changes no less than those before
            found.append((value, trial))
    return tuple(trial for _, trial in found)


def picked(trials: Sequence[Trial], number: int) -> Trial:
    """The complete trial of a number."""
    for trial in trials:
        if trial.number == number and trial.state == "complete":
            return trial
    raise TrimtabError(f"there is no complete trial {number} to pick: take a number of the front")


def is_within(trial: Trial, kl: float, cost: float | None) -> bool:
    """Whether a trial moves neutral texts by so many nats per token at most, and plain text costs
    no more (None: no limit)."""
    cheap = cost is None or trial.cost is None or trial.cost <= cost
    return trial.kl is not None and trial.kl <= kl and cheap
