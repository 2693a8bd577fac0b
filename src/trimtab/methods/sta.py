"""STA: add up the features of a sparse autoencoder that set the two sides apart.

"Beyond Prompt Engineering: Robust Behavior Control in LLMs via Steering Target Atoms"
(Wang et al., ACL 2025).

Of each feature, its activation is averaged over a text's answer tokens; then

    amplitude  a = mean over positives - mean over negatives
    frequency  f = #positives with it above 0 - #negatives with it above 0

Kept are the features whose a and f agree in sign and are both among the share `p` that is largest
in size. The value at rank p n is the cut-off, and what equals it is kept; f counts as 0 where the
signs differ before its cut-off is taken, as in the authors' code. Where fewer than p n features
agree, the cut-off of f is 0 and only a decides among those that do (the authors' code then also
keeps features whose signs differ). Their sum

    v = sum a_i W_dec,i,    made as long as CAA's vector at the same place

is added to the residual stream that the autoencoder reads.

`locate="effect"` is ours. Scaling what feature i adds to the stream, f_i W_dec,i, by 1 + gamma
moves the pair's log-odds by gamma e_i, with e_i the sum over tokens of f_i <W_dec,i, dm/dh>; a
feature that is off at a token has none there. The k features of the most certain effect are kept
(see first_order.py), and

    v = sum sign(e_i) a_i W_dec,i,    with a_i the mean activation over all tokens of both sides,

as long as CAA's vector again. What adding v does is then known to first order, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Active,
    Count,
    Effect,
    Means,
    Method,
    Number,
    Says,
    Statistics,
    Token,
    Want,
    new_steering,
    unit_costs,
)
from trimtab.methods.effects import predicted_in_words
from trimtab.methods.first_order import (
    added_prediction,
    effects_in_words,
    scaled_scores,
    scaled_wants,
    slope_wants,
    surest,
)
from trimtab.methods.ranking import Scores, rank
from trimtab.methods.words import adds_vectors, read_at
from trimtab.model import LanguageModel
from trimtab.reading import FeatureEffects, Features, features_for, load_features
from trimtab.steering import Add, Dial, Intervention, Positions, Scope, Steering, chosen

#: How many are kept: of the authors' rule the share, by effect the number.
_P, _K = 0.35, 16
Share = Annotated[float, Field(gt=0, le=1), Says("must be above 0 and at most 1, not {value}")]


@dataclass(frozen=True)
class STA(Method):
    """STA: add up the features of a sparse autoencoder that set the two sides apart.

        h <- h + alpha v,    v = sum of a_i W_dec,i  over the features kept, as long as CAA's vector

    with a_i how much more active feature i is on the positive side; kept are those among the share
    p that is largest both in a and in how often they are active. "Beyond Prompt Engineering: Robust
    Behavior Control in LLMs via Steering Target Atoms" (Wang et al., ACL 2025).

        >>> steering = tt.STA(sae="my-sae/", p=0.3).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering)
    """

    sae: str = field(metadata={"help": "Sparse autoencoder: a directory, or RELEASE:ID (SAELens)."})
    p: Share = field(default=_P, metadata={"help": "Share of features to keep, by either size."})
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    token: Token = field(
        default="answer",
        metadata={"help": "What stands for a text: answer, mean, last, or -2 and so on."},
    )
    locate: Literal["difference", "effect"] = field(
        default="difference",
        metadata={
            "help": "Score of a feature: difference of the two sides, or effect (what scaling it "
            "does to the answers, against its standard error)."
        },
    )
    k: Count | None = field(
        default=None, metadata={"help": f"How many features to keep by effect (default: {_K})."}
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "sta"
    unmeasured = 1.0
    columns = ("feature", "amplitude", "frequency")

    def check(self) -> None:
        if not self.sae:
            raise TrimtabError("sta: name an autoencoder (sae): a directory, or RELEASE:ID")
        if self.by_effect and self.p != _P:
            raise TrimtabError("sta: p is for locate difference: by effect say how many (k)")
        if not self.by_effect and self.k is not None:
            raise TrimtabError("sta: k is for locate effect: by difference say which share (p)")

    @property
    def by_effect(self) -> bool:
        """Whether features are kept for what scaling them does."""
        return self.locate == "effect"

    @property
    def _effect(self) -> Effect:
        return Effect(self.positions)

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"p": (0.05, 0.15, 0.35, 0.5), "alpha": (0.5, 1.0, 2.0)}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        features = features_for(self.name, self.sae, language_model)
        wants = self._differences(features)
        if self.by_effect:
            wants += scaled_wants({features.site: _effects_read(features)}, self._effect)
            wants += slope_wants([features.site], self._effect)
            wants.append(Want(features.site, "mean", Means, read=features))
        return wants

    def _differences(self, features: Features) -> list[Want]:
        """Of every feature how active it is on each side, and how often; and of the stream."""
        return [
            Want(features.site, self.token, Means, read=features),
            Want(features.site, self.token, Active, read=features),
            Want(features.site, self.token, Means),
        ]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        if self.by_effect and self.k is None:
            return replace(self, k=_K).build(language_model, contrast, statistics)
        features = load_features(self.sae)
        means, active, stream = (statistics[want] for want in self._differences(features))
        columns = {"amplitude": means.difference, "frequency": active.difference}
        if self.by_effect:
            found = self._scores(language_model, statistics, features)
            columns |= found.columns
            kept = surest(self.name, "features", found, self.k or 0)
            activity = statistics.of(features.site, "mean", Means, read=features)
            weights = columns["gain"] * (activity.positive + activity.negative)
        else:
            kept, weights = self._atoms(features, **columns), columns["amplitude"]
        vector = weights[kept] @ features.decoder[kept].double()
        if not vector.any():
            raise TrimtabError(
                "sta: the features that were kept add up to nothing: "
                f"raise {'k' if self.by_effect else 'p'}"
            )
        vector = vector * (stream.difference.norm() / vector.norm())
        interventions = [Intervention(features.site, Add(vector.float()), Scope.of(self.positions))]
        findings = {
            "autoencoder": features.name,
            "features": features.width,
            "kept": len(kept),
        }
        if self.by_effect and self.positions == "all":
            findings["predicted"] = added_prediction(
                language_model, statistics, self._effect, interventions
            )
        return new_steering(
            self,
            language_model,
            contrast,
            interventions,
            Dial("alpha", self.at_default, (-20.0, 20.0)),
            _table(columns, kept),
            findings,
        )

    def _scores(
        self, language_model: LanguageModel, statistics: Statistics, features: Features
    ) -> Scores:
        """The certainty of the effect of every feature."""
        reads = {features.site: _effects_read(features)}
        costs = unit_costs(language_model, list(reads), reads=reads)
        return scaled_scores(statistics, reads, self._effect, costs)

    def _atoms(self, features: Features, amplitude: Tensor, frequency: Tensor) -> Tensor:
        """The target atoms, the one that moves the stream most first."""
        kept = self._kept(amplitude, frequency).nonzero().flatten()
        if not len(kept):
            raise TrimtabError("sta: no feature sets the two sides apart: raise p")
        size = (amplitude.abs() * features.decoder.norm(dim=-1))[kept]
        return kept[rank(size)]

    def _kept(self, amplitude: Tensor, frequency: Tensor) -> Tensor:
        """Which features are target atoms, [features]."""
        agree = amplitude.sign() == frequency.sign()
        agreeing = torch.where(agree, frequency, 0)
        large = [_largest(size.abs().double(), self.p) for size in (amplitude, agreeing)]
        return agree & large[0] & large[1] & (amplitude != 0)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        found, options = steering.findings, steering.hyperparameters
        by_effect = options.get("locate") == "effect"
        why = "whose effects are most certain" if by_effect else "that set the two sides apart"
        what = (
            f"the sum of {found['kept']} of {found['features']} features of a sparse autoencoder, "
            f"those {why}, made as long as the difference of the two sides' mean activations, "
            f"{read_at(options['token'])}"
        )
        lines = adds_vectors("STA", steering, what)
        if by_effect:
            features = chosen(steering, cls.columns)["features"]
            lines += effects_in_words(features, "scaling what one of them adds")
            lines += predicted_in_words(steering)
        return lines


def _effects_read(features: Features) -> FeatureEffects:
    """Reads the effects of scaling features; an autoencoder that rescales what it reads is
    refused."""
    if not features.plain:
        raise TrimtabError(
            "sta: effects need an autoencoder that reads activations as they are, and this one "
            "rescales them (normalize_activations): take locate difference"
        )
    return FeatureEffects(features)


def _largest(sizes: Tensor, p: float) -> Tensor:
    """Those at least as large as the one at rank int(p n)."""
    place = min(int(p * len(sizes)), len(sizes) - 1)
    return sizes >= sizes.sort(descending=True).values[place]


def _table(columns: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """The kept features in rank order."""
    found = {name: column[kept] for name, column in columns.items()}
    return {
        "feature": kept,
        **{name: column.float() for name, column in found.items()},
        "frequency": found["frequency"].to(torch.int64),
    }
