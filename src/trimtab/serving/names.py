"""What a request says of steerings: `base+joy@12` as its model, or the body's field `steering`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import TrimtabError, shown
from trimtab.steering import as_number

#: Names of steerings that are served: no path, and nothing that has a meaning in a variant's name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WORD = re.compile(r"-?[a-z]{1,32}")
#: Steerings that one request may stack.
MOST_STACKED = 8


@dataclass(frozen=True)
class Asked:
    """A steering by its name, where its dial stands (a number, or a strength's name), or how many
    nats it may change the next token by, and the scope it acts in; what is None is the steering's
    own."""

    name: str
    dial: float | str | None = None
    kl: float | None = None
    scope: str | None = None


def check_name(name: str) -> str:
    """A name as steerings may have it."""
    if not _NAME.fullmatch(name):
        raise TrimtabError(
            f"'{shown(name, 80)}' is no name of a steering: take letters, digits, '.', '_' and "
            "'-', 64 at most"
        )
    return name


def asked_by(model: str, base: str) -> list[Asked] | None:
    """What a request's model name asks for: `base`, `base+joy`, `base+joy@12`, `base+joy@clear`,
    `base+joy@kl=0.1`, `base+joy@12+calm`. None where it is another model."""
    if model == base:
        return []
    if not model.startswith(f"{base}+"):
        return None
    parts = model[len(base) + 1 :].split("+")
    if len(parts) > MOST_STACKED:
        raise TrimtabError(f"a request may stack {MOST_STACKED} steerings, not {len(parts)}")
    return [_part(part) for part in parts]


def _part(text: str) -> Asked:
    name, at, dial = text.partition("@")
    check_name(name)
    if not at:
        return Asked(name)
    kind, is_budget, budget = dial.partition("=")
    if is_budget and kind == "kl":
        return Asked(name, kl=_number(budget, "kl"))
    if _WORD.fullmatch(dial):
        return Asked(name, dial)
    return Asked(name, _number(dial, "a dial"))


def _number(text: str, what: str) -> float:
    number = as_number(text)
    if number is None:
        raise TrimtabError(f"{what} must be a number, not '{shown(text, 40)}'")
    return number


def plainly_asked(model: str, bases: Sequence[str]) -> list[Asked] | None:
    """What a name asks for of a model that has several; None where it is another model, or the
    model alone. Each variant has one name: a dial in its shortest form, 12 and not 12.0."""
    for base in bases:
        asked = asked_by(model, base)
        if asked:
            plain = "+".join([base, *map(_plain, asked)])
            if model != plain:
                raise TrimtabError(f"'{shown(model, 80)}' has no such dial: take {shown(plain)}")
            return asked
    return None


def _plain(asked: Asked) -> str:
    """A steering of a variant's name, in its shortest form."""
    if asked.kl is not None:
        return f"{asked.name}@kl={_shortest(asked.kl)}"
    if asked.dial is None:
        return asked.name
    dial = asked.dial if isinstance(asked.dial, str) else _shortest(asked.dial)
    return f"{asked.name}@{dial}"


def _shortest(number: float) -> str:
    """12, 0.1, 1e-05, 1e30: a + would stack another steering."""
    return repr(number + 0.0).removesuffix(".0").replace("e+", "e")  # and not -0
