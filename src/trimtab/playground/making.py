"""From a wish, or from pairs, to a steering: a contrast to look over, a fit, gain and cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimtab.contrasts import Contrast, last_message
from trimtab.errors import TrimtabError
from trimtab.figures import mean_interval
from trimtab.methods import METHODS
from trimtab.model import LanguageModel
from trimtab.options import PersonaAmounts
from trimtab.playground.bodies import ContrastBody, FitBody, Row
from trimtab.playground.curves import cost
from trimtab.playground.shelf import Shelf
from trimtab.reading import log_odds
from trimtab.writing import persona_contrast

#: The methods of the page, which need nothing but pairs, with what they are in a few words.
OFFERED = {
    "caa": "adds the mean difference of the two sides to one block",
    "austeer": "scales the few units that tell the two sides apart",
    "iti": "adds to the attention heads that tell the two sides apart",
    "ablation": "takes the direction between the two sides away",
    "act": "moves units to where they are on the positive side",
}
#: Rows of which so many are held out are enough for an interval.
_FEWEST = 2


def contrast_rows(language_model: LanguageModel, body: ContrastBody) -> dict[str, Any]:
    """The rows of a contrast, to be looked over, and what it is called."""
    if body.wish is not None:
        amounts = PersonaAmounts(questions=body.questions)
        found = persona_contrast(language_model, body.wish, amounts=amounts)
    elif body.builtin is not None:
        found = Contrast.builtin(body.builtin)
    else:
        found = _pasted(body.pasted or "")
    if not found.paired:
        raise TrimtabError("the page takes pairs: rows with prompt, positive and negative")
    return {
        "name": found.name,
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


def fitted(language_model: LanguageModel, shelf: Shelf, body: FitBody) -> dict[str, Any]:
    """A steering fitted on the rows, saved and on the shelf; its gain on rows that were held out
    and its cost on plain text, with 95 % intervals, at its default dial."""
    if body.method not in OFFERED:
        raise TrimtabError(f"choose a method among {', '.join(OFFERED)}")
    contrast = as_contrast(body.rows, body.source).with_parts()
    steering = METHODS[body.method]().fit(language_model, contrast)
    file = shelf.keep(body.name, steering)
    return {
        "name": body.name,
        "file": str(file),
        "method": body.method,
        "dial": {"name": steering.dial.name, "value": steering.setting, "unit": steering.dial.unit},
        "parts": contrast.sizes,
        "gain": _gain(language_model, contrast, steering),
        "cost": cost(language_model, (steering,)),
    }


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


def _gain(language_model: LanguageModel, contrast: Contrast, steering: Any) -> dict[str, Any]:
    """By how much the held-out pairs' log-odds (positive against negative, nats per pair) rise; of
    too few pairs the rows that were fitted on, which says so."""
    held = contrast.has_parts and contrast.sizes.get("test", 0) >= _FEWEST
    rows = contrast.part("test") if held else contrast.train
    before = log_odds(language_model, rows)
    after = log_odds(language_model, rows, steering)
    estimate = mean_interval(after - before)
    return {
        "value": estimate.value,
        "ci95": list(estimate.ci95),
        "n": estimate.n,
        "held_out": held,
    }
