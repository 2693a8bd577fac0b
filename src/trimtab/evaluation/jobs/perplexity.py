"""Cross-entropy and perplexity of any text."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.answering import Settings, next_tokens_by
from trimtab.evaluation.jobs.job import Attached, Done, Planned, Wanted
from trimtab.evaluation.prompted import steering_of, with_words
from trimtab.figures import Record
from trimtab.files import file_digest, read_jsonl, user_path
from trimtab.model import LanguageModel
from trimtab.reading import Reading
from trimtab.terminal import progress

#: Tokens of text that are scored together; the first of them is only read.
_WINDOW = 1024


@dataclass(frozen=True)
class PerplexityJob:
    """Cross-entropy of a text file (.txt; `by_line` a text a line), or of the column `text` of a
    JSONL file.

    Long texts are scored in windows that do not overlap, each of which begins with the BOS that
    the text begins with; a window is a record that weighs as many tokens as it scores. To a
    steering that tells prompt from answer a text is answer, from the second token on.
    """

    name: str
    file: str
    wanted: Wanted
    by_line: bool = False
    texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        path = user_path(self.file)
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
                text = path.read_text(encoding="utf-8-sig")
                texts = text.splitlines() if self.by_line else [text]
            except UnicodeDecodeError as error:
                raise TrimtabError(f"{path} is not UTF-8 text: {error}") from error
        texts = [text for text in texts if text.strip()][: self.wanted.limit]
        if not texts:
            raise TrimtabError(f"{path} has no text")
        object.__setattr__(self, "texts", texts)

    def describe(self) -> dict[str, Any]:
        path = user_path(self.file)
        return {"task": self.name, "rows": len(self.texts), "sha256": file_digest(path)}

    def notes(self) -> list[str]:
        return []

    def planned(self, language_model: LanguageModel) -> Planned:
        return {
            ("", index): {"id": name, "weight": len(reading.targets or ())}
            for index, (name, reading) in enumerate(self._windows(language_model))
        }

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        windows = self._windows(language_model)
        readings = with_words(language_model, steering, [reading for _, reading in windows])
        with progress(self.name, len(windows)) as advance:
            started = time.perf_counter()
            waited = 0.0
            # What is kept of prompts is not for long texts.
            plain = replace(settings, kept=None)
            for batch, found in next_tokens_by(
                language_model,
                readings,
                steering_of(steering),
                lambda i: ("", i) not in done,
                plain,
            ):
                waited += time.perf_counter() - started
                if not batch.rows:  # others have their turn
                    yield []
                    started = time.perf_counter()
                    continue
                seconds, waited = waited / len(batch.rows), 0.0
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
