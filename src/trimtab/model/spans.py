"""Which tokens of a pass a scope takes: from where its texts stand, and from what they say.

All that is found here is a function of the token ids that a row has read so far and of where its
prompt ends. So it is the same however a text is cut into passes, beside whatever other rows. A
marker counts from its last token on: that token is the first of what the marker begins, and the
first that is no longer in what it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.model.standing import is_stretch
from trimtab.steering import And, Not, Or, TokenIs, Window

if TYPE_CHECKING:
    from trimtab.model.one_pass import Pass

#: Token ids of a marker.
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """Tokens that stand for images."""

    ids: Ids


@dataclass(frozen=True)
class Span:
    """Tokens from one of some markers on, up to one of others."""

    opens: tuple[Ids, ...]
    closes: tuple[Ids, ...]


@dataclass(frozen=True)
class Turns:
    """How the turns of a chat are told apart: markers, the longest last, and whose turn each of
    them begins ("" where it only ends one). A bare system message has no marker: what stands before
    the first one is the system's then, but for the tokens that any text begins with."""

    markers: tuple[tuple[Ids, str], ...]
    has_system: bool = True
    bare_system: bool = False
    begins: Ids = ()


@dataclass(frozen=True)
class Turn:
    """Tokens of somebody's turns, or of the last one in the prompt."""

    turns: Turns
    role: str
    only_last: bool = False


def fires(part: Any, now: Pass, first: int, device: torch.device) -> Tensor | bool:
    """Which tokens a part takes of the columns from `first` to the end of a pass: one answer for
    all of them, or [rows, columns]."""
    stop = now.start + now.length
    if is_stretch(part):
        return now.prompts.within(part, first, stop, device)
    match part:
        case Not(of=of):
            found = fires(of, now, first, device)
            return ~found if isinstance(found, Tensor) else not found
        case And(parts=parts) | Or(parts=parts):
            return _together(parts, isinstance(part, And), now, first, device)
        case Window(of=of, first=begin, stop=end):
            return _window(fires(of, now, 0, device), begin, end, now, device)[:, first:]
        case TokenIs(ids=ids):
            return _is_one_of(now.texts().ids[:, first:].to(device), ids)
        case Images(ids=ids):
            found = _is_one_of(now.texts().ids[:, first:], ids)
            return found.to(device) if bool(found.any()) else False
        case Span():
            return _in_span(part, now, device)[:, first:]
        case Turn():
            return _in_turn(part, now, device)[:, first:]
    raise TypeError(f"{part!r} is no part of a scope")


def _together(
    parts: Sequence[Any], all_of_them: bool, now: Pass, first: int, device: torch.device
) -> Tensor | bool:
    """Where all of some parts hold, or one of them; what the first ones decide is not asked of the
    others."""
    found: Tensor | bool = all_of_them
    for part in parts:
        one = fires(part, now, first, device)
        if isinstance(one, bool):
            if one is not all_of_them:
                return one
        elif isinstance(found, bool):
            found = one
        else:
            found = found & one if all_of_them else found | one
    return found


def _window(
    inside: Tensor | bool, begin: int | None, end: int | None, now: Pass, device: torch.device
) -> Tensor:
    """Of tokens [rows, columns] of a text those from one number on, up to another."""
    if isinstance(inside, bool):
        rows, columns = len(now.prompts.rows), now.start + now.length
        inside = torch.full((rows, columns), inside, device=device)
    if now.trail is not None and now.trail.real is not None:
        inside = inside & now.trail.real.to(device)
    number = inside.cumsum(-1) - 1
    if begin is not None:
        inside = inside & (number >= begin)
    return inside if end is None else inside & (number < end)


def _is_one_of(ids: Tensor, wanted: Ids) -> Tensor:
    if len(wanted) == 1:
        return ids == wanted[0]
    return torch.isin(ids, torch.tensor(wanted, device=ids.device))


