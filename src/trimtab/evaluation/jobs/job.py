"""What all jobs have in common: what is asked of them, and who judges."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab.contrasts import Contrast, Part
from trimtab.evaluation.answering import Settings
from trimtab.evaluation.metrics.judges import Chat, Judge
from trimtab.evaluation.metrics.toxicity import Scorer
from trimtab.evaluation.prompted import Attached
from trimtab.evaluation.tasks import Protocol as TaskProtocol
from trimtab.figures import Record
from trimtab.model import LanguageModel
from trimtab.options import SPLIT, Split

#: A task by its name, or a contrast, which is the task contrast:NAME of its pairs.
Asked = str | Contrast
#: What of a job is there already: (protocol, index).
Done = set[tuple[str, int]]
#: What the record of each example says of it, whatever the model answers, by (protocol, index).
Planned = Mapping[tuple[str, int], Record]


@dataclass(frozen=True)
class Judging:
    """Who judges texts: toxicity by name or scorer, compliance by judges, pairs by a chat model."""

    toxicity: str | Scorer = "offline"
    judges: tuple[Judge, ...] = ()
    preference: Chat | None = None


class Job(Protocol):
    """What every job has."""

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]:
        """For the configuration of a run: the rows and where they come from."""

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""

    def planned(self, language_model: LanguageModel) -> Planned | None:
        """The examples; None where they are known only when it has run."""

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        """Records, a batch at a time."""


@dataclass(frozen=True)
class Wanted:
    """What of each task is evaluated."""

    protocols: tuple[TaskProtocol, ...] = ("trimtab",)
    part: Part = "test"
    limit: int | None = None
    data: str | None = None
    split: Split | str | None = SPLIT  # of a contrast whose rows name no part
    few_shot: int | None = None
    chat: bool = False  # lm-eval's prompts through the chat template
    task_files: tuple[str, ...] = ()
    answers: Path | None = None  # a directory for what lm-eval has asked already
