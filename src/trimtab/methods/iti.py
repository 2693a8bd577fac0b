"""ITI: move the attention heads that know which side a text is on.

"Inference-Time Intervention: Eliciting Truthful Answers from a Language Model" (Li et al.,
NeurIPS 2023).

For each head, at the last token: a logistic regression tells the two sides apart; heads are ranked
by its accuracy on held-out texts, and the K best are steered:

    x_h <- x_h + alpha sigma_h theta_h

    theta_h   unit(mean x_h^pos - mean x_h^neg), or with `direction="probe"` the probe's own
    sigma_h   standard deviation of <x_h, theta_h> over all texts; 1 with `scale=False`

`locate="effect"` is ours: it ranks heads by what adding sigma_h theta_h does to the answers, e_h
against its standard error (see first_order.py), whatever a probe can tell from them. A head of
negative effect is moved the other way, by -alpha sigma_h theta_h.

Held-out texts are a random fifth of the rows, both sides of a pair together. The authors steer the
last position of every pass, which is `positions="last"`, and publish checkpoints in which every
position is steered, which is `"all"`, the default, and can be baked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    BetweenZeroAndOne,
    Count,
    Effect,
    Method,
    Number,
    Samples,
    Statistics,
    Want,
    new_steering,
)
from trimtab.methods.effects import predicted_in_words
from trimtab.methods.first_order import (
    added_prediction,
    added_scores,
    effects_in_words,
    slope_wants,
    surest,
)
from trimtab.methods.ranking import Scores, rank
from trimtab.methods.words import counted, percent
from trimtab.model import LanguageModel
from trimtab.steering import Add, Dial, Intervention, Positions, Scope, Steering, chosen
from trimtab.terminal import progress


@dataclass(frozen=True)
class ITI(Method):
    """ITI: move the attention heads that know which side a text is on.

        x_h <- x_h + alpha sigma_h theta_h    at the k heads whose probes are most accurate

    with theta_h the direction from the negative side to the positive one and sigma_h the spread
    along it. "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model" (Li et
    al., NeurIPS 2023).

        >>> steering = tt.ITI(k=4, alpha=5).fit(lm, contrast)
        >>> steering.at(10).save("iti.safetensors", overwrite=True).name
        'iti.safetensors'
    """

    k: Count = field(default=48, metadata={"help": "How many heads to steer (K)."})
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    direction: Literal["mean", "probe"] = field(
        default="mean", metadata={"help": "theta: the mean difference, or the probe's weights."}
    )
    scale: bool = field(default=True, metadata={"help": "Multiply by sigma, the heads' spread."})
    held_out: BetweenZeroAndOne = field(
        default=0.2, metadata={"help": "Share of rows that rank the heads."}
    )
    seed: Count = field(default=0, metadata={"help": "Which rows are held out."})
    locate: Literal["accuracy", "effect"] = field(
        default="accuracy",
        metadata={
            "help": "Score of a head: accuracy of its probe, or effect (what moving it does to the "
            "answers, against its standard error)."
        },
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "iti"
    unmeasured = 15.0
    columns = ("layer", "head", "accuracy", "sigma")

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"k": (16, 32, 48, 64, 96), "alpha": (1.0, 5.0, 10.0, 15.0, 20.0)}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        anatomy = language_model.anatomy
        sites = anatomy.sites("heads")
        heads = len(sites) * anatomy.heads
        if self.k > heads:
            raise TrimtabError(f"iti: k is {self.k}, but {anatomy.name} has {heads} heads here")
        wants = [Want(site, "last", Samples) for site in sites]
        return wants + (slope_wants(sites, self._effect) if self.locate == "effect" else [])

    @property
    def _effect(self) -> Effect:
        return Effect(self.positions)

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        anatomy = language_model.anatomy
        own = ("iti", self.direction, self.scale, self.held_out, self.seed)
        accuracies, shifts, deviations = statistics.once(
            own, lambda: self._probes(anatomy, contrast.paired, statistics)
        )
        sites, columns, findings = anatomy.sites("heads"), {}, {}
        if self.locate == "effect":
            found = self._effects(language_model, statistics, shifts)
            columns, chosen = dict(found.columns), surest(self.name, "heads", found, self.k)
            shifts = [sign * shift for sign, shift in zip(columns["gain"], shifts, strict=True)]
        else:
            chosen = rank(torch.tensor(accuracies))[: self.k]  # flat over the sites' heads
        interventions = self._interventions(anatomy, chosen, shifts)
        columns |= {"accuracy": torch.tensor(accuracies), "sigma": torch.stack(deviations)}
        tables = {
            "layer": torch.tensor([anatomy.check(site)[0] for site in sites])[
                chosen // anatomy.heads
            ],
            "head": chosen % anatomy.heads,
            **{name: column[chosen].float() for name, column in columns.items()},
        }
        if self.locate == "effect" and self.positions == "all":
            findings["predicted"] = added_prediction(
                language_model, statistics, self._effect, interventions
            )
        dial = Dial("alpha", self.at_default, (-50.0, 50.0))
        return new_steering(self, language_model, contrast, interventions, dial, tables, findings)

    def _interventions(
        self, anatomy: Anatomy, chosen: Tensor, shifts: Sequence[Tensor]
    ) -> list[Intervention]:
        """What moves the chosen heads; heads of one site are equally wide, those of others may not
        be."""
        interventions = []
        for number, site in enumerate(anatomy.sites("heads")):
            here = chosen[chosen // anatomy.heads == number].tolist()
            if here:
                vector = torch.zeros(anatomy.heads, len(shifts[here[0]]), dtype=torch.float64)
                for index in here:
                    vector[index % anatomy.heads] = shifts[index]
                add = Add(vector.flatten().float())
                interventions.append(Intervention(site, add, Scope.of(self.positions)))
        return interventions

    def _effects(
        self, language_model: LanguageModel, statistics: Statistics, shifts: Sequence[Tensor]
    ) -> Scores:
        """What adding its shift to each head does."""
        heads = language_model.anatomy.heads
        vectors = {
            site: torch.block_diag(*shifts[number * heads : (number + 1) * heads])
            for number, site in enumerate(language_model.anatomy.sites("heads"))
        }
        return added_scores(language_model, statistics, self._effect, vectors)

    def _probes(
        self, anatomy: Anatomy, paired: bool, statistics: Statistics
    ) -> tuple[list[float], list[Tensor], list[Tensor]]:
        """Of each head its probe's held-out accuracy, what is added to it, and its spread."""
        sites = anatomy.sites("heads")
        accuracies: list[float] = []
        shifts: list[Tensor] = []
        deviations: list[Tensor] = []
        import_module("sklearn.linear_model")  # only of what is there threads can be limited
        # A probe is small: threads in its matrix products would cost ten times what they save.
        with progress("training probes", len(sites)) as advance, threadpool_limits(1, "blas"):
            for site in sites:
                texts, positive, rows = statistics.of(site, "last", Samples).texts()
                heads = texts.unflatten(-1, (anatomy.heads, -1))  # [texts, heads, units]
                held = self._held_out(rows, positive, paired)
                for head in heads.double().unbind(1):
                    accuracy, weights = _probe(head, positive, held)
                    mean = head[positive].mean(0) - head[~positive].mean(0)
                    theta = _unit(mean if self.direction == "mean" else weights)
                    deviation = (head @ theta).std(correction=0)
                    accuracies.append(accuracy)
                    shifts.append(deviation * theta if self.scale else theta)
                    deviations.append(deviation)
                advance(1)
        return accuracies, shifts, deviations

    def _held_out(self, rows: Tensor, positive: Tensor, paired: bool) -> Tensor:
        """Which texts are held out, [texts]: a share of the pairs, or of each side's texts."""
        generator = np.random.default_rng(self.seed)
        held = torch.zeros(len(rows), dtype=torch.bool)
        for side in [torch.ones_like(positive)] if paired else [positive, ~positive]:
            own = rows[side].unique()
            # At least one row is held out, and one stays to train on.
            count = min(max(1, round(self.held_out * len(own))), len(own) - 1)
            if count < 1:
                raise TrimtabError(
                    f"iti: {len(own)} rows are too few to train probes and hold some out: "
                    "give it 2 or more pairs, or 2 or more texts of each side"
                )
            drawn = torch.from_numpy(generator.permutation(len(own))[:count])
            held |= torch.isin(rows, own[drawn])
        return held

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        heads = chosen(steering, cls.columns).get("heads", [])
        if not heads:
            return ["ITI with k = 0: no head is changed."]
        options, dial = steering.hyperparameters, steering.dial.name
        by = "times the texts' standard deviation along it" if options["scale"] else "long"
        along = {
            "mean": "from the mean of the negative texts to that of the positive ones",
            "probe": "where a classifier says that texts are positive",
        }[options["direction"]]
        right = percent([head["accuracy"] for head in heads])
        lines = [
            f"ITI adds a vector to the output of {len(heads)} attention heads, in "
            f"{counted(heads)}: it leads {along} and is {dial} {by}."
        ]
        if options.get("locate") == "effect":
            return [
                *lines,
                *effects_in_words(heads, "adding one of these vectors"),
                *predicted_in_words(steering),
            ]
        return [
            *lines,
            "They are the heads from which a classifier tells the two sides apart best: it is "
            f"right on {right} of texts that it was not trained on.",
        ]


def _probe(head: Tensor, positive: Tensor, held: Tensor) -> tuple[float, Tensor]:
    """A logistic regression's accuracy on the held-out texts, and its weights [units]."""
    from sklearn.linear_model import LogisticRegression

    # The default solver stops early on activations as they come, whose sizes differ widely: its
    # accuracies would rank heads by where it stopped.
    probe = LogisticRegression(max_iter=1000, solver="newton-cholesky")
    probe.fit(head[~held].numpy(), positive[~held].numpy())
    accuracy = float(probe.score(head[held].numpy(), positive[held].numpy()))
    return accuracy, torch.from_numpy(probe.coef_[0])


def _unit(vector: Tensor) -> Tensor:
    length = vector.norm()
    return vector / length if length > 0 else vector
