"""Contrasts by generation: texts that a model writes about a concept, against texts that it does
not.

The setting of "Towards Understanding Steering Strength" (Taimeskhanov et al. 2026, section 4 and
appendix A). Positives answer a fixed request to define a concept and then to speak as it.
Negatives are what the model that is to be steered writes from nothing but its
beginning-of-sequence token (`empty`), or answers to the same request for the concept's opposite
(`contrastive`). All are sampled, 500 of 300 tokens a side, with the end of text disabled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.contrasts import Contrast, Conversation, Prompt
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.files import write_whole
from trimtab.model import LanguageModel
from trimtab.options import Sampling, flat
from trimtab.terminal import progress
from trimtab.writing.work import Work, checked_target
from trimtab.writing.writers import (
    Writer,
    batch_seed,
    check_sampling,
    check_writer,
    described,
    write,
)

#: The paper's concepts. Any other is a word or a phrase of the user's.
CONCEPTS = (
    "apathetic",
    "depression",
    "evil",
    "humorous",
    "impolite",
    "joy",
    "lying",
    "optimistic",
)

Negatives = Literal["empty", "contrastive"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)

#: The paper's request (appendix A), word for word.
SYSTEM = "You are an assistant."
REQUEST = (
    "Describe the concept: {concept}. Begin with a one-sentence definition. "
    "Then give several natural first-person examples that demonstrate the concept in an "
    "unmistakable way. "
    "Write as if you are the concept itself. Your examples must make the concept obvious through "
    "what you say or do "
    "— for example, if the concept is *lying*, give clearly false statements (e.g., claiming "
    "impossible facts or events). "
    "Do not use third-person references. Do not explain anything. "
    "After the definition, output only the examples as simple first-person sentences that fully "
    "embody the concept."
)

#: So many times the texts that are wanted are sampled at most, where some are equal or empty.
_MOST_SAMPLES = 4
#: After so many batches in which no text is new, none is expected to come.
_BARREN = 3


@dataclass(frozen=True)
class _Side:
    """The texts of one label: who writes them, in answer to what."""

    label: Literal["positive", "negative"]
    writer: Writer
    prompt: Prompt


def request(concept: str) -> Conversation:
    """The paper's request for texts of a concept, as messages (role, content)."""
    name = " ".join(concept.split())
    if not name:
        raise TrimtabError("the concept is empty: name one, as in joy")
    return (("system", SYSTEM), ("user", REQUEST.format(concept=name)))


