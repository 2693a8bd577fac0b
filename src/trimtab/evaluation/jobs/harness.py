"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.answering import Settings
from trimtab.evaluation.jobs.job import Attached, Done, Planned, Wanted
from trimtab.evaluation.prompted import steering_of, words_of
from trimtab.figures import Record
from trimtab.files import file_digest
from trimtab.model import LanguageModel


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
        from trimtab.evaluation.harness.local_rows import local_task_files

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

    def planned(self, language_model: LanguageModel) -> Planned | None:
        return None  # lm-eval's own, which it makes as it runs

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        from trimtab.evaluation.harness.local_rows import local_task_files
        from trimtab.evaluation.harness.model import TrimtabLM
        from trimtab.evaluation.harness.run import run_task

        if words_of(steering) is not None:
            raise TrimtabError(f"{self.name} makes its own prompts, before which nothing is put")
        started = time.perf_counter()
        model = TrimtabLM(
            language_model,
            steering_of(steering),
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
        strange = done - {("", record["index"]) for record in records}
        if strange:
            number = min(index for _, index in strange)
            raise TrimtabError(
                f"the run has a record of {self.name} with index {number}, which is none of its "
                "examples: delete it, or choose another directory"
            )
        yield [record for record in records if ("", record["index"]) not in done]

    def _answers(self) -> Path | None:
        """Where answers are kept, by who was asked what, so that they are not lost."""
        if self.wanted.answers is None:
            return None
        task = "".join(c if c.isalnum() else "_" for c in self.task)
        return self.wanted.answers / f"lm-eval-{task}.jsonl"
