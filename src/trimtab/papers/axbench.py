"""AxBench's data: texts that show a concept, and texts that show none, with their instructions.

Of a set NAME there are DIR/axbench/NAME_train.jsonl, to fit on, and NAME_eval.jsonl, held out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation import data_directory
from trimtab.files import read_jsonl
from trimtab.model import LanguageModel

#: The directory of AxBench's files, and what they are called behind the set's name.
_FOLDER, _ENDS = "axbench", {"train": "_train.jsonl", "test": "_eval.jsonl"}
_COLUMNS = ("input", "output", "output_concept", "category", "concept_id")
#: The number that rows of no concept have.
NONE = "-1"


def read_set(texts_of: str, part: str, data: str | None) -> list[dict[str, Any]]:
    """The rows of a set's part, train or test, with what is read of them."""
    file = texts_of + _ENDS[part]
    directory = data_directory(data)
    path = Path(_FOLDER, file) if directory is None else directory / _FOLDER / file
    if directory is None or not path.is_file():
        raise TrimtabError(f"there is no {_FOLDER}/{file} in the directory of data sets (--data)")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        missing = [name for name in _COLUMNS if name not in row]
        if missing:
            raise TrimtabError(f"{path}, line {number}: {missing[0]} is missing")
    return [{**row, "concept_id": str(row["concept_id"])} for row in rows]


def concepts_of(rows: list[dict[str, Any]], most: int | None) -> dict[str, str]:
    """The first concepts of a train part, in words, by their numbers."""
    known = {row["concept_id"]: row["output_concept"] for row in rows}
    names = [one for one in known if one != NONE][:most]
    return {name: known[name] for name in names}


def first_tokens(language_model: LanguageModel, text: str, most: int) -> str:
    """A text up to so many tokens."""
    tokenizer = language_model.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= most else str(tokenizer.decode(ids[:most]))
