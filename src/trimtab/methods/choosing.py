"""Which units a steering by effect scales, and by how much.

The simplest choice takes the k units of the best scores, as they are at a dial of 0 and each for
itself. Three things can be better, for more passes over the texts:

    average      effects are the mean over 0, half and all of the strength, with the units scaled
                 together that were chosen at 0; then units are chosen anew. Effects change on the
                 way to a large strength, and the mean is nearer to what is gained there. Of those
                 that are chosen the effect is measured once more on their own way.
    blocks       a few units are chosen at a time, and the effects of all others are measured again
                 with these scaled: so units that do the same are not all taken, and units that work
                 only after others are found. One at a time is the greedy choice.
    fisher       gamma = F^-1 e for the chosen units, with the effects e and the full Fisher
                 information F of these units (their products on plain text, not only squares)
                 plus a tenth of all units' mean square on its diagonal: of all gammas that
                 are predicted to cost the same, those that gain most.

The strength is alpha, or where that was not given the one at which the steering of the simplest
choice is predicted to cost `BUDGET` nats per token of plain text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.fitting import Effect, Effects, Want, collect
from trimtab.methods.effects import RIDGE, Scoring, effects_and_errors
from trimtab.methods.ranking import Scores, places
from trimtab.methods.verifying import CANDIDATES, Verification, verification, verified
from trimtab.model import LanguageModel
from trimtab.steering import Dial, Intervention, Steering

#: How much effects at 0, half and all of the strength count: where units are ranked, and where a
#: gain is predicted, which is their integral over the way (Simpson's rule).
_EQUALLY, _SIMPSON = (1 / 3, 1 / 3, 1 / 3), (1 / 6, 4 / 6, 1 / 6)
#: How many units are chosen at a time where nothing else is said.
BLOCK = 8
#: How near to 0 the factor of a unit may come where its effect is read, and by how much the dial is
#: moved there: from a unit that is 0, nothing can be read.
_NEAR, _MOVED = 1e-3, 1.01

#: Effects, scores and gains of all units with some of them scaled, whose indices and gammas these
#: are; and scores that were measured by scaling candidates, with some units scaled meanwhile.
Again = Callable[[Scores, Tensor], Scores]
Narrow = Callable[[Scores, Tensor, Tensor], Scores]


@dataclass(frozen=True)
class Ways:
    """How units by effect are chosen beyond their scores: `verify` is a number of pairs, `block` a
    number of units."""

    verify: int
    average: bool
    interaction: Literal["none", "blocks", "fisher"]
    block: int | None

    @property
    def simplest(self) -> bool:
        return not (self.verify or self.average) and self.interaction == "none"

    def check(self, alpha: float | None, k: int | str, choose: str, positions: str) -> None:
        """Refuse what does not go together."""
        asked = {
            "verify": self.verify > 0,
            "average": self.average,
            f"interaction {self.interaction}": self.interaction != "none",
        }
        named = [name for name, wanted in asked.items() if wanted]
        if not named:
            return
        if k == "all" or choose == "least":
            raise TrimtabError(
                f"austeer: {named[0]} chooses among units: give k a number, and leave choose out"
            )
        if alpha is not None and alpha <= 0:
            raise TrimtabError(
                f"austeer: {named[0]} looks at units at the strength alpha, which must be above 0, "
                f"not {alpha:g}"
            )
        if self.verify == 1:
            raise TrimtabError("austeer: verify is a number of pairs: 2 or more, or 0 for none")
        again = [name for name in named if name in ("average", "interaction blocks")]
        if again and positions != "all":
            raise TrimtabError(
                f"austeer: {again[0]} measures effects where every token is steered: leave "
                "positions out"
            )
        if self.average and self.interaction == "blocks":
            raise TrimtabError(
                "austeer: average chooses anew once, interaction blocks again and again: take one"
            )


@dataclass(frozen=True)
class Choice:
    """The units that are scaled, by their indices in rank order, what is known of all units, and
    what is to be noted of how they were chosen."""

    found: Scores
    picked: Tensor
    findings: dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """Units scaled on the texts that a steering is fitted on, at the strength `dial`, to look at
    them again. `interventions` makes those of some units."""

    language_model: LanguageModel
    contrast: Contrast
    effect: Effect
    scoring: Scoring
    interventions: Callable[[Scores, Tensor], Sequence[Intervention]]
    clamp_sign: bool
    dial: float
    max_length: int | None = None

    def steering(self, found: Scores, picked: Tensor, share: float = 1.0) -> Steering:
        """The steering of some units at a share of the strength."""
        dial = Dial("alpha", self.dial, (-abs(self.dial), abs(self.dial)))
        acting = tuple(self.interventions(found, picked))
        own = self.language_model.identity
        return Steering("austeer", {}, acting, dial, own, value=share * self.dial)

    def gammas(self, found: Scores, picked: Tensor, share: float = 1.0) -> Tensor:
        """What is added to the factors of some units, [picked] in float64."""
        gammas = share * self.dial * found.columns["gain"][picked]
        return gammas.clamp(min=-1) if self.clamp_sign else gammas

    def again(self, found: Scores, picked: Tensor, share: float = 1.0) -> Scores:
        """Effects and scores of all units with some of them scaled; graded gains keep their size.

        What comes out of the pass is x d m / d x at a unit's activation as it is scaled, which is
        1 + gamma times the effect of changing its gamma.
        """
        factors = 1 + self.gammas(found, picked, share)
        if not self.clamp_sign and (factors.abs() < _NEAR).any():
            return self.again(found, picked, share * _MOVED)
        wants = [Want(site, self.effect, Effects) for site in found.sites]
        with self.language_model.steered(self.steering(found, picked, share)):
            gathered = collect(
                self.language_model, self.contrast, wants, max_length=self.max_length
            )
        mean, error = effects_and_errors(gathered, found.sites, self.effect)
        inverse = torch.where(factors == 0, 0.0, 1 / factors)
        mean[picked], error[picked] = mean[picked] * inverse, error[picked] * inverse.abs()
        return self.rescored(found, mean, error)

    def rescored(self, found: Scores, mean: Tensor, error: Tensor) -> Scores:
        columns = {**found.columns, "effect": mean, "error": error}
        return self.scoring(found.sites, columns, found.costs)

    def averaged(
        self, first: Scores, found: Scores, picked: Tensor, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Effects over the way to the strength with some units scaled together, and their errors:
        the weighted mean of those at 0, which are `first`'s, at half and at all of the strength.
        The errors, which are those of the same texts, are averaged too."""
        passes = [first, *(self.again(found, picked, share) for share in (0.5, 1.0))]
        shares = torch.tensor(weights, dtype=torch.float64)[:, None]
        mean, error = (
            (shares * torch.stack([each.columns[name] for each in passes])).sum(0)
            for name in ("effect", "error")
        )
        return mean, error

    def narrowed(
        self, check: Verification, found: Scores, candidates: Tensor, picked: Tensor
    ) -> Scores:
        """Scores of candidates that are measured by scaling them, with those picked scaled too."""
        on = self.steering(found, picked) if len(picked) else None
        per_nat = self.scoring.locate == "effect_per_nat"
        return verified(check, found, candidates, self.gammas(found, candidates), per_nat, on)