def _end_of(ids: Tensor, marker: Ids) -> Tensor:
    """Where a marker ends in token ids [rows, columns]."""
    found = ids == marker[-1]
    for back, token in enumerate(reversed(marker[:-1]), 1):
        before = torch.zeros_like(found)
        before[:, back:] = ids[:, :-back] == token
        found = found & before
    return found


def _ends_of(ids: Tensor, markers: Sequence[Ids]) -> Tensor:
    found = _end_of(ids, markers[0])
    for marker in markers[1:]:
        found = found | _end_of(ids, marker)
    return found


def _last_seen(events: Sequence[Tensor]) -> Tensor:
    """Which of some events [rows, columns] came last at or before each column, counted from 1; 0
    where none did. Of two in one column the later in the list counts."""
    kinds, columns = len(events) + 1, events[0].shape[1]
    places = torch.arange(columns, device=events[0].device) * kinds
    latest = torch.zeros_like(events[0], dtype=torch.long)
    for kind, event in enumerate(events, 1):
        latest = torch.where(event, places + kind, latest)
    return latest.cummax(-1).values % kinds


def _real(found: Tensor, now: Pass, device: torch.device) -> Tensor:
    """Where something is found in a text, and not in the padding beside it."""
    real = now.texts().real
    return found if real is None else found & real.to(device)


def _in_span(span: Span, now: Pass, device: torch.device) -> Tensor:
    ids = now.texts().ids.to(device)
    opens = _real(_ends_of(ids, span.opens), now, device)
    if span.opens == span.closes:  # the same marker begins and ends it
        return opens.cumsum(-1) % 2 == 1
    closes = _real(_ends_of(ids, span.closes), now, device)
    return _last_seen((closes, opens)) == 2


def _events(turns: Turns, now: Pass, device: torch.device) -> list[Tensor]:
    """Where markers of turns end, one [rows, columns] for each."""
    ids = now.texts().ids.to(device)
    made: list[Tensor] = now.once(
        (id(turns), device),
        lambda: [_real(_end_of(ids, marker), now, device) for marker, _ in turns.markers],
    )
    return made


def _in_turn(turn: Turn, now: Pass, device: torch.device) -> Tensor:
    turns = turn.turns
    events = _events(turns, now, device)
    latest: Tensor = now.once((id(turns), "latest", device), lambda: _last_seen(events))
    if turn.role == "system" and turns.bare_system:
        return (latest == 0) & ~_is_one_of(now.texts().ids.to(device), turns.begins or (-1,))
    own = [i for i, (_, role) in enumerate(turns.markers, 1) if role == turn.role]
    inside: Tensor = _is_one_of(latest, tuple(own))
    if not turn.only_last:
        return inside
    number = _numbers(turn, latest)
    whole = number
    if now.start + now.length < now.prompts.last_end:
        whole = _numbers(turn, _last_seen(_events(turns, now.whole_prompt(), device)))
    columns = torch.arange(whole.shape[1], device=device)
    in_prompt = columns < now.prompts.column("end", device)
    return inside & (number == (whole * in_prompt).amax(-1, keepdim=True))


def _numbers(turn: Turn, latest: Tensor) -> Tensor:
    """How many turns of a role have begun at each column, [rows, columns]."""
    own = tuple(i for i, (_, role) in enumerate(turn.turns.markers, 1) if role == turn.role)
    inside = _is_one_of(latest, own)
    before = torch.zeros_like(inside)
    before[:, 1:] = inside[:, :-1]
    return (inside & ~before).cumsum(-1)


def without_turns(turns: Turns, now: Pass, device: torch.device) -> Tensor:
    """Which rows have no marker of a turn at all, [rows]."""
    events = torch.stack(_events(turns, now, device))
    return ~events.any(0).any(-1)


def refuse_no_turns(scope: str, row: int, name: str) -> TrimtabError:
    """The error of a text in which no turn begins."""
    return TrimtabError(
        f"text {row + 1} of the batch has no turn of a chat, so that the scope '{scope}' is "
        f"nowhere in it: give {name} messages through its chat template, or take another scope "
        "(prompt, generated)"
    )
