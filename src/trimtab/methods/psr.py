"""PSR: steer to where a prompt that asks for the behaviour takes the model.

Prompt steering replacement (2605.03907), after the port that SteerScope (yht0511/SteerScope)
compares with other methods. At every block (A-PSR), or at one (S-PSR),

    h <- h + alpha max(0, <a, h> + b) v        on the prompt's last token and on the answer

where v, a and b bring the activations of each positive answer as near as can be to those that the
model has when words before the same prompt ask for it:

    loss = sum over blocks of  mean |h_steered - h_asked|^2,  divided by what it is unsteered

The mean is over the steered tokens and the units. Blocks below the lowest one that is steered
cannot come nearer, and are left out of both. The port begins with random v, a and b (as
torch.nn.Linear does) and divides by the loss there; but a reader that fires at no token learns
nothing, and that is every other one. Here v and a begin with zeros and b with 1: a vector of no
length that is added everywhere, and the loss is the share of the distance that is left. What to ask
for is given (`ask`), or said by the contrast; the port has another model write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.contrasts import Contrast, spread
from trimtab.errors import TrimtabError, shown
from trimtab.fitting import Number
from trimtab.methods.tokens import token_activations
from trimtab.methods.trained import SMALL, Presets, TrainedMethod, at_sites, training_in_words
from trimtab.model import LanguageModel, asked, frozen
from trimtab.steering import Intervention, Positions, Respond, Steering
from trimtab.training import (
    Objective,
    Outcome,
    Run,
    Steered,
    Text,
    Texts,
    numbered,
    positive_texts,
)

#: Bytes of activations under the request that are kept; others are computed whenever they are
#: needed.
_KEPT = 1 << 29
#: Rows whose distance is measured, at most, before anything is steered.
_MEASURED = 64


_SAY = "say what to ask for, as in ask='Please answer formally.'"


@dataclass(frozen=True, kw_only=True)
class PSR(TrainedMethod):
    """PSR: steer to where a prompt that asks for the behaviour takes the model.

        h <- h + alpha max(0, <a, h> + b) v,    nearest to what h is when words ask for the answer

    Prompt steering replacement (arXiv 2605.03907). At all blocks, or at some.

        >>> steering = tt.PSR(ask="Please be glad.", layer=1, steps=4).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    ask: str | None = field(
        default=None,
        metadata={
            "help": 'What to ask for, as a system message: "Please answer formally." (before a '
            "prompt that is plain text; default: what the contrast says of itself)."
        },
    )
    layer: int | tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Blocks, as in 12 or 10-14, negative from the end (default: all)."},
    )
    alpha: Number = field(default=1.0, metadata={"help": "Strength; the dial's default."})
    name = "psr"
    presets = Presets(
        {
            "small": {
                **SMALL,
                "learning_rate": 0.003,
                "batch": 3,
                "steps": 60,
                "positions": "last",
            },
            "paper": {
                "learning_rate": 0.001,
                "batch": 1,
                "epochs": 15,
                "positions": "last",
                "patience": 0,
                "weight_decay": 1e-6,
                "clip": 1e9,  # none
            },
        }
    )

    def check(self) -> None:
        super().check()
        if self.ask is not None and not self.ask.strip():
            raise TrimtabError(f"psr: ask is empty: {_SAY}")

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"alpha": (0.5, 1.0, 1.5, 2.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        if self.layer is not None:
            return super().sites(anatomy)
        found: list[str] = anatomy.sites(self.site)
        return found

    def texts(
        self, language_model: LanguageModel, contrast: Contrast, max_length: int | None
    ) -> Texts:
        """Of each row the positive text, and the same text under the request."""
        if not contrast.paired:
            raise TrimtabError(
                f"psr: {contrast.name} is unpaired, so that there are no prompts before which "
                "something could be asked for: give it rows with prompt, positive and negative"
            )
        plain = positive_texts(language_model, contrast, max_length)
        pairs = contrast.train.pairs
        prompts = asked(language_model, [pair.prompt for pair in pairs], self._words(contrast))
        encoded = language_model.encode(prompts, [pair.positive for pair in pairs])
        rows = []
        for number, ((own,), tokens) in enumerate(zip(plain.rows, encoded, strict=True)):
            where = f"psr: {contrast.name}, row {number + 1}"
            text = plain.texts[own]
            rows.append([text, _asked_text(language_model, text, tokens, where)])
        held_out = [[plain.texts[number] for number in row] for row in plain.held_out]
        return numbered(rows, held_out)

    def _words(self, contrast: Contrast) -> str:
        """What is asked for."""
        if self.ask is None and not contrast.behaviour:
            raise TrimtabError(
                f"psr: {contrast.name} does not say what its positive side does: {_SAY}"
            )
        return self.ask or f"Please {contrast.behaviour}."

    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        assert self.positions is not None
        sites = self.sites(language_model.anatomy)
        return Imitation(language_model, texts, sites, self.positions)

    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        return at_sites(parameters, _operator, self.positions)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        left = steering.findings["training"]["loss"]["last"]
        own = steering.hyperparameters["ask"]
        words = f"the words '{shown(own, 200)}'" if own else "asking for the behaviour"
        takes = "take" if own else "takes"
        return [
            f"PSR adds a vector at {steering.where}, as much of it as a reader finds in each token "
            f"of '{steering.interventions[0].scope}'. It was learnt to take activations where "
            f"{words} {takes} them: in the last step {100 * left:.0f} % of that distance was "
            "left.",
            *training_in_words(steering),
        ]


def _asked_text(
    language_model: LanguageModel, text: Text, tokens: Sequence[int], where: str
) -> Text:
    """A text under the request, which is to end as the text itself does, from the token on from
    which the answer begins to be read."""
    behind = len(text) - text.start + 1
    if len(tokens) > language_model.max_length:
        raise TrimtabError(
            f"{where}: with what is asked for it has {len(tokens)} tokens, and the model takes "
            f"{language_model.max_length}: ask in fewer words, or take a shorter text"
        )
    if tuple(tokens)[-behind:] != tuple(text.tokens)[-behind:]:
        raise TrimtabError(
            f"{where}: behind what is asked for, the prompt's last token and the answer are other "
            "tokens than without it: end the prompt otherwise, or give it as messages"
        )
    return Text(frozen(tokens), len(tokens) - behind + 1)


class Imitation(Objective):
    """The distance to the activations under the request, as a share of what it is unsteered; v and
    a [units] and b at each site."""

    def __init__(
        self,
        language_model: LanguageModel,
        texts: Texts,
        sites: Sequence[str],
        positions: Positions,
    ) -> None:
        anatomy = language_model.anatomy
        self._lm, self._texts = language_model, texts
        self.sites, self.positions = tuple(sites), positions
        lowest = min(parse_site(site)[0] or 0 for site in sites)
        self.reads = tuple(anatomy.sites("resid", tuple(range(lowest, anatomy.layers))))
        #: Of each text the same under the request.
        self._asked = {row[0]: row[1] for row in texts.rows}
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self._whole: float | None = None

    def start(self, generator: Generator) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in self.sites:
            width = self._lm.anatomy.width(site)
            found[f"{site}/v"], found[f"{site}/a"] = torch.zeros(width), torch.zeros(width)
            found[f"{site}/b"] = torch.ones(1)
        return found

    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        return [[Run(row[0])] for row in rows]

    def change(self, parameters: Mapping[str, Tensor], site: str, x: Tensor, at: Steered) -> Tensor:
        a, b, v = (parameters[f"{site}/{name}"].to(x) for name in ("a", "b", "v"))
        return x + at.dials * (x @ a + b).relu()[..., None] * v

    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        if self._whole is None:
            self._whole = self._unsteered()
        length = max(map(len, outcome.at.texts))
        distances = []
        for line, run in enumerate(outcome.at.runs):
            text = self._texts.texts[run.text]
            # From the end, because some layers see a text's last tokens alone.
            first, end = text.start - 1 - length, len(text) - length
            seen = [outcome.seen[site][line, first : end or None] for site in self.reads]
            distances.append(_distance(seen, self._target(self._asked[run.text])))
        return {"loss": outcome.by_row(torch.stack(distances))[:, 0] / self._whole}

    def _unsteered(self) -> float:
        """The mean distance of rows that are trained on when nothing is steered."""
        found = [
            float(_distance(self._read(text), self._target(other)))
            for text, other in spread(self._texts.rows, _MEASURED)
        ]
        whole = sum(found) / len(found)
        if not whole > 0:
            raise TrimtabError("psr: what is asked for changes nothing: ask for something else")
        return whole

    def _target(self, number: int) -> list[Tensor]:
        """The activations of a text under the request."""
        if number in self._kept:
            return self._kept[number]
        found = self._read(number)
        size = sum(each.nbytes for each in found)
        if self._bytes + size <= _KEPT:
            self._kept[number], self._bytes = found, self._bytes + size
        return found

    def _read(self, number: int) -> list[Tensor]:
        """What a text's last token before the answer and its answer are at each block, when nothing
        is steered, [tokens, units]. Each text is read alone, so that it is always the same."""
        text = self._texts.texts[number]
        ((_, found),) = token_activations(self._lm, [text], self.reads)
        return [found[site][text.start - 1 :].clone() for site in self.reads]


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The mean squared difference of each pair, summed."""
    parts = []
    for own, other in zip(ours, theirs, strict=True):
        wide = torch.promote_types(own.dtype, torch.float32)
        parts.append((own.to(wide) - other.to(own.device, wide)).square().mean().to(ours[0].device))
    return torch.stack(parts).sum()


def _operator(parameters: Mapping[str, Tensor], site: str) -> Respond:
    vector, reader, bias = (parameters[f"{site}/{name}"] for name in ("v", "a", "b"))
    return Respond(vector, reader, float(bias))
