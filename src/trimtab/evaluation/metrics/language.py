"""In which language a text is: by its script, and where that is Latin by its commonest words.

A heuristic for sentences, not for single words: of a text in which no language's words are clearly
more frequent than any other's nothing is said.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

#: Scripts that belong to few languages, by the beginning of their characters' names.
_SCRIPTS = {
    "CYRILLIC": "ru",
    "GREEK": "el",
    "HEBREW": "he",
    "ARABIC": "ar",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "THAI": "th",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
}
#: Words that sentences of a language seldom do without.
_WORDS = {
    "en": "the of and to in is that it for was with as are this be on by from you they which have",
    "de": "der die das und ist nicht ein eine zu den mit von sich auf für im dem auch es wird sie",
    "fr": "le la les et est des un une de du que qui dans pour sur pas avec au ce il sont par plus",
    "es": "el la los las y es de que en un una por con para no se del lo como su más pero son",
    "it": "il la di che e è un una per non con del della sono si le dei gli nel più anche come",
    "pt": "o a os as e é de que em um uma por com para não se do da mais como são ao dos na",
    "nl": "de het een en is van niet dat op te in met voor zijn ook er aan die maar wordt naar",
    "pl": "i w na nie się jest z do że to jak po ale od przez dla są być który także",
    "sv": "och att det som en är på för med av inte den till har de ett om men var sig",
}
_COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}
#: Hits that tell a Latin language, and how far ahead of the next it has to be.
_FEWEST, _AHEAD = 3, 1.25


def language_of(text: str) -> str | None:
    """The language of a text as its two letters, or None where that is not clear."""
    script = _script(text)
    if script is not None:
        return script
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = Counter({name: sum(word in own for word in words) for name, own in _COMMON.items()})
    (first, most), (_, next_most) = hits.most_common(2)
    return first if most >= _FEWEST and most >= _AHEAD * next_most else None


def _script(text: str) -> str | None:
    """The language of the script that most letters are of; None for Latin, and where there are
    none. Japanese has Chinese characters too, and is known by its own."""
    letters = [character for character in text if character.isalpha()]
    names = (re.split(r"[ -]", unicodedata.name(letter, ""))[0] for letter in letters)
    kinds = Counter(map(_SCRIPTS.get, names))
    if not kinds or kinds[None] > len(letters) / 2:
        return None
    found = max((kind for kind in kinds if kind), key=lambda kind: kinds[kind])
    return "ja" if kinds["ja"] > 0.1 * len(letters) else found


def same_language(asked: str | None, answer: str) -> float | None:
    """Whether an answer is in the language of what was asked; None where either is not clear."""
    found = language_of(answer)
    return None if asked is None or found is None else float(asked == found)
