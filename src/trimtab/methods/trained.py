"""What the trained methods share: the fields that say where and how long, and the way from a
contrast through the trainer to a steering.

Each has two presets: `small`, which ends within minutes on two cores, and `paper`, the authors'
own. A field that is given wins over the preset.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

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
from trimtab.steering import Dial, Intervention, Positions, Steering
from trimtab.training import Objective, Texts, Trained, Training, texts_of, train

OneOrMore = Annotated[int, Field(ge=1), Says("must be 1 or more, not {value}")]
AboveZero = Annotated[float, Field(gt=0), Says("must be above 0, not {value}")]
Value = TypeVar("Value")


@dataclass(frozen=True)
class TrainedMethod(Method):
    """The fields of every trained method, and how it is fitted."""

    layer: int | tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Blocks, as in 12 or 10-14, negative from the end (default: 40%)."},
    )
    site: Literal["resid", "attn_out", "ffn_out"] = field(
        default="resid", metadata={"help": "Which activations of a block."}
    )
    alpha: Number | None = field(
        default=None, metadata={"help": "Strength; the dial's default (default: measured)."}
    )
    positions: Positions = field(default="all", metadata={"help": POSITIONS_HELP})
    preset: Literal["small", "paper"] = field(
        default="small",
        metadata={
            "help": "Settings of the training that are not given: for a small model, within "
            "minutes, or the authors' own."
        },
    )
    steps: OneOrMore | None = field(
        default=None, metadata={"help": "Steps of the training (default: the preset's)."}
    )
    minutes: AboveZero | None = field(
        default=None, metadata={"help": "End the training after so many minutes."}
    )
    learning_rate: AboveZero | None = field(
        default=None, metadata={"help": "AdamW's (default: the preset's)."}
    )
    batch: OneOrMore | None = field(
        default=None, metadata={"help": "Rows of the contrast in a step (default: the preset's)."}
    )
    patience: Count = field(
        default=3,
        metadata={
            "help": "End after so many checks without a better gain on validation rows, of which "
            "there are ten; 0: never."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the order of rows, and of what is drawn."})

    unmeasured: ClassVar[float | None] = 1.0
    #: Of each preset: `learning_rate`, `batch`, `steps` or `epochs`, and what else `Training` has.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    @classmethod
    def grid(cls, layers: int) -> dict[str, Sequence[Any]]:
        return {"layer": tuple(range(layers)), "alpha": (0.5, 1.0, 2.0)}

    def sites(self, anatomy: Anatomy) -> list[str]:
        """The sites that are steered."""
        blocks = residual_sites(anatomy, self.layer)
        found = [site.replace("resid", self.site) for site in blocks]
        for site in found:
            anatomy.width(site)  # refuses what there is not
        return found

    def check(self) -> None:
        if self.layer == ():
            raise TrimtabError(f"{self.name}: layer is empty: name some, or leave it out")

    def wants(self, language_model: LanguageModel, contrast: Contrast) -> list[Want]:
        return []  # it runs the model itself

    @abstractmethod
    def objective(self, language_model: LanguageModel, texts: Texts) -> Objective:
        """What is trained, on some texts."""

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
        """Where the dial may stand as far as nothing is measured."""
        return (-20.0, 20.0)

    def or_preset(self, name: str) -> Any:
        """A field as it was given, or as the preset has it."""
        given = getattr(self, name)
        return self.presets[self.preset][name] if given is None else given

    def training(self, rows: int) -> Training:
        """The settings of a training on so many rows."""
        preset = dict(self.presets[self.preset])
        batch: int = self.or_preset("batch")
        of_epoch = math.ceil(rows / batch)
        steps = self.steps or preset.get("steps") or of_epoch * preset["epochs"]
        horizon = preset["horizon_epochs"] * of_epoch if "horizon_epochs" in preset else None
        known = {each.name for each in fields(Training)}
        own = {name: value for name, value in preset.items() if name in known}
        return Training(
            **{
                **own,
                "steps": steps,
                "batch": batch,
                "learning_rate": self.or_preset("learning_rate"),
                "horizon": None if self.steps else horizon,
                "minutes": self.minutes,
                "check_every": max(1, steps // 10),
                "patience": self.patience,
                "seed": self.seed,
            }
        )

    def build(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Steering:
        made = self.learn(language_model, contrast, statistics)
        interventions = self.interventions(made.parameters)
        dial = Dial(self.dial, self.at_default, self.dial_range)
        findings = {"training": made.findings, **self.further_findings(made)}
        tables = self.tables(made)
        return new_steering(self, language_model, contrast, interventions, dial, tables, findings)

    def tables(self, made: Trained) -> dict[str, Tensor]:
        """What it knows beside its interventions, tensors by name."""
        return {}

    def further_findings(self, made: Trained) -> dict[str, Any]:
        """What a method tells beside its training: JSON."""
        return {}

    def learn(
        self, language_model: LanguageModel, contrast: Contrast, statistics: Statistics
    ) -> Trained:
        """What the training gives; methods that differ in the dial alone share it."""
        own = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in (self.dial, "minutes")
        }
        key = (self.name, self.minutes, *own.items())
        return statistics.once(key, self._learning(language_model, contrast, statistics, own))

    def _learning(
        self,
        language_model: LanguageModel,
        contrast: Contrast,
        statistics: Statistics,
        own: dict[str, Any],
    ) -> Callable[[], Trained]:
        def learn() -> Trained:
            texts = self.texts(language_model, contrast, statistics.max_length)
            return train(
                language_model,
                self.objective(language_model, texts),
                texts,
                self.training(len(texts.rows)),
                own={"method": self.name, **own},
                cache=statistics.cache,
            )

        return learn

    @classmethod
    def explain(cls, steering: Steering) -> list[str]:
        return training_in_words(steering)


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
