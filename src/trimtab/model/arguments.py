"""What a model is asked for and what it gives: the `steering` argument, by rows; a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trimtab.contrasts import Prompt
from trimtab.errors import TrimtabError, shown
from trimtab.model.attach import RowSteerings
from trimtab.model.gate_reports import Fired
from trimtab.steering import Steering, Steerings, no_steering

if TYPE_CHECKING:
    from trimtab.model.language_model import LanguageModel


@runtime_checkable
class Rule(Protocol):
    """A steering whose dial is found for each row, from the tokens that the row begins with."""

    @property
    def steering(self) -> Steering:
        """What is steered with; its own dial may say on which side."""

    def dials(
        self, language_model: LanguageModel, texts: Sequence[Sequence[int]], force: bool
    ) -> list[float]:
        """The dial of each text (token ids); with no text it only says what would be wrong."""


#: What the `steering` argument of generate and logits takes: one for all rows, or one per row; a
#: row takes a steering, None, or several that act in order (a + b, or a list). A rule is for all
#: rows.
RowArgument = Steering | Steerings | None | Sequence[Steering]
SteeringArgument = Steering | Steerings | Rule | None | Sequence[RowArgument]


@dataclass(frozen=True, repr=False)
class Completion:
    """What a model wrote after a prompt: the text, and the ids of the new tokens. `gates` say of
    gated steerings whether they acted."""

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    steering: tuple[str, ...] = ()
    #: What the gates of its steerings decided, in order.
    gates: tuple[Fired, ...] = ()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        steered = f", {' + '.join(self.steering)}" if self.steering else ""
        return f"<Completion of {len(self.tokens)} tokens{steered}: {shown(repr(self.text), 100)}>"


def is_for_all(argument: Any) -> bool:
    """Whether a `steering` argument is for all rows, not a list with one per row."""
    return isinstance(argument, Steerings) or not isinstance(argument, list | tuple)


def per_text(steering: Any, count: int, what: str = "texts") -> list[RowSteerings] | None:
    """Of a `steering` argument with one for each of so many texts what each has; None where one is
    for all of them."""
    if is_for_all(steering):
        return None
    if len(steering) != count:
        raise TrimtabError(
            f"{len(steering)} steerings for {count} {what}: give one for all or one for each"
        )
    return [row_steerings(row) for row in steering]


def row_steerings(argument: Any) -> RowSteerings:
    """The steerings of one row, from None, one, or several; of all rows, from a list of such."""
    if argument is None:
        return ()
    if isinstance(argument, Steering):
        return (argument,)
    if isinstance(argument, list | tuple):
        return tuple(steering for item in argument for steering in row_steerings(item))
    if isinstance(argument, Rule):
        raise TrimtabError("a rule (a budget) is for all rows: give it alone, not in a list")
    raise no_steering(argument)
