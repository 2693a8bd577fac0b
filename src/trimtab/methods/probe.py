"""Probe: a direction that reads a behaviour, and one that steers it.

    reader   a logit of each activation, <x, w> + b: Fisher's discriminant (`lda`), logistic
             regression, the axis of differences (`lat`) or the difference of means (`mean`)
    writer   what is added, taken out, or held within bounds; by default the difference of means

What reads best is not what steers best. With C the covariance within the two sides and m the
difference of their means, the discriminant C^-1 m tells them apart best; of all steps that raise
its logit by as much, the one that goes least far in units of C is along C C^-1 m = m. So the
reader's weights are there to read and to gate, and m to steer with.

"Representation Engineering" (Zou et al., arXiv:2310.01405) has `lat`; ITI (NeurIPS 2023) the length
`sigma`, which is the spread of the texts along the direction; "The Assistant Axis"
(arXiv:2601.10387) bounds at a quantile. Bounds are those of texts, each of which is one activation
here: single tokens lie farther apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.figures import auroc_interval
from trimtab.fitting import (
    POSITIONS_HELP,
    BetweenZeroAndOne,
    Count,
    Method,
    Number,
    Samples,
    Says,
    Statistics,
    Token,
    Want,
    collect,
    fired_rate,
    new_steering,
    separation,
    validation_part,
)
from trimtab.methods.act import Kind
from trimtab.methods.readers import Estimator, Reader, Settings, direction_of, reader_of
from trimtab.methods.words import difference_read_at, read_at
from trimtab.model import LanguageModel
from trimtab.steering import (
    Ablate,
    Add,
    Clamp,
    Dial,
    Intervention,
    Operator,
    Positions,
    Scope,
    Steering,
)

Positive = Annotated[float, Field(gt=0), Says("must be above 0, not {value}")]
Share = Annotated[float, Field(ge=0, le=1), Says("must lie between 0 and 1, not {value}")]
#: The dial's range by what is done, and by how long what is added is.
_RANGES = {
    "ablate": (-1.0, 1.0), "clamp": (0.0, 1.0),
    "difference": (-20.0, 20.0), "sigma": (-50.0, 50.0),
}  # fmt: skip


@dataclass(frozen=True)
class _Fitted:
    """What was made of one site: a reader, a direction to steer along [units] in float64 and the
    length of 1 that it has; and what is to be said of it."""

    reader: Reader
    unit: Tensor
    length: float
    bounds: tuple[float | None, float | None]
    said: dict[str, Any]


@dataclass(frozen=True)
class Probe(Method):
    """Probe: read a behaviour with one direction, and steer it with another.

        x <- x + alpha v,    v = mean(x^pos) - mean(x^neg);    logit(x) = <x, w> + b

    or v is taken out of x (`ablate`), or what lies along it held within bounds (`clamp`).
    "Representation Engineering" (Zou et al., arXiv:2310.01405), and for bounds "The Assistant Axis"
    (arXiv:2601.10387).

        >>> steering = tt.Probe(layer=1, read="logistic").fit(lm, contrast)
        >>> gate = tt.Gate((steering.condition(),))
        >>> texts = lm.generate(["Today I feel"], steering=steering.at(1).gated(gate))
    """

    site: Kind = field(default="resid", metadata={"help": "Which activations of a block."})
    layer: int | tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "Blocks, as in 12 or 10-14, negative from the end (default: the one whose "
            "reader tells validation texts apart best, by AUROC)."
        },
    )
    read: Estimator = field(
        default="lda",
        metadata={"help": "The reader: lda, logistic, lat (PCA of differences) or mean."},
    )
    steer: Estimator = field(
        default="mean", metadata={"help": "The direction to steer along: the same words."}
    )
    operator: Literal["add", "ablate", "clamp"] = field(
        default="add", metadata={"help": "What is done along it: add, ablate or clamp."}
    )
    length: Literal["difference", "sigma"] = field(
        default="difference",
        metadata={
            "help": "Length of what is added at alpha 1: that of the difference of means, or "
            "sigma, the texts' standard deviation along it."
        },
    )
    alpha: Number | None = field(
        default=None,
        metadata={
            "help": "Strength, or the share of ablate and clamp; the dial's default (default: "
            "measured; of a share 1)."
        },
    )
    bound: Literal["floor", "ceiling", "both"] = field(
        default="floor",
        metadata={
            "help": "clamp: at least the positive texts' quantile, at most the negative texts' one "
            "from above, or between the two of the positive texts."
        },
    )
    quantile: BetweenZeroAndOne = field(
        default=0.25, metadata={"help": "clamp: which quantile, counted from the bound's side."}
    )
    token: Token | None = field(
        default=None,
        metadata={
            "help": "What stands for a text: last, mean, answer, or -2 and so on (default: answer; "
            "of unpaired texts last)."
        },
    )
    l2: Positive = field(
        default=10.0,
        metadata={"help": "logistic: penalty on the weights of activations of spread 1."},
    )
    shrinkage: Share | None = field(
        default=None,
        metadata={"help": "lda: how far correlations are drawn to 0 (default: Ledoit and Wolf's)."},
    )
    centred: bool = field(
        default=True, metadata={"help": "lat: take the mean of the differences away first."}
    )
    seed: Count = field(default=0, metadata={"help": "lat: the differences' random signs."})
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})

    name = "probe"
    unmeasured = 1.0

    def check(self) -> None:
        if self.layer == ():
            raise TrimtabError("probe: layer is empty: name some, or leave it out")
        if self.bound == "both" and self.quantile >= 0.5:
            raise TrimtabError(
                f"probe: bound both keeps what lies between a quantile and the same one from "
                f"above, so it must be below 0.5, not {self.quantile:g}"
            )

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "alpha": (0.5, 1.0, 2.0)}

    @property
    def asks_for_dial(self) -> bool:
        """A share is 1 unless the user says otherwise."""
        return self.operator == "add" and super().asks_for_dial

    @property
    def looks_beyond(self) -> bool:
        return self.operator == "add"

    @property
    def _range(self) -> tuple[float, float]:
        return _RANGES[self.length if self.operator == "add" else self.operator]

    # -- what it reads ------------------------------------------------------------------------

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The sites to steer, or those to choose from."""
        layers = (self.layer,) if isinstance(self.layer, int) else self.layer
        return list(dict.fromkeys(anatomy.sites(self.site, layers)))

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        if self.layer is None:
            validation_part(self.name, contrast)
        token = self._token_for(contrast)
        return [Want(site, token, Samples) for site in self.sites(language_model.anatomy)]

    def _token_for(self, contrast: Contrast) -> Token:
        """What it takes of this contrast's texts, if it was not told."""
        return self.token or ("answer" if contrast.paired else "last")

    @property
    def _settings(self) -> Settings:
        return Settings(self.l2, self.shrinkage, self.centred, self.seed)

    # -- what it makes ------------------------------------------------------------------------

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        method = replace(self, token=self._token_for(contrast))
        wants = method.wants(language_model, contrast)
        made = {want.site: method._fitted(*statistics[want].texts()[:2]) for want in wants}
        held_out = None
        if any(row.part == "validation" for row in contrast.rows):
            held_out = statistics.once(
                ("probe", *wants),
                lambda: collect(
                    language_model,
                    contrast.part("validation"),
                    wants,
                    max_length=statistics.max_length,
                    engine=statistics.engine,
                ),
            )
        findings: dict[str, Any] = {}
        if self.layer is None:
            assert held_out is not None  # `wants` refuses
            ranks = {want.site: _rank(made[want.site].reader, held_out[want]) for want in wants}
            best = max(ranks, key=lambda site: ranks[site])  # of equal ones the lowest
            findings = {"site": best, "auroc": {site: rank[0] for site, rank in ranks.items()}}
            wants = [want for want in wants if want.site == best]
        findings["probe"] = {
            want.site: {
                **made[want.site].said,
                **({} if held_out is None else _told(made[want.site].reader, held_out[want])),
            }
            for want in wants
        }
        chosen = {want.site: made[want.site] for want in wants}
        return new_steering(
            method,
            language_model,
            contrast,
            [
                Intervention(site, method._operator(own), Scope.of(self.positions))
                for site, own in chosen.items()
            ],
            Dial("alpha", self.at_default, self._range),
            _tables(chosen),
            findings,
        )

    def _fitted(self, x: Tensor, positive: Tensor) -> _Fitted:
        """From the texts' activations at a site, [texts, units]."""
        x = x.double()
        direction = direction_of(self.steer, x, positive, self._settings)
        difference = x[positive].mean(0) - x[~positive].mean(0)
        norm = float(direction.norm())
        unit = direction / norm if norm > 0 else direction
        along = x @ unit
        sigma = float(along.std(correction=0))
        length = sigma if self.length == "sigma" else float(difference.norm())
        said = {"difference": float(difference.norm()), "sigma": sigma}
        reader = reader_of(self.read, x, positive, self._settings)
        return _Fitted(reader, unit, length, self._bounds(along, positive), said)

    def _bounds(self, along: Tensor, positive: Tensor) -> tuple[float | None, float | None]:
        """Between which numbers what lies along the direction is kept."""
        q, at = self.quantile, torch.quantile
        if self.bound == "floor":
            return float(at(along[positive], q)), None
        if self.bound == "ceiling":
            return None, float(at(along[~positive], 1 - q))
        return float(at(along[positive], q)), float(at(along[positive], 1 - q))

    def _operator(self, fitted: _Fitted) -> Operator:
        if self.operator == "add":
            return Add((fitted.length * fitted.unit).float())
        if self.operator == "ablate":
            return Ablate(fitted.unit.float())
        return Clamp(fitted.unit.float(), *fitted.bounds)

    # -- in words -----------------------------------------------------------------------------

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        options, found = steering.hyperparameters, steering.findings["probe"]
        along, reader = (_in_words(options[which], options["token"]) for which in ("steer", "read"))
        lines = [
            _what_it_does(steering),
            f"The direction is {along}.",
            f"It is read, as a logit, with {reader}.",
        ]
        for site, said in found.items():
            if "auroc" in said:
                right, auroc = said["accuracy"], said["auroc"]
                lines.append(
                    f"At {site} the reader is right on {_share(right['value'], right['ci95'])} of "
                    f"{right['n']} validation texts (AUROC {auroc['value']:.3f} "
                    f"[{auroc['ci95'][0]:.3f}, {auroc['ci95'][1]:.3f}])."
                )
        if "auroc" in steering.findings:
            lines.append(
                f"The block was chosen among {len(steering.findings['auroc'])} because its reader "
                "tells validation texts apart best; another one may steer more."
            )
        return lines


