"""From a wish, or from pairs, to a steering: a contrast to look over, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.contrasts import Contrast, last_message
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.options import Keep, Making, PersonaAmounts, Sampling, WishTexts
from trimtab.playground.bodies import ContrastBody, MakeBody, Row
from trimtab.playground.shelf import Shelf
from trimtab.wishes import make
from trimtab.writing import persona_contrast


def contrast_rows(body: ContrastBody) -> dict[str, Any]:
    """The rows of a contrast that is there, to be looked over, and what it is called."""
    if body.builtin is not None:
        return as_rows(Contrast.builtin(body.builtin))
    return as_rows(_pasted(body.pasted or ""))


def written_rows(language_model: LanguageModel, wish: str) -> dict[str, Any]:
    """The rows that a model writes for a wish, as many and as long as `trimtab make` has them."""
    texts = WishTexts()
    amounts = PersonaAmounts(pairs=texts.pairs, questions=texts.questions, answers=texts.answers)
    sampling = Sampling(max_new_tokens=texts.max_new_tokens, temperature=1.0, top_k=0, top_p=0.9)
    return as_rows(persona_contrast(language_model, wish, amounts=amounts, sampling=sampling))


def as_rows(found: Contrast) -> dict[str, Any]:
    """A contrast as the table has it."""
    if not found.paired:
        raise TrimtabError("the page takes pairs: rows with prompt, positive and negative")
    return {
        "name": found.name,
        "behaviour": found.behaviour,
        "opposite": found.opposite,
        "rows": [
            {
                "prompt": last_message(pair.prompt),
                "chat": _is_message(pair.prompt),
                "positive": pair.positive,
                "negative": pair.negative,
                "part": pair.part,
            }
            for pair in found.pairs
        ],
    }


def _is_message(prompt: Any) -> bool:
    """Whether a prompt is one message of a user; plain text is none, and no cell of the table has
    room for more."""
    if isinstance(prompt, str):
        return False
    if len(prompt) != 1 or prompt[0][0] != "user":
        raise TrimtabError("the table takes prompts of one message: fit this contrast with Python")
    return True


def _pasted(text: str) -> Contrast:
    """Pairs that were pasted: JSON lines, or lines of two or three columns with tabs between."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith("{"):
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append((row.get("prompt", ""), row["positive"], row["negative"]))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise TrimtabError(
                    f"line {number} is no pair: write "
                    '{"prompt": "...", "positive": "...", "negative": "..."}'
                ) from error
        return Contrast.from_pairs(rows, "pasted pairs")
    cells = [[cell.strip() for cell in line.split("\t")] for line in lines]
    for number, row in enumerate(cells, 1):
        if len(row) not in (2, 3) or not all(row[-2:]):
            raise TrimtabError(
                f"line {number} is no pair: write prompt, positive and negative with tabs between, "
                "or one JSON object a line"
            )
    return Contrast.from_pairs(
        [(row[0] if len(row) == 3 else "", row[-2], row[-1]) for row in cells], "pasted pairs"
    )


def made(
    language_model: LanguageModel, shelf: Shelf, body: MakeBody, say: Callable[[str], object]
) -> dict[str, Any]:
    """What comes of the rows, in a directory of its own beside the shelf's files, where it goes on
    if it was stopped; a steering that works is put on the shelf."""
    shelf.check_free(body.name)
    contrast = replace(
        as_contrast(body.rows, body.source), behaviour=body.behaviour, opposite=body.opposite
    )
    found = make(
        language_model,
        contrast=contrast,
        making=Making(max_cost=body.max_cost, minutes=body.minutes),
        keep=Keep(output=shelf.saves / body.name),
        say=say,
    )
    file = None if found.steering is None else str(shelf.keep(body.name, found.steering))
    told = {"name": body.name, "file": file, "summary": found.summary, "notes": found.notes()}
    return {**told, "directory": str(shelf.saves / body.name), "made": found.as_json()}


def as_contrast(rows: Sequence[Row], name: str) -> Contrast:
    """Rows of the table as a contrast; plain prompts are taken as they are."""
    asked: list[tuple[Any, str, str]] = []
    for row in rows:
        prompt: Any = row.prompt
        if row.chat:
            prompt = [{"role": "user", "content": prompt}]
        asked.append((prompt, row.positive, row.negative))
    found = Contrast.from_pairs(asked, name)
    return replace(
        found,
        rows=tuple(
            replace(pair, part=row.part) for pair, row in zip(found.pairs, rows, strict=True)
        ),
    )
