"""The contrast of any task that has right answers: a right answer against a wrong one.

The general recipe (AUSteer, section 3): the wrong answer of a question is one of the other answers
in the pool, at random; in mathematics, where a random number is wrong too plainly, the one that a
sentence encoder finds most similar to the right one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimtab.contrasts import Contrast, Pair, Prompt, read_prompt, read_table
from trimtab.errors import TrimtabError, check_choice
from trimtab.evaluation.tasks.encoder import encode

Wrong = Literal["random", "similar"]


def from_answers(
    rows: Sequence[tuple[Prompt, str]],
    *,
    pool: Sequence[str] | None = None,
    wrong: Wrong = "random",
    seed: int = 0,
    name: str = "answers",
) -> Contrast:
    """A contrast of (prompt, right answer) rows.

    The wrong answer of each row comes from `pool` (default: the right answers of all rows), at
    random or the most similar one; it always differs from the right one.
    """
    check_choice("wrong", wrong, Wrong)
    if not rows:
        raise TrimtabError(f"{name}: there are no answers")
    right = [answer for _, answer in rows]
    others = list(dict.fromkeys(right if pool is None else pool))
    for answer in dict.fromkeys(right):
        if not set(others) - {answer}:
            raise TrimtabError(f"{name}: the pool has no answer but {answer!r}")
    if wrong == "random":
        generator = random.Random(seed)
        chosen = [generator.choice([o for o in others if o != answer]) for answer in right]
    else:
        chosen = nearest(right, others)
    prompts = [prompt for prompt, _ in rows]
    return Contrast(tuple(Pair(*row) for row in zip(prompts, right, chosen, strict=True)), name)


def read_answers(path: str | Path, *, wrong: Wrong = "random", seed: int = 0) -> Contrast:
    """A contrast of a JSONL, JSON or CSV file with `prompt` and `answer`; a row may have `choices`
    of its own, among which its wrong answer is then chosen at random."""
    rows = read_table(Path(path), "the answers", ("prompt", "answer"))
    found: list[Pair | None] = []
    open_rows: list[tuple[Prompt, str]] = []
    generator = random.Random(seed)
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        prompt, answer, choices = _answer_row(row, where)
        if choices is None:
            open_rows.append((prompt, answer))
            found.append(None)
        else:
            found.append(Pair(prompt, answer, generator.choice(choices)))
    if open_rows:
        pooled = from_answers(open_rows, wrong=wrong, seed=seed, name=str(path))
        pairs = iter(pooled.pairs)
        return Contrast(tuple(pair or next(pairs) for pair in found), f"answers:{path}")
    return Contrast(tuple(pair for pair in found if pair), f"answers:{path}")


def _answer_row(row: dict[str, Any], where: str) -> tuple[Prompt, str, list[str] | None]:
    for key in ("prompt", "answer"):
        if key not in row:
            raise TrimtabError(f"{where}: {key!r} is missing (rows have prompt, answer)")
    answer, choices = row["answer"], row.get("choices")
    if not isinstance(answer, str) or not answer.strip():
        raise TrimtabError(f"{where}: the answer must be text")
    if choices is not None:
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            raise TrimtabError(f"{where}: choices must be a list of texts")
        choices = [choice for choice in choices if choice != answer]
        if not choices:
            raise TrimtabError(f"{where}: there is no wrong choice")
    return read_prompt(row["prompt"], where), answer, choices


def nearest(answers: Sequence[str], pool: Sequence[str]) -> list[str]:
    """For each answer the text of the pool that is most like it and not the same."""
    texts = list(dict.fromkeys(pool))
    if len(texts) == 1 and texts[0] in answers:
        raise TrimtabError(f"there is no wrong answer to choose: all answers are {texts[0]!r}")
    similarity = encode(answers) @ encode(texts).T
    place = {text: i for i, text in enumerate(texts)}
    for row, answer in enumerate(answers):
        if answer in place:
            similarity[row, place[answer]] = -np.inf
    return [texts[i] for i in similarity.argmax(1)]


def nearest_as_published(answers: Sequence[str], same: str) -> list[str]:
    """As the authors' code does it: the nearest answer of another row, and `same` (spaces) where
    that happens to be the same text."""
    vectors = encode(answers)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    chosen = [answers[i] for i in similarity.argmax(1)]
    return [same if other == own else other for own, other in zip(answers, chosen, strict=True)]
