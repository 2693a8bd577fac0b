"""What may run a model over many texts in place of transformers.

Whoever asks a model about many texts takes such an engine, or None. Several may ask at once: each
of what is given `in_turns` comes empty wherever nothing is known yet, so that one loop can go
around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trimtab.contrasts import Prompt
from trimtab.model import Completion, SteeringArgument, UnsoundError
from trimtab.reading.reader import Next, PlannedBatch, Reading
from trimtab.steering import Steering


@dataclass(frozen=True)
class Stretch:
    """Tokens of a text, from `first` up to `stop`, at a site: `whole` asks for the activation of
    each, otherwise for their sum."""

    site: str
    first: int
    stop: int
    whole: bool


class Engine(Protocol):
    """An engine on the weights of one language model."""

    @property
    def name(self) -> str:
        """For records of what ran."""

    @property
    def longest(self) -> int:
        """The longest text, with what is written after it, in tokens."""

    @property
    def read(self) -> int:
        """Tokens that ran through the model so far; what was in a cache did not."""

    def prepare(
        self, steerings: Sequence[Steering], *, everywhere: bool = False, force: bool = False
    ) -> None:
        """Be able to steer so, or refuse it; `everywhere` means in all blocks, at such sites."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse what says how texts are written, and is not carried."""

    def written(
        self,
        prompts: Sequence[Prompt],
        acting: Sequence[tuple[Steering, ...]],
        missing: Sequence[bool] | None = None,
        *,
        in_turns: bool = False,
        **options: Any,
    ) -> Iterator[list[tuple[int, Completion | UnsoundError]]]:
        """What follows prompts under the steerings of each, as it comes, by its place."""

    def next_tokens(
        self,
        readings: Sequence[Reading],
        steering: SteeringArgument = None,
        *,
        missing: Callable[[int], bool] | None = None,
        in_turns: bool = False,
        force: bool = False,
    ) -> Iterator[tuple[PlannedBatch, list[Next]]]:
        """As `reading.next_tokens`, as it comes."""

    def prepare_sites(self, sites: Sequence[str]) -> None:
        """Be able to read activations there, or refuse it."""

    def activations(
        self, texts: Sequence[tuple[Sequence[int], Sequence[Stretch]]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Of texts, as token ids, the stretches that are wanted of each, as they come, by the
        text's place: [tokens, units] in float32 of a whole one, of others the sum, [units] in
        float64. No steering acts."""