_WORDS = {
    "lda": "Fisher's discriminant of the two sides",
    "logistic": "the weights of a logistic regression",
    "lat": "the axis along which pairs differ most, with random signs",
}


def _in_words(estimator: str, token: str | int) -> str:
    """A direction, and at which token it was read."""
    if estimator == "mean":
        return difference_read_at(token)
    return f"{_WORDS[estimator]}, {read_at(token)}"


def _what_it_does(steering: Steering) -> str:
    operators = [each.operator for each in steering.interventions]
    first, where = operators[0], steering.where
    if isinstance(first, Add):
        lengths = [float(each.added.norm()) for each in operators if each.added is not None]
        of = {
            "difference": "that of the difference of means",
            "sigma": "the texts' standard deviation along it",
        }[steering.hyperparameters["length"]]
        size = " to ".join(dict.fromkeys(f"{each:.2f}" for each in (min(lengths), max(lengths))))
        return f"Probe adds a vector at {where} (length {size} at alpha 1: {of})."
    if isinstance(first, Clamp):
        bounds = [
            f"{word} {bound:.3g}"
            for word, bound in (("at least", first.low), ("at most", first.high))
            if bound is not None
        ]
        where = where if len(operators) == 1 else f"{where}, first"
        return f"Probe holds what lies along a direction at {where} to {' and '.join(bounds)}."
    return f"Probe takes out what lies along a direction at {where}."