@flat
def generate_contrast(
    language_model: LanguageModel,
    concept: str,
    *,
    negatives: Negatives = "empty",
    count: int = 500,
    writer: Writer | None = None,
    sampling: Sampling = Sampling(),
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Contrast:
    """`count` positive and `count` negative texts of a concept, as an unpaired contrast.

    `writer` writes the positives, and the `contrastive` negatives: another chat model, an endpoint,
    or (None) `language_model` itself. `empty` negatives are always `language_model`'s own. Where a
    model is loaded here, a text has exactly `max_new_tokens` tokens; an endpoint's may end before
    (and takes no `top_k`, except by its `extra`). Texts that are empty, or equal to another but for
    white space, are sampled again; a warning says how many there are where too few are new.

    With `output` the contrast is a JSONL file. Until it is whole, finished batches are in
    OUTPUT.part: an interrupted call that is repeated goes on with the very texts that it would have
    had. (A service need not heed a seed: there, answers come from the endpoint's cache.)

    Errors: a writer without chat template; OUTPUT exists; OUTPUT.part is damaged, or of other
    settings (`overwrite` replaces both).
    """
    check_sampling(sampling)
    if count < 1:
        raise TrimtabError(f"count must be 1 or more, not {count}")
    sides = _sides(language_model, concept, negatives, language_model if writer is None else writer)
    settings = _settings(concept, negatives, count, sampling, sides)
    target = checked_target(output, overwrite)
    work = Work(target, settings, overwrite)

    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    with progress("writing texts", 2 * count) as advance:
        for side in sides:
            texts[side.label] = _collect(side, count, sampling, work, seen, advance)
    work.check_used()
    for side in sides:
        _check_number(side, len(texts[side.label]), count)

    if target is None:
        return Contrast.from_texts(texts["positive"], texts["negative"], f"generated:{concept}")
    rows = [{"text": text, "label": side.label} for side in sides for text in texts[side.label]]
    write_whole(target, "".join(map(_line, rows)).encode(), overwrite)
    work.remove()
    return Contrast.from_jsonl(target)


# -- who writes what --------------------------------------------------------------------------


def _sides(
    language_model: LanguageModel, concept: str, negatives: str, writer: Writer
) -> tuple[_Side, _Side]:
    if negatives not in NEGATIVES:
        raise TrimtabError(f"negatives {negatives!r} is none of {', '.join(NEGATIVES)}")
    positive = _Side("positive", writer, request(concept))
    check_writer(writer, positive.prompt, "write about a concept")
    if negatives == "empty":
        return positive, _Side("negative", language_model, _beginning(language_model))
    return positive, _Side("negative", writer, request(f"the opposite of {concept}"))


def _beginning(language_model: LanguageModel) -> str:
    """The text of the token with which a model's texts begin: BOS, or where a model has none, the
    token that separates its texts, EOS."""
    tokenizer, config = language_model.tokenizer, language_model.anatomy.config
    token: str | None = tokenizer.bos_token
    if token is None and isinstance(getattr(config, "bos_token_id", None), int):
        token = tokenizer.convert_ids_to_tokens(config.bos_token_id)
    token = token or tokenizer.eos_token
    if token is None or len(language_model.encode([token])[0]) != 1:
        raise TrimtabError(
            f"{language_model.name} has no token with which a text begins (BOS or EOS), so nothing "
            "can be sampled from an empty prompt: take negatives='contrastive'"
        )
    return token


def _write(side: _Side, count: int, seed: int, sampling: Sampling) -> list[str]:
    """One batch of texts."""
    return write(side.writer, [side.prompt] * count, seed, sampling, sampling.max_new_tokens)


# -- collecting -------------------------------------------------------------------------------


def _collect(
    side: _Side,
    count: int,
    sampling: Sampling,
    work: Work,
    seen: set[str],
    advance: Callable[[int], object],
) -> list[str]:
    """New texts of one side, batch by batch: first the batches that are there already."""
    kept: list[str] = []
    number = samples = barren = 0
    while len(kept) < count and samples < _MOST_SAMPLES * count and barren < _BARREN:
        size = min(sampling.batch_size, count - len(kept))
        batch = work.next_batch(side.label, number, size, str)
        if batch is None:
            batch = _write(side, size, batch_seed(sampling.seed, side.label, number), sampling)
            work.append(side.label, number, batch)
        new = _new(batch, seen)
        kept += new
        number, samples, barren = number + 1, samples + size, 0 if new else barren + 1
        advance(len(new))
    return kept


def _new(texts: Sequence[str], seen: set[str]) -> list[str]:
    """Those that are neither empty nor seen before, but for white space, which are seen now."""
    new = []
    for text in texts:
        plain = " ".join(text.split())
        if plain and plain not in seen:
            seen.add(plain)
            new.append(text.strip())
    return new


def _check_number(side: _Side, found: int, count: int) -> None:
    if found == count:
        return
    what = f"{found} of {count} {side.label} texts by {side.writer.name} are new and not empty"
    hint = "raise temperature or max_new_tokens, or ask for fewer (count)"
    if not found:
        raise TrimtabError(f"{what}: {hint}")
    # Past generate_contrast and what `flat` makes of it, to who called it.
    warnings.warn(f"only {what}: {hint}", TrimtabWarning, stacklevel=4)


# -- what decides ------------------------------------------------------------------------------


def _settings(
    concept: str, negatives: str, count: int, sampling: Sampling, sides: Sequence[_Side]
) -> dict[str, Any]:
    """Everything that decides what the texts are."""
    asked: dict[str, Any] = {"concept": concept, "negatives": negatives, "count": count}
    for side in sides:
        asked[f"{side.label} writer"] = described(side.writer)
        asked[f"{side.label} prompt"] = side.prompt
    settings: dict[str, Any] = json.loads(json.dumps(asked | asdict(sampling)))
    return settings  # as they come back from a file


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
