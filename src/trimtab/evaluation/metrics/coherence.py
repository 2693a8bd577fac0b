"""Whether a text still holds together: perplexity, repetition, language, compressibility.

Perplexity of what a model wrote is taken twice. Scored by the *unsteered* model it says how odd the
text is; scored by the model that wrote it (self-perplexity, as Selective Steering has it) it says
how sure of itself the steered model was. The second is blind to loops, which a model predicts
perfectly; so is the first, in part; repetition and compression are there to see them.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence

import torch

from trimtab.contrasts import Prompt
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel, extended
from trimtab.reading import Engine, Reading, next_tokens
from trimtab.steering import Steering, Steerings

#: Characters of a run by which a loop is seen that has no words.
_CHARACTERS = 12
#: A word, or a sign.
_PIECES = re.compile(r"\w+|[^\w\s]")


def language_consistency(text: str) -> float:
    """The share of characters, spaces aside, that are ASCII or Latin; 1 for an empty text.

    As in Selective Steering: a character is at home if it is ASCII or its Unicode name begins with
    LATIN, COMMON or INHERITED, so that typographic quotes and emoji count as foreign.
    """
    visible = [character for character in text if not character.isspace()]
    if not visible:
        return 1.0
    return sum(map(_at_home, visible)) / len(visible)


def _at_home(character: str) -> bool:
    name = unicodedata.name(character, "")
    return character.isascii() or name.startswith(("LATIN", "COMMON", "INHERITED"))


def compression_ratio(text: str) -> float:
    """Size after zlib (level 9) over size in UTF-8; 1 for an empty text. Loops compress well."""
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / len(raw) if raw else 1.0


def repetition(text: str, n: int = 4) -> float:
    """The share of n-grams of words that occurred before in the text; 0 for fewer than n words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def looping(text: str) -> float:
    """How much of a text is a loop: the share of its runs of four words or signs that were there
    before, as in "1. 1.1.1.1", or of its runs of twelve characters, as in "aaaaaa", whichever is
    more."""
    runs = [text[i : i + _CHARACTERS] for i in range(len(text) - _CHARACTERS + 1)]
    before = (len(runs) - len(set(runs))) / len(runs) if runs else 0.0
    return max(before, repetition(" ".join(_PIECES.findall(text))))


def perplexities(
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    steering: Steering | Steerings | None = None,
    *,
    engine: Engine | None = None,
    force: bool = False,
) -> list[float | None]:
    """exp of the mean -ln p over the generated tokens of each text; None where there are none.

    `completions` are the ids of the new tokens of each prompt. `steering` is one for all texts, or
    None for the unsteered model; `engine` runs it in place of transformers.
    """
    if len(prompts) != len(completions):
        raise TrimtabError(f"{len(completions)} completions for {len(prompts)} prompts")
    written = [i for i, tokens in enumerate(completions) if tokens]
    readings = []
    for i, prompt in zip(
        written, language_model.encode([prompts[i] for i in written]), strict=True
    ):
        if not prompt:
            raise TrimtabError(f"the prompt {prompts[i]!r} is empty")
        start, new = len(prompt), tuple(completions[i])
        # The last token is read too, though nothing is asked of it: a steering of the generated
        # tokens alone must find one, also where every text has but one.
        asked = tuple(range(start - 1, start - 1 + len(new)))
        readings.append(Reading(extended(prompt, new), asked, start, new))
    found: list[float | None] = [None] * len(prompts)
    if engine is None:
        read = next_tokens(language_model, readings, steering, force=force)
    else:
        read = engine.next_tokens(readings, steering, force=force)
    for batch, rows in read:
        for i, row in zip(batch.rows, rows, strict=True):
            # Beyond e^700 a float ends; such a text is as odd as any.
            found[written[i]] = float(torch.exp((-row.log_p.mean()).clamp(max=700)))
    return found


def coherence(
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    completions: Sequence[Sequence[int]],
    steering: Steering | Steerings | None = None,
    *,
    asked: Sequence[Prompt] | None = None,
    engine: Engine | None = None,
    force: bool = False,
) -> list[dict[str, float | None]]:
    """All measures of each text, by name; `asked` are the prompts as the model that wrote the
    texts was given them (default: `prompts`)."""
    plain = perplexities(language_model, prompts, completions, engine=engine)
    own, given = plain, prompts if asked is None else asked
    if steering is not None or list(given) != list(prompts):
        own = perplexities(language_model, given, completions, steering, engine=engine, force=force)
    return [
        {
            "perplexity": plain[i],
            "self_perplexity": own[i],
            "language_consistency": language_consistency(text),
            "compression_ratio": compression_ratio(text),
            "repetition_4gram": repetition(text),
        }
        for i, text in enumerate(texts)
    ]
