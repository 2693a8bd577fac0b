"""The questions that a persona is asked: those that come with trimtab, or a writer's, and the part
of the contrast that each belongs to."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from trimtab.contrasts import PARTS, Part
from trimtab.errors import TrimtabError

#: One half of the questions is for fitting, and a quarter each for choosing and for measuring: the
#: parts of the first, the second and so on, over and over again.
_DEALT: tuple[Part, ...] = ("train", "validation", "train", "test")
#: A question is no single word, and no essay.
_FEWEST_WORDS, _LONGEST = 3, 300
#: Questions that share so many of their words are the same one.
_ALIKE = 0.8

#: In our words; the authors' request is longer, and for large models.
REQUEST = (
    "I study how a language model's answers change in style. Write {count} different questions "
    "that people ask an assistant in everyday life, on many topics: the home, work, nature, "
    "science, travel, people. Each must be answerable in a few sentences. An answer to it may show "
    "this trait or not, but the question itself must not ask for it: {wish}\n"
    'Reply with JSON only, in this form: {{"questions": ["...", "..."]}}'
)


@dataclass(frozen=True)
class Question:
    """A question, the part that it belongs to, and who wrote it."""

    text: str
    part: Part
    source: str


def built_in() -> list[Question]:
    """The questions that come with trimtab, with their parts."""
    path = files("trimtab") / "data" / "questions.jsonl"
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Question(row["question"], row["part"], "built in") for row in rows]


def dealt(written: Sequence[str], count: int, source: str = "writer") -> list[Question]:
    """`count` questions: those that were written, dealt out to the parts in turn, and for what is
    missing the built-in ones of the same parts."""
    parts = [_DEALT[i % len(_DEALT)] for i in range(count)]
    found = [Question(text, part, source) for text, part in zip(written, parts, strict=False)]
    missing = Counter(parts[len(found) :])
    for question in built_in():
        if missing[question.part] and _is_new(question.text, [one.text for one in found]):
            found.append(question)
            missing[question.part] -= 1
    if len(found) < count:
        raise TrimtabError(
            f"there are {len(found)} questions for the {count} that are asked for, and "
            f"{len(built_in())} come with trimtab: ask for fewer (questions), or name a writer "
            "that writes more"
        )
    return sorted(found, key=lambda one: PARTS.index(one.part))


def new_questions(texts: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those that are questions, and not among the known ones or each other."""
    found: list[str] = []
    for text in texts:
        plain = " ".join(text.split())
        if is_question(plain) and _is_new(plain, [*known, *found]):
            found.append(plain)
    return found


def is_question(text: str) -> bool:
    """Whether it ends as one, and has a question's length; some scripts set no blanks."""
    long_enough = len(re.findall(r"\w+", text)) >= _FEWEST_WORDS or not text.isascii()
    return text.endswith(("?", "\uff1f", "\u061f")) and len(text) <= _LONGEST and long_enough


def _is_new(text: str, others: Sequence[str]) -> bool:
    words = _words(text)
    return all(len(words & known) < _ALIKE * len(words | known) for known in map(_words, others))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
