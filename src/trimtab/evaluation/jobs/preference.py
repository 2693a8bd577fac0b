"""Preference between the sides of a contrast's pairs."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.contrasts import Contrast, Pair
from trimtab.errors import TrimtabError
from trimtab.evaluation.answering import Settings
from trimtab.evaluation.jobs.job import Attached, Done, Planned, Wanted
from trimtab.evaluation.tasks import load_contrast
from trimtab.figures import Record
from trimtab.model import LanguageModel
from trimtab.reading import next_tokens, side_readings
from trimtab.terminal import progress


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
        contrast = load_contrast(source, data=wanted.data)
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

    def planned(self, language_model: LanguageModel) -> Planned:
        return {
            ("", index): {"id": str(number), "prompt": pair.prompt, "target": pair.positive}
            for index, (pair, number) in enumerate(zip(self.pairs, self.numbers, strict=True))
        }

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        missing = {i for i in range(len(self.pairs)) if ("", i) not in done}
        if not missing:
            return
        readings = side_readings(language_model, Contrast(self.pairs, self.name))
        scores: dict[int, float] = {}
        with progress(self.name, len(missing)) as advance:
            started = time.perf_counter()
            for batch, found in next_tokens(
                language_model,
                readings,
                steering,
                missing=lambda i: i // 2 in missing,
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
                    missing.difference_update(ready)
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
