"""ActAdd: add the difference of one pair of texts to the residual stream.

"Steering Language Models With Activation Engineering" (Turner et al., arXiv 2308.10248), in the
form in which later papers compare with it:

    v_l = h_l(positive) - h_l(negative)  at block l's output,      h_l <- h_l + alpha v_l

with the mean over a text's tokens as h. (The original adds the two prompts' activations token by
token to the first tokens of the text; here the vector acts wherever `positions` says.) With
`pairs` above 1 it is the mean over the first pairs, and with all of them it is CAA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
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

    layer: int | None = field(
        default=None,
        metadata={"help": "Block whose output is steered; negative from the end (default: 40%)."},
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

    def _want(self, anatomy: Anatomy, contrast: Contrast) -> Want:
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
        rows = frozenset(index for side in sides for index in side[: self.pairs])
        (site,) = residual_sites(anatomy, self.layer)
        return Want(site, self.token, Means, rows=rows)

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        return [self._want(language_model.anatomy, contrast)]

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        want = self._want(language_model.anatomy, contrast)
        vector = statistics[want].difference.float()
        interventions = [Intervention(want.site, Add(vector), Scope.of(self.positions))]
        dial = Dial("alpha", self.at_default, (-20.0, 20.0))
        return new_steering(self, language_model, contrast, interventions, dial)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        token, pairs = steering.hyperparameters["token"], steering.hyperparameters["pairs"]
        what = f"{difference_read_at(token)}; of each side the first {pairs} are used"
        if pairs == 1:
            first = f"the activation of the first positive text, {read_at(token)}"
            what = f"{first}, minus that of the first negative one"
        return adds_vectors("ActAdd", steering, what)
