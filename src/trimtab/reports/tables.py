"""Tables for people, for a page as for a terminal, and how figures stand in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.figures import Difference


@dataclass(frozen=True)
class Table:
    """Rows of cells under their heads; `note` stands below."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def without_empty_columns(self, first: int = 0) -> Table:
        """The columns that have something in a row; the `first` ones are kept in any case."""
        kept = [
            i for i in range(len(self.heads)) if i < first or any(row[i] != "" for row in self.rows)
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.title, [self.heads[i] for i in kept], rows, self.note)


class Valued(Protocol):
    """What has a value and its 95 % interval, where it has them: an estimate, a result, a trial."""

    @property
    def value(self) -> float | None: ...

    @property
    def ci95(self) -> tuple[float, float] | None: ...


def cell(figure: Valued | None) -> str:
    """A figure with its interval, or nothing."""
    if figure is None or figure.value is None:
        return ""
    return f"{figure.value:.4g} {interval(figure.ci95)}".strip()


def interval(ci95: tuple[float, float] | None) -> str:
    """An interval as text, or nothing."""
    return "" if ci95 is None else f"[{ci95[0]:.4g}, {ci95[1]:.4g}]"


def difference_cell(difference: Difference | None) -> str:
    """A difference with its sign and interval, or nothing."""
    if difference is None:
        return ""
    return f"{difference.difference:+.4g} {interval(difference.ci95)}"


def flips_cell(difference: Difference | None) -> str:
    """How many examples flipped each way, or nothing where values do not flip."""
    if difference is None or difference.gained is None:
        return ""
    return f"+{difference.gained} -{difference.lost}"


def tested_cell(difference: Difference | None) -> str:
    """The flips of a difference, if it has any, and its p (corrected, where it was)."""
    if difference is None or difference.p is None:
        return ""
    p = difference.p if difference.corrected_p is None else difference.corrected_p
    return f"{flips_cell(difference)} (p {p:.2g})".strip()


def number_cell(value: float | None, form: str = ".4g") -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)
