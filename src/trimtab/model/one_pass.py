"""One forward pass: where its tokens stand, what its texts have read, and which of it a scope
takes. What is worked out for a pass is kept with it, because every steered site asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.model.marks import Placed
from trimtab.model.spans import Turns, fires, refuse_no_turns, without_turns
from trimtab.model.standing import UNKNOWN_END, Prompts
from trimtab.model.trails import Trail


@dataclass(eq=False)
class FoundDials:
    """Dials that were found when the model began to read, [rows]; steps keep here what they make
    of them."""

    values: Tensor
    bound: dict[Any, Any] = field(default_factory=dict)

    def moved(self, move: Callable[[Tensor], Tensor]) -> FoundDials:
        """Those of rows that were put in another order, repeated or chosen."""
        return FoundDials(move(self.values))


@dataclass(eq=False)
class Pass:
    """One forward pass: its first token's column, its number of tokens, where its texts stand and
    what they have read, as far as anybody asks."""

    start: int
    length: int
    prompts: Prompts
    found: FoundDials | None = None
    trail: Trail | None = None
    #: Why there is no trail.
    why_not: str = ""
    #: Of a prompt that is read in parts all of it, where that is known.
    whole: Trail | None = None
    #: What gates have decided of these rows before this pass, by gate.
    latched: Mapping[Any, Any] = field(default_factory=dict)
    #: Its KV cache, held weakly, so that nobody keeps its memory.
    cache: Any = None
    _masks: dict[Any, Any] = field(default_factory=dict)

    def mask(self, scope: Placed, device: torch.device) -> Tensor | bool:
        """Which tokens of the pass to steer: [rows, tokens], or one answer for all of them."""
        if scope.everywhere:
            return True
        key = (id(scope), device)
        if key not in self._masks:
            with torch.inference_mode(False):  # the backward pass may come back to it
                found = fires(scope.part, self, self.start, device)
                self._masks[key] = found
        answer: Tensor | bool = self._masks[key]
        return answer

    def factors(self, decay: float, device: torch.device) -> Tensor:
        """What a decay leaves of the dial at each token, [rows, tokens]: the factor as often as
        tokens were generated before."""
        key = (decay, device)
        if key not in self._masks:
            with torch.inference_mode(False):
                columns = torch.arange(self.start, self.start + self.length, device=device)
                written = columns - self.prompts.column("resumes", device)
                self._masks[key] = torch.pow(decay, written.clamp(min=0).double())
        found: Tensor = self._masks[key]
        return found

    def check_turns(self, scope: Placed, rows: Sequence[bool]) -> None:
        """Refuse texts that are no chats, of the rows that a scope of turns is for."""
        if (
            scope.turns is None
            or self.length == 1
            or self.start + self.length < self.prompts.last_end
        ):
            return
        without = self.once((id(scope.turns), "without"), partial(self._without_turns, scope.turns))
        times = max(1, len(without) // len(rows))
        for row, lacks in enumerate(without):
            if lacks and rows[min(row // times, len(rows) - 1)]:
                raise refuse_no_turns(scope.text, row, scope.name)

    def _without_turns(self, turns: Turns) -> list[bool]:
        found: list[bool] = without_turns(turns, self, self.texts().ids.device).tolist()
        return found

    def whole_prompt(self) -> Pass:
        """As if the whole prompt were read in one pass, of which this one reads a part. What comes
        of a beginning whose end is not known is for nobody to read."""
        if self.prompts.last_end >= UNKNOWN_END:
            return self
        if self.whole is None:
            raise TrimtabError(
                "the prompt is read in parts, and which turn of the user is its last cannot be "
                "told before all of it is known: read it in one pass, or take the scope user"
            )
        return Pass(0, self.whole.columns, self.prompts, trail=self.whole)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is found once for a pass."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def texts(self) -> Trail:
        """What the rows have read, this pass with it."""
        if self.trail is None:
            raise TrimtabError(self.why_not)
        return self.trail
