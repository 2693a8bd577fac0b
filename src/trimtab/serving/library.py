"""The steerings that are served, by name: read at the start, added and removed while requests run.

A request takes the steering that has its name when it begins, and ends with it: another one under
the same name, or none, does not reach it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from trimtab.dials import searched, within
from trimtab.errors import TrimtabError, shown
from trimtab.model import LanguageModel
from trimtab.serving.names import Asked, check_name
from trimtab.steering import Steering

#: How many steerings are held at once, and how large a file of one may be.
MOST, LARGEST = 256, 64 * 2**20


class UnknownSteeringError(TrimtabError):
    """A request names a steering that is not served."""


@dataclass(frozen=True)
class Held:
    """A steering that is served, and how large its file is."""

    steering: Steering
    size: int


class Library:
    """Steerings by name, for one model, which each of them is checked against.

    `refusal` says of a steering why what runs the model cannot carry it, "" where it can; it is
    None where the model of transformers runs, which carries all. Dials of budgets are found here,
    `by_engine` where that has passes for it, and by nobody where it has none.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        force: bool = False,
        refusal: Callable[[Steering], str] | None = None,
        by_engine: bool = False,
    ) -> None:
        self._lm, self._force, self._refusal = language_model, force, refusal
        self._by_engine = by_engine
        self._identity = language_model.identity  # its weights may be let go
        self._held: dict[str, Held] = {}
        self._changing = Lock()

    def read(self, source: str) -> None:
        """Add what a file or FILE@DIAL has, by the file's name, or every .safetensors file of a
        directory."""
        directory = Path(source).expanduser()
        if directory.is_dir():
            files = sorted(directory.glob("*.safetensors"))
            if not files:
                raise TrimtabError(f"{source} has no .safetensors file")
            for file in files:
                if not file.resolve().is_relative_to(directory.resolve()):
                    raise TrimtabError(f"{file} leads out of {source}: copy it there")
                self._put(file.stem, Steering.load(file), file.stat().st_size, replace=False)
            return
        steering, path = Steering.read(source), _path_of(source)
        self._put(path.stem, steering, path.stat().st_size, replace=False)

    def add(self, name: str, content: bytes) -> Held:
        """Take a steering from the content of its file; one of the same name is replaced."""
        check_name(name)
        if len(content) > LARGEST:
            raise TrimtabError(f"a steering's file may have {LARGEST} bytes, not {len(content)}")
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / f"{name}.safetensors"
            file.write_bytes(content)
            try:
                steering = Steering.load(file)
            except TrimtabError as error:  # which names a file that the client never saw
                raise TrimtabError(str(error).replace(str(file), name)) from error
        return self._put(name, steering, len(content), replace=True)

    def _put(self, name: str, steering: Steering, size: int, replace: bool) -> Held:
        check_name(name)
        steering.check_fits(self._lm.anatomy, self._identity, self._force, self._lm.quantised)
        if self._refusal is not None and (reason := self._refusal(steering)):
            raise TrimtabError(f"{name} cannot be served by this engine: {reason}")
        with self._changing:
            if name in self._held and not replace:
                raise TrimtabError(f"two steerings are called {name}: rename a file")
            if name not in self._held and len(self._held) >= MOST:
                raise TrimtabError(f"{MOST} steerings are held: remove one first")
            held = Held(steering, size)
            self._held = {**self._held, name: held}
        return held

    def remove(self, name: str) -> None:
        """Serve it no more; requests that run with it end with it."""
        with self._changing:
            if name not in self._held:
                raise UnknownSteeringError(_unknown(name, self._held))
            self._held = {kept: held for kept, held in self._held.items() if kept != name}

    @property
    def held(self) -> dict[str, Held]:
        """Steerings by name."""
        return dict(sorted(self._held.items()))

    def wanted(self, asked: Sequence[Asked]) -> list[tuple[Asked, Steering]]:
        """The steerings that a request asks for, each at its dial as far as that is known before
        the prompt is."""
        held = self._held
        found = []
        for one in asked:
            if one.name not in held:
                raise UnknownSteeringError(_unknown(one.name, held))
            steering = held[one.name].steering
            if one.scope is not None:
                steering = steering.scoped(one.scope)
            if one.dial is not None:
                steering = steering.at(one.dial)
            found.append((one, steering))
        budgets = [one.name for one, _ in found if one.kl is not None]
        if budgets and self._refusal is not None and not self._by_engine:
            raise TrimtabError(
                "a budget for each prompt (kl) takes passes of the model that this engine does not "
                f"have: give {budgets[0]} a dial or a strength, or serve with --engine transformers"
            )
        if budgets and len(found) > 1:
            raise TrimtabError(
                f"a budget (kl) turns the dial of one steering: {budgets[0]} cannot be stacked"
            )
        for one, steering in found:
            if one.kl is not None and self._by_engine:  # both say at once what is wrong
                searched(steering, one.kl)
            elif one.kl is not None:
                within(steering, kl=one.kl).dials(self._lm, [], self._force)
        return found

    def settled(
        self, wanted: Sequence[tuple[Asked, Steering]], tokens: Sequence[int]
    ) -> tuple[Steering, ...]:
        """The same at dials that a budget allows for a prompt; the model runs for it, or the engine
        finds them."""
        steerings = []
        for one, steering in wanted:
            if one.kl is not None and not self._by_engine:
                (dial,) = within(steering, kl=one.kl).dials(self._lm, [tokens], self._force)
                steering = steering.at(dial)
            steerings.append(steering)
        return tuple(steerings)

    def left_to_engine(self, wanted: Sequence[tuple[Asked, Steering]]) -> float | None:
        """The budget, in nats, that the engine is to find a dial for; None where there is none."""
        budgets = [one.kl for one, _ in wanted if one.kl is not None]
        return budgets[0] if budgets and self._by_engine else None


def described(name: str, held: Held) -> dict[str, Any]:
    """What a client may know of a steering: how far its dial goes and what that costs."""
    steering, measured = held.steering, held.steering.findings.get("measured")
    dial = {
        "name": steering.dial.name,
        "unit": steering.dial.unit,
        "default": steering.setting,
        "range": list(steering.dial.range),
    }
    return {
        "name": name,
        "method": steering.method,
        "dial": dial,
        "strengths": {} if steering.calibration is None else steering.calibration.strengths,
        "cost": measured.get("cost") if isinstance(measured, dict) else None,
        "scopes": [str(scope) for scope in steering.scopes],
        "gate": None if steering.gate is None else steering.gate.kind,
        "sites": len(steering.interventions),
        "bytes": held.size,
    }


def _path_of(source: str) -> Path:
    path = Path(source).expanduser()
    return path if path.exists() else Path(source.rpartition("@")[0]).expanduser()


def _unknown(name: str, held: dict[str, Held]) -> str:
    known = ", ".join(sorted(held)) or "none"
    return f"no steering is called '{shown(name, 80)}': there are {shown(known, 400)}"
