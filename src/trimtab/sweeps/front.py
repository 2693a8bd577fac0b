"""Trade-offs: of all trials those that no other beats both in what they do and in what they cost,
and the one that is chosen among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.sweeps.result import Trial
from trimtab.sweeps.rows import choose


@dataclass(frozen=True)
class Limits:
    """What a chosen trial may do to other text: KL on neutral texts, and the cost of plain text, in
    nats per token (None: no limit). `pick` is the number of a trial that is chosen in any case."""

    kl: float
    cost: float | None = None
    pick: int | None = None


def front(trials: Sequence[Trial], maximise: bool) -> tuple[Trial, ...]:
    """The trials that no other one equals in both value and KL and beats in one, from the least KL
    to the most; of equal ones the first."""
    sign = -1.0 if maximise else 1.0
    ordered = sorted(_measured(trials), key=lambda t: (t.kl, sign * _value(t), t.number))
    found: list[Trial] = []
    for trial in ordered:  # each costs more than those before, so it has to do more
        if not found or sign * _value(trial) < sign * _value(found[-1]):
            found.append(trial)
    return tuple(found)


def chosen_trial(trials: Sequence[Trial], limits: Limits, maximise: bool) -> Trial | None:
    """The trial that was picked, or else the best of those within the limits."""
    measured = _measured(trials)
    if limits.pick is not None:
        picked = next((t for t in measured if t.number == limits.pick), None)
        if picked is None:
            raise TrimtabError(
                f"there is no complete trial {limits.pick} to pick: take a number of the front"
            )
        return picked
    within = [t for t in measured if is_within(t, limits)]
    return choose(sorted(within, key=lambda t: t.number), lambda t: t.value, maximise)


def is_within(trial: Trial, limits: Limits) -> bool:
    """Whether a trial keeps both limits."""
    cheap = limits.cost is None or trial.cost is None or trial.cost <= limits.cost
    return trial.kl is not None and trial.kl <= limits.kl and cheap


def _measured(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.state == "complete" and t.value is not None and t.kl is not None]


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value
