"""Which tokens of one text a scope takes, and how much of the dial each of them gets.

An engine cuts texts into passes and blocks as it likes, in several processes. So what a scope says
of a token is worked out here from the ids that its text has so far and from where its prompt ends,
and from nothing else: the worker that steers and the key of a cached block ask the same function.
What is asked for travels as JSON, with markers and turns as token ids already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: A part of a scope as JSON: a word, and what it is about.
Tree = list[Any]
#: Words that ask where a token stands, and nothing else.
_PLACES = ("all", "prompt", "generated", "last")
_FAR = 1 << 60
_DEEPEST = 64


@dataclass(frozen=True)
class Acts:
    """A scope as it travels: its tree, and its decay."""

    tree: Tree
    decay: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {"tree": self.tree, "decay": self.decay}

    @property
    def reads(self) -> bool:
        """Whether it asks which tokens a text has."""
        return _reads(self.tree)


def read_acts(given: Any) -> Acts:
    """A scope from its JSON, after every check; a ValueError says what is wrong."""
    if not (isinstance(given, dict) and set(given) == {"tree", "decay"}):
        raise ValueError("a scope is {tree, decay}")
    decay = given["decay"]
    if decay is not None and not (isinstance(decay, float) and 0 < decay < 1):
        raise ValueError("a decay is a number between 0 and 1")
    _check(given["tree"], _DEEPEST)
    return Acts(given["tree"], decay)


def weights(acts: Acts, ids: Sequence[int], prompt: int, first: int, stop: int) -> Any:
    """How much of the dial tokens `first` to `stop` of a text get, float64 [stop - first]: 0 where
    a token is left as it is. `ids` has the text up to `stop` at least, and the whole prompt, where
    the scope reads; the first `prompt` tokens are the prompt."""
    mask = _fires(acts.tree, _Text(ids, prompt, stop), first).astype(np.float64)
    if acts.decay is None:
        return mask
    written = np.maximum(np.arange(first, stop) - prompt, 0)
    return mask * np.power(acts.decay, written.astype(np.float64))


def stretch(acts: Acts, prompt: int) -> tuple[int, int] | None:
    """From which token on, up to which one, a scope takes all, with the whole dial, whatever they
    are; None where that is not so."""
    return _stretch(acts.tree, prompt) if acts.decay is None else None


@dataclass(frozen=True)
class _Text:
    """A text as far as it is known: its ids, how long its prompt is, and up to where it is asked
    for."""

    ids: Sequence[int]
    prompt: int
    stop: int

    def known(self, stop: int) -> Any:
        return np.asarray(self.ids[:stop], dtype=np.int64)


def _fires(tree: Tree, text: _Text, first: int) -> Any:
    """Which of the tokens from `first` on a part takes, [text.stop - first]."""
    stretch = _stretch(tree, text.prompt)
    if stretch is not None:
        places = np.arange(first, text.stop)
        return (places >= stretch[0]) & (places < stretch[1])
    kind, *about = tree
    if kind == "not":
        return ~_fires(about[0], text, first)
    if kind in ("and", "or"):
        each = [_fires(part, text, first) for part in about]
        return np.all(each, axis=0) if kind == "and" else np.any(each, axis=0)
    if kind == "window":
        return _window(_fires(about[0], text, 0), about[1], about[2])[first:]
    if kind == "token":
        return np.isin(text.known(text.stop)[first:], about[0])
    if kind == "span":
        return _in_span(text.known(text.stop), *about)[first:]
    return _in_turn(about[0], text)[first:]


def _stretch(tree: Tree, prompt: int) -> tuple[int, int] | None:
    """From which token on, up to which one, a word of place or a window of one is; None of any
    other part."""
    kind = tree[0]
    if kind == "window":
        inner = _stretch(tree[1], prompt)
        if inner is None:
            return None
        begin, end = first, stop = inner
        if tree[2] is not None:
            first = begin + tree[2] if tree[2] >= 0 else max(begin, end + tree[2])
        if tree[3] is not None:
            stop = min(end, begin + tree[3]) if tree[3] >= 0 else end + tree[3]
        return first, max(first, stop)
    return {
        "all": (0, _FAR),
        "prompt": (0, prompt),
        "generated": (prompt, _FAR),
        "last": (max(0, prompt - 1), _FAR),
    }.get(kind)


def _window(inside: Any, begin: int | None, end: int | None) -> Any:
    """Of the tokens of a part those from one number on, up to another."""
    number = inside.cumsum() - 1
    if begin is not None:
        inside = inside & (number >= begin)
    return inside if end is None else inside & (number < end)


def _ends_of(ids: Any, markers: Sequence[Sequence[int]]) -> Any:
    """Where one of some markers ends."""
    found = np.zeros(len(ids), dtype=bool)
    for marker in markers:
        one = ids == marker[-1]
        for back, token in enumerate(reversed(marker[:-1]), 1):
            before = np.zeros(len(ids), dtype=bool)
            before[back:] = ids[:-back] == token
            one &= before
        found |= one
    return found


def _last_seen(events: Sequence[Any]) -> Any:
    """Which of some events came last at or before each token, counted from 1; 0 where none did. Of
    two at one token the later in the list counts."""
    kinds = len(events) + 1
    latest = np.zeros(len(events[0]), dtype=np.int64)
    places = np.arange(len(latest)) * kinds
    for kind, event in enumerate(events, 1):
        latest[event] = places[event] + kind
    return np.maximum.accumulate(latest) % kinds


def _in_span(ids: Any, opens: list[list[int]], closes: list[list[int]]) -> Any:
    begun = _ends_of(ids, opens)
    if sorted(opens) == sorted(closes):  # the same marker begins and ends it
        return begun.cumsum() % 2 == 1
    return _last_seen((_ends_of(ids, closes), begun)) == 2


def _in_turn(turn: dict[str, Any], text: _Text) -> Any:
    """Tokens of somebody's turns, or of the last one in the prompt."""
    markers, role = turn["markers"], turn["role"]
    stop = max(text.stop, text.prompt) if turn["only_last"] else text.stop
    ids = text.known(stop)
    latest = _last_seen([_ends_of(ids, [marker]) for marker, _ in markers])
    if role == "system" and turn["bare_system"]:
        return ((latest == 0) & ~np.isin(ids, turn["begins"]))[: text.stop]
    own = [number for number, (_, whose) in enumerate(markers, 1) if whose == role]
    inside = np.isin(latest, own)
    if turn["only_last"]:
        begins = inside & ~np.concatenate(([False], inside[:-1]))
        number = begins.cumsum()
        inside &= number == number[: text.prompt].max(initial=0)
    return inside[: text.stop]


