"""Continues the prompts of a file, each under steerings of its own, into another file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.batches.output import Output
from trimtab.batches.rows import Row, read_rows
from trimtab.contrasts import Prompt
from trimtab.errors import TrimtabError
from trimtab.files import file_digest, user_path
from trimtab.model import (
    Completion,
    LanguageModel,
    UnsoundError,
    batches_by_length,
    row_steerings,
)
from trimtab.reading import Engine
from trimtab.steering import Steering, Steerings
from trimtab.terminal import progress

#: Some rows by their place, and what came of each: a text, or why there is none.
_Made = Iterator[list[tuple[int, Completion | UnsoundError]]]


@dataclass(frozen=True)
class Generated:
    """What came of a file of prompts: how many rows it has, how many were written this time (the
    others were there), which have an error in place of a text (line and error), and seconds."""

    output: Path
    rows: int
    written: int
    failed: tuple[tuple[int, str], ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        failed = [{"line": line, "error": error} for line, error in self.failed]
        return {
            "output": str(self.output),
            "rows": self.rows,
            "written": self.written,
            "failed": failed,
            "seconds": self.seconds,
        }


def generate_file(
    language_model: LanguageModel,
    source: str | Path,
    output: str | Path,
    *,
    steering: Steering | Steerings | Sequence[Steering] | None = None,
    chat: bool | None = None,
    engine: Engine | None = None,
    overwrite: bool = False,
    force: bool = False,
    **options: Any,
) -> Generated:
    """Continue the prompts of `source`, a JSONL file, and write a row for each to `output`.

    A row is {"prompt": TEXT} or {"messages": [...]}; it may have an `id`, which is handed on, and
    steerings of its own: `steer` (FILE, FILE@DIAL, or a list of such; [] is none), `dial` and
    `scope` (one, or a list with one for each steering). Rows without `steer` have `steering`.
    Each row of the output has the `line` of its prompt, the prompt, the text and its tokens, and
    the labels of its steerings; or an `error`, where the model's numbers overflowed.

    A row is on the disk as soon as it is known. What was interrupted goes on when it is called
    again with the same arguments; what is there of other ones is refused, unless `overwrite`. In
    the end rows are in the order of the input.
    `engine` is vLLM (`tt.VLLM`), where it is to run all rows in one continuous batch. `options` are
    those of `LanguageModel.generate` that say how tokens are chosen, and `batch_size`.
    """
    file, target = user_path(source), user_path(output)
    rows = read_rows(file, row_steerings(steering))
    options = {"max_new_tokens": 64, **options}
    new = int(options["max_new_tokens"])
    prompts, lengths = _prompts(language_model, rows, file, chat, new, engine)
    _check_steerings(language_model, rows, file, force, engine)
    settings = {
        "engine": "transformers" if engine is None else engine.name,
        "input": file_digest(file),
        "model": language_model.described,
        "steerings": _digest_of(rows),
        "chat": chat,
        "options": options,
    }
    started = time.perf_counter()
    with Output(target, rows, settings, overwrite) as kept:
        if engine is not None:
            engine.check_options(options)
        before = len(kept.done)
        missing = [kept.missing(row) for row in rows]
        if any(missing):
            if engine is None:
                given = {**options, "force": force}
                made = _by_transformers(language_model, rows, prompts, lengths, missing, given)
            else:
                acting = [row.steerings for row in rows]
                made = engine.written(prompts, acting, missing, **options)
            with progress("generating", len(rows)) as advance:
                advance(before)
                for some in made:
                    for place, one in some:
                        if missing[place]:
                            kept.append(rows[place], _said(one, rows[place]))
                            advance(1)
        kept.finish()
        failed = [(line, one["error"]) for line, one in kept.done.items() if "error" in one]
    seconds = round(time.perf_counter() - started, 2)
    return Generated(target, len(rows), len(rows) - before, tuple(failed), seconds)


def _prompts(
    language_model: LanguageModel,
    rows: Sequence[Row],
    file: Path,
    chat: bool | None,
    new: int,
    engine: Engine | None,
) -> tuple[list[Prompt], list[int]]:
    """The prompts as they are asked, and how many tokens each has; one that is too long is refused,
    with its line."""
    prompts = language_model.prompts([row.given for row in rows], chat)
    longest = language_model.max_length if engine is None else engine.longest
    lengths = [len(tokens) for tokens in language_model.encode(prompts)]
    for row, length in zip(rows, lengths, strict=True):
        if not length or length + new > longest:
            raise TrimtabError(
                f"{file}, line {row.line}: a prompt of {length} tokens and {new} new ones do "
                f"not go into the {longest} tokens that {language_model.name} takes"
            )
    return prompts, lengths


def _check_steerings(
    language_model: LanguageModel,
    rows: Sequence[Row],
    file: Path,
    force: bool,
    engine: Engine | None,
) -> None:
    """Refuse what does not fit the model, or what the engine does not carry, with its line."""
    known: set[int] = set()
    for row in rows:
        for steering in row.steerings:
            if id(steering) in known:
                continue
            known.add(id(steering))
            try:
                with language_model.steered(steering, force=force):
                    pass
                if engine is not None:
                    engine.prepare([steering], force=force)
            except TrimtabError as error:
                raise TrimtabError(f"{file}, line {row.line}: {error}") from error


def _digest_of(rows: Sequence[Row]) -> str:
    """SHA-256 of what steers each row, whatever files are called."""
    found = hashlib.sha256()
    of: dict[int, str] = {}
    for row in rows:
        for steering in row.steerings:
            if id(steering) not in of:
                of[id(steering)] = f"{steering.digest} {steering.setting!r} "
            found.update(of[id(steering)].encode())
        found.update(f"{row.line}\n".encode())
    return found.hexdigest()


def _said(made: Completion | UnsoundError, row: Row) -> dict[str, Any]:
    """What the output says of a row."""
    if isinstance(made, UnsoundError):
        return {"error": str(made), "steering": [one.label for one in row.steerings]}
    gates = {"gate": [each.as_json() for each in made.gates]} if made.gates else {}
    return {
        "text": made.text,
        "tokens": list(made.tokens),
        "steering": list(made.steering),
        **gates,
    }


def _by_transformers(
    language_model: LanguageModel,
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    missing: Sequence[bool],
    options: Mapping[str, Any],
) -> _Made:
    """Batches of prompts of similar length, planned over all rows, so that those that are left
    after an interruption are the very same. Each has a seed of its own where there is one."""
    settings = dict(options)
    size, seed = int(settings.get("batch_size", 16)), settings.pop("seed", None)
    for number, batch in enumerate(batches_by_length(lengths, rows=max(1, size))):
        if not any(missing[i] for i in batch):
            continue
        own = {} if seed is None else {"seed": seed_of(seed, number)}
        yield _answered(language_model, rows, prompts, batch, {**settings, **own})


def _answered(
    language_model: LanguageModel,
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    batch: Sequence[int],
    options: Mapping[str, Any],
) -> list[tuple[int, Completion | UnsoundError]]:
    """One batch; where numbers of a row overflow, row by row, so that it harms no other."""
    try:
        found = language_model.generate(
            [prompts[i] for i in batch],
            chat=False,  # conversations are rendered all the same, and text is taken as it is
            steering=[rows[i].steerings for i in batch],
            **options,
        )
    except UnsoundError as error:
        if len(batch) == 1:
            return [(batch[0], error)]
        return [
            one for i in batch for one in _answered(language_model, rows, prompts, [i], options)
        ]
    return list(zip(batch, found, strict=True))


def seed_of(seed: int, number: int) -> int:
    """A seed for each batch, or text, so that leaving some out changes nothing in the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")
