"""The dial that a budget allows: how far a steering can be turned before it changes what the model
expects next by more than so many nats.

The measure is KL(unsteered || steered) of the next token's distribution after a prompt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from trimtab.contrasts import Prompt, as_messages, last_message
from trimtab.dials.solving import Side, Solution, check_budgets, solve
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.figures import Estimate
from trimtab.files import json_digest
from trimtab.model import ImageText, LanguageModel, check_model
from trimtab.reports import Presented, Table, number_text
from trimtab.steering import Calibration, Steering

#: The budgets of a calibration, in nats.
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class PromptBudget:
    """The dial of one prompt, and the KL in nats that was measured there.

    `reached` is false where even the end of the range costs less than the budget: the dial is then
    that end. Where KL jumps past the budget (experts that are routed anew, the rounding of
    bfloat16) `kl` is less too, and the dial the last one that keeps to it. `in_range` is false
    where the dial is outside the steering's sensible range, which happens only on request.
    """

    prompt: Prompt
    dial: float
    kl: float
    reached: bool = True
    in_range: bool = True


@dataclass(frozen=True, repr=False)
class Budget(Presented):
    """The dials at which a budget of `kl` nats is used up, on one side of the dial.

    `dial` is the median over prompts; at `worst5_dial` 95 % of the prompts stay within the budget.
    `other` is the other side, where it was asked for and the dial has one.
    """

    kl: float
    dial: float
    worst5_dial: float
    per_prompt: tuple[PromptBudget, ...]
    other: Budget | None = None

    @property
    def unreached(self) -> int:
        """How many prompts do not use up the budget within the range."""
        return sum(not found.reached for found in self.per_prompt)

    @property
    def summary(self) -> str:
        """One sentence: how far the dial may be turned."""
        said = [self._allowed()] if self.other is None else [self._allowed(), self.other._allowed()]
        n = len(self.per_prompt)
        ends = sum(one.unreached for one in (self, self.other) if one is not None)
        more = f"; {ends} prompts do not use it up before the dial ends" if ends else ""
        return f"A budget of {self.kl:g} nats allows {', and '.join(said)} (n = {n}){more}."

    def _allowed(self) -> str:
        return (
            f"a dial of {number_text(self.dial)} for half of the prompts and "
            f"{number_text(self.worst5_dial)} for 95 % of them"
        )

    def tables(self) -> list[Table]:
        """The dial of each prompt, and the KL there; a table for each side of the dial."""
        tables = [] if self.other is None else self.other.tables()
        rows = [
            [_start_of(one.prompt), number_text(one.dial), number_text(one.kl), _to_know(one)]
            for one in self.per_prompt
        ]
        side = "negative" if self.dial < 0 else "positive"
        table = Table(
            f"Dials of {self.kl:g} nats, {side} side",
            ["prompt", "dial", "KL, nats", "to know"],
            [*rows, ["half of the prompts", number_text(self.dial), "", ""],
             ["95 % of the prompts", number_text(self.worst5_dial), "", ""]],
        )  # fmt: skip
        return [table.without_empty_columns(), *tables]

    def plot(self, ax: Any = None) -> Any:
        """The dial of each prompt, and the two of all of them: on the matplotlib axes `ax` or those
        of a new figure; they are returned."""
        from trimtab.reports import DOWN, UP, Line, axes_for, forest  # loads matplotlib

        axes = axes_for(ax, (6.5, 1.2 + 0.26 * len(self.per_prompt)))
        sides = [one for one in (self, self.other) if one is not None]
        lines = []
        for one, colour in zip(sides, (UP, DOWN), strict=False):
            at = range(len(one.per_prompt))
            dials = [Estimate(p.dial, p.dial, p.dial, 1) for p in one.per_prompt]
            lines.append(Line("", list(at), dials, colour))
            axes.axvline(one.dial, color=colour, linewidth=1, label="half of the prompts")
            style = {"linestyle": ":", "label": "95 % of the prompts"}
            axes.axvline(one.worst5_dial, color=colour, linewidth=1.2, **style)
        names = [_start_of(one.prompt).replace("$", r"\$") for one in self.per_prompt]
        forest(axes, names, lines, apart=0.0, xlabel=f"dial at {self.kl:g} nats")
        axes.legend(frameon=False, fontsize=8)
        return axes

    def as_json(self) -> dict[str, Any]:
        """What `trimtab strength budget --json` prints."""
        rows = [
            {
                "prompt": as_messages(found.prompt),
                "dial": found.dial,
                "kl": found.kl,
                "reached": found.reached,
                "in_range": found.in_range,
            }
            for found in self.per_prompt
        ]
        sides = {} if self.other is None else {"negative": self.other.as_json()}
        return {
            "kl": self.kl,
            "dial": self.dial,
            "worst5_dial": self.worst5_dial,
            "per_prompt": rows,
            **sides,
        }


def _start_of(prompt: Prompt) -> str:
    """The beginning of a prompt in one line."""
    text = " ".join(last_message(prompt).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _to_know(found: PromptBudget) -> str:
    if not found.in_range:
        return "outside the sensible range"
    return "" if found.reached else "end of the dial"


def budget(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    kl: float = 0.1,
    *,
    side: Side | Literal["both"] = "both",
    chat: bool | None = None,
    beyond_range: bool = False,
    force: bool = False,
) -> Budget:
    """The dial at which KL(unsteered || steered) of the next token's distribution reaches `kl`
    nats, for each prompt and for all of them.

    `side` is the positive or the negative dial, or both: the negative one is then `.other`, and
    a dial without a negative side has none. `chat` puts prompts through the chat template (default:
    where the model has one). `beyond_range` looks up to a hundred times further than the dial's
    sensible range. KL need not rise with the dial (a rotation's falls again): the dial is one at
    which it equals the budget, as a rule the first. Refused for steerings that do nothing at no
    dial (SAS, AAS).
    """
    (found,) = all_budgets(
        language_model,
        steering,
        prompts,
        [kl],
        side=side,
        chat=chat,
        beyond_range=beyond_range,
        force=force,
    )
    return found


def all_budgets(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    kl: Sequence[float],
    *,
    side: Side | Literal["both"] = "both",
    chat: bool | None = None,
    beyond_range: bool = False,
    force: bool = False,
) -> list[Budget]:
    """`budget` for several budgets, which are searched for together."""
    check_budgets(kl)
    wanted, encoded = _encoded(language_model, prompts, chat)
    per_side = solve(language_model, steering, encoded, kl, side, beyond_range, force)
    found = []
    for i, nats in enumerate(kl):
        sides: dict[Side, Budget] = {}
        for one, solutions in per_side.items():
            reached = [solution[i] for solution in solutions]
            rows = tuple(
                _prompt_budget(steering, prompt, solution)
                for prompt, solution in zip(wanted, reached, strict=True)
            )
            median, worst = _of_set([row.dial for row in rows])
            sides[one] = Budget(nats, median, worst, rows)
            _warn_unreached(reached, steering, nats)
        first = sides.get("positive") or sides["negative"]
        found.append(replace(first, other=sides["negative"]) if len(sides) > 1 else first)
    return found


def _prompt_budget(steering: Steering, prompt: Prompt, solution: Solution) -> PromptBudget:
    low, high = steering.dial.range
    inside = low <= solution.dial <= high
    return PromptBudget(prompt, solution.dial, solution.kl, solution.reached, inside)


def _of_set(dials: Sequence[float]) -> tuple[float, float]:
    """Median, and the dial that no more than 5 % of the prompts bear less than."""
    sizes = np.abs(dials)
    worst = float(np.quantile(sizes, 0.05, method="lower"))
    return float(np.median(dials)), math.copysign(worst, dials[0])


def calibrate(
    language_model: LanguageModel,
    steering: Steering,
    prompts: Sequence[Any],
    kl: Sequence[float] = BUDGETS,
    *,
    chat: bool | None = None,
    force: bool = False,
) -> Steering:
    """The same steering, with the dials of some budgets written into it: `steering.at(kl=0.1)`.

    A budget that less than half of the prompts use up within the dial's range has no median dial.
    """
    budgets = sorted({float(one) for one in kl})
    check_budgets(budgets)
    _, encoded = _encoded(language_model, prompts, chat)
    per_side = solve(language_model, steering, encoded, budgets, "both", False, force)
    return replace(steering, calibration=calibration(budgets, encoded, per_side))


def calibration(
    budgets: Sequence[float],
    texts: Sequence[Sequence[int]],
    per_side: Mapping[Side, Sequence[Sequence[Solution]]],
) -> Calibration:
    """What the solutions of some texts (token ids) say of budgets that rise."""
    columns: dict[str, tuple[float | None, ...]] = {}
    for side, solutions in per_side.items():
        dials, worst = [], []
        for i in range(len(budgets)):
            reached = [solution[i].reached for solution in solutions]
            median, lowest = _of_set([solution[i].dial for solution in solutions])
            dials.append(median if sum(reached) * 2 > len(reached) else None)
            worst.append(lowest if sum(reached) >= 0.05 * len(reached) else None)
        columns |= {side: tuple(dials), f"{side}_worst5": tuple(worst)}
    seen = [text.digests for text in texts if isinstance(text, ImageText)]
    digest = json_digest([*map(list, texts), *seen], separators=(",", ":"))
    return Calibration.rising(budgets, len(texts), digest, **columns)


def _encoded(
    language_model: LanguageModel, prompts: Sequence[Any], chat: bool | None
) -> tuple[list[Prompt], list[Sequence[int]]]:
    check_model(language_model)
    wanted = language_model.prompts(prompts, chat)
    if not wanted:
        raise TrimtabError("there is no prompt to keep a budget on")
    return wanted, language_model.fitting(wanted)


def dials_for(
    language_model: LanguageModel,
    steering: Steering,
    texts: Sequence[Sequence[int]],
    kl: float,
    force: bool = False,
) -> list[float]:
    """The dial of each text (token ids), on the side of the dial on which the steering stands."""
    check_budgets([kl])
    side: Side = "negative" if steering.setting < 0 else "positive"
    found = solve(language_model, steering, texts, [kl], side, force=force)[side]
    _warn_unreached([solution[0] for solution in found], steering, kl)
    return [solution[0].dial for solution in found]


def _warn_unreached(solutions: Sequence[Solution], steering: Steering, kl: float) -> None:
    ends = sorted({solution.dial for solution in solutions if not solution.reached}, key=abs)
    if ends:
        count = sum(not solution.reached for solution in solutions)
        warnings.warn(
            f"{count} of {len(solutions)} prompts cost less than {kl:g} nats as far as the dial "
            f"goes: their dial is its end, {ends[-1]:g}{steering.dial.unit}",
            TrimtabWarning,
            stacklevel=3,
        )
