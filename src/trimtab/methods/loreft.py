"""LoReFT: what an activation says in a small subspace is learnt anew.

"ReFT: Representation Finetuning for Language Models" (Wu et al., NeurIPS 2024, 2404.03592).

    h <- h + alpha R'(W h + b - R h)        R [rank, units] with orthonormal rows

R, W and b minimise - log p(positive answer | prompt) per token at alpha 1, where R h has become
W h + b, and what is across the rows of R is as it was. It is an affine map of rank `rank`:

    h <- h + alpha (U V'h + c),    U = R',  V = (W - R)',  c = R'b

The authors steer the first five and the last five tokens of the prompt, after some blocks; no
weights do that. At all tokens of `ffn_out` or `attn_out` the same map bakes into the weights.

R is kept orthonormal by a QR decomposition, in the gradient and after each step; in the authors'
parametrisation (a matrix of units by units beside each R) AdamW takes other steps. Of a prompt of
fewer than ten tokens all are steered; of an odd number they leave out the one in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import Number
from trimtab.methods.trained import (
    SMALL,
    OneOrMore,
    Presets,
    TrainedMethod,
    at_sites,
    training_in_words,
)
from trimtab.model import LanguageModel
from trimtab.steering import Affine, Intervention, Positions, Scope, Situation, Steering
from trimtab.training import Objective, Outcome, Run, Steered, Texts, positive_texts

#: Where blocks are steered, as shares of the depth: the authors' 5, 10, 15 and 20 of 26.
_DEPTHS = (0.2, 0.4, 0.6, 0.8)
#: The authors' tokens.
_ENDS = "prompt[:5] | prompt[-5:]"


@dataclass(frozen=True)
class LoReFT(TrainedMethod):
    """LoReFT: what an activation says in a small subspace is learnt anew.

        h <- h + alpha R'(W h + b - R h),    rows of R orthonormal

    "ReFT: Representation Finetuning for Language Models" (Wu et al., NeurIPS 2024, arXiv
    2404.03592). With site="ffn_out" and positions="all" it bakes.

        >>> steering = tt.LoReFT(layer=1, steps=4, rank=2).fit(lm, contrast)
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1))
    """

    alpha: Number = field(
        default=1.0, metadata={"help": "How much of the map, 0 to 1; the dial's default."}
    )
    rank: OneOrMore = field(default=4, metadata={"help": "Dimensions of the subspace."})
    bias: bool = field(
        default=True,
        metadata={"help": "Learn b, too; without it the map is one that an adapter (LoRA) holds."},
    )

    name = "loreft"
    unmeasured = None  # type: ignore[assignment]
    presets = Presets(
        {
            "small": {
                **SMALL,
                "learning_rate": 0.003,
                "batch": 6,
                "steps": 60,
                "positions": _ENDS,
            },
            "paper": {
                "learning_rate": 0.0009,
                "batch": 36,
                "epochs": 24,
                "positions": _ENDS,
                "patience": 0,
            },
        }
    )

    @property
    def dial_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"rank": (1, 4), "alpha": (0.25, 0.5, 0.75, 1.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        if self.layer is not None:
            return super().sites(anatomy)
        layers = tuple(dict.fromkeys(int(depth * anatomy.layers) for depth in _DEPTHS))
        return replace(self, layer=layers).sites(anatomy)

    def texts(
        self, language_model: LanguageModel, contrast: Contrast, max_length: int | None
    ) -> Texts:
        positions = self.positions or self.presets[self.preset]["positions"]
        of_prompts = Scope.of(positions).holds(Situation("generated")) is False
        if of_prompts and not contrast.paired:
            raise TrimtabError(
                f"loreft: '{positions}' are tokens of prompts, and {contrast.name} is "
                "unpaired, so that its texts have none: give it pairs, or positions all "
                "(--positions all)"
            )
        return positive_texts(language_model, contrast, max_length)

    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        where = self.where(language_model.anatomy)
        for site, width in where["widths"].items():
            if self.rank > width:
                raise TrimtabError(f"loreft: rank {self.rank} is more than the {width} of {site}")
        return Subspaces(self.rank, self.bias, **where)

    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        return at_sites(parameters, _map, self.positions)

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        rank, scope = steering.hyperparameters["rank"], steering.interventions[0].scope
        return [
            f"LoReFT sets what activations say in {rank} dimensions at {steering.where} anew, on "
            f"the tokens '{scope}', as was learnt to make the positive answers as probable as can "
            "be; other dimensions stay as they are.",
            *training_in_words(steering),
        ]


class Subspaces(Objective):
    """The mean negative log-likelihood per token of each positive answer, with R, W [rank, units]
    and maybe b [rank] at each site."""

    def __init__(
        self, rank: int, bias: bool, widths: Mapping[str, int], positions: Positions
    ) -> None:
        self._widths, self.sites, self.positions = widths, tuple(widths), positions
        self._rank, self._bias = rank, bias

    def start(self, generator: Generator) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site, width in self._widths.items():
            random = torch.randn(self._rank, width, generator=generator, dtype=torch.float64)
            end = width**-0.5  # as torch.nn.Linear begins
            shapes = {"W": (self._rank, width), **({"b": (self._rank,)} if self._bias else {})}
            for name, shape in shapes.items():
                uniform = torch.rand(shape, generator=generator)
                found[f"{site}/{name}"] = end * (2 * uniform - 1)
            found[f"{site}/R"] = orthonormal_rows(random).float()
        return found

    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        return [[Run(row[0])] for row in rows]

    def change(self, parameters: Mapping[str, Tensor], site: str, x: Tensor, at: Steered) -> Tensor:
        r = orthonormal_rows(parameters[f"{site}/R"].to(x))
        wanted = x @ parameters[f"{site}/W"].to(x).T
        if self._bias:
            wanted = wanted + parameters[f"{site}/b"].to(x)
        return x + at.dials * ((wanted - x @ r.T) @ r)

    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        return {"loss": -(outcome.log_p / outcome.lengths)}

    def tidy(self, parameters: Mapping[str, Tensor]) -> None:
        for name, tensor in parameters.items():
            if name.endswith("/R"):
                tensor.copy_(orthonormal_rows(tensor))


def orthonormal_rows(rows: Tensor) -> Tensor:
    """An orthonormal basis of what rows [rank, units] span, itself where they are one; derivatives
    go through."""
    q, r = torch.linalg.qr(rows.T)
    found: Tensor = (q * r.diagonal().sign()).T
    return found


def _map(parameters: Mapping[str, Tensor], site: str) -> Affine:
    r, w = (parameters[f"{site}/{name}"].double() for name in ("R", "W"))
    u, v = (each.float().contiguous() for each in (r.T, (w - r).T))
    b = parameters.get(f"{site}/b")
    return Affine(u, v, None if b is None else (r.T @ b.double()).float())
