"""SteerMoE: send tokens to the experts that one side uses, and keep them from those of the other.

"Steering MoE LLMs via Expert (De)Activation" (2509.09660).

    RD_e = A_e^pos / T^pos - A_e^neg / T^neg

A_e is at how many of a side's T tokens expert e is among the k to which the router sends a token;
tokens are pooled over texts, and the weights of experts do not count. In each layer RD lies between
-1 and 1 and sums to 0. Two ways of using it:

    soft     z_e <- z_e + d RD_e / max|RD|        the router's logits; d in nats
    force    the `activate` experts of the largest RD > 0 are chosen for every token, and the
             `deactivate` ones of the least RD < 0 never

Soft is ours: at a router that makes weights of its logits by softmax, the odds of an expert against
another of RD 0 are multiplied by e^(d RD_e / max|RD|), so that each token keeps its own preference.
Force is the paper's: of one layer no more experts are forced on than a token goes to (the rest of
them are left alone), and never so many off that fewer remain free. The authors lay log-softmax over
the logits and put what is on at their maximum + .01, where all tie; here what is on keeps the
router's preference among itself, and routers by sigmoid, with a bias, in groups, are forced by the
scores by which they choose (see `Force`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.anatomy import CHOICE, Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Count,
    Method,
    Number,
    Pooled,
    Statistics,
    Totals,
    Want,
    new_steering,
)
from trimtab.methods.ranking import places, rank
from trimtab.model import LanguageModel
from trimtab.steering import (
    Add,
    Dial,
    Force,
    Intervention,
    Operator,
    Positions,
    Scope,
    Steering,
    chosen,
)


@dataclass(frozen=True)
class Routed:
    """Reads the scores by which a router chooses as 1 for each of the `count` that it chooses."""

    count: int

    @property
    def name(self) -> str:
        return f"routed-{self.count}"

    def __call__(self, scores: Tensor) -> Tensor:
        best = scores.topk(self.count, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, best, 1.0)


@dataclass(frozen=True)
class SteerMoE(Method):
    """SteerMoE: send tokens to the experts that one side uses, and keep them from the other's.

        z_e <- z_e + strength RD_e / max|RD|,    RD_e how much more often the positive side's
                                                 tokens go to expert e than the negative side's

    at the logits of a mixture's routers; or experts that are chosen always and never. "Steering MoE
    LLMs via Expert (De)Activation" (arXiv:2509.09660).

        >>> steering = tt.SteerMoE(strength=2).fit(lm, contrast)
        >>> forced = tt.SteerMoE(variant="force", activate=1, deactivate=1).fit(lm, contrast)
    """

    variant: Literal["soft", "force"] = field(
        default="soft",
        metadata={"help": "soft moves the router's logits, force chooses experts always or never."},
    )
    activate: Count | None = field(
        default=None,
        metadata={"help": "How many experts are furthered, of all layers (default: soft, all)."},
    )
    deactivate: Count | None = field(
        default=None, metadata={"help": "How many are held back (default: soft, all)."}
    )
    strength: Number | None = field(
        default=None,
        metadata={"help": "The dial's default, nats of soft (default: measured; of force 1)."},
    )
    token: Literal["answer", "all"] | None = field(
        default=None,
        metadata={"help": "Tokens to count: of answers, or all (default: of pairs, answers)."},
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "steermoe"
    dial = "strength"
    unmeasured = 1.0
    columns = ("layer", "score")

    def check(self) -> None:
        if self.variant == "force" and self.activate is None and self.deactivate is None:
            raise TrimtabError(
                "steermoe: say how many experts are forced: --activate, --deactivate"
            )

    @property
    def asks_for_dial(self) -> bool:
        return self.variant == "soft" and super().asks_for_dial

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"strength": (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        anatomy = language_model.anatomy
        if self.token == "answer" and not contrast.paired:
            raise TrimtabError(
                f"steermoe: {contrast.name} is unpaired, so its texts have no answers: count all "
                "tokens (--token all)"
            )
        tokens = Pooled("sum", self.token or ("answer" if contrast.paired else "all"))
        return [_counted(anatomy, site, tokens) for site in _routers(anatomy)]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        anatomy, wants = language_model.anatomy, self.wants(language_model, contrast)
        sites, widths = _routers(anatomy), [anatomy.router(s).width for s in _routers(anatomy)]
        rates = [_rates(statistics[want], want.read.count) for want in wants]
        positive, negative = (torch.cat([each[side] for each in rates]) for side in (0, 1))
        difference = positive - negative  # [experts of all layers]
        ranked = self._chosen(difference)
        site_of, expert = places(widths, ranked)
        dropped = 0
        if self.variant == "force":
            kept = _not_too_many(anatomy, sites, site_of, difference[ranked])
            dropped = int((~kept).sum())
            ranked, site_of, expert = ranked[kept], site_of[kept], expert[kept]
        interventions = []
        largest = difference.abs().max()
        for number, site in enumerate(sites):
            here = site_of == number
            if not here.any():
                continue
            score, width = difference[ranked][here], widths[number]
            operator: Operator
            if self.variant == "force":
                experts = expert[here]
                operator = Force(experts[score > 0], experts[score < 0], width)
                operator.check_chosen(site, anatomy.router(site).chosen, 1.0)
            else:
                moved = torch.zeros(width).index_copy(0, expert[here], (score / largest).float())
                operator = Add(moved)
            interventions.append(Intervention(site, operator, Scope.of(self.positions)))
        tables = {
            "layer": torch.tensor([anatomy.check(site)[0] for site in sites])[site_of],
            "expert": expert,
            "score": difference[ranked].float(),
            "r_pos": positive[ranked].float(),
            "r_neg": negative[ranked].float(),
        }
        ends = (0.0, 1.0) if self.variant == "force" else (-20.0, 20.0)
        tokens = [int(counts.sum()) // wants[0].read.count for counts in statistics[wants[0]].both]
        findings = {
            "tokens": dict(zip(("positive", "negative"), tokens, strict=True)),
            **({"dropped": dropped} if dropped else {}),
        }
        dial = Dial("strength", self.at_default, ends)
        return new_steering(self, language_model, contrast, interventions, dial, tables, findings)

    def _chosen(self, difference: Tensor) -> Tensor:
        """The experts that are furthered or held back, the surest first."""
        order = rank(difference.abs())
        forced = 0 if self.variant == "force" else len(order)
        kept = []
        for sign, asked in ((1, self.activate), (-1, self.deactivate)):
            of = order[sign * difference[order] > 0]
            if asked is not None and asked > len(of):
                what, side = ("", "positive") if sign > 0 else ("de", "negative")
                raise TrimtabError(
                    f"steermoe: {what}activate is {asked}, and {len(of)} of {len(order)} experts "
                    f"are used more on the {side} side"
                )
            kept.append(of[: forced if asked is None else asked])
        together = torch.cat(kept)
        if (
            self.variant == "soft"
            and not len(together)
            and (self.activate, self.deactivate) == (None, None)
        ):
            raise TrimtabError("steermoe: both sides use every expert alike: nothing to steer")
        return together[rank(difference[together].abs())]

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        records = chosen(steering, cls.columns)["experts"]
        if not records:
            return ["SteerMoE with no expert: nothing is changed."]
        tokens, dial = steering.findings["tokens"], steering.dial.name
        up = sum(record["score"] > 0 for record in records)
        layers = len({record["layer"] for record in records})
        where = f"{layers} layer{'s' if layers > 1 else ''}"
        best = records[0]
        if steering.hyperparameters["variant"] == "force":
            does = (
                f"SteerMoE forces {up} experts on and {len(records) - up} off, in {where}: every "
                "token goes to the first and none to the others."
            )
            dropped = steering.findings.get("dropped")
            if dropped:
                does += f" {dropped} more to force on were too many for their layers."
        else:
            does = (
                f"SteerMoE moves the routers' logits of {len(records)} experts in {where}, up "
                "where the positive side uses one more and down where the negative side does: by "
                f"{dial} nats where they differ most."
            )
        return [
            does,
            f"Most of all expert {best['expert']} of layer {best['layer']}: the positive side uses "
            f"it at {100 * best['r_pos']:.0f} % of {tokens['positive']} tokens, the negative side "
            f"at {100 * best['r_neg']:.0f} % of {tokens['negative']}.",
        ]


def _routers(anatomy: Anatomy) -> list[str]:
    """The sites of all routers."""
    if not anatomy.has("router"):
        raise TrimtabError(
            f"steermoe is for mixtures of experts: {anatomy.name} has no router "
            f"({anatomy.missing(0, 'router')})"
        )
    return anatomy.sites("router")


def _counted(anatomy: Anatomy, site: str, tokens: Pooled) -> Want:
    """At how many tokens each expert of a router is chosen."""
    choice = site.removesuffix("router") + CHOICE
    return Want(choice, tokens, Totals, read=Routed(anatomy.router(site).chosen))


def _rates(totals: Totals, chosen_of_each: int) -> tuple[Tensor, Tensor]:
    """At which share of each side's tokens every expert is chosen, [experts] each: each token goes
    to as many."""
    positive, negative = (
        counts / (counts.sum() / chosen_of_each).clamp(min=1) for counts in totals.both
    )
    return positive, negative


def _not_too_many(anatomy: Anatomy, sites: Sequence[str], site_of: Tensor, score: Tensor) -> Tensor:
    """Which of the ranked experts stay: in each layer no more are on than a token goes to."""
    kept = torch.ones(len(score), dtype=torch.bool)
    for number, site in enumerate(sites):
        here = (site_of == number) & (score > 0)
        kept[here.nonzero()[anatomy.router(site).chosen :, 0]] = False
    return kept
