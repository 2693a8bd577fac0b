"""A row of each task with what its prompt must be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOOLQ = {
    "id": "b-0",
    "question": "is bread made from flour",
    "passage": "Bread is baked from a dough of flour and water.",
    "answer": True,
}
COPA = {
    "id": 1,
    "premise": "The dough rose.",
    "question": "cause",
    "choice1": "The yeast was fresh.",
    "choice2": "The oven was cold.",
    "label": 0,
}
WINOGRANDE = {
    "id": "W-1",
    "sentence": "The loaf did not fit in the tin because the _ was too small.",
    "option1": "loaf",
    "option2": "tin",
    "answer": 2,
}
SVAMP = {"id": "s-0", "body": "Ann has 3 loaves. Ben has 48.", "question": "How many are there?"}
MAWPS = {
    "id": "m-0",
    "question": "A baker had 5.5 loaves and sold 2 . How many are left ?",
    "equation": "( 5.5 - 2 )",
    "answer": 3.5,
}
DETOX = {"filename": "1.txt", "challenging": False, "prompt": "The bread is"}
BPO = {"id": "p-0", "prompt": "Write a poem about bread.", "good_res": "Warm loaf", "bad_res": "No"}

#: A row of each task with what its prompt must be.
LETTER_BY_LETTER: dict[str, tuple[dict[str, Any], str]] = {
    "boolq": (
        BOOLQ,
        "Is the answer to the question encapsulated in the passage? Please confirm with 'yes' or "
        "'no'.\n"
        "\n"
        "Passage: Bread is baked from a dough of flour and water.\n"
        "\n"
        "Question: is bread made from flour\n"
        "\n"
        "Answer:",
    ),
    "copa": (
        COPA,
        "Question:\n"
        "The dough rose. Based on the previous passage, choose the most reasonable cause.\n"
        "A:The yeast was fresh.\n"
        "B:The oven was cold.\n"
        "\n"
        "Answer:\n",
    ),
    "winogrande": (
        WINOGRANDE,
        "Please fill in the blanks. Write A or B as the answer.\n"
        "\n"
        "Sentence: The loaf did not fit in the tin because the _ was too small.\n"
        "A. loaf\n"
        "B. tin\n"
        "Answer:",
    ),
    "svamp": (
        {**SVAMP, "answer": 51.0},
        "Answer the following grade-school math word problem. Reply with only the final answer as "
        "a number.\n"
        "Question: Ann has 3 loaves. Ben has 48. How many are there?\n"
        "Answer:",
    ),
    "mawps": (
        MAWPS,
        "Answer the grade school math word problem below, using step-by-step problem-solving "
        'process. Print the final answer after "####".\n'
        "question: A baker had 5.5 loaves and sold 2 . How many are left ?\n"
        "answer: \n",
    ),
    "detox": (DETOX, "Question\\,The bread is\n\nAnswer:"),
    "bpo": (BPO, "Write a poem about bread."),
}


def write(path: Path, rows: Sequence[Any]) -> Path:
    """A JSONL file, its folder made where need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path
