"""Scopes without trimtab: for each string a plain loop over token ids that says how much of the
dial each token of one text gets, and models run by hand with that as an explicit mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from helpers import block

#: Of token ids and the number of those that are prompt: what each of them gets.
Weights = Callable[[Sequence[int], int], list[float]]

#: Tokens that the tiny models write often, so that spans between them begin and end.
OPENS, CLOSES, PAIR = 293, 80, (159, 32)
#: The tokens of the tiny tokenizer's chats.
END, SYSTEM, USER, ASSISTANT, NEWLINE = 2, 3, 4, 5, 204
_TURNS = {SYSTEM: "system", USER: "user", ASSISTANT: "assistant", END: ""}


def _where(holds: Callable[[Sequence[int], int, int], bool]) -> Weights:
    """Tokens of which something holds, by the ids, their place and the prompt's end."""
    return lambda ids, end: [float(holds(ids, i, end)) for i in range(len(ids))]


def _between(start: Sequence[int], stop: Sequence[int]) -> Weights:
    def weights(ids: Sequence[int], end: int) -> list[float]:
        inside, found = False, []
        for i in range(len(ids)):
            if list(ids[i + 1 - len(stop) : i + 1]) == list(stop):
                inside = False
            if list(ids[i + 1 - len(start) : i + 1]) == list(start):
                inside = True
            found.append(float(inside))
        return found

    return weights


def _turns(ids: Sequence[int]) -> list[str]:
    """Whose turn each token of a chat is in."""
    turn, found = "", []
    for i, token in enumerate(ids):
        if i and token == NEWLINE and ids[i - 1] in _TURNS:
            turn = _TURNS[ids[i - 1]]
        found.append(turn)
    return found


def _of_turn(role: str) -> Weights:
    return lambda ids, end: [float(turn == role) for turn in _turns(ids)]


def _last_user(ids: Sequence[int], end: int) -> list[float]:
    turns = _turns(ids)
    places = [i for i in range(end) if turns[i] == "user" and turns[i - 1] != "user"]
    found, i = [0.0] * len(ids), places[-1]
    while i < len(ids) and turns[i] == "user":
        found[i], i = 1.0, i + 1
    return found


def _first(count: int, of: Weights) -> Weights:
    def weights(ids: Sequence[int], end: int) -> list[float]:
        left, found = count, []
        for weight in of(ids, end):
            found.append(weight if left > 0 else 0.0)
            left -= weight > 0
        return found

    return weights


def _decayed(factor: float, of: Weights) -> Weights:
    return lambda ids, end: [
        weight * factor ** max(0, i - end) for i, weight in enumerate(of(ids, end))
    ]


_GENERATED = _where(lambda ids, i, end: i >= end)
_SPAN = _between([OPENS], [CLOSES])

#: On any text.
SCOPES: dict[str, Weights] = {
    "all": _where(lambda ids, i, end: True),
    "prompt": _where(lambda ids, i, end: i < end),
    "generated": _GENERATED,
    "last": _where(lambda ids, i, end: i >= end - 1),
    "generated[:3]": _where(lambda ids, i, end: end <= i < end + 3),
    "generated[3:]": _where(lambda ids, i, end: i >= end + 3),
    "last[1:4]": _where(lambda ids, i, end: end <= i < end + 3),
    "all[5:]": _where(lambda ids, i, end: i >= 5),
    "all[2:9]": _where(lambda ids, i, end: 2 <= i < 9),
    "prompt[-4:]": _where(lambda ids, i, end: end - 4 <= i < end),
    "prompt[1:-2] | generated[2:]": _where(lambda ids, i, end: 1 <= i < end - 2 or i >= end + 2),
    f"token({OPENS}, {CLOSES})": _where(lambda ids, i, end: ids[i] in (OPENS, CLOSES)),
    f"!token({CLOSES}) & last": _where(lambda ids, i, end: ids[i] != CLOSES and i >= end - 1),
    f"between({OPENS}, {CLOSES})": _SPAN,
    f"generated & !between({OPENS}, {CLOSES})": lambda ids, end: [
        float(i >= end and not inside) for i, inside in enumerate(_SPAN(ids, end))
    ],
    f"between([{PAIR[0]}, {PAIR[1]}], {CLOSES})": _between(PAIR, [CLOSES]),
    f"between({OPENS}, {CLOSES})[:2]": _first(2, _SPAN),
    "(prompt[:2] | generated)[1:]": _where(lambda ids, i, end: i == 1 or i >= end),
    "generated ~ 0.8": _decayed(0.8, _GENERATED),
    "prompt | generated[1:] ~ 0.5": _decayed(0.5, _where(lambda ids, i, end: i != end)),
}
#: On texts that are chats.
OF_CHATS: dict[str, Weights] = {
    "user": _of_turn("user"),
    "assistant": _of_turn("assistant"),
    "system": _of_turn("system"),
    "last_user": _last_user,
    "user[:3]": _first(3, _of_turn("user")),
    "assistant & generated": lambda ids, end: [
        float(i >= end and turn == "assistant") for i, turn in enumerate(_turns(ids))
    ],
}
#: Those that a quick run takes everywhere.
QUICK = (
    "generated[:3]",
    "all[5:]",
    f"generated & !between({OPENS}, {CLOSES})",
    f"between({OPENS}, {CLOSES})[:2]",
    "generated ~ 0.8",
)


def added(x: Tensor, weights: Tensor, vector: Tensor, dial: float) -> Tensor:
    """A vector added at the dial that each token gets; `weights` [rows, tokens]."""
    return x + dial * weights[..., None].to(x) * vector.to(x)


@contextmanager
def masked_by_hand(
    model: Any, layer: int, weights: Callable[[Tensor], Tensor], vector: Tensor, dial: float
) -> Iterator[None]:
    """Change a block's output in passes that hold whole texts, whose ids say which tokens."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen[:] = [kwargs["input_ids"] if "input_ids" in kwargs else args[0]]

    def change(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        return added(x, weights(seen[0]), vector, dial)

    handles = [
        model.register_forward_pre_hook(see, with_kwargs=True),
        block(model, layer).register_forward_hook(change),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def written_by_hand(
    model: Any, prompt: Sequence[int], new: int, steered: tuple[Weights, Tensor, float]
) -> list[int]:
    """A plain greedy loop over whole texts, without a cache."""
    scope, vector, dial = steered
    ids, end = list(prompt), len(prompt)
    with (
        torch.no_grad(),
        masked_by_hand(model, 1, lambda now: torch.tensor([scope(ids, end)]), vector, dial),
    ):
        for _ in range(new):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[end:]
