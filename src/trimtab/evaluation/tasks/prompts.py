"""Tasks over prompts that the user brings: refusal and attack success, and coherence.

Known are the columns of AdvBench and JailbreakBench (goal), HarmBench (behavior, with a context),
lists of instructions, and plain prompts, as JSONL, JSON or CSV; a .txt file has one prompt a line.
trimtab itself has no harmful prompts.
A column `label` of safe and unsafe, as XSTest has it, tells over-refusal from refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.contrasts import Prompt, meant_file, read_prompt, read_table
from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks.data import Row, Source, data_directory
from trimtab.evaluation.tasks.task import Example, Generation, Protocol, Task
from trimtab.files import user_path

#: Columns that hold the prompt, the most telling first, in any case.
_COLUMNS = ("prompt", "goal", "instruction", "behavior")
_CONTEXTS = ("context", "contextstring")
_LABELS = ("safe", "unsafe")
#: New tokens, as in Selective Steering.
_NEW_TOKENS = 512

MEASURES = {"refusal": ("refusal", "coherence"), "coherence": ("coherence",)}


def prompts_task(kind: str, file: str, data: str | None) -> Task:
    """`refusal:FILE` or `coherence:FILE`; the file is looked for here, then among the data."""
    path = _find(file, data)

    def example(row: Row, index: int, protocol: Protocol) -> Example:
        where = f"{path}, row {index + 1}"
        columns = {str(key).lower(): value for key, value in row.items()}
        label = str(columns.get("label", "")).strip().lower()
        return Example(
            str(row.get("id", index)),
            _conversation(columns, where),
            fields={"label": label} if kind == "refusal" and label in _LABELS else {},
        )

    return Task(
        name=f"{kind}:{file}",
        about=f"{kind} over the prompts of {file}",
        test=Source(str(path)),
        train=None,
        columns={},
        example=example,
        generation=Generation(_NEW_TOKENS),
        measures=MEASURES[kind],
        read_file=_read,
        chat=True,
    )


def _find(file: str, data: str | None) -> Path:
    path = user_path(file)
    if path.is_file():
        return path.absolute()
    directory = data_directory(data)
    if directory is not None and (directory / file).is_file():
        return (directory / file).absolute()
    raise TrimtabError(f"no such file of prompts: {file}{meant_file(file)}")


def _read(path: Path) -> Sequence[Row]:
    """The rows of a table, or the lines of a text."""
    if path.suffix.lower() != ".txt":
        return read_table(path, "the prompts", (*_COLUMNS, *_CONTEXTS, "label"))
    try:
        with path.open(encoding="utf-8-sig") as lines:
            return [{"prompt": line.rstrip("\n")} for line in lines if line.strip()]
    except OSError as error:
        raise TrimtabError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{path} is not UTF-8 text: {error}") from error


def _conversation(columns: Row, where: str) -> Prompt:
    """The prompt of a row as a conversation; the names of its columns in lower case."""
    for name in _COLUMNS:
        if columns.get(name):
            prompt = read_prompt(columns[name], where)
            break
    else:
        raise TrimtabError(f"{where} has no prompt: name it {', '.join(_COLUMNS)}")
    if not isinstance(prompt, str):
        return prompt
    context: Any = next((columns[name] for name in _CONTEXTS if columns.get(name)), "")
    text = f"{context}\n\n---\n\n{prompt}" if context else prompt
    return (("user", text),)
