"""The contrast of a wish, which a model writes, or one that is there already; in the directory it
is a file that anybody may edit before anything is fitted on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.contrasts import Contrast, Pair, Part, last_message, made_beside, spread
from trimtab.errors import TrimtabError, shown
from trimtab.evaluation import load_contrast
from trimtab.files import exists
from trimtab.model import LanguageModel
from trimtab.options import PersonaAmounts, Sampling, WishTexts
from trimtab.wishes.work import Work
from trimtab.writing import persona_contrast

FILE = "contrast.jsonl"
#: Rows of each part of a contrast that was given, at most: two cores are to be done in minutes.
MOST: dict[Part, int] = {"train": 120, "validation": 40, "test": 100}
#: Pairs that are shown, and characters of each text.
_SHOWN, _WIDTH = 2, 160


@dataclass(frozen=True)
class Given:
    """A contrast that somebody named, if anybody did, and how much of it is taken, if not all."""

    contrast: Contrast | None = None
    taken: str = ""


def given_contrast(source: Any, data: str | None) -> Given:
    """A contrast that somebody names, with its parts; refused where nothing can be held out."""
    found = load_contrast(str(source) if isinstance(source, Path) else source, data=data)
    if not found.paired:
        raise TrimtabError(
            f"{found.name} is unpaired: what a steering gains is measured on pairs (prompt, "
            "positive, negative)"
        )
    found = found.with_parts()
    missing = [part for part in MOST if part not in found.sizes]
    if missing:
        why = found.too_few if not found.has_parts else f"it has no {' and no '.join(missing)} rows"
        raise TrimtabError(
            f"{found.name}: {why}; a steering is fitted on train rows, chosen on validation rows "
            "and measured on test rows"
        )
    sizes = found.sizes
    if all(sizes[part] <= most for part, most in MOST.items()):
        return Given(found)
    parts = {part: spread(found.part(part).rows, most) for part, most in MOST.items()}
    cut = replace(found, rows=tuple(row for rows in parts.values() for row in rows))
    said = ", ".join(f"{len(rows)} of {sizes[part]} {part}" for part, rows in parts.items())
    return Given(cut, f"of the {len(found)} pairs of {found.name} {len(cut)} are taken: {said}")


def begin_anew(directory: Path, given: Contrast | None) -> None:
    """Take the contrast of an earlier run away, or put one that was given in its place: it may have
    been that very file, with what somebody edited in it."""
    file = directory / FILE
    if given is not None:
        given.to_jsonl(file, overwrite=True)
        return
    for each in (file, made_beside(file)):
        each.unlink(missing_ok=True)


def contrast_of(
    language_model: LanguageModel,
    wish: str,
    given: Contrast | None,
    texts: WishTexts,
    seed: int,
    directory: Path | None,
    work: Work,
) -> Contrast:
    """The contrast: the file that is in the directory, or else what was given, or what the model
    writes for the wish."""
    file = None if directory is None else directory / FILE
    if file is None or not exists(file):
        made = given or _written(language_model, wish, texts, seed, file)
        if file is None:
            return made
        if given is not None:
            given.to_jsonl(file)
    there = Contrast.from_jsonl(file)
    if given is not None:  # of which the file does not say what it is in words
        there = replace(there, behaviour=given.behaviour, opposite=given.opposite)
    _check_unchanged(there, file, work)
    return there


def _check_unchanged(contrast: Contrast, file: Path, work: Work) -> None:
    """Refuse rows that were edited after work on them had begun."""
    if work.knows("contrast") and work.recall("contrast", str) != contrast.digest:
        raise TrimtabError(
            f"{file} was edited after work on it had begun: take it with --contrast {file} into "
            "another directory, or pass --overwrite with it"
        )


def _written(
    language_model: LanguageModel, wish: str, texts: WishTexts, seed: int, file: Path | None
) -> Contrast:
    return persona_contrast(
        language_model,
        wish,
        opposite=texts.opposite,
        writer=texts.writer,
        judge=texts.judge,
        amounts=PersonaAmounts(pairs=texts.pairs, questions=texts.questions, answers=texts.answers),
        sampling=Sampling(
            max_new_tokens=texts.max_new_tokens, temperature=1.0, top_k=0, top_p=0.9, seed=seed
        ),
        output=file,
    )


def say_contrast(contrast: Contrast, taken: str, say: Callable[[str], object]) -> None:
    """How large it is, how it came about, and some pairs of it."""
    if taken:
        say(taken)
    sizes = ", ".join(f"{count} {part}" for part, count in contrast.sizes.items())
    counts = (contrast.made or {}).get("counts")
    kept = f"; {counts['kept']} of {counts['written']} that were written are kept" if counts else ""
    say(f"contrast: {len(contrast)} pairs ({sizes}){kept}")
    for pair in spread(contrast.pairs, _SHOWN):
        say_pair(pair, say)


def say_pair(pair: Pair, say: Callable[[str], object]) -> None:
    """A pair in three lines."""
    say(f"  {shown(last_message(pair.prompt), _WIDTH)}")
    say(f"    + {shown(' '.join(pair.positive.split()), _WIDTH)}")
    say(f"    - {shown(' '.join(pair.negative.split()), _WIDTH)}")
