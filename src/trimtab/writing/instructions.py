"""Pairs of instructions: one that asks for a trait, and one that asks for its opposite or for none
of it; by templates, or from a writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.contrasts import plain
from trimtab.errors import TrimtabError
from trimtab.writing.wishes import Wish

#: Each holds what to do, as an imperative that begins small.
TEMPLATES = (
    "{do}.",
    "Whatever you are asked, {do}.",
    "Keep to one rule in every answer: {do}.",
    "Please {do}, from your first word to your last.",
    "This matters more than anything else: {do}.",
    "Before you answer, remember this: {do}.",
    "Here is the style guide for all of your answers: {do}.",
    "The people whom you talk to want one thing of you: {do}.",
)
#: An instruction is a sentence or two.
_SHORTEST, _LONGEST = 8, 400

#: In our words; the authors' request is longer, and for large models.
REQUEST = (
    "I study how a language model's answers change in style. The trait is: {wish}. Its opposite "
    "is: {opposite}.\n"
    "Write {count} different pairs of instructions to an assistant. In each pair the positive "
    "instruction makes every answer show the trait clearly, and the negative one makes every "
    "answer show its opposite, or nothing of it. Each is one or two plain sentences, addressed to "
    "the assistant, and says in its own words how to answer any question.\n"
    'Reply with JSON only, in this form: {{"instructions": [{{"positive": "...", "negative": '
    '"..."}}]}}'
)


@dataclass(frozen=True)
class Instructions:
    """What a model is told on either side, and who wrote it."""

    positive: str
    negative: str
    source: str


def by_templates(wish: Wish, count: int) -> list[Instructions]:
    """So many pairs from the wish's own words."""
    if count > len(TEMPLATES):
        raise TrimtabError(
            f"there are {len(TEMPLATES)} templates for the {count} pairs of instructions that are "
            "asked for: ask for fewer (pairs), or name a writer that writes more"
        )
    return [
        Instructions(_filled(each, wish.ask), _filled(each, wish.ask_not), "templates")
        for each in TEMPLATES[:count]
    ]


def _filled(template: str, do: str) -> str:
    text = template.replace("{do}", do)
    return text[:1].upper() + text[1:]


def new_pairs(found: Sequence[Any], known: Sequence[Instructions]) -> list[Instructions]:
    """The pairs among what a writer gave that are pairs of instructions, and new."""
    pairs: list[Instructions] = []
    for each in found:
        pair = _pair(each)
        told = {plain(text) for one in (*known, *pairs) for text in (one.positive, one.negative)}
        if pair and not {plain(pair.positive), plain(pair.negative)} & told:
            pairs.append(pair)
    return pairs


def _pair(value: Any) -> Instructions | None:
    if not isinstance(value, Mapping):
        return None
    sides = [value.get(side) for side in ("positive", "negative")]
    texts = [" ".join(side.split()) for side in sides if isinstance(side, str)]
    if len(texts) < 2 or not all(_SHORTEST <= len(text) <= _LONGEST for text in texts):
        return None
    if plain(texts[0]) == plain(texts[1]):
        return None
    return Instructions(texts[0], texts[1], "writer")


def top_up(written: Sequence[Instructions], wish: Wish, count: int) -> list[Instructions]:
    """So many pairs: those that were written, and for what is missing templates."""
    missing = count - len(written)
    return [*written[:count], *(by_templates(wish, missing) if missing > 0 else ())]
