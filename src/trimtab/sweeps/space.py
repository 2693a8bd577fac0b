"""What a sweep searches: values or ranges for the hyperparameters of a method, and the steerings
that they make, all from one pass over the contrast where the values can be listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import Method, Want, collect, plain
from trimtab.model import LanguageModel
from trimtab.steering import Gate, Steering, read_gate

#: More settings than this are a slip in a range.
_MOST = 100_000
#: Lists of settings up to this long are fitted from one pass; the others as they come.
_LISTED = 2_000
#: Ranges of whole numbers up to this long may be layers, each of which wants its own statistics.
_WRITTEN_OUT = 200
#: Hyperparameters whose values have no end (angles), or whose order says nothing (draws).
_CLOSED = ("theta", "seed")
#: What a hyperparameter is at least, where that is not 0.
_LEAST = {"k": 1}

Params = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, for searches that draw them; whole ones where both ends
    are. `log` draws by their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise TrimtabError(f"a range goes from a number to a larger one, not {self}")
        if self.log and self.low <= 0:
            raise TrimtabError(f"a logarithmic range begins above 0, not at {self.low:g}")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __str__(self) -> str:
        return f"{self.low}:{self.high}{':log' if self.log else ''}"


#: Values or a range for each hyperparameter that is searched.
Space = Mapping[str, Sequence[Any] | Range]


def gate_given(gate: Any) -> Gate | None:
    """The gate under which what is fitted acts, from itself or from what names its files."""
    return read_gate(gate) if isinstance(gate, str) else gate


def gate_said(gate: Gate | None) -> dict[str, Any]:
    """What a configuration says of it; nothing without one."""
    return {} if gate is None else {"gate": {**gate.as_json(), "digest": gate.digest}}


def default_space(
    method: type[Method], layers: int, fixed: Collection[str] = ()
) -> dict[str, Sequence[Any]]:
    """The settings of the method's paper, or what covers them, for a model of so many blocks;
    without the hyperparameters that are fixed."""
    grid = method.grid(layers)
    if not grid:
        raise TrimtabError(f"{method.name} has no grid of its own: name values to search")
    return {name: values for name, values in grid.items() if name not in fixed}


def tidy(space: Mapping[str, Any]) -> dict[str, Sequence[Any] | Range]:
    """A space as it was given, with values as plain Python has them."""
    found: dict[str, Sequence[Any] | Range] = {}
    for name, values in space.items():
        given = values if isinstance(values, Range) else plain(values)
        if isinstance(given, range):
            given = tuple(given)
        if not isinstance(given, Range | tuple):
            raise TrimtabError(f"{name}: give several values in a list, or a Range, not {values!r}")
        found[name] = given
    return found


def check_space(method: type[Method], space: Space, fixed: Params) -> None:
    """Refuse what the method does not have, and what is missing."""
    known = {item.name: item for item in fields(method)}  # type: ignore[arg-type]
    for name in (*space, *fixed):
        if name not in known:
            raise TrimtabError(f"{method.name} has no {name}: it has {', '.join(known)}")
    for name, values in space.items():
        if name in fixed:
            raise TrimtabError(f"{name} is both searched and set to {fixed[name]}")
        if not isinstance(values, Range) and not values:
            raise TrimtabError(f"{name}: there is no value to search")
    missing = [
        name
        for name, item in known.items()
        if item.default is MISSING and name not in space and name not in fixed
    ]
    if missing:
        raise TrimtabError(f"{method.name} needs {missing[0]}: give it a value")


def grid(space: Space) -> list[Params]:
    """Every combination of the values, the last hyperparameter turning fastest."""
    columns: list[list[Any]] = []
    for name, values in space.items():
        if isinstance(values, Range):
            raise TrimtabError(
                f"{name} is a range, {values}: a grid needs values, or search with tpe"
            )
        columns.append(list(dict.fromkeys(values)))
    count = math.prod([len(column) for column in columns])
    if count > _MOST:
        raise TrimtabError(f"the grid has {count:,} settings: {_MOST:,} are the most")
    return [dict(zip(space, row, strict=True)) for row in itertools.product(*columns)]


def listed(space: Space) -> list[Params] | None:
    """Settings that want of a pass over the contrast what all of a space want: ranges written out,
    of others the ends. Of many ranges, whose draws are in no grid, each is written out beside one
    value of the others. None where they are too many to fit at once."""
    columns: dict[str, Sequence[Any]] = {}
    for name, values in space.items():
        columns[name] = _written_out(values) if isinstance(values, Range) else values
    if math.prod([len(values) for values in columns.values()]) <= _LISTED:
        return grid(columns)
    if all(not isinstance(values, Range) or values.whole for values in space.values()):
        return None
    first = {name: values[0] for name, values in columns.items()}
    return [{**first, name: value} for name, values in columns.items() for value in values]


def _written_out(values: Range) -> Sequence[Any]:
    """The numbers of a range that may be layers, each of which wants its own statistics, also where
    what is drawn lies between two; of a wide one its ends, since of a share or a number of units
    other ones want the same."""
    if values.high - values.low >= _WRITTEN_OUT:
        return (values.low, values.high)
    if values.whole:
        return range(int(values.low), int(values.high) + 1)
    between = range(math.ceil(values.low), math.floor(values.high) + 1)
    return tuple(dict.fromkeys((values.low, *map(float, between), values.high)))


def label(method: type[Method], params: Params) -> str:
    """`austeer k=16 alpha=8`: how a setting is written on the command line."""
    return f"{method.name} {setting(params)}".rstrip()


def setting(params: Params) -> str:
    """`k=16 alpha=8`."""
    return " ".join(f"{name}={shown(value)}" for name, value in params.items())


def at_ends(space: Space, params: Params, layers: int) -> list[str]:
    """Which of a chosen setting's numbers are the least or the largest that were to be tried, where
    there is something beyond: a better one may lie there."""
    said = []
    for name, values in space.items():
        chosen = params.get(name)
        tried = (values.low, values.high) if isinstance(values, Range) else values
        if name in _CLOSED or not all(map(_is_number, tried)) or len(set(tried)) < 2:
            continue
        least, largest = min(tried), max(tried)
        if chosen == largest and not (name == "layer" and chosen == layers - 1):
            said.append(f"{name}={shown(chosen)} is the largest of its values: no larger was tried")
        elif chosen == least and chosen != _LEAST.get(name, 0):
            said.append(f"{name}={shown(chosen)} is the least of its values: no smaller was tried")
    return said


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def described(space: Space) -> dict[str, Any]:
    """A space for the configuration of a run."""
    return {
        name: str(values) if isinstance(values, Range) else list(values)
        for name, values in space.items()
    }


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return ",".join(map(shown, value)) if isinstance(value, tuple | list) else str(value)


class Fitter:
    """Makes the steering of any setting; the model runs over the contrast once for all that can be
    listed, and nothing is fitted again where only the dial differs. `statistics` is what passes
    have gathered, by what was wanted; fitters that share it share the passes."""

    def __init__(
        self,
        language_model: LanguageModel,
        method: type[Method],
        contrast: Contrast,
        space: Space,
        fixed: Params,
        cache: Any = None,
        statistics: dict[tuple[Want, ...], Any] | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.language_model, self.method, self.contrast = language_model, method, contrast
        self.fixed, self.cache, self.gate = fixed, cache, gate
        self.dial = method.dial
        self._statistics = {} if statistics is None else statistics
        self._built: dict[tuple[Any, ...], Steering] = {}
        wanted: dict[str, Any] = dict(space)
        if self.dial in space:  # one dial wants what any other wants
            dials = space[self.dial]
            wanted[self.dial] = (dials.low if isinstance(dials, Range) else dials[0],)
        self._listed = listed(wanted) or []

    def method_at(self, params: Params) -> Method:
        """The method with its hyperparameters."""
        return self.method(**self.fixed, **params)

    def check(self, settings: Sequence[Params]) -> None:
        """Before anything is run: refuse a value that the method never takes, and a list of
        settings of which none can be fitted here."""
        taken: set[tuple[str, Any]] = set()
        refused: dict[tuple[str, Any], TrimtabError] = {}
        methods: dict[tuple[Any, ...], Method] = {}
        for params in settings:
            try:
                method = self.method_at(params)
                methods.setdefault(self._key(method, params), method)
                taken |= params.items()
            except TrimtabError as error:
                for item in params.items():
                    refused.setdefault(item, error)
        for item, reason in refused.items():
            if item not in taken:
                raise reason
        first: TrimtabError | None = None
        for method in methods.values():
            try:
                method.wants(self.language_model, self.contrast)
                return
            except TrimtabError as error:
                first = first or error
        if first is not None:
            raise first

    def steering(self, params: Params) -> Steering:
        """The steering of a setting, its dial turned to what the setting says."""
        method = self.method_at(params)  # which checks the dial too
        key = self._key(method, params)
        if key not in self._built:
            self._built[key] = self._build(method)
        built = self._built[key]
        if self.dial not in params:
            return built
        return replace(built, value=float(params[self.dial]))

    def _key(self, method: Method, params: Params) -> tuple[Any, ...]:
        """What a steering is built from: the dial only where the method chooses something by it."""
        return tuple(
            (name, value)
            for name, value in params.items()
            if method.chooses_by_dial or name != self.dial
        )

    def fitted(self, params: Params) -> Steering:
        """The same as an artifact of its own: its dial's default is what the setting says."""
        return self._build(self.method_at(params))

    def _build(self, method: Method) -> Steering:
        built = method.build(self.language_model, self.contrast, self._gathered(method))
        return built if self.gate is None else built.gated(self.gate)

    def wants(self) -> list[Want]:
        """What all settings that can be listed want of the pass."""
        every: dict[Want, None] = {}
        for params in self._listed:
            # One that cannot be fitted fails when it is tried, and not the others with it.
            with suppress(TrimtabError):
                method = self.method_at(params)
                every |= dict.fromkeys(method.wants(self.language_model, self.contrast))
        return list(every)

    def _gathered(self, method: Method) -> Any:
        """The statistics that the method wants, from the pass over everything that is listed."""
        wants = tuple(method.wants(self.language_model, self.contrast))
        for known, statistics in self._statistics.items():
            if set(wants) <= set(known):
                return statistics
        every = tuple(dict.fromkeys((*wants, *self.wants())))
        try:
            found = self._collect(every)
            self._listed = []  # read now: what else is wanted is read by itself
        except TrimtabError:
            if every == wants:
                raise
            self._listed = []  # something of it cannot be had: settings stand for themselves
            every, found = wants, self._collect(wants)
        self._statistics[every] = found
        return found

    def _collect(self, wants: Sequence[Want]) -> Any:
        return collect(self.language_model, self.contrast.train, wants, cache=self.cache)
