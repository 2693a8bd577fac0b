"""Answers that a model wrote, with how each went, and what it read while it wrote them.

A file of outcomes is JSON lines (or JSON, or CSV): `prompt`, `answer` (or `text`, or `output`) and
`outcome`, 0 or 1 or any score. The records.jsonl that `trimtab evaluate -o RUN` leaves is one, too:
its accuracy is the outcome, and what was written under a steering is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Edit, Enough, Point, hooked, site_order
from trimtab.contrasts import Prompt, read_prompt, read_table
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.files import json_digest, user_path
from trimtab.model import LanguageModel, batches_by_length, with_images
from trimtab.reading import run_upper
from trimtab.terminal import progress

_ANSWERS = ("answer", "text", "output")
_COLUMNS = ("prompt", *_ANSWERS, "outcome")


@dataclass(frozen=True)
class Outcomes:
    """Prompts, the answers that were written to them, and how each went, in the order of a file."""

    source: str
    prompts: tuple[Prompt, ...]
    answers: tuple[str, ...]
    values: Tensor  # [rows] float64

    @property
    def successful(self) -> Tensor:
        """Which went better than the mean: of 0 and 1 those of 1, [rows]."""
        return self.values > self.values.mean()

    @property
    def digest(self) -> str:
        """SHA-256 of the texts and outcomes."""
        rows = zip(self.prompts, self.answers, self.values.tolist(), strict=True)
        return json_digest([[str(prompt), answer, value] for prompt, answer, value in rows])


@dataclass(frozen=True)
class Written:
    """One answer as tokens: the `text` with its prompt, and the tokens at which it was written, the
    prompt's last and all of its own but the last, `first` to `end` - 1."""

    row: int
    text: Sequence[int]
    first: int
    end: int


def read_outcomes(source: str) -> Outcomes:
    """The rows of a file; raises TrimtabError for what is none, or where all went alike."""
    path = user_path(source)
    rows = read_table(path / "records.jsonl" if path.is_dir() else path, "the outcomes", _COLUMNS)
    kept = [
        (number, row) for number, row in enumerate(rows, 1) if row.get("steering") in (None, "")
    ]
    read = [_row(row, f"{source}, row {number}") for number, row in kept]
    if len(read) < len(rows):
        warnings.warn(
            f"{source}: {len(rows) - len(read)} answers were written under a steering, and are "
            "left out",
            TrimtabWarning,
            stacklevel=2,
        )
    values = torch.tensor([value for _, _, value in read], dtype=torch.float64)
    if len(values.unique()) < 2:
        raise TrimtabError(
            f"{source} has {len(values)} rows, and all went alike: a correlation needs answers "
            "that went well and answers that did not"
        )
    prompts, answers, _ = zip(*read, strict=True)
    return Outcomes(source, prompts, answers, values)


def _row(row: Mapping[str, Any], where: str) -> tuple[Prompt, str, float]:
    answer = next((row[name] for name in _ANSWERS if name in row), None)
    if "prompt" not in row or not isinstance(answer, str):
        raise TrimtabError(f"{where}: rows of outcomes have prompt, answer and outcome")
    values = row.get("values")
    outcome = row.get("outcome")
    if outcome is None and isinstance(values, Mapping):
        outcome = values.get("accuracy")
    with suppress(TypeError, ValueError):
        value = float(outcome)  # type: ignore[arg-type]  # CSV has text
        if math.isfinite(value):
            return read_prompt(row["prompt"], where), answer, value
    raise TrimtabError(f"{where}: the outcome must be a number, as 0 or 1, not {outcome!r}")


def written(language_model: LanguageModel, outcomes: Outcomes) -> list[Written]:
    """The answers as tokens; those of no token, and those that the model cannot take, are left out
    with a warning."""
    lm = language_model
    starts = lm.encode(outcomes.prompts)
    texts = lm.encode(outcomes.prompts, outcomes.answers)
    found = []
    for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
        pairs = zip(start, text, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(start), len(text)))
        if 1 <= common < len(text) <= lm.max_length:
            found.append(Written(row, text, common - 1, len(text) - 1))
    if len(found) < len(texts):
        warnings.warn(
            f"{outcomes.source}: {len(texts) - len(found)} of {len(texts)} answers are empty, or "
            f"with their prompt longer than {lm.max_length} tokens: they are left out",
            TrimtabWarning,
            stacklevel=2,
        )
    if len({float(outcomes.values[each.row]) for each in found}) < 2:
        raise TrimtabError(f"{outcomes.source}: no answers are left that went differently")
    return found


def read_texts(
    language_model: LanguageModel, sites: Sequence[str], texts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Activations of texts (token ids) at some sites, text by text in any order: its number, and
    [tokens, units] by site. Blocks above the last site do not run."""
    lm = language_model
    places = sorted(set(sites), key=site_order)
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Edit:
        def read(activation: Tensor) -> None:
            seen[site] = activation.detach()
            if site == places[-1]:
                raise Enough

        return read

    edits: dict[Point, Edit] = {lm.anatomy.read_point(site): keep(site) for site in places}
    batches = batches_by_length(list(map(len, texts)), lm.batch_tokens, apart=with_images(texts))
    with progress("reading answers", len(texts)) as advance:
        for rows in batches:
            seen.clear()
            with torch.no_grad(), hooked(lm.anatomy.body, edits), suppress(Enough):
                run_upper(lm, [texts[i] for i in rows], [], 0)
            for line, i in enumerate(rows):
                yield i, {site: seen[site][line, : len(texts[i])] for site in places}
            advance(len(rows))
