"""What a model says and not what it thinks: answers without the text between thinking markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trimtab.model.arguments import Completion
from trimtab.model.language_model import LanguageModel
from trimtab.model.marks import THINKING
from trimtab.model.spans import Ids, Span

#: How near a prompt's end thinking begins that the chat template has begun.
_BEGUN = 8


def answer_of(language_model: LanguageModel, completion: Completion) -> Completion:
    """A completion whose text is without its thinking: markers, what is between them, and what
    follows one that was never closed; the tokens are all that was written. The same object where
    there is no thinking, or the model marks none."""
    span = language_model.marks.thinking
    if span is None or not completion.tokens:
        return completion
    (prompt,) = language_model.encode([completion.prompt])
    said = _said(tuple(prompt)[-_BEGUN:], completion.tokens, span)
    if len(said) == len(completion.tokens):
        return completion
    text = language_model.tokenizer.decode(said, skip_special_tokens=True)
    return replace(completion, text=text.lstrip())


def _said(before: Ids, new: Ids, span: Span) -> Ids:
    """The new tokens that are no thinking, after the last ones of a prompt."""
    ids, said, inside = before + new, [True] * len(before + new), False
    for place in range(len(ids)):
        opened = _ending(ids, place, span.opens)
        closed = _ending(ids, place, span.closes)
        if opened and not (inside and span.opens == span.closes):
            inside, marker = True, opened
        elif closed:
            inside, marker = False, closed
        else:
            marker = ()
        said[place] = not inside
        for back in range(len(marker)):
            said[place - back] = False
    return tuple(token for token, kept in zip(new, said[len(before) :], strict=True) if kept)


def _ending(ids: Ids, place: int, markers: Sequence[Ids]) -> Ids:
    """The longest marker that ends at a place, or none."""
    found = [one for one in markers if ids[max(0, place + 1 - len(one)) : place + 1] == one]
    return max(found, key=len, default=())


def without_thoughts(text: str) -> str:
    """A text that came from elsewhere without the thinking that it begins with, by the markers that
    models have; what is begun and never ended is all thinking."""
    for begin, end in THINKING:
        before, closed, after = text.partition(end)
        begun = before.lstrip().startswith(begin)
        if closed and (begun or begin not in before):
            return after.lstrip()
        if begun:
            return ""
    return text
