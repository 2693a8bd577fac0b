"""What a request says of its steerings on its way through an engine, and what a cached block's key
says of them.

A request carries one JSON text in its sampling parameters. It names steerings by the digest of what
they do, never by a name that may come to mean something else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from trimtab.engines.tokens import Acts, read_acts, weights

#: Under which name a request's `extra_args` have it.
FIELD = "trimtab"
#: Under which name they have what is to be read of it.
READING = "trimtab_reading"
#: Under which name clients say which steerings they want, which no engine reads.
ASKED = "steering"
#: Steerings that one request may stack, and characters that it may say of them.
MOST_STACKED, LONGEST = 8, 1 << 20
_DIGEST, _NAME = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Wanted:
    """A steering of a request: what it does, by its digest, where its dial stands, and on which
    tokens it acts: the scopes that there are, and where they are several, which of them each
    intervention has, by number. `prompt` is how many of the request's tokens are prompt to it,
    where that is not all that came with the request: a text that is only scored has its answer
    in it already."""

    digest: str
    dial: float
    scopes: tuple[Acts, ...]
    of: tuple[int, ...] = ()
    prompt: int | None = None

    @property
    def reads(self) -> bool:
        """Whether it asks which tokens a text has."""
        return any(acts.reads for acts in self.scopes)


def extra_args(wanted: Sequence[Wanted]) -> dict[str, str] | None:
    """What the sampling parameters of a request carry; None of one that is not steered."""
    if not wanted:
        return None
    said = [
        {
            "steering": one.digest,
            "dial": float(one.dial),
            "scopes": [acts.as_json() for acts in one.scopes],
            "of": list(one.of),
            **({} if one.prompt is None else {"prompt": one.prompt}),
        }
        for one in wanted
    ]
    return {FIELD: json.dumps(said, allow_nan=False)}


@dataclass(frozen=True)
class Read:
    """What is read of a prompt: the sum of a site's activations over the tokens of a scope, or the
    last one alone, where that is None. `tokens` names them by number in place of a scope, from the
    first up to one behind the last; `whole` hands each of these over, in place of their sum."""

    site: str
    acts: Acts | None = None
    tokens: tuple[int, int] | None = None
    whole: bool = False

    def as_json(self) -> dict[str, Any]:
        scope = None if self.acts is None else self.acts.as_json()
        by_number = {} if self.tokens is None else {"tokens": list(self.tokens)}
        return {"site": self.site, "scope": scope, **by_number, "whole": self.whole}


@dataclass(frozen=True)
class ReadingOf:
    """All that is read of one prompt, and the name by which it is asked for afterwards: sums of
    activations, and what gates of its steerings decide token by token, where it is `written` also
    of the tokens that are written after it."""

    name: str
    reads: tuple[Read, ...] = ()
    written: bool = False


def reading_args(reading: ReadingOf) -> dict[str, str]:
    """What the sampling parameters of a request carry that is read."""
    reads = [one.as_json() for one in reading.reads]
    said = {"name": reading.name, "reads": reads, "written": reading.written}
    return {READING: json.dumps(said, allow_nan=False)}


def reading_by(params: Any) -> ReadingOf | None:
    """What is to be read by sampling parameters, after every check; a ValueError says what is
    wrong."""
    extra = getattr(params, "extra_args", None)
    if not extra or READING not in extra:
        return None
    text = extra[READING]
    if not isinstance(text, str) or len(text) > LONGEST:
        _refuse(f"what is read is no text of {LONGEST} characters at most")
    return _reading(text)


@lru_cache(maxsize=2048)  # the keys of blocks ask again and again
def _reading(text: str) -> ReadingOf:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        _refuse("what is read is no JSON")
    if not (isinstance(given, dict) and set(given) == {"name", "reads", "written"}):
        _refuse("what is read has a name and reads, and is written or not")
    name, reads, written = given["name"], given["reads"], given["written"]
    if not isinstance(written, bool):
        _refuse("written is true or false")
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(reads, list)):
        _refuse("what is read has a name, 32 hexadecimal digits, and a list")
    return ReadingOf(name, tuple(map(_one_read, reads)), written)


def _one_read(given: Any) -> Read:
    if not (isinstance(given, dict) and set(given) - {"tokens"} == {"site", "scope", "whole"}):
        _refuse("what is read has sites and scopes, and is whole or not")
    if not (isinstance(given["site"], str) and isinstance(given["whole"], bool)):
        _refuse("a site is a text, and whole is true or false")
    tokens = given.get("tokens")
    if "tokens" in given:
        if not (isinstance(tokens, list) and [type(one) for one in tokens] == [int, int]):
            _refuse("tokens are named by two numbers")
        if not 0 <= tokens[0] < tokens[1] < LONGEST:
            _refuse("tokens are numbered from the first up to one behind the last")
    try:
        acts = None if given["scope"] is None else read_acts(given["scope"])
    except (ValueError, RecursionError) as error:
        _refuse(str(error))
    return Read(given["site"], acts, tuple(tokens) if tokens else None, given["whole"])


def wanted_by(params: Any) -> tuple[Wanted, ...]:
    """What sampling parameters carry, after every check; a ValueError says what is wrong."""
    extra = getattr(params, "extra_args", None)
    if not extra or FIELD not in extra:
        return ()
    if not isinstance(extra[FIELD], str):
        _refuse("it is no text")
    return _read(extra[FIELD])


@lru_cache(maxsize=4096)
def _read(text: str) -> tuple[Wanted, ...]:
    if len(text) > LONGEST:
        _refuse(f"it has more than {LONGEST} characters")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        _refuse("it is no JSON")
    if not isinstance(given, list) or len(given) > MOST_STACKED:
        _refuse(f"it is no list of {MOST_STACKED} steerings at most")
    return tuple(map(_one, given))


def _one(given: Any) -> Wanted:
    names = ("steering", "dial", "scopes", "of")
    if not (isinstance(given, dict) and set(given) - {"prompt"} == set(names)):
        _refuse("it has steerings of steering, dial, scopes and of")
    digest, dial, scopes, of = (given[name] for name in names)
    prompt = given.get("prompt")
    if "prompt" in given and not (type(prompt) is int and 0 <= prompt < LONGEST):
        _refuse("a prompt is so many tokens long")
    if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        _refuse("a steering is named by its digest, 64 hexadecimal digits")
    if not isinstance(dial, float) or not math.isfinite(dial):
        _refuse("a dial is a number with a point in it")
    if not (isinstance(scopes, list) and scopes):
        _refuse("a steering has scopes")
    if not (isinstance(of, list) and all(type(n) is int and 0 <= n < len(scopes) for n in of)):
        _refuse("interventions have scopes by number")
    if len(scopes) > 1 and not of:
        _refuse("it does not say which intervention has which scope")
    try:
        return Wanted(digest, dial, tuple(map(read_acts, scopes)), tuple(of), prompt)
    except (ValueError, RecursionError) as error:
        _refuse(str(error))


def _refuse(why: str) -> NoReturn:
    raise ValueError(f"what this request says of steerings cannot be read: {why}")


def read_key(reading: ReadingOf | None, first: int, stop: int) -> list[tuple[str, str]]:
    """What the key of a block says of a text whose tokens `first` to `stop` are read by number: its
    own name, because a token that comes out of a cache passes no site. Other blocks are shared."""
    for one in () if reading is None else reading.reads:
        if one.tokens is not None and one.tokens[0] < stop and first < one.tokens[1]:
            assert reading is not None
            return [(READING, reading.name)]
    return []


def block_key(
    wanted: Sequence[Wanted], ids: Sequence[int], prompt: int, first: int, stop: int
) -> list[tuple[str, str]]:
    """What the tokens `first` to `stop` of a text saw of its steerings: nothing where none acted.

    Two texts may share a block only where all tokens up to its end were steered alike. A block's
    hash holds those of the blocks before it, so that its own tokens are all that is to be said.
    """
    found: list[tuple[str, str]] = []
    for one in wanted:
        own = prompt if one.prompt is None else one.prompt
        for number, acts in enumerate(one.scopes):
            got = weights(acts, ids, own, first, stop)
            if np.any(got):
                shares = hashlib.sha256(got.tobytes()).hexdigest()
                whose = ",".join(str(i) for i, of in enumerate(one.of) if of == number)
                found.append((FIELD, f"{one.digest} {one.dial!r} {whose} {shares}"))
    return found
