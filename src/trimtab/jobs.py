"""The work of an evaluation, one job for each task: what its records are and how they are made.

Every job has a `name`, says what it is for the record (`describe`), and `run`s: records of one
model, steered or not, a batch at a time, without those that are there already.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from trimtab.answering import Entry, Measure, Settings, answer
from trimtab.contrasts import Contrast, Pair, Part, last_message
from trimtab.errors import TrimtabError
from trimtab.metrics.coherence import coherence
from trimtab.metrics.judges import Chat, Judge, attack_success
from trimtab.metrics.likelihood import side_readings
from trimtab.metrics.refusal import refuses, validate_phrases
from trimtab.metrics.toxicity import TOXIC, Scorer, find_scorer
from trimtab.model import Completion, LanguageModel
from trimtab.next_tokens import Reading, next_tokens, plan
from trimtab.progress import progress
from trimtab.steering import Steering, Steerings, together
from trimtab.tasks import Example, Task, find_task
from trimtab.tasks import Protocol as TaskProtocol
from trimtab.tasks.data import file_digest, read_jsonl, source_file

Record = dict[str, Any]
Attached = Steering | Steerings | None
#: What of a job is there already: (protocol, index).
Done = set[tuple[str, int]]


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
    few_shot: int | None = None
    chat: bool = False  # lm-eval's prompts through the chat template
    task_files: tuple[str, ...] = ()
    answers: Path | None = None  # a directory for what lm-eval has asked already


def find_job(name: str, wanted: Wanted, judging: Judging) -> Job:
    """The job of a task by its name."""
    kind, colon, rest = name.partition(":")
    if colon and kind == "lm-eval":
        return HarnessJob(name, rest, wanted)
    if colon and kind == "perplexity":
        return PerplexityJob(name, rest, wanted)
    if colon and kind == "contrast":
        return PreferenceJob.of(name, rest, wanted)
    return TaskJob.of(find_task(name, wanted.data), wanted, judging)


# -- tasks of our own -----------------------------------------------------------------------------


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
        for one in together(steering):
            if any(each.positions == "generated" for each in one.interventions):
                raise TrimtabError(
                    f"{self.name} reads the first token of the answer, which a steering of "
                    f"generated tokens ({one.label}) never reaches: fit it for other positions"
                )

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        every: dict[str, Measure] = {
            "coherence": partial(_coherence, language_model, steering, settings.force),
            "refusal": self._refusal,
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


def _coherence(
    language_model: LanguageModel,
    steering: Attached,
    force: bool,
    examples: Sequence[Example],
    completions: Sequence[Completion],
) -> list[dict[str, float | None]]:
    return coherence(
        language_model,
        [completion.prompt for completion in completions],
        [completion.text for completion in completions],
        [completion.tokens for completion in completions],
        steering,
        force=force,
    )


# -- preference between the sides of a contrast ---------------------------------------------------


@dataclass(frozen=True)
class PreferenceJob:
    """Which side of each pair of a contrast's part the model finds more probable, and by how many
    nats (log-odds of the positive side). `numbers` are those of the pairs' rows in the contrast,
    from 1."""

    name: str
    wanted: Wanted
    pairs: tuple[Pair, ...]
    numbers: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, name: str, source: str, wanted: Wanted) -> PreferenceJob:
        contrast = Contrast.load(source, data=wanted.data)
        if not contrast.paired:
            raise TrimtabError(f"{source} is unpaired: a preference is between the sides of a pair")
        chosen = contrast.part(wanted.part)
        numbers = [n for n, pair in enumerate(contrast.pairs, 1) if pair.part == wanted.part]
        limit = wanted.limit
        return cls(name, wanted, chosen.pairs[:limit], tuple(numbers[:limit]), chosen.digest)

    @property
    def rows(self) -> int:
        """How many pairs there are."""
        return len(self.pairs)

    def shuffled(self, order: Sequence[int]) -> PreferenceJob:
        """The same pairs in another order."""
        pairs = tuple(self.pairs[i] for i in order)
        return replace(self, pairs=pairs, numbers=tuple(self.numbers[i] for i in order))

    def part(self, start: int, stop: int) -> PreferenceJob:
        """The pairs from one to another only, counted from 0 in their records."""
        return replace(self, pairs=self.pairs[start:stop], numbers=self.numbers[start:stop])

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, "rows": len(self.pairs), "sha256": self.digest}

    def notes(self) -> list[str]:
        return []

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        missing = {i for i in range(len(self.pairs)) if ("", i) not in done}
        if not missing:
            return
        readings = side_readings(language_model, Contrast(self.pairs, self.name))
        batches = [
            batch
            for batch in plan(readings, language_model.batch_tokens)
            if any(i // 2 in missing for i in batch.rows)
        ]
        scores: dict[int, float] = {}
        with progress(self.name, len(missing)) as advance:
            started = time.perf_counter()
            for batch, found in next_tokens(
                language_model,
                readings,
                batches,
                steering,
                kept=settings.kept,
                force=settings.force,
            ):
                scores |= {
                    i: float(each.log_p.sum()) for i, each in zip(batch.rows, found, strict=True)
                }
                # The sides of a pair may be in different batches.
                ready = [
                    i
                    for i in sorted({row // 2 for row in batch.rows} & missing)
                    if 2 * i in scores and 2 * i + 1 in scores
                ]
                if ready:
                    missing -= set(ready)
                    seconds = (time.perf_counter() - started) / len(ready)
                    yield [
                        self._record(i, scores[2 * i] - scores[2 * i + 1], seconds) for i in ready
                    ]
                    advance(len(ready))
                    started = time.perf_counter()

    def _record(self, i: int, log_odds: float, seconds: float) -> Record:
        pair = self.pairs[i]
        return {
            "task": self.name,
            "protocol": "",
            "index": i,
            "id": str(self.numbers[i]),
            "prompt": pair.prompt,
            "output": pair.positive if log_odds > 0 else pair.negative,
            "target": pair.positive,
            "values": {"log_odds": log_odds, "prefers": float(log_odds > 0)},
            "seconds": round(seconds, 4),
        }


# -- perplexity of any text -----------------------------------------------------------------------

#: Tokens of text that are scored together; the first of them is only read.
_WINDOW = 1024


@dataclass(frozen=True)
class PerplexityJob:
    """Cross-entropy of a text file (.txt), or of the column `text` of a JSONL file.

    Long texts are scored in windows that do not overlap, each of which begins with the BOS that
    the text begins with; a window is a record that weighs as many tokens as it scores. To a
    steering that tells prompt from answer a text is answer, from the second token on.
    """

    name: str
    file: str
    wanted: Wanted
    texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        path = Path(self.file).expanduser()
        if not path.is_file():
            raise TrimtabError(f"no such file of text: {self.file}")
        if path.suffix == ".jsonl":
            texts = []
            for number, row in enumerate(read_jsonl(path), 1):
                if not isinstance(row.get("text"), str):
                    raise TrimtabError(f"{path}, row {number}: 'text' is missing")
                texts.append(row["text"])
        else:
            try:
                texts = [path.read_text(encoding="utf-8-sig")]
            except UnicodeDecodeError as error:
                raise TrimtabError(f"{path} is not UTF-8 text: {error}") from error
        texts = [text for text in texts if text.strip()][: self.wanted.limit]
        if not texts:
            raise TrimtabError(f"{path} has no text")
        object.__setattr__(self, "texts", texts)

    def describe(self) -> dict[str, Any]:
        path = Path(self.file).expanduser()
        return {"task": self.name, "rows": len(self.texts), "sha256": file_digest(path)}

    def notes(self) -> list[str]:
        return []

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        windows = self._windows(language_model)
        readings = [reading for _, reading in windows]
        batches = [
            batch
            for batch in plan(readings, language_model.batch_tokens)
            if any(("", i) not in done for i in batch.rows)
        ]
        with progress(self.name, len(windows)) as advance:
            started = time.perf_counter()
            for batch, found in next_tokens(
                language_model, readings, batches, steering, force=settings.force
            ):
                seconds = (time.perf_counter() - started) / len(batch.rows)
                yield [
                    {
                        "task": self.name,
                        "protocol": "",
                        "index": i,
                        "id": windows[i][0],
                        "weight": len(each.log_p),
                        "values": {"cross_entropy": -float(each.log_p.mean())},
                        "seconds": round(seconds, 4),
                    }
                    for i, each in zip(batch.rows, found, strict=True)
                    if ("", i) not in done
                ]
                advance(len(batch.rows))
                started = time.perf_counter()

    def _windows(self, language_model: LanguageModel) -> list[tuple[str, Reading]]:
        length = min(_WINDOW, language_model.max_length - 1)  # and a BOS
        windows = []
        for number, tokens in enumerate(language_model.encode(self.texts)):
            for start in range(0, len(tokens) - 1, length):
                # The first token is only read, and in later windows what it follows is gone.
                bos = tokens[:1] if start and tokens[0] == language_model.bos else []
                piece = (*bos, *tokens[start : start + length + 1])
                first = len(bos)
                asked = tuple(range(first, len(piece) - 1))
                reading = Reading(piece[:-1], asked, first + 1, piece[first + 1 :])
                windows.append((f"text {number + 1}, token {start + 1}", reading))
        if not windows:
            raise TrimtabError(f"{self.file}: the texts are too short to score")
        return windows


# -- tasks of lm-eval -----------------------------------------------------------------------------


def _digest_of(directories: Sequence[Path], pattern: str) -> str:
    """SHA-256 over the names and contents of files in directories, for the configuration."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(directory)} {file_digest(path)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class HarnessJob:
    """A task of lm-evaluation-harness, on local rows where the data directory has them."""

    name: str
    task: str
    wanted: Wanted

    def __post_init__(self) -> None:
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise TrimtabError(f"{self.name} needs lm-eval: pip install 'trimtab[eval]'") from error
        if self.wanted.part != "test":
            raise TrimtabError(f"{self.name} has no part but the one that lm-eval tests on")

    def describe(self) -> dict[str, Any]:
        from trimtab.tasks.capability import local_task_files

        with tempfile.TemporaryDirectory() as room:
            local = local_task_files(self.task, self.wanted.data, Path(room))
            rows = _digest_of([Path(room)], "*.jsonl") if local else None
        return {
            "task": self.name,
            "lm_eval": version("lm-eval"),
            "few_shot": self.wanted.few_shot,
            "chat": self.wanted.chat,
            "rows": rows,
            "task_files": _digest_of([Path(one) for one in self.wanted.task_files], "*"),
        }

    def notes(self) -> list[str]:
        return []

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        from trimtab.lm_eval import TrimtabLM
        from trimtab.lm_eval_tasks import run_task
        from trimtab.tasks.capability import local_task_files

        started = time.perf_counter()
        model = TrimtabLM(
            language_model,
            steering,
            batch_size=settings.batch_size,
            answers=self._answers(),
            force=settings.force,
        )
        with tempfile.TemporaryDirectory() as room:
            local = local_task_files(self.task, self.wanted.data, Path(room))
            records = run_task(
                self.task,
                model,
                limit=self.wanted.limit,
                few_shot=self.wanted.few_shot,
                # Later ones override earlier ones: the user's own come last.
                task_files=[*([room] if local else []), *self.wanted.task_files],
                chat=self.wanted.chat,
                seed=settings.seed,
            )
        seconds = (time.perf_counter() - started) / max(1, len(records))
        for record in records:
            record |= {"task": self.name, "protocol": "", "seconds": round(seconds, 4)}
        yield [record for record in records if ("", record["index"]) not in done]

    def _answers(self) -> Path | None:
        """Where answers are kept, by who was asked what, so that they are not lost."""
        if self.wanted.answers is None:
            return None
        task = "".join(c if c.isalnum() else "_" for c in self.task)
        return self.wanted.answers / f"lm-eval-{task}.jsonl"
