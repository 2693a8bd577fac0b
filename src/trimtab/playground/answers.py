"""Two answers to a conversation, a token at a time: of the model as it is, and under steerings.

Both are rows of one batch. For evidence there is a third row: the model as it is reads what the
steered one writes, so that at each token there are two distributions after one and the same text.
Where both sides answer the same conversation it is read once for all rows that are not steered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.dials import divergence, entropy
from trimtab.errors import TrimtabError
from trimtab.model import Growing, LanguageModel, Writing, are_sound, end_tokens, unsound
from trimtab.serving import Chooser, Settings
from trimtab.steering import Steering

Side = Literal["plain", "steered"]
#: The model as it is, which reads the steered answer.
_SHADOW = "shadow"
#: Beside three rows one more that nobody looks at: products of three rows take a processor half as
#: long again as products of four (MKL in single precision; on a card there is no difference).
_SPARE = "spare"
#: How many of the likeliest tokens are told of.
TOP = 5


@dataclass(eq=False)
class _Text:
    """One side's answer, as far as it is written."""

    side: Side
    chooser: Chooser
    began: float
    new: list[int] = field(default_factory=list)
    growing: Growing = field(default_factory=Growing)


class _Rows:
    """Texts that are gone on with together, or by themselves where the model does not pad."""

    def __init__(
        self,
        language_model: LanguageModel,
        texts: Sequence[Sequence[int]],
        steerings: Sequence[tuple[Steering, ...]],
    ) -> None:
        one_batch = len(set(map(len, texts))) == 1 or language_model.pads("generate")
        groups = [range(len(texts))] if one_batch else [range(i, i + 1) for i in range(len(texts))]
        self.writings = [
            Writing(language_model, [texts[i] for i in rows], [steerings[i] for i in rows])
            for rows in groups
        ]

    @property
    def together(self) -> bool:
        """Whether all are rows of one batch."""
        return len(self.writings) == 1

    def logits(self) -> Tensor:
        return torch.cat([writing.logits() for writing in self.writings])

    def put(self, tokens: Sequence[int]) -> None:
        start = 0
        for writing in self.writings:
            writing.put(torch.tensor(tokens[start : start + len(writing)]))
            start += len(writing)

    def keep(self, rows: Sequence[int]) -> None:
        start, kept = 0, []
        for writing in self.writings:
            own = [row - start for row in rows if start <= row < start + len(writing)]
            start += len(writing)
            if own:
                writing.keep(own)
                kept.append(writing)
        self.writings = kept

    @property
    def gates(self) -> list[tuple[Any, ...]]:
        return [gates for writing in self.writings for gates in writing.gates]

    @property
    def firing(self) -> list[tuple[bool | None, ...]]:
        return [fires for writing in self.writings for fires in writing.firing]


def answers(
    language_model: LanguageModel,
    texts: Mapping[Side, Sequence[int]],
    steerings: tuple[Steering, ...],
    settings: Settings,
    evidence: bool,
) -> Iterator[dict[str, Any]]:
    """What is written after the texts (token ids) of one side or both: events of kind `begun` (what
    gates decided), `token`, `gated` (of each steering whether its token gate fired at the token
    before), `failed` and `ended`, each of a side."""
    lm, began = language_model, time.monotonic()
    roles: list[str] = [side for side in ("plain", "steered") if side in texts]
    shadowed = evidence and "steered" in texts
    shared = shadowed and texts.get("plain") == texts["steered"]
    if shadowed and not shared:
        roles.append(_SHADOW)
    read = [texts["steered" if role == _SHADOW else role] for role in roles]  # type: ignore[index]
    acting = [steerings if role == "steered" else () for role in roles]
    rows = _Rows(lm, read, acting)
    logits = rows.logits()
    if "steered" in roles:
        gates = rows.gates[roles.index("steered")]
        yield {"kind": "begun", "side": "steered", "gates": [gate.as_json() for gate in gates]}
    wanted = list(range(len(roles)))
    if shared:
        wanted, roles = [*wanted, roles.index("plain")], [*roles, _SHADOW]
    if len(roles) == 3 and lm.device.type == "cpu" and rows.together:
        wanted, roles = [*wanted, wanted[-1]], [*roles, _SPARE]
    if len(wanted) > len(read):
        rows.keep(wanted)
        logits, acting = logits[wanted], [acting[i] for i in wanted]
    written = {
        side: _Text(side, Chooser(settings, list(text)), began) for side, text in texts.items()
    }
    while True:
        chosen, over = list[int](), set[str]()
        sound = are_sound(logits).tolist()
        for place, role in enumerate(roles):
            if role in (_SHADOW, _SPARE):
                chosen.append(chosen[roles.index("steered")])
                continue
            text = written[role]  # type: ignore[index]
            if not sound[place]:
                labels = tuple(one.label for one in acting[place])
                error = unsound("this answer", labels, lm.dtype)
                yield {"kind": "failed", "side": role, "message": str(error)}
                over.add(role)
                chosen.append(0)
                continue
            token = _next(text.chooser, logits[place])
            chosen.append(token)
            more = _evidence(lm, logits, roles, token) if shadowed and role == "steered" else None
            event = _said(lm, text, token, settings, more)
            yield event
            if event["kind"] == "ended":
                over.add(role)
            elif len(text.new) >= settings.max_tokens:
                yield _ended(lm, text, "length")
                over.add(role)
        if "steered" in over:
            over.add(_SHADOW)
        if over:
            over.add(_SPARE)
        kept = [place for place, role in enumerate(roles) if role not in over]
        if not kept:
            return
        rows.put(chosen)
        if len(kept) < len(roles):
            rows.keep(kept)
            roles, acting = [roles[i] for i in kept], [acting[i] for i in kept]
        logits = rows.logits()
        if "steered" in roles:
            fires = rows.firing[roles.index("steered")]
            if any(one is not None for one in fires):
                place = len(written["steered"].new) - 1
                yield {"kind": "gated", "side": "steered", "place": place, "fired": list(fires)}


