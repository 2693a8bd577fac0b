"""What a steering is made of: interventions, a dial, and the model that it was made for.

The types say what a file may hold of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat

from trimtab.errors import TrimtabError, shown
from trimtab.steering.operators import WIDEST, Operator
from trimtab.steering.scope import Scope

#: Steering runs in float32, where a larger number is infinity.
LARGEST = torch.finfo(torch.float32).max
_MOST_LAYERS = 100_000  # more than the name of a site can tell apart


def _float32(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"{value:g} is beyond float32, in which steering runs")
    return value


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    json.dumps(value, allow_nan=False)  # a ValueError says where there is NaN or infinity
    return value


#: What is said in JSON, with numbers that are some.
Finite = Annotated[dict[str, Any], AfterValidator(_finite)]
Number = Annotated[FiniteFloat, AfterValidator(_float32)]
Word = Annotated[str, Field(max_length=200)]
STRICT = ConfigDict(extra="forbid", strict=True)

#: A scope may be given as its string.
EVERYWHERE = Scope.parse("all")


@dataclass(frozen=True)
class Dial:
    """The one number that a user turns."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Word
    default: Number
    range: tuple[Number, Number]
    unit: Word = ""


@dataclass(frozen=True)
class Intervention:
    """An operator at a site, on the tokens of a scope, which may be given as its string.

    Its dial is the steering's times `weight`, so that one dial turns a kernel over layers.
    """

    site: str
    operator: Operator
    scope: Scope = EVERYWHERE
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scope", Scope.of(self.scope))  # it is frozen
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight)):
            raise TrimtabError(
                f"the weight of an intervention at {self.site} must be a finite number, not "
                f"{self.weight!r}"
            )
        if self.scope.never:
            raise TrimtabError(
                f"the scope '{self.scope}' never acts: it is true of no token (generated tokens, "
                "and the prompt's last, are text)"
            )
        if self.scope.decay is not None and self.operator.identity != 0:
            raise TrimtabError(
                f"the scope '{self.scope}' turns the dial towards 0, at which "
                f"{type(self.operator).__name__} does something: leave the decay out"
            )

    @property
    def acts(self) -> bool:
        """Whether it changes an activation at any dial: with no unit chosen, or only zeros to add,
        it does not; nor with a weight of zero, where the operator does nothing at zero."""
        return self.operator.acts and not (self.weight == 0 and self.operator.identity == 0)

    @property
    def details(self) -> dict[str, Any]:
        """What is to be said of it beside its site, its operator's name and size, its scope: what
        the operator says of itself, and its weight."""
        # Operators of other packages may say nothing.
        said: dict[str, Any] = dict(getattr(self.operator, "details", {}))
        return said if self.weight == 1 else {**said, "weight": self.weight}

    def dial_at(self, setting: float) -> float:
        """Its own dial where the steering's stands at `setting`."""
        return setting * self.weight

    def idle_at(self, setting: float) -> bool:
        """Whether it does nothing where the steering's dial stands at `setting`."""
        return self.operator.identity == self.dial_at(setting)


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a steering was made for."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    architecture: Word
    layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
    hidden_size: Annotated[int, Field(ge=1, le=WIDEST)]
    digest: Word
    #: Of the weights that stay whole when a model is quantised; "" where it was not noted.
    plain_digest: Word = ""

    def __str__(self) -> str:
        name, architecture = shown(self.name), shown(self.architecture, 40)
        return f"{name} ({architecture}, {self.layers} layers, {shown(self.digest[:8])})"


def as_number(text: str) -> float | None:
    """A dial or a budget as it is typed; None where that is no finite number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
