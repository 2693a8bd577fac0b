"""What the trained methods share: the fields that say where and how long, and the way from a
contrast through the trainer to a steering.

Each has two presets: `small`, which ends within minutes on two cores, and `paper`, the authors'
own. A field that is given wins over the preset.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from torch import Tensor

from trimtab.anatomy import Anatomy
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import (
    POSITIONS_HELP,
    Count,
    Method,
    Number,
    Says,
    Statistics,
    Want,
    new_steering,
)
from trimtab.methods.caa import residual_sites
from trimtab.model import LanguageModel
from trimtab.steering import Add, Dial, Intervention, Operator, Positions, Scope, Steering
from trimtab.training import (
    Objective,
    Steered,
    Texts,
    Trained,
    Training,
    texts_of,
    train,
    typical_size,
)

OneOrMore = Annotated[int, Field(ge=1), Says("must be 1 or more, not {value}")]
AboveZero = Annotated[float, Field(gt=0), Says("must be above 0, not {value}")]
#: Of each preset what it says.
Presets = MappingProxyType[str, Mapping[str, Any]]
#: What the small presets share.
SMALL = {"depth": 0.4, "positions": "all", "patience": 3}


def at_sites(
    parameters: Mapping[str, Tensor],
    operator: Callable[[Mapping[str, Tensor], str], Operator],
    positions: Positions | None,
) -> list[Intervention]:
    """An operator at each site that parameters are of, whose names are SITE/NAME."""
    assert positions is not None  # a method that is fitted has all its settings
    scope = Scope.of(positions)
    sites = dict.fromkeys(name.rpartition("/")[0] for name in parameters)
    return [Intervention(site, operator(parameters, site), scope) for site in sites]


@dataclass(frozen=True)
class TrainedMethod(Method):
    """The fields of every trained method, and how it is fitted."""

    layer: int | tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "Blocks, as in 12 or 10-14, negative from the end (default: the preset's share "
            "of the depth, about 40%)."
        },
    )
    site: Literal["resid", "attn_out", "ffn_out"] = field(
        default="resid", metadata={"help": "Which activations of a block."}
    )
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    positions: Positions | None = field(
        default=None, metadata={"help": f"{POSITIONS_HELP} (default: the preset's)."}
    )
    preset: Literal["small", "paper"] = field(
        default="small",
        metadata={
            "help": "What is not given: small, which ends within minutes on two cores, or paper, "
            "the authors' own."
        },
    )
    steps: OneOrMore | None = field(
        default=None, metadata={"help": "Steps of the training (default: the preset's)."}
    )
    minutes: AboveZero | None = field(
        default=None, metadata={"help": "End the training after so many minutes."}
    )
    learning_rate: AboveZero | None = field(
        default=None,
        metadata={
            "help": "AdamW's (default: the preset's; small's is in proportion to the activations "
            "at the site)."
        },
    )
    batch: OneOrMore | None = field(
        default=None, metadata={"help": "Rows of the contrast in a step (default: the preset's)."}
    )
    patience: Count | None = field(
        default=None,
        metadata={
            "help": "End after so many checks on validation rows without a better gain, of ten in "
            "all; 0: never (default: the preset's)."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the order of rows, and of what is drawn."})

    unmeasured = 1.0
    #: By name, what a preset says of fields that are not given (`learning_rate`, or `rate` in
    #: medians of the activations' sizes; `steps`, or `epochs`), the share of the `depth` at which
    #: it steers, and what else `Training` has, with `horizon_epochs` in place of `horizon`.
    #: Not annotated, or a dataclass would list it among its fields.
    presets = Presets({})

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "alpha": (0.5, 1.0, 2.0)}

    def check(self) -> None:
        if self.layer == ():
            raise TrimtabError(f"{self.name}: layer is empty: name some, or leave it out")

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The sites that are steered."""
        layer = self.layer
        if layer is None:
            layer = int(self.presets[self.preset]["depth"] * anatomy.layers)
        found = [site.replace("resid", self.site) for site in residual_sites(anatomy, layer)]
        for site in found:
            anatomy.width(site)  # refuses what there is not
        return found

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        return []  # it runs the model itself

    # -- what a method says -----------------------------------------------------------------------

    @abstractmethod
    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        """What is trained, on some texts. All fields have values here."""

    @abstractmethod
    def interventions(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        """What is steered with, of parameters that were learnt."""

    def texts(
        self, language_model: LanguageModel, contrast: Contrast, max_length: int | None
    ) -> Texts:
        """What it is trained on."""
        return texts_of(language_model, contrast, max_length)

    @property
    def dial_range(self) -> tuple[float, float]:
        """Where the dial may stand as long as nothing is measured."""
        return -20.0, 20.0

    # -- from a contrast to a steering ------------------------------------------------------------

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        settled, made = statistics.once(
            self._key(), lambda: self._learn(language_model, contrast, statistics)
        )
        own = replace(settled, **{self.dial: getattr(self, self.dial)})
        interventions = own.interventions(made.parameters)
        dial = Dial(self.dial, self.at_default, self.dial_range)
        findings = {"training": made.findings, **own.further_findings(made)}
        tables = own.tables(made)
        return new_steering(own, language_model, contrast, interventions, dial, tables, findings)

    def tables(self, made: Trained) -> dict[str, Tensor]:
        """What it knows beside its interventions, tensors by name."""
        return {}

    def further_findings(self, made: Trained) -> dict[str, Any]:
        """What it tells beside its training: JSON."""
        return {}

    def _key(self) -> Hashable:
        """Methods that differ in the dial alone share a training."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return self.name, *((name, value) for name, value in own.items() if name != self.dial)

    def _learn(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> tuple[Self, Trained]:
        texts = self.texts(language_model, contrast, statistics.max_length)
        own = self.settled(language_model, texts)
        told = {
            name: value for name, value in asdict(own).items() if name not in (own.dial, "minutes")
        }
        made = train(
            language_model,
            own.objective(language_model, texts),
            texts,
            own.training(len(texts.rows)),
            own={"method": own.name, **told},
            cache=statistics.cache,
        )
        return own, made

    def settled(self, language_model: LanguageModel, texts: Texts) -> Self:
        """The method with what its preset says of fields that are not given."""
        preset = self.presets[self.preset]
        given = {
            each.name: preset[each.name]
            for each in fields(self)
            if getattr(self, each.name) is None and each.name in preset
        }
        own = replace(self, **given)
        if own.steps is None:
            assert own.batch is not None
            steps = preset["epochs"] * math.ceil(len(texts.rows) / own.batch)
            own = replace(own, steps=steps)
        if own.learning_rate is None:
            size = typical_size(language_model, self.sites(language_model.anatomy), texts.texts)
            own = replace(own, learning_rate=preset["rate"] * size)
        return own

    def training(self, rows: int) -> Training:
        """The settings of a training on so many rows, of a method that is settled."""
        preset = self.presets[self.preset]
        assert self.steps is not None and self.batch is not None  # noqa: PT018
        assert self.learning_rate is not None and self.patience is not None  # noqa: PT018
        own = ("schedule", "warmup", "weight_decay", "clip")
        more = {name: preset[name] for name in own if name in preset}
        if "horizon_epochs" in preset:
            more["horizon"] = preset["horizon_epochs"] * math.ceil(rows / self.batch)
        return Training(
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            minutes=self.minutes,
            check_every=max(1, self.steps // 10),
            patience=self.patience,
            seed=self.seed,
            **more,
        )

    # -- for methods whose parameters are vectors that are added ----------------------------------

    def where(self, anatomy: Anatomy) -> dict[str, Any]:
        """What an objective of vectors is made of: the width of each site, and the positions."""
        widths = {site: anatomy.width(site) for site in self.sites(anatomy)}
        return {"widths": widths, "positions": self.positions}

    def adding(self, parameters: Mapping[str, Tensor]) -> list[Intervention]:
        """Adds each vector at the site that it is named after."""
        assert self.positions is not None
        scope = Scope.of(self.positions)
        return [Intervention(site, Add(vector), scope) for site, vector in parameters.items()]


class Vectors(Objective):
    """Trains a vector that is added at each site, named as the site."""

    def __init__(self, widths: Mapping[str, int], positions: Positions) -> None:
        self.widths, self.sites, self.positions = widths, tuple(widths), positions

    def change(self, parameters: Mapping[str, Tensor], site: str, x: Tensor, at: Steered) -> Tensor:
        return x + at.dials * parameters[site].to(x)


def training_in_words(steering: Steering) -> list[str]:
    """How long the training took, and what came of it."""
    told = steering.findings["training"]
    loss = told["loss"]
    lines = [
        f"It was trained on {told['rows']} rows for {told['steps']} steps ({told['seconds']:.0f} "
        f"s); the loss went from {loss['first']:.3g} to {loss['last']:.3g}."
    ]
    gains = told.get("validation_gain")
    if not gains:
        lines.append("The contrast had no validation rows: the last step's numbers are kept.")
        return lines
    best = gains[str(told["best_step"])]
    lines.append(
        f"On {told['validation_rows']} validation rows it gains most at step {told['best_step']}, "
        f"whose numbers are kept: {best:+.2f} nats per row."
    )
    if told["ended"] == "patience":
        lines.append("The training ended early, because the gain grew no more.")
    return lines
