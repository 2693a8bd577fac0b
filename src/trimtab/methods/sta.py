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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Active,
    Features,
    Means,
    Method,
    Number,
    Says,
    Statistics,
    Token,
    Want,
    load_features,
    new_steering,
)
from trimtab.methods.ranking import rank
from trimtab.methods.words import adds_vectors, read_at
from trimtab.model import LanguageModel
from trimtab.steering import Add, Dial, Intervention, Positions, Scope, Steering

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
    p: Share = field(default=0.35, metadata={"help": "Share of features to keep, by either size."})
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    token: Token = field(
        default="answer",
        metadata={"help": "What stands for a text: answer, mean, last, or -2 and so on."},
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "sta"
    unmeasured = 1.0
    columns = ("feature", "amplitude", "frequency")

    def check(self) -> None:
        if not self.sae:
            raise TrimtabError("sta: name an autoencoder (sae): a directory, or RELEASE:ID")

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"p": (0.05, 0.15, 0.35, 0.5), "alpha": (0.5, 1.0, 2.0)}

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        features = load_features(self.sae)
        width = language_model.anatomy.width(features.site)  # refuses a layer out of range
        if features.decoder.shape[1] != width:
            raise TrimtabError(
                f"sta: the autoencoder reads {features.decoder.shape[1]} units, {features.site} of "
                f"{language_model.name} has {width}: it was made for another model"
            )
        return [
            Want(features.site, self.token, Means, read=features),
            Want(features.site, self.token, Active, read=features),
            Want(features.site, self.token, Means),
        ]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        features = load_features(self.sae)
        means, active, stream = (statistics[want] for want in self.wants(language_model, contrast))
        amplitude, frequency = means.difference, active.difference
        kept = self._kept(amplitude, frequency)
        if not kept.any():
            raise TrimtabError("sta: no feature sets the two sides apart: raise p")
        vector = amplitude[kept] @ features.decoder[kept].double()
        if not vector.any():
            raise TrimtabError("sta: the features that were kept add up to nothing: raise p")
        vector = vector * (stream.difference.norm() / vector.norm())
        interventions = [Intervention(features.site, Add(vector.float()), Scope.of(self.positions))]
        return new_steering(
            self,
            language_model,
            contrast,
            interventions,
            Dial("alpha", self.at_default, (-20.0, 20.0)),
            _table(features, amplitude, frequency, kept),
            {"autoencoder": features.name, "features": features.width, "kept": int(kept.sum())},
        )

    def _kept(self, amplitude: Tensor, frequency: Tensor) -> Tensor:
        """Which features are target atoms, [features]."""
        agree = amplitude.sign() == frequency.sign()
        agreeing = torch.where(agree, frequency, 0)
        large = [_largest(size.abs().double(), self.p) for size in (amplitude, agreeing)]
        return agree & large[0] & large[1] & (amplitude != 0)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        found = steering.findings
        what = (
            f"the sum of {found['kept']} of {found['features']} features of a sparse autoencoder, "
            "those that set the two sides apart, made as long as the difference of the two sides' "
            f"mean activations, {read_at(steering.hyperparameters['token'])}"
        )
        return adds_vectors("STA", steering, what)


def _largest(sizes: Tensor, p: float) -> Tensor:
    """Those at least as large as the one at rank int(p n)."""
    place = min(int(p * len(sizes)), len(sizes) - 1)
    return sizes >= sizes.sort(descending=True).values[place]


def _table(
    features: Features, amplitude: Tensor, frequency: Tensor, kept: Tensor
) -> dict[str, Tensor]:
    """The kept features, the one that moves the stream most first."""
    index = kept.nonzero().flatten()
    size = (amplitude.abs() * features.decoder.norm(dim=-1))[index]
    index = index[rank(size)]
    return {
        "feature": index,
        "amplitude": amplitude[index].float(),
        "frequency": frequency[index].to(torch.int64),
    }