def choose(trials: Trials, first: Scores, picked: Tensor, k: int, ways: Ways) -> Choice:
    """The units and gains that the ways lead to, from the scores at 0 and those picked by them."""
    found = first
    findings: dict[str, Any] = {"dial": trials.dial}
    if ways.average:
        found = trials.rescored(first, *trials.averaged(first, first, picked, _EQUALLY))
    narrow: Narrow | None = None
    if ways.verify:
        check = verification(
            trials.language_model, trials.contrast, ways.verify, trials.effect, trials.max_length
        )
        narrow = partial(trials.narrowed, check)
        findings["verified_on"] = check.rows
    size = (ways.block or BLOCK) if ways.interaction == "blocks" else k
    found, picked = in_blocks(found, k, size, trials.again, narrow)
    if not len(picked):
        raise TrimtabError(
            f"austeer: at a strength of {trials.dial:.3g} no unit gains anything: take a smaller "
            "alpha"
        )
    if len(picked) < k:
        warnings.warn(
            f"austeer: k is {k}, but only {len(picked)} units gain anything at a strength of "
            f"{trials.dial:.3g}: the others are left alone",
            TrimtabWarning,
            stacklevel=2,
        )
    if ways.interaction == "fisher":
        found = fisher_gains(found, picked)
    if ways.average:
        effect, error = trials.averaged(first, found, picked, _SIMPSON)
        found = found.with_columns(effect=effect, error=error)
    return Choice(found, picked, {"chosen": findings})


