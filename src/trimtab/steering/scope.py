"""At which tokens an intervention acts: one small value, written as one short string.

    all    prompt    generated & !thinking    generated[:32]    user | system    generated ~ 0.95

docs/scopes.md has the grammar and all words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator

from trimtab.errors import TrimtabError, check_choice
from trimtab.steering.scope_grammar import read
from trimtab.steering.scope_tree import (
    PLACES,
    READ,
    SITUATIONS,
    And,
    Between,
    Part,
    Situation,
    TokenIs,
    Window,
    Word,
    parts_of,
)

#: The four words of place, which were all that scopes could say at first.
Place = Literal["all", "prompt", "generated", "last"]
POSITIONS: tuple[Place, ...] = get_args(Place)
#: Tokens of which kind, of a model that sees images: all, those of text, or those that stand for
#: images.
Tokens = Literal["all", "text", "image"]


@dataclass(frozen=True)
class Scope:
    """Which tokens of a text, and, with a `decay`, how much of the dial each of them gets: that
    factor for each token generated before it.

    `Scope.parse(str(scope)) == scope`. Errors: a TrimtabError of one line.
    """

    part: Part
    decay: float | None = None

    @classmethod
    def parse(cls, text: str) -> Scope:
        """Read a scope from its string."""
        return cls(*read(text))

    @classmethod
    def of(cls, scope: Scope | str) -> Scope:
        """A scope, from itself or from its string."""
        if isinstance(scope, Scope):
            return scope
        if not isinstance(scope, str):
            raise TrimtabError(
                f"{scope!r} is no scope: write one as text, as in 'generated & !thinking'"
            )
        return cls.parse(scope)

    @classmethod
    def placed(cls, positions: Place, tokens: Tokens = "all") -> Scope:
        """What files said before there were scopes: a place, and a kind of token."""
        place = Word(positions)
        if tokens == "all":
            return cls(place)
        return cls(Word(tokens) if positions == "all" else And((place, Word(tokens))))

    def __str__(self) -> str:
        return str(self.part) if self.decay is None else f"{self.part} ~ {self.decay!r}"

    # -- what can be said without a text ------------------------------------------------------

    def holds(self, *situations: Situation) -> bool | None:
        """Whether it acts on tokens of these kinds (default: of all kinds): on all of them, on
        none, or None, where that depends on the text."""
        found = {self.part.holds(at) for at in situations or SITUATIONS}
        return found.pop() if len(found) == 1 else None

    @property
    def everywhere(self) -> bool:
        """Whether it acts on all tokens of any text alike."""
        return self.decay is None and self.holds() is True

    @property
    def never(self) -> bool:
        """Whether it acts on no token of any text."""
        return self.holds() is False

    @property
    def only_generated(self) -> bool:
        """Whether it leaves a text that is only read as it is."""
        return self.holds(*READ) is False

    @property
    def only_images(self) -> bool:
        """Whether it acts on nothing but tokens that stand for images."""
        return self.holds(*(at for at in SITUATIONS if at.kind == "text")) is False

    @property
    def at_end(self) -> bool | None:
        """Whether it acts on the prompt's last token, which the next one is read from."""
        return self.holds(Situation("end"))

    @property
    def plain(self) -> bool:
        """Whether a token's place and kind decide, whatever the text says and however long it
        is."""
        known = (*PLACES, "text", "image")
        return self.decay is None and not any(
            isinstance(each, TokenIs | Between | Window)
            or (isinstance(each, Word) and each.name not in known)
            for each in parts_of(self.part)
        )

    @property
    def by_content(self) -> bool:
        """Whether it looks at what a text says: ids, turns, spans."""
        known = (*PLACES, "text", "image")
        return any(
            isinstance(each, TokenIs | Between)
            or (isinstance(each, Word) and each.name not in known)
            for each in parts_of(self.part)
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether what comes later in the prompt decides: the last turn of the user, and a window
        that counts from the prompt's end."""
        return any(
            each == Word("last_user")
            or (isinstance(each, Window) and min(each.first or 0, each.stop or 0) < 0)
            for each in parts_of(self.part)
        )

    # -- what it was called before ------------------------------------------------------------

    @property
    def as_placed(self) -> tuple[Place, Tokens] | None:
        """The place and the kind of token that say the same, where two words do."""
        return _PLACED.get(self)

    def on(self, tokens: Tokens) -> Scope:
        """The same scope on tokens of one kind, or of all kinds."""
        check_choice("tokens", tokens, Tokens)
        parts = self.part.parts if isinstance(self.part, And) else (self.part,)
        rest = tuple(each for each in parts if each not in (Word("text"), Word("image")))
        kept = rest if tokens == "all" else (*rest, Word(tokens))
        kept = tuple(each for each in kept if each != Word("all")) or (Word("all"),)
        return Scope(kept[0] if len(kept) == 1 else And(kept), self.decay)


def _readable(text: str) -> str:
    try:
        Scope.parse(text)
    except TrimtabError as error:  # pydantic hands on what is a ValueError
        raise ValueError(str(error)) from error
    return text


#: A field that takes a scope's string.
Positions = Annotated[str, AfterValidator(_readable)]

_PLACED: dict[Scope, Any] = {
    Scope.placed(positions, tokens): (positions, tokens)
    for positions in POSITIONS
    for tokens in get_args(Tokens)
}
