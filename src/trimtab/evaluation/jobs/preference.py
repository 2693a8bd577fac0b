"""Preference between the sides of a contrast's pairs."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.contrasts import Contrast, Pair, shared_rows
from trimtab.errors import TrimtabError
from trimtab.evaluation.answering import Settings, next_tokens_by
from trimtab.evaluation.jobs.job import Attached, Done, Planned, Wanted
from trimtab.evaluation.prompted import asked_with, steering_of
from trimtab.evaluation.tasks import load_contrast
from trimtab.figures import Record
from trimtab.model import LanguageModel
from trimtab.reading import Reading, side_readings
from trimtab.steering import together
from trimtab.terminal import progress


@dataclass(frozen=True)
class PreferenceJob:
    """Which side of each pair of a contrast's part the model finds more probable, and by how many
    nats (log-odds of the positive side). `numbers` are those of the pairs' rows in the contrast,
    from 1. Where its rows name no part, they are given one as `Contrast.with_parts` says; where
    they are too few for that, all of them are train rows."""

    name: str
    wanted: Wanted
    pairs: tuple[Pair, ...]
    numbers: tuple[int, ...]
    digest: str
    contrast: Contrast

    @classmethod
    def of(cls, name: str, source: str | Contrast, wanted: Wanted) -> PreferenceJob:
        contrast = load_contrast(source, data=wanted.data).with_parts(wanted.split)
        if not contrast.paired:
            raise TrimtabError(
                f"{contrast.name} is unpaired: a preference is between the sides of a pair"
            )
        chosen = _chosen(contrast, wanted)
        numbers = [
            n for n, pair in enumerate(contrast.pairs, 1) if pair.part == chosen.rows[0].part
        ]
        limit = wanted.limit
        return cls(
            name, wanted, chosen.pairs[:limit], tuple(numbers[:limit]), chosen.digest, contrast
        )

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
        drawn = self.contrast.drawn
        split = {} if drawn is None else {"split": str(drawn)}
        return {"task": self.name, "rows": len(self.pairs), "sha256": self.digest, **split}

    def notes(self) -> list[str]:
        said = self.contrast.drawn_in_words
        return [said] if said else []

    def trained(self, steering: Attached) -> str:
        """That a steering was fitted on some of these pairs, which are to say how it does on
        others; or nothing."""
        if self.wanted.part == "train":
            return ""
        for one in together(steering_of(steering)):
            known = self.contrast.fitted_rows(one.contrast)
            count = shared_rows(self.pairs, known)
            # Parts that were drawn are others where the file has changed since.
            changed = self.contrast.drawn and not known and self.contrast.name != Contrast.name
            if changed and one.contrast.get("name") == self.contrast.name:
                return (
                    f"{one.label} was fitted on other rows of {self.contrast.name} than those that "
                    f"are there now: how many of the {len(self.pairs)} {self.wanted.part} pairs it "
                    "has seen cannot be told; fit it anew"
                )
            if count:
                return (
                    f"{one.label} was fitted on {count} of the {len(self.pairs)} "
                    f"{self.wanted.part} pairs of {self.name}: what it does there says nothing of "
                    "pairs that it has not seen; fit it on the train pairs of the same split"
                )
        return ""

    def planned(self, language_model: LanguageModel) -> Planned:
        return {
            ("", index): {"id": str(number), "prompt": pair.prompt, "target": pair.positive}
            for index, (pair, number) in enumerate(zip(self.pairs, self.numbers, strict=True))
        }

    def readings(self, language_model: LanguageModel, attached: Attached = None) -> list[Reading]:
        """Both sides of each pair, with what is said before its prompt."""
        asked = asked_with(language_model, attached, [pair.prompt for pair in self.pairs])
        pairs = (replace(pair, prompt=p) for pair, p in zip(self.pairs, asked, strict=True))
        return side_readings(language_model, Contrast(tuple(pairs), self.name))

    def run(
        self, language_model: LanguageModel, steering: Attached, done: Done, settings: Settings
    ) -> Generator[list[Record]]:
        missing = {i for i in range(len(self.pairs)) if ("", i) not in done}
        if not missing:
            return
        readings = self.readings(language_model, steering)
        scores: dict[int, float] = {}
        waited = 0.0
        with progress(self.name, len(missing)) as advance:
            started = time.perf_counter()
            for batch, found in next_tokens_by(
                language_model,
                readings,
                steering_of(steering),
                lambda i: i // 2 in missing,
                settings,
            ):
                if not batch.rows:  # others have their turn
                    waited += time.perf_counter() - started
                    yield []
                    started = time.perf_counter()
                    continue
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
                    seconds = (waited + time.perf_counter() - started) / len(ready)
                    waited = 0.0
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


def _chosen(contrast: Contrast, wanted: Wanted) -> Contrast:
    """The rows of the part that is wanted."""
    if contrast.has_parts:
        return contrast.part(wanted.part)
    if wanted.part == "train":
        return contrast
    why = contrast.too_few or "there is no split"
    raise TrimtabError(
        f"{contrast.name} has no {wanted.part} rows, and {why}: name parts in its rows, as "
        "`trimtab contrast split` does, or take the train rows, which are all of them"
    )
