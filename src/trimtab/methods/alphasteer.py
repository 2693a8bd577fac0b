"""AlphaSteer: steer texts like some, and leave texts like others alone.

"AlphaSteer: Learning Refusal Steering with Principled Null-Space Constraint" (2506.07022).

    x <- x + strength <u, x> r        r the mean difference of the two sides at a site

u is found so that <u, x> is about 1 at the texts that are to be steered, H, and as little as can be
at the protected ones, B (rows are activations): with Q the directions in which B has least energy,

    u = Q (Q' H' H Q + lambda I)^-1 Q' H' 1

The authors solve for a matrix of units by units; because each row of their target is the same r, it
is of rank one, u r', and two vectors say all of it: steering by r with a gate that is linear.

With fewer protected texts than units many directions have no energy at all, and which of them come
first is chance: Q has all of these then, be they more than the share.

The authors' code reads the last token of a padded batch and adds one vector to every token of a
prompt's first pass: here each token is steered by what it is itself, in the prompt and after it.
Protected texts that u was not fitted on say how well it leaves them alone: `findings["gate"]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Method,
    Number,
    Samples,
    Says,
    Statistics,
    Want,
    new_steering,
)
from trimtab.methods.caa import residual_sites
from trimtab.methods.protected import about_texts, last_tokens, protected_texts
from trimtab.model import LanguageModel
from trimtab.steering import (
    Affine,
    Dial,
    Intervention,
    Positions,
    Scope,
    Steering,
)

Share = Annotated[float, Field(gt=0, le=1), Says("must be above 0 and at most 1, not {value}")]
Positive = Annotated[float, Field(gt=0), Says("must be above 0, not {value}")]
#: Of so many protected prompts the texts of one are kept to say how well they are left alone.
_HELD_OUT = 5
#: Energy below this share of the largest is none.
_NO_ENERGY = 1e-12


@dataclass(frozen=True)
class AlphaSteer(Method):
    """AlphaSteer: steer texts like some, and leave texts like others alone.

        x <- x + strength <u, x> r,    <u, x> about 1 at the texts to steer, 0 at protected ones

    "AlphaSteer: Learning Refusal Steering with Principled Null-Space Constraint"
    (arXiv:2506.07022).

        >>> steering = tt.AlphaSteer(protect="builtin:facts", layer=1).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    protect: str = field(
        metadata={
            "help": "Texts to leave alone: a contrast's file (both its sides), builtin:NAME, or a "
            ".txt with a text a line."
        }
    )
    layer: int | tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Blocks, as in 12 or 10-14, negative from the end (default: 40%)."},
    )
    site: Literal["resid", "attn_out", "ffn_out"] = field(
        default="resid",
        metadata={"help": "Which activations of a block; of resid nothing bakes or exports."},
    )
    strength: Number | None = field(
        default=None, metadata={"help": "The dial's default (default: measured)."}
    )
    where: Literal["both", "positive", "negative"] | None = field(
        default=None,
        metadata={
            "help": "Which side's texts are to be steered (default: both of pairs, positive of "
            "texts)."
        },
    )
    share: Share = field(
        default=0.5,
        metadata={
            "help": "Share of directions, those of least protected energy (at least those of none)."
        },
    )
    ridge: Positive = field(default=10.0, metadata={"help": "lambda, the penalty on u."})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "alphasteer"
    dial = "strength"
    unmeasured = 1.0

    def check(self) -> None:
        if not self.protect:
            raise TrimtabError("alphasteer: name the texts to leave alone (protect)")

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "strength": (0.5, 1.0, 2.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The sites that are steered."""
        blocks = residual_sites(anatomy, self.layer)
        found = [site.replace("resid", self.site) for site in blocks]
        for site in found:
            anatomy.width(site)  # refuses what there is not
        return found

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        return [Want(site, "last", Samples) for site in self.sites(language_model.anatomy)]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        sites = self.sites(language_model.anatomy)
        protected, held, about = statistics.once(
            ("alphasteer", self.protect, self.site, self.layer),
            lambda: self._protected(language_model, sites),
        )
        where = self.where or ("both" if contrast.paired else "positive")
        interventions, kept = [], {}
        for site in sites:
            texts, positive, _ = statistics.of(site, "last", Samples).texts()
            r = texts[positive].double().mean(0) - texts[~positive].double().mean(0)
            own = {"both": texts, "positive": texts[positive], "negative": texts[~positive]}[where]
            u = gate_of(own, protected[site][~held], self.share, self.ridge)
            operator = Affine(r.float()[:, None], u.float()[:, None])
            interventions.append(Intervention(site, operator, Scope.of(self.positions)))
            kept[site] = {
                "steered": _mean_of(own, u),
                "protected": _mean_of(protected[site][held], u),
                "protected_size": float((protected[site][held].double() @ u).abs().mean()),
            }
        dial = Dial("strength", self.at_default, (-20.0, 20.0))
        findings = {"protected": about, "gate": kept}
        return new_steering(self, language_model, contrast, interventions, dial, findings=findings)

    def _protected(
        self, language_model: LanguageModel, sites: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        """Activations of the protected texts' last tokens at each site; which texts are held out,
        all of one prompt or none; and what they were."""
        rows = protected_texts(self.protect)
        if len(rows) < _HELD_OUT:
            raise TrimtabError(
                f"alphasteer: {self.protect} has {len(rows)} different texts: {_HELD_OUT} are the "
                "least, of which one says how well they are left alone"
            )
        texts = [text for row in rows for text in row]
        number = torch.tensor([number for number, row in enumerate(rows) for _ in row])
        held = number % _HELD_OUT == _HELD_OUT - 1
        return last_tokens(language_model, texts, sites), held, about_texts(self.protect, texts)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        found = steering.findings["gate"]
        steered, protected = (
            sum(each[name] for each in found.values()) / len(found)
            for name in ("steered", "protected")
        )
        return [
            f"AlphaSteer adds the mean difference of the two sides at {steering.where}, as much of "
            f"it as a linear gate says of each token: on average {steered:.2f} at the texts to be "
            f"steered, and {protected:.2f} at protected texts that it was not fitted on "
            f"({steering.findings['protected']['source']})."
        ]


def gate_of(steered: Tensor, protected: Tensor, share: float, ridge: float) -> Tensor:
    """u, [units] in float64, of activations [texts, units] that are to be steered and of protected
    ones; `share` is how many of all directions it may use, those of least protected energy. Where
    more of them have none at all, as with fewer texts than units, it may use all of these: which
    ones a decomposition names first is chance."""
    h, b = steered.double(), protected.double()
    units = h.shape[1]
    count = int(share * units)
    if count < 1:
        raise TrimtabError(f"alphasteer: a share of {share:g} of {units} units is none of them")
    energies, vectors = torch.linalg.eigh(b.T @ b)  # the smallest first
    none = energies <= _NO_ENERGY * energies[-1]
    count = max(count, int(none.sum()))
    q = vectors[:, :count]
    seen = h @ q
    system = seen.T @ seen + ridge * torch.eye(count, dtype=torch.float64)
    factor = torch.linalg.cholesky(system)
    found: Tensor = q @ torch.cholesky_solve(seen.sum(0)[:, None], factor)[:, 0]
    return found


def _mean_of(texts: Tensor, u: Tensor) -> float:
    return float((texts.double() @ u).mean())
