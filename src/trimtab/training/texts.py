"""The texts of a contrast as the trainer reads them: token ids, and where each one's answer begins.

A text is kept once; rows name texts by their numbers, the positive one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, frozen
from trimtab.reading import Packed, encode_contrast, scored_from


@dataclass(frozen=True)
class Text:
    """Token ids; those from `start` on are its answer, which is scored."""

    tokens: Any  # a tuple of ids, or an ImageText
    start: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answer(self) -> tuple[int, ...]:
        return tuple(self.tokens)[self.start :]


@dataclass(frozen=True)
class Texts:
    """What is trained on: `rows` of numbers of texts, and rows that are `held_out`, on which the
    training is judged. Of a row the first text is the positive one, a second the negative one."""

    texts: tuple[Text, ...]
    rows: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...] = ()


def texts_of(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None = None
) -> Texts:
    """Both sides of every pair, of the contrast's train part and of its validation part."""
    if not contrast.paired:
        raise TrimtabError(
            f"{contrast.name} is unpaired, and this method is trained on the two answers of a "
            "pair: give it rows with prompt, positive and negative"
        )
    rows = _pairs(language_model, contrast.train, max_length)
    return numbered(rows, _held_out(language_model, contrast, max_length))


def positive_texts(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None = None
) -> Texts:
    """The positive side of every row of the train part, and the validation part, of pairs both
    sides. Of unpaired texts all tokens but the first are answer."""
    read = _pairs if contrast.paired else _positives
    rows = [row[:1] for row in read(language_model, contrast.train, max_length)]
    return numbered(rows, _held_out(language_model, contrast, max_length))


def numbered(rows: Sequence[Sequence[Text]], held_out: Sequence[Sequence[Text]] = ()) -> Texts:
    """Rows of texts to train on and rows to judge by, each text kept once."""
    numbers: dict[Text, int] = {}
    first, second = (
        tuple(tuple(numbers.setdefault(text, len(numbers)) for text in row) for row in part)
        for part in (rows, held_out)
    )
    return Texts(tuple(numbers), first, second)


def _held_out(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None
) -> list[Sequence[Text]]:
    """The rows of the validation part, where there is one."""
    if not any(row.part == "validation" for row in contrast.rows):
        return []
    read = _pairs if contrast.paired else _positives
    return read(language_model, contrast.part("validation"), max_length)


def _pairs(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None
) -> list[Sequence[Text]]:
    found: list[Sequence[Text]] = []
    for row in encode_contrast(language_model, contrast, max_length):
        start = scored_from(row, contrast.name)
        texts = [Text(frozen(text), start) for text in row.texts()]
        _refuse_empty(contrast.name, row, texts)
        found.append(texts)
    return found


def _positives(
    language_model: LanguageModel, contrast: Contrast, max_length: int | None
) -> list[Sequence[Text]]:
    found: list[Sequence[Text]] = []
    for row in encode_contrast(language_model, contrast, max_length):
        if contrast.texts[row.index].label == "positive":
            texts = [Text(frozen(row.texts()[0]), 1)]
            _refuse_empty(contrast.name, row, texts)
            found.append(texts)
    if not found:
        raise TrimtabError(f"{contrast.name} has no positive texts to train on")
    return found


def _refuse_empty(name: str, row: Packed, texts: Sequence[Text]) -> None:
    for text in texts:
        if len(text) <= text.start:
            raise TrimtabError(f"{name}, row {row.index + 1}: an answer has no token to train on")
