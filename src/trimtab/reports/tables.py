"""Tables for people: how figures stand in their cells, and a table as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from trimtab.figures import Difference, metric_of


class FigureCell(str):
    """A figure as it is read in a table, which remembers its numbers for CSV."""

    value: float
    ci95: tuple[float, float] | None

    def __new__(cls, text: str, value: float, ci95: tuple[float, float] | None) -> FigureCell:
        made = super().__new__(cls, text)
        made.value, made.ci95 = value, ci95
        return made


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

    def to_csv(self) -> str:
        """The table as CSV. A column of figures is three, with the ends of the interval beside the
        value; there a share is a part of 1, and nothing is rounded."""
        wide = [any(isinstance(row[i], FigureCell) for row in self.rows) for i in self._places]
        written = io.StringIO()
        lines = csv.writer(written, lineterminator="\n")
        heads = [[head, f"{head}, low", f"{head}, high"] for head in self.heads]
        lines.writerow(chain(*(h if w else h[:1] for h, w in zip(heads, wide, strict=True))))
        for row in self.rows:
            cells = (_numbers(one) if w else [one] for one, w in zip(row, wide, strict=True))
            lines.writerow(chain(*cells))
        return written.getvalue()

    def to_latex(self) -> str:
        r"""The table as a LaTeX tabular with the rules of booktabs (\usepackage{booktabs}), its
        title and note above it as comments."""
        about = [f"% {' '.join(line.split())}" for line in (self.title, self.note) if line]
        columns = "".join("r" if self._is_numeric(i) else "l" for i in self._places)
        rows = [" & ".join(map(_latex, map(str, row))) + r" \\" for row in self.rows]
        return "\n".join([
            *about,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_latex, self.heads)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ])  # fmt: skip

    @property
    def _places(self) -> range:
        return range(len(self.heads))

    def _is_numeric(self, place: int) -> bool:
        """Whether each cell of a column that holds something begins with a number."""
        cells = [str(row[place]) for row in self.rows if str(row[place])]
        return bool(cells) and all(re.match(r"[-+−]?\d", one) for one in cells)


def _numbers(one: Any) -> list[Any]:
    """A cell of a column of figures: its value, and the ends of its interval."""
    if not isinstance(one, FigureCell):
        return [one, "", ""]
    return [one.value, *(one.ci95 or ("", ""))]


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ",
    "‖": r"$\Vert$", "×": r"$\times$", "±": r"$\pm$", "−": r"$-$", "→": r"$\to$", "°": r"$^\circ$",
    "α": r"$\alpha$", "γ": r"$\gamma$", "θ": r"$\theta$", "σ": r"$\sigma$", "Δ": r"$\Delta$",
}  # fmt: skip


def _latex(text: str) -> str:
    """A text with what means something to LaTeX as it is read."""
    return "".join(_LATEX.get(character, character) for character in text)


# -- figures in cells -----------------------------------------------------------------------------


class Valued(Protocol):
    """What has a value and its 95 % interval, where it has them: an estimate, a result, a trial."""

    @property
    def value(self) -> float | None: ...

    @property
    def ci95(self) -> tuple[float, float] | None: ...


def number_text(value: float, sign: str = "") -> str:
    """A number to three digits, or whole where it is large; with `sign` "+" it has its sign."""
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < 1e9 else f"{value:{sign}.3g}"


def value_text(value: float, metric: str = "", sign: str = "") -> str:
    """A figure of a metric: a share in %, others as numbers."""
    return f"{100 * value:{sign}.1f} %" if metric_of(metric).is_share else number_text(value, sign)


def change_text(value: float, metric: str = "") -> str:
    """A change of a metric, with its sign: that of a share in points, which are hundredths."""
    return f"{100 * value:+.1f} points" if metric_of(metric).is_share else number_text(value, "+")


def cell(found: Valued | None, metric: str = "") -> str:
    """A figure of a metric with its interval, or nothing."""
    if found is None or found.value is None:
        return ""
    text = f"{value_text(found.value, metric)} {interval(found.ci95, metric)}".strip()
    return FigureCell(text, found.value, found.ci95)


def interval(ci95: tuple[float, float] | None, metric: str = "") -> str:
    """An interval as text, or nothing."""
    if ci95 is None:
        return ""
    low, high = ci95
    if metric_of(metric).is_share:
        return f"[{100 * low:.1f}, {100 * high:.1f}]"
    return f"[{number_text(low)}, {number_text(high)}]"


def difference_cell(difference: Difference | None, metric: str = "") -> str:
    """A difference with its sign and interval, or nothing."""
    if difference is None:
        return ""
    name = metric or difference.metric
    text = f"{change_text(difference.difference, name)} {interval(difference.ci95, name)}"
    return FigureCell(text, difference.difference, difference.ci95)


def change_words(difference: Difference, metric: str = "") -> str:
    """A difference as part of a sentence: `+9.0 points [2.1, 15.8], clear of chance`."""
    name = metric or difference.metric
    unit = metric_of(name).said_unit
    clear = "clear of chance" if difference.is_clear else "no more than chance makes"
    said = f"{change_text(difference.difference, name)} {unit}".strip()
    text = f"{said} {interval(difference.ci95, name)}"
    return f"{text}, {clear}"


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


def wrong_way_cell(difference: Difference | None) -> str:
    """The share of examples that moved the wrong way, with its interval."""
    share = None if difference is None else difference.wrong_way
    return "" if share is None else cell(share, "accuracy")


def number_cell(value: float | None, form: str = ".4g") -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)