def _next(chooser: Chooser, logits: Tensor) -> int:
    """The token that a text goes on with."""
    token = int(logits.argmax()) if chooser.plain else chooser.choose(logits).token
    chooser.note(token)
    return token


def _said(
    lm: LanguageModel,
    text: _Text,
    token: int,
    settings: Settings,
    evidence: dict[str, Any] | None,
) -> dict[str, Any]:
    """What a token adds to a text, or that it ends it."""
    if token in end_tokens(lm.model.generation_config.eos_token_id):
        return _ended(lm, text, "stop")
    text.new.append(token)
    more = text.growing.more(lm.tokenizer.decode(text.new, skip_special_tokens=True))
    told = {"kind": "token", "side": text.side, "id": token, "text": more}
    return told if evidence is None else {**told, "evidence": evidence}


def _ended(lm: LanguageModel, text: _Text, reason: str) -> dict[str, Any]:
    whole = lm.tokenizer.decode(text.new, skip_special_tokens=True)
    return {
        "kind": "ended",
        "side": text.side,
        "reason": reason,
        "text": whole,
        "tokens": len(text.new),
        "seconds": round(time.monotonic() - text.began, 3),
    }


@torch.inference_mode()
def _evidence(
    lm: LanguageModel, logits: Tensor, roles: Sequence[str], token: int
) -> dict[str, Any] | None:
    """What the steerings changed at a token: its log-probability before and after, KL(unsteered ||
    steered) and both entropies in nats, and the likeliest tokens of either with both of their
    probabilities."""
    places = [roles.index("steered"), roles.index(_SHADOW)]
    if not bool(are_sound(logits[places]).all()):
        return None
    after, before = logits[places].log_softmax(-1)
    return {
        "logp": float(after[token]),
        "base_logp": float(before[token]),
        "kl": max(0.0, float(divergence(before[None], after[None])[0])),
        "entropy": float(entropy(after)),
        "base_entropy": float(entropy(before)),
        "top": _likeliest(lm, after, before),
        "base_top": _likeliest(lm, before, after),
    }


def _likeliest(lm: LanguageModel, own: Tensor, other: Tensor) -> list[list[Any]]:
    """The likeliest tokens: text, log-probability, and that in the other distribution."""
    values, tokens = own.topk(min(TOP, len(own)))
    beside = other[tokens].tolist()
    return [
        [lm.tokenizer.decode([token]), value, there]
        for token, value, there in zip(tokens.tolist(), values.tolist(), beside, strict=True)
    ]


def check_length(lm: LanguageModel, tokens: Sequence[int], settings: Settings) -> None:
    """Refuse an answer for which there is no room."""
    if len(tokens) + settings.max_tokens > lm.max_length:
        raise TrimtabError(
            f"the conversation has {len(tokens)} tokens, and with {settings.max_tokens} new ones "
            f"it exceeds the {lm.max_length} that {lm.name} takes: begin a new one, or ask for less"
        )
