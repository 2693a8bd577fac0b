"""What a method hands to the trainer: parameters, what they do, the runs of a row, and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from trimtab.steering import Positions
from trimtab.training.texts import Text


@dataclass(frozen=True)
class Run:
    """One pass of a text (by its number) under the operators at a dial. `role` is the method's own
    word for runs that its operators treat otherwise."""

    text: int
    dial: float = 1.0
    role: str = ""


@dataclass(frozen=True)
class Steered:
    """The runs of a pass and their tokens; texts are padded on the right."""

    runs: tuple[Run, ...]
    texts: tuple[Text, ...]  # one of each run
    weights: Tensor  # [runs, tokens] how much of the dial a token gets: 0 where it is left alone
    answers: Tensor  # [runs, tokens] true at the tokens of the answer
    #: The share of all steps that is done.
    progress: float = 0.0
    #: What operators note on the way, for the loss.
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steered(self) -> Tensor:
        """Which tokens are steered, [runs, tokens]."""
        return self.weights != 0

    @property
    def dials(self) -> Tensor:
        """The dial of each token, [runs, tokens, 1]: its run's times the weight of its scope."""
        own = torch.tensor([run.dial for run in self.runs]).to(self.weights)
        return (own[:, None] * self.weights)[..., None]

    def last(self, tokens: int, device: torch.device) -> Steered:
        """The same of the last tokens only, on a device: layers that read others' keys see a
        text's last tokens alone."""
        weights, answers = (x[:, -tokens:].to(device) for x in (self.weights, self.answers))
        return replace(self, weights=weights, answers=answers)

    def has_role(self, role: str) -> Tensor:
        """Which runs have a role, [runs]."""
        return torch.tensor([run.role == role for run in self.runs], device=self.weights.device)


@dataclass(frozen=True)
class Outcome:
    """What came out of the runs of some rows, those of a row side by side."""

    at: Steered
    log_p: Tensor  # [runs] summed log-probabilities of the answer's tokens in nats
    #: The same without operators, [runs]; where the objective asks for it.
    reference: Tensor
    #: Activations at the sites that the objective reads, [runs, tokens, units] after the operators.
    seen: Mapping[str, Tensor]
    rows: int

    @property
    def lengths(self) -> Tensor:
        """How many tokens each run's answer has, [runs]."""
        return torch.tensor([len(text.answer) for text in self.at.texts]).to(self.log_p)

    @property
    def text_lengths(self) -> Tensor:
        """How many tokens each run's prompt and answer have together, [runs]."""
        return torch.tensor([len(text) for text in self.at.texts]).to(self.log_p)

    def by_row(self, of_runs: Tensor) -> Tensor:
        """[runs] as [rows, runs of a row]."""
        return of_runs.view(self.rows, -1)


class Objective(ABC):
    """What is trained. A method makes one for a model and a contrast."""

    #: Whether `Outcome.reference` is needed; it is computed once for each text and kept.
    refers: ClassVar[bool] = False

    #: Where operators act.
    sites: tuple[str, ...]
    #: At which tokens.
    positions: Positions
    #: Sites whose activations the loss is made of.
    reads: tuple[str, ...] = ()

    @abstractmethod
    def start(self, generator: Generator) -> dict[str, Tensor]:
        """The parameters before the first step, by name, float32."""

    @abstractmethod
    def draw(self, rows: Sequence[tuple[int, ...]], generator: Generator) -> list[list[Run]]:
        """The runs that each row of a batch asks for, equally many of every row. `rows` are numbers
        of texts; whatever is drawn by chance comes from the generator."""

    @abstractmethod
    def change(self, parameters: Mapping[str, Tensor], site: str, x: Tensor, at: Steered) -> Tensor:
        """What becomes of activations at a site, [runs, tokens, units] in float32 (of a float64
        model in float64). The trainer leaves tokens that are not steered as they were."""

    @abstractmethod
    def loss(self, parameters: Mapping[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
        """Figures of each row, [rows]. The mean of "loss" over a batch is what goes down; others
        are recorded."""

    def tidy(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027, most need none
        """Put parameters right in place after a step, where they must keep to something."""

    def judged(self, text: int) -> Run:
        """The run by which a text of a held-out row is judged."""
        return Run(text)
