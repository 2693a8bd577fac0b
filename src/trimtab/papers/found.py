"""What a study of a recipe found, and figures that can stand beside the paper's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trimtab.evaluation import load_contrast
from trimtab.reports import Picture, Table, interval

#: `task:copa first 40`: the first so many pairs of a contrast's train part.
_FIRST = re.compile(r"(.+) first (\d+)")


@dataclass(frozen=True)
class Value:
    """One figure of ours, or a few words; `share` where it is a part of 1, which a paper that
    counts in % gives a hundredfold."""

    value: float | str | None
    ci95: tuple[float, float] | None = None
    n: int | None = None
    share: bool = False

    def shown(self, unit: str) -> str:
        """As it stands in a table, in the paper's unit."""
        if self.value is None or isinstance(self.value, str):
            return self.value or ""
        times = 100.0 if unit == "%" and self.share else 1.0
        ends = self.ci95 and (times * self.ci95[0], times * self.ci95[1])
        return f"{times * self.value:.4g} {interval(ends)}".strip()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """Tables, pictures and notes for people, `data` for JSON, and `values` by the row of the
    paper's table that they belong to."""

    data: dict[str, Any]
    values: Mapping[str, Value] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


def value_of(result: Any, share: bool = True) -> Value:
    """A `Result` of an evaluation as a figure."""
    return Value(result.value, result.ci95, result.n, share)


def contrast_of(source: Any, data: str | None) -> Any:
    """A contrast as a recipe names it: a source, of which ` first N` takes the first N train
    pairs."""
    if not isinstance(source, str):
        return source
    part = _FIRST.fullmatch(source)
    if part is None:
        return load_contrast(source, data=data)
    return load_contrast(part[1], data=data).train.take(int(part[2]))