def _tables(fitted: dict[str, _Fitted]) -> dict[str, Tensor]:
    """Of each site the reader with its bias, and the direction that is steered along, as long as it
    is at a dial of 1."""
    found = {}
    for site, own in fitted.items():
        found[f"reader.{site}"] = own.reader.direction.float()
        found[f"bias.{site}"] = torch.tensor([own.reader.bias])
        found[f"writer.{site}"] = (own.length * own.unit).float()
    return found


def _rank(reader: Reader, samples: Samples) -> tuple[float, float]:
    """AUROC on some texts, and where that is the same how far apart the sides are."""
    x, positive, _ = samples.texts()
    scores = reader.scores(x)
    return auroc_interval(scores, positive).value, separation(scores, positive)


def _told(reader: Reader, samples: Samples) -> dict[str, Any]:
    """How well a reader tells texts apart that it was not fitted on."""
    x, positive, _ = samples.texts()
    scores = reader.scores(x)
    auroc, right = auroc_interval(scores, positive), fired_rate((scores > 0) == positive)
    return {
        "auroc": {"value": auroc.value, "ci95": list(auroc.ci95), "n": auroc.n},
        "accuracy": {"value": right["fired"], "ci95": right["ci95"], "n": right["n"]},
    }


def _share(value: float, ci95: Sequence[float]) -> str:
    return f"{100 * value:.0f} % [{100 * ci95[0]:.0f}, {100 * ci95[1]:.0f}]"
