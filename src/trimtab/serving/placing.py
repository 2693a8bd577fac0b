"""Scopes as an engine elsewhere takes them: with the markers and turns of one model's tokenizer as
token ids."""

from __future__ import annotations

from typing import Any

from trimtab.engines import Acts
from trimtab.model import Images, LanguageModel, Span, Turn
from trimtab.steering import And, Not, Or, Scope, TokenIs, Window, Word


def acts_of(language_model: LanguageModel, scope: Scope) -> Acts:
    """A scope in a model's tokens. Refuses what the model has no marker for."""
    placed = language_model.marks.place(scope)
    return Acts(_tree(placed.part), placed.decay)


def _tree(part: Any) -> list[Any]:
    match part:
        case Word(name=name):
            return [name]
        case TokenIs(ids=ids) | Images(ids=ids):
            return ["token", list(ids)]
        case Window(of=of, first=first, stop=stop):
            return ["window", _tree(of), first, stop]
        case Not(of=of):
            return ["not", _tree(of)]
        case And(parts=parts):
            return ["and", *map(_tree, parts)]
        case Or(parts=parts):
            return ["or", *map(_tree, parts)]
        case Span(opens=opens, closes=closes):
            return ["span", list(map(list, opens)), list(map(list, closes))]
        case Turn(turns=turns, role=role, only_last=only_last):
            markers = [[list(marker), whose] for marker, whose in turns.markers]
            about = {"markers": markers, "role": role, "only_last": only_last}
            return [
                "turn",
                about | {"bare_system": turns.bare_system, "begins": list(turns.begins)},
            ]
    raise TypeError(f"{part!r} is no part of a scope")
