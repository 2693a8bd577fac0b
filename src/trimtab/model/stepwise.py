"""Texts that are written together, a token of each at a time, each under steerings of its own.

What `generate` does in one call is taken apart here for whoever serves many readers at once: a text
may end, or be left, at any token, and several batches may take turns on one model. Which token
comes next the caller says; the logits are those that `generate` would choose from.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.model.attach import RowSteerings
from trimtab.model.gate_reports import Columns, Fired, decided_by, reported, watch
from trimtab.model.gating import GateAtWork
from trimtab.model.padding import left_padded
from trimtab.model.versions import cache_argument

if TYPE_CHECKING:
    from trimtab.model.language_model import LanguageModel


class Writing:
    """A batch of texts (token ids) that a model goes on with, `steerings` of each.

    Take turns: `logits()` gives those of each text's next token, [texts, vocabulary] in float32,
    `put(tokens)` says which token each text goes on with. `keep(rows)` leaves all other texts.
    Between two calls nothing is on the model, and others may run it.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        texts: Sequence[Sequence[int]],
        steerings: Sequence[RowSteerings],
        *,
        force: bool = False,
    ) -> None:
        self._lm, self._force = language_model, force
        self._asked = list(steerings)
        self._rows, decided = language_model.settled(steerings, texts, force)
        self._decided: list[dict[int, Fired]] = [
            {place: fired for (of, place), fired in decided.items() if of == row}
            for row in range(len(texts))
        ]
        inputs = left_padded(texts, language_model.device)
        self._next, self._mask = inputs["input_ids"], inputs["attention_mask"]
        self._lengths = [len(text) for text in texts]
        self._cache: Any = None
        self._taken = inspect.signature(language_model.model.forward).parameters
        #: What the gates of each text's steerings decided of its prompt, known after one pass.
        self.gates: list[tuple[Fired, ...]] = [()] * len(texts)
        #: Of each text's steerings whether their token gate fired at the token that was read last;
        #: None of one without such a gate.
        self.firing: list[tuple[bool | None, ...]] = [(None,) * len(row) for row in steerings]
        self._by_token = any(
            one.gate is not None and one.gate.kind == "token" for row in steerings for one in row
        )

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits of the next token of each text, [texts, vocabulary], in float32."""
        with self._lm.held(self._rows, self._force) as sequences:
            sequences.in_part = True
            first = self._cache is None
            if first or self._by_token:
                watch(sequences.gates)
            output = self._lm.model(**self._arguments(), use_cache=True)
            if first:
                self._cache = output.past_key_values
                self._report(sequences.gates)
            if self._by_token:
                self.firing = [
                    tuple(_fires(by, row) for by in decided_by(asked, decided, sequences.gates))
                    for row, (asked, decided) in enumerate(
                        zip(self._asked, self._decided, strict=True)
                    )
                ]
        found: Tensor = output.logits[:, -1].float()
        return found

    def put(self, tokens: Tensor) -> None:
        """The tokens that the texts go on with, [texts]."""
        self._next = tokens.to(self._next.device)[:, None]
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(self), 1)), dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these texts only, in this order; their logits come first from `logits()`
        after the next `put`."""
        chosen = torch.tensor(rows, device=self._mask.device)
        self._mask, self._next = self._mask[chosen], self._next[chosen]
        if self._cache is not None:
            self._cache.reorder_cache(chosen)  # which layers without attention have, too
        for name in ("_asked", "_rows", "_decided", "_lengths", "gates", "firing"):
            own = getattr(self, name)
            setattr(self, name, [own[row] for row in rows])

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": self._next, "attention_mask": self._mask}
        if "position_ids" in self._taken:
            places = (self._mask.cumsum(-1) - 1).clamp(min=0)
            arguments["position_ids"] = places[:, -self._next.shape[1] :]
        if "logits_to_keep" in self._taken:
            arguments["logits_to_keep"] = 1
        if self._cache is not None:
            arguments[cache_argument(self._lm.model)] = self._cache
        return arguments

    def _report(self, gates: Any) -> None:
        width = self._mask.shape[1]
        self.gates = [
            reported(asked, decided, gates, row, Columns(width - length, width, None))
            for row, (asked, decided, length) in enumerate(
                zip(self._asked, self._decided, self._lengths, strict=True)
            )
        ]


def _fires(by: Any, row: int) -> bool | None:
    """Whether a token gate fired at a row's last token; None of what else decides."""
    if not isinstance(by, GateAtWork) or by.gate.kind != "token":
        return None
    fired = by.seen[-1].fired
    return bool(fired[row if len(fired) > 1 else 0, -1])
