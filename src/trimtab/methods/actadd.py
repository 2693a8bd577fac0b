"""ActAdd: add the difference of one pair of texts to the residual stream.

"Steering Language Models With Activation Engineering" (Turner et al., arXiv 2308.10248), in the
form in which later papers compare with it:

    v_l = h_l(positive) - h_l(negative)  at block l's output,      h_l <- h_l + alpha v_l

with the mean over a text's tokens as h. (The original adds the two prompts' activations token by
token to the first tokens of the text; here the vector acts wherever `positions` says.) With
`pairs` above 1 it is the mean over the first pairs, and with all of them it is CAA.

`layer="effect"` chooses block and sign as in CAA, by what the vector does to the answers of all
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Effect,
    Means,
    Method,
    Number,
    Says,
    Statistics,
    Token,
    Want,
    new_steering,
)
from trimtab.methods.caa import residual_sites
from trimtab.methods.effects import predicted_in_words
from trimtab.methods.first_order import slope_wants
from trimtab.methods.layers import layer_by_effect, layer_in_words
from trimtab.methods.words import adds_vectors, difference_read_at, read_at
from trimtab.model import LanguageModel
from trimtab.steering import Add, Dial, Intervention, Positions, Scope, Steering

OneOrMore = Annotated[int, Field(ge=1), Says("must be 1 or more, not {value}")]


@dataclass(frozen=True)
class ActAdd(Method):
    """ActAdd: add the difference of one pair of texts to the residual stream. Of an unpaired
    contrast the first text of each side is used.

        h_l <- h_l + alpha v_l,    v_l = h_l(positive) - h_l(negative)  at the output of block l

    "Steering Language Models With Activation Engineering" (Turner et al., arXiv 2308.10248).

        >>> steering = tt.ActAdd(alpha=2, pairs=2).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering)
    """

    layer: int | Literal["effect"] | None = field(
        default=None,
        metadata={
            "help": "Block whose output is steered, negative from the end; or effect: the one "
            "where the vector most certainly does something to the answers (default: 40%)."
        },
    )
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    pairs: OneOrMore = field(default=1, metadata={"help": "How many pairs, from the first on."})
    token: Token = field(
        default="mean",
        metadata={"help": "What stands for a text: mean, last, answer, or -2 and so on."},
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "actadd"
    unmeasured = 1.0

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "alpha": (0.5, 1.0, 2.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The site to steer, or those to choose from."""
        if self.layer == "effect":
            every: list[str] = anatomy.sites("resid")
            return every
        return residual_sites(anatomy, self.layer)

    def _rows(self, contrast: Contrast) -> frozenset[int]:
        """The rows of the train part that make the vector."""
        train = contrast.train
        if train.paired:
            sides = [list(range(len(train)))]
        else:
            labels = [text.label for text in train.texts]
            sides = [
                [index for index, label in enumerate(labels) if label == side]
                for side in ("positive", "negative")
            ]
        there = min(map(len, sides))
        if self.pairs > there:
            what = "pairs" if train.paired else "texts of each side"
            raise TrimtabError(
                f"actadd: pairs is {self.pairs}, but {train.name} has {there} {what}"
            )
        return frozenset(index for side in sides for index in side[: self.pairs])

    def _means(self, anatomy: Anatomy, contrast: Contrast) -> list[Want]:
        rows = self._rows(contrast)
        return [Want(site, self.token, Means, rows=rows) for site in self.sites(anatomy)]

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        wants = self._means(language_model.anatomy, contrast)
        if self.layer == "effect":
            wants += slope_wants([want.site for want in wants], Effect(self.positions))
        return wants

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        dial = Dial("alpha", self.at_default, (-20.0, 20.0))
        vectors = {
            want.site: statistics[want].difference.float()
            for want in self._means(language_model.anatomy, contrast)
        }
        if self.layer == "effect":
            best, findings = layer_by_effect(
                self.name, language_model, statistics, vectors, Effect(self.positions)
            )
            return new_steering(self, language_model, contrast, [best], dial, findings=findings)
        ((site, vector),) = vectors.items()
        interventions = [Intervention(site, Add(vector), Scope.of(self.positions))]
        return new_steering(self, language_model, contrast, interventions, dial)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        token, pairs = steering.hyperparameters["token"], steering.hyperparameters["pairs"]
        what = f"{difference_read_at(token)}; of each side the first {pairs} are used"
        if pairs == 1:
            first = f"the activation of the first positive text, {read_at(token)}"
            what = f"{first}, minus that of the first negative one"
        return [
            *adds_vectors("ActAdd", steering, what),
            *layer_in_words(steering),
            *predicted_in_words(steering),
        ]
