"""What came of a wish: the steering that was chosen, what it gains and costs beside just asking,
and why there is none where nothing works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.evaluation import samples_table
from trimtab.figures import Difference, Estimate
from trimtab.reports import Presented, Table, cell, difference_cell, number_cell, number_text
from trimtab.steering import Steering
from trimtab.wishes.asking import Asked, Written
from trimtab.wishes.choosing import Row, Tried
from trimtab.wishes.holding import Held

#: What is shown of the samples in a table.
_SAMPLES = 4


@dataclass(frozen=True)
class Tested:
    """What a steering, a prompt, or both gain on the pairs that nothing was chosen on, what plain
    text costs, and what changes per generated token (KL, where it could be measured). `prefers` is
    for how many pairs the positive side is more probable."""

    gain: Difference
    cost: Estimate
    prefers: Estimate
    kl: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "gain": self.gain.difference,
            "gain_ci95": self.gain.ci95,
            "n": self.gain.n,
            "p": self.gain.p,
            "cost": self.cost.value,
            "cost_ci95": self.cost.ci95,
            "prefers": self.prefers.value,
            "prefers_ci95": self.prefers.ci95,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Chosen:
    """The setting that was chosen, by name, and its steering, which stands on the chosen dial."""

    row: Row
    dial: float
    steering: Steering
    tested: Tested
    validation: Estimate

    def as_json(self) -> dict[str, Any]:
        chosen_on = {"gain": self.validation.value, "gain_ci95": self.validation.ci95}
        return {
            "method": self.row.method,
            "params": self.row.params,
            "dial": self.dial,
            **self.tested.as_json(),
            "validation": {**chosen_on, "n": self.validation.n},
        }


@dataclass(frozen=True)
class Baseline:
    """The best prompt: as it was chosen, and on the test rows where these were looked at; `against`
    is what it gains more than the steering there."""

    asked: Asked
    tested: Tested | None = None
    against: Difference | None = None

    @property
    def verdict(self) -> str:
        """One sentence: whether just asking is better."""
        if self.against is None or self.tested is None:
            return ""
        said = f"{number_text(abs(self.against.difference))} nats"
        low, high = self.against.ci95
        cost = f"{number_text(self.tested.cost.value, '+')} nats per token of plain text"
        if low > 0:
            return f"Just asking ({self.asked.said}) does more: by {said}, for {cost}."
        if high < 0:
            return f"It does {said} more than just asking ({self.asked.said}), which costs {cost}."
        return f"Just asking ({self.asked.said}) does about as much, for {cost}."

    def as_json(self) -> dict[str, Any]:
        on = "validation" if self.tested is None else "test"
        figures = {} if self.tested is None else self.tested.as_json()
        better = self.against is not None and self.against.ci95[0] > 0
        against = None if self.against is None else self.against.as_json()
        own = {"part": on, "better": better, "against_steering": against}
        return {**self.asked.as_json(), **figures, **own, "says": self.verdict}


@dataclass(frozen=True, repr=False)
class Made(Presented):
    """What came of a wish.

    `chosen` is None where nothing works: `why` says why, `advice` what to try. `unsteered` is by
    how many nats the positive side is ahead in the model as it is, on the validation rows, and how
    often it is the more probable one. `reviewed` is false where only the contrast was made, for
    somebody to look at it. `plan` is what was planned, `left_out` what there was no time for,
    `taken` how much of a contrast that was given is used, if not all; `held` is whether answers to
    validation prompts hold together; `files` are in the directory, if there is one.
    """

    wish: str
    contrast: Contrast | None
    model: Mapping[str, Any]
    max_cost: float
    seconds: float
    chosen: Chosen | None = None
    baseline: Baseline | None = None
    together: Tested | None = None
    rows: tuple[Row, ...] = ()
    tried: tuple[Tried, ...] = ()
    front: tuple[Tried, ...] = ()
    asked: tuple[Asked, ...] = ()
    written: Written = Written((), {})
    unsteered: Mapping[str, float] = field(default_factory=dict)
    why: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    taken: str = ""
    held: Held | None = None
    plan: tuple[Mapping[str, Any], ...] = ()
    reviewed: bool = True
    files: tuple[str, ...] = ()

    @property
    def steering(self) -> Steering | None:
        """The steering that was chosen, on its dial."""
        return None if self.chosen is None else self.chosen.steering

    @property
    def called(self) -> str:
        """The wish, or what the contrast is about."""
        named = "" if self.contrast is None else self.contrast.behaviour or self.contrast.name
        return self.wish or named

    @property
    def summary(self) -> str:
        """One sentence: what was chosen, what it gains and costs; or that nothing works."""
        if not self.reviewed:
            return f"The contrast for {self.called!r} is there to be looked at; nothing is fitted."
        if self.chosen is None:
            return f"Nothing works for {self.called!r}: {self.why[0]}."
        tested = self.chosen.tested
        gain, cost = tested.gain, tested.cost
        name = self.chosen.row.name
        return (
            f"{name} at {self.chosen.steering.dial.name} {number_text(self.chosen.dial)} brings "
            f"the wished-for answer {number_text(gain.difference)} nats further ahead "
            f"[{number_text(gain.ci95[0])}, {number_text(gain.ci95[1])}], n = {gain.n} test pairs, "
            f"for {number_text(cost.value, '+')} nats per token of plain text (limit "
            f"{self.max_cost:g})."
        )

    def notes(self) -> list[str]:
        """What a reader must know, in sentences."""
        said = [self.baseline.verdict] if self.baseline and self.baseline.verdict else []
        said += [f"{self.taken}."[0].upper() + f"{self.taken}."[1:]] if self.taken else []
        if self.held is not None:
            apart = (
                ""
                if self.held.holds
                else "Its answers fall apart, and so do those of what came next: "
            )
            said.append(f"{apart}{self.held} (validation prompts).")
        said += [*self.why, *self.advice]
        return said + [f"Left out for lack of time: {one}." for one in self.left_out]

    def tables(self) -> list[Table]:
        """What was chosen beside asking, the front, every method, what it writes."""
        tables = []
        if self.chosen is not None:
            tables.append(self._beside(self.chosen))
        if self.front:
            tables.append(self._front())
        if self.asked:
            tables.append(self._asked())
        if self.rows:
            tables.append(self._methods())
        if self.written.samples:
            tables.append(samples_table(self.written.samples[:_SAMPLES]))
        return tables

    def _beside(self, chosen: Chosen) -> Table:
        named: dict[str, tuple[str, Tested | None]] = {
            "steered": (f"{chosen.row.name}, dial {number_text(chosen.dial)}", chosen.tested)
        }
        if self.baseline is not None:
            named["asked"] = (self.baseline.asked.said, self.baseline.tested)
        if self.together is not None:
            named["both"] = ("", self.together)
        rows = []
        for name, (what, tested) in named.items():
            if tested is None:
                continue
            fits, held = self.written.fits.get(name), self.written.held.get(name)
            apart = "" if held is None else f"{held.steered} of {held.n}"
            kl = "" if tested.kl is None else number_cell(tested.kl["mean"], ".3f")
            rows.append([
                name, what, difference_cell(tested.gain), cell(tested.cost),
                kl, cell(tested.prefers, "accuracy"), cell(fits), apart,
            ])  # fmt: skip
        n, often = chosen.tested.gain.n, 100 * self.unsteered.get("prefers", 0.0)
        heads = [
            "", "what", "gain, nats per pair", "cost, nats/token", "KL per generated token",
            "wished-for side more probable", "what it writes fits better, nats",
            "samples that repeat themselves",
        ]  # fmt: skip
        note = (
            f"On {n} test pairs that nothing was chosen on. Unsteered, the wished-for side is the "
            f"more probable one of {often:.0f} % of the validation pairs. What it writes fits "
            "better by what the model itself says of its texts."
        )
        held = self.written.held.get("steered")
        if held is not None:
            note += f" Of its samples as it is {held.unsteered} of {held.n} repeat themselves."
        return Table("Steered, asked, both", heads, rows, note).without_empty_columns(first=4)

    def _front(self) -> Table:
        rows = [
            [one.arm, number_text(one.dial), number_cell(one.cost, "+.4f"), cell(one.gain)]
            for one in self.front
        ]
        note = "No other setting that was tried on all validation rows gains as much for less."
        heads = ["method", "dial", "cost, nats/token", "gain on validation, nats per pair"]
        return Table("Gain against cost: the Pareto front", heads, rows, note)

    def _asked(self) -> Table:
        rows = [
            [one.name, one.said, cell(one.gain), number_cell(one.cost, "+.4f")]
            for one in self.asked
        ]
        heads = ["prompt", "said", "gain on validation, nats per pair", "cost, nats/token"]
        return Table("Asking instead", heads, rows)

    def _methods(self) -> Table:
        ranked = sorted(self.rows, key=lambda row: -_gain(row))
        rows = []
        for row in ranked:
            best = row.best
            rows.append([
                row.name,
                row.state,
                "" if best is None else cell(best.gain),
                "" if best is None else best.gain.n,
                "" if best is None else number_text(best.dial),
                "" if best is None else number_cell(best.cost, "+.4f"),
                row.why,
            ])  # fmt: skip
        heads = ["method", "", "gain, nats per pair", "validation pairs", "dial", "cost", "to know"]
        note = (
            "Each at the dial that costs as much as the limit allows, on as many validation pairs "
            "as it got to: stopped are those that others left behind."
        )
        return Table("Every method that was tried", heads, rows, note).without_empty_columns(2)

    def as_json(self) -> dict[str, Any]:
        """What `trimtab make --json` prints."""
        contrast = self.contrast
        return {
            "wish": self.wish,
            "contrast": contrast
            and {"name": contrast.name, "digest": contrast.digest, "parts": contrast.sizes},
            "chosen": self.chosen and self.chosen.as_json(),
            "prompt_baseline": self.baseline and self.baseline.as_json(),
            "together": self.together and self.together.as_json(),
            "max_cost": self.max_cost,
            "why": list(self.why),
            "advice": list(self.advice),
            "front": [one.as_json() for one in self.front],
            "methods": [row.as_json() for row in self.rows],
            "prompts": [one.as_json() for one in self.asked],
            "unsteered": dict(self.unsteered),
            "written": self.written.as_json(),
            "plan": [dict(step) for step in self.plan],
            "left_out": list(self.left_out),
            "taken": self.taken,
            "held": self.held and self.held.as_json(),
            "reviewed": self.reviewed,
            "model": dict(self.model),
            "seconds": self.seconds,
            "files": list(self.files),
        }


def _gain(row: Row) -> float:
    """For the order of a table."""
    return float("-inf") if row.best is None else row.best.gain.value
