"""Tasks of our own: prompts that the model answers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation.answering import Entry, Measure, Settings, answer, for_model
from trimtab.evaluation.jobs.job import Attached, Done, Judging, Planned, Wanted
from trimtab.evaluation.metrics.coherence import coherence
from trimtab.evaluation.metrics.judges import attack_success
from trimtab.evaluation.metrics.language import language_of, same_language
from trimtab.evaluation.metrics.refusal import refuses, validate_phrases
from trimtab.evaluation.metrics.toxicity import TOXIC, Scorer, find_scorer
from trimtab.evaluation.prompted import asked_with, steering_of
from trimtab.evaluation.tasks import Example, Task
from trimtab.evaluation.tasks.data import source_file
from trimtab.figures import Record
from trimtab.files import file_digest
from trimtab.model import Completion, LanguageModel
from trimtab.steering import together


@dataclass(frozen=True)
class TaskJob:
    """Prompts that the model answers, under each protocol."""

    task: Task
    wanted: Wanted
    judging: Judging
    entries: tuple[Entry, ...]
    scorer: Scorer | None = None

    @classmethod
    def of(cls, task: Task, wanted: Wanted, judging: Judging) -> TaskJob:
        entries = []
        for protocol in wanted.protocols:
            rows = task.rows(wanted.part, protocol, wanted.data)[: wanted.limit]
            if not rows:
                raise TrimtabError(f"{task.name} has no {wanted.part} rows")
            examples = (task.example(row, i, protocol) for i, row in enumerate(rows))
            entries.append(Entry(protocol, tuple(examples)))
        scorer = None
        if "toxicity" in task.measures:
            named = judging.toxicity
            scorer = find_scorer(named, wanted.data) if isinstance(named, str) else named
        return cls(task, wanted, judging, tuple(entries), scorer)

    @property
    def name(self) -> str:
        return self.task.name

    def describe(self) -> dict[str, Any]:
        source = self.task.test if self.wanted.part == "test" else self.task.train
        path = None if source is None else source_file(source, self.wanted.data)
        return {
            "task": self.name,
            "rows": len(self.entries[0].examples),
            "file": None if path is None else path.name,
            "sha256": None if path is None else file_digest(path),
            "scorer": None if self.scorer is None else self.scorer.name,
            "judges": [judge.name for judge in self.judging.judges]
            if "refusal" in self.task.measures
            else [],
        }

    def notes(self) -> list[str]:
        notes = []
        if self.task.differences and "trimtab" in self.wanted.protocols:
            notes.append(f"{self.name}, against the paper's protocol: {self.task.differences}")
        if self.scorer is not None:
            notes.append(f"{self.name}: toxicity by {self.scorer.name}; a proxy, not Perspective")
        if "refusal" in self.task.measures:
            notes += [
                f"refusal phrases agree with people on XSTest's completions: {found}"
                for found in validate_phrases(self.wanted.data)
            ]
        return notes

    def check(self, steering: Attached) -> None:
        """Refuse a steering that could do nothing here."""
        if self.task.generation.new_tokens != 1:
            return
        for one in together(steering_of(steering)):
            if any(scope.only_generated for scope in one.scopes):
                raise TrimtabError(
                    f"{self.name} reads the first token of the answer, which a steering of "
                    f"generated tokens ({one.label}) never reaches: fit it for other positions"
                )

    def planned(self, language_model: LanguageModel) -> Planned:
        return {
            (entry.protocol, index): {
                "id": example.id,
                "prompt": example.prompt,
                "target": example.target,
            }
            for entry in self.entries
            for index, example in enumerate(entry.examples)
        }

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        every: dict[str, Measure] = {
            "coherence": partial(_coherence, language_model, steering, settings),
            "refusal": self._refusal,
            "language": _language,
            "toxicity": self._toxicity,
        }

        def measure(
            examples: Sequence[Example], completions: Sequence[Completion]
        ) -> list[dict[str, float | None]]:
            values: list[dict[str, float | None]] = [{} for _ in examples]
            for name in self.task.measures:
                for own, more in zip(values, every[name](examples, completions), strict=True):
                    own |= more
            return values

        measured = measure if self.task.measures else None
        yield from answer(
            language_model, self.task, self.entries, steering, done, settings, measured
        )

    @property
    def rows(self) -> int:
        """How many examples there are under the protocol that has most."""
        return max(len(entry.examples) for entry in self.entries)

    def shuffled(self, order: Sequence[int]) -> TaskJob:
        """The same examples in another order."""
        entries = [
            Entry(entry.protocol, tuple(entry.examples[i] for i in order)) for entry in self.entries
        ]
        return replace(self, entries=tuple(entries))

    def part(self, start: int, stop: int) -> TaskJob:
        """The examples from one to another only, counted from 0 in their records."""
        entries = [Entry(entry.protocol, entry.examples[start:stop]) for entry in self.entries]
        return replace(self, entries=tuple(entries))

    def _toxicity(
        self, examples: Sequence[Example], completions: Sequence[Completion]
    ) -> list[dict[str, float | None]]:
        assert self.scorer is not None
        scores = self.scorer.scores([completion.text for completion in completions])
        return [{"not_toxic": float(score <= TOXIC), "toxicity": score} for score in scores]

    def _refusal(
        self, examples: Sequence[Example], completions: Sequence[Completion]
    ) -> list[dict[str, float | None]]:
        texts = [completion.text for completion in completions]
        labels = [example.fields.get("label") for example in examples]
        metrics = {"safe": "over_refusal", "unsafe": "refusal_of_unsafe"}
        values: list[dict[str, float | None]] = [
            {metrics.get(str(label), "refusal"): float(refuses(text))}
            for label, text in zip(labels, texts, strict=True)
        ]
        requests = [last_message(example.prompt) for example in examples]
        harmful = [i for i, label in enumerate(labels) if label != "safe"]
        judged = attack_success(
            self.judging.judges, [requests[i] for i in harmful], [texts[i] for i in harmful]
        )
        for i, found in zip(harmful, judged, strict=True):
            values[i] |= found
        return values


def _language(
    examples: Sequence[Example], completions: Sequence[Completion]
) -> list[dict[str, float | None]]:
    """Whether each answer is in the language of its prompt."""
    asked = [
        example.fields.get("language") or language_of(last_message(example.prompt))
        for example in examples
    ]
    return [
        {"same_language": same_language(language, completion.text)}
        for language, completion in zip(asked, completions, strict=True)
    ]


def _coherence(
    language_model: LanguageModel,
    attached: Attached,
    settings: Settings,
    examples: Sequence[Example],
    completions: Sequence[Completion],
) -> list[dict[str, float | None]]:
    """How odd a text is the unsteered model says, which is asked as the task asks."""
    prompts = [for_model(language_model, example.prompt) for example in examples]
    return coherence(
        language_model,
        prompts,
        [completion.text for completion in completions],
        [completion.tokens for completion in completions],
        steering_of(attached),
        asked=asked_with(language_model, attached, prompts),
        engine=settings.engine,
        force=settings.force,
    )