def _reads(tree: Tree) -> bool:
    if tree[0] in ("token", "span", "turn"):
        return True
    return any(_reads(part) for part in tree[1:] if isinstance(part, list))


def _check(tree: Any, deepest: int) -> None:
    """Refuse what is no tree."""
    if not (isinstance(tree, list) and tree and isinstance(tree[0], str)) or deepest == 0:
        raise ValueError("a scope's tree is a word and what it is about")
    kind, *about = tree
    if kind in ("and", "or", "not"):
        if not about or (kind == "not" and len(about) != 1):
            raise ValueError(f"'{kind}' has parts")
        for part in about:
            _check(part, deepest - 1)
    elif kind == "window":
        if len(about) != 3 or not all(end is None or _is_int(end) for end in about[1:]):
            raise ValueError("a window is of a part, from a number to a number")
        _check(about[0], deepest - 1)
    elif kind == "token":
        _check_ids(about, 1)
    elif kind == "span":
        if len(about) != 2:
            raise ValueError("a span has markers that begin it and markers that end it")
        for markers in about:
            if not isinstance(markers, list) or not markers:
                raise ValueError("a span has markers")
            for marker in markers:
                _check_ids([marker], 1)
    elif kind == "turn":
        _check_turn(about)
    elif kind not in _PLACES or about:
        raise ValueError("a scope's word is not known")


def _check_turn(about: list[Any]) -> None:
    names = {"markers", "role", "only_last", "bare_system", "begins"}
    turn = about[0] if len(about) == 1 else None
    if not (isinstance(turn, dict) and set(turn) == names and isinstance(turn["markers"], list)):
        raise ValueError("a turn has markers, a role, and how its text begins")
    if not turn["markers"]:
        raise ValueError("a turn has markers")
    for pair in turn["markers"]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)):
            raise ValueError("a turn's marker is ids and a role")
        _check_ids(pair[:1], 1)
    _check_ids([turn["begins"]], 0)


def _check_ids(about: list[Any], least: int) -> None:
    ids = about[0] if len(about) == 1 else None
    if not (isinstance(ids, list) and len(ids) >= least and all(map(_is_int, ids))):
        raise ValueError("token ids are whole numbers")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 40