def in_blocks(
    first: Scores, k: int, size: int, again: Again, narrow: Narrow | None
) -> tuple[Scores, Tensor]:
    """At most k units, `size` of them at a time: those of the best scores with all that were chosen
    before scaled. Columns have of each unit what was known when it was chosen."""
    found, known, picked = first, first, torch.zeros(0, dtype=torch.long)
    while True:
        rest = found.score.index_fill(0, picked, 0.0)
        found, count = replace(found, score=rest), min(size, k - len(picked))
        if narrow is not None:
            candidates = found.best(CANDIDATES * count)
            found = narrow(found, candidates, picked) if len(candidates) else found
        best = found.best(count)
        columns = {
            name: known.columns.get(name, torch.zeros_like(rest)).index_copy(0, best, column[best])
            for name, column in found.columns.items()
        }
        known, picked = known.with_columns(**columns), torch.cat([picked, best])
        if len(picked) >= k or len(best) < count:
            return known, picked
        found = again(known, picked)


def fisher_gains(found: Scores, picked: Tensor) -> Scores:
    """The scores with gains F^-1 e for the units that were picked, the largest of which is 1."""
    widths = [cost.samples.shape[1] for cost in found.costs]
    site_of, unit_of = places(widths, picked)
    samples = torch.stack(
        [
            found.costs[site].samples[:, unit].double()
            for site, unit in zip(site_of.tolist(), unit_of.tolist(), strict=True)
        ],
        dim=1,
    )  # [samples, picked]
    fisher = samples.T @ samples / len(samples)
    fisher.diagonal().add_(RIDGE * found.columns["cost"].mean())
    gains = torch.linalg.solve(fisher, found.columns["effect"][picked])
    gains = gains / gains.abs().max()
    return found.with_columns(gain=found.columns["gain"].index_copy(0, picked, gains))


def choice_in_words(steering: Steering, units: Sequence[dict[str, Any]]) -> list[str]:
    """How the units were looked at again, where they were."""
    options, known = steering.hyperparameters, steering.findings.get("chosen")
    if not isinstance(known, dict):
        return []
    strength = f"a strength of {known['dial']:.3g}"
    lines = []
    if options.get("average"):
        lines.append(f"Their effects are the mean over none, half and all of {strength}.")
    if options.get("interaction") == "blocks":
        lines.append(
            f"They were chosen {options['block']} at a time, with those before scaled at "
            f"{strength}."
        )
    if "verified_on" in known and all("real" in unit for unit in units):
        real, foreseen = (sum(unit[name] for unit in units) for name in ("real", "predicted"))
        lines.append(
            f"Each was scaled alone on {known['verified_on']} rows at {strength}: they gained "
            f"{real:+.2f} nats in sum, where their effects say {foreseen:+.2f}."
        )
    if options.get("interaction") == "fisher":
        lines.append("gamma heeds what they cost together.")
    return lines
