"""What a study found: data, tables, pictures, notes, figures that can stand beside a paper's; and
the directory that it leaves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec

from trimtab.contrasts import Contrast
from trimtab.evaluation import load_contrast
from trimtab.figures import Estimate, Result
from trimtab.papers.sentences import SENTENCES
from trimtab.reports import Picture, Run, Table, model_line, run_page, tables_html

#: `task:copa first 40`: the first so many pairs of a contrast's train part.
_FIRST = re.compile(r"(.+) first (\d+)")
P = ParamSpec("P")


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
        shown = f"{times * self.value:.4g}"
        if self.ci95 is None or self.n == 1:  # a single example has no interval
            return shown
        low, high = self.ci95
        return f"{shown} [{times * low:.4g}, {times * high:.4g}]"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class StudyResult:
    """`data` is ready for JSON; tables and pictures show the same to people; `values` are figures
    by the row of the paper's table that they belong to. An analysis has a name and a title."""

    data: dict[str, Any]
    values: Mapping[str, Value] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    name: str = ""
    title: str = ""
    seconds: float = 0.0

    @property
    def summary(self) -> str:
        """One sentence that says what an analysis found; nothing of a recipe's study."""
        return SENTENCES[self.name](self.data) if self.name in SENTENCES else ""

    def __repr__(self) -> str:
        said = [self.title, self.summary] if self.title else list(self.values)[:4]
        return f"<StudyResult: {': '.join(filter(None, said))}>"

    def _repr_html_(self) -> str:
        """For notebooks: the sentence and the tables, as the page of a run has them."""
        return tables_html(self.tables, self.summary)

    def as_json(self) -> dict[str, Any]:
        """What `trimtab analyse --json` prints; of a recipe's study the data alone."""
        if not self.name:
            return self.data
        named = {"analysis": self.name, "title": self.title}
        return {**named, **self.data, "notes": list(self.notes), "seconds": self.seconds}


def timed(analysis: Callable[P, StudyResult]) -> Callable[P, StudyResult]:
    """The analysis, which says how long it took."""

    @wraps(analysis)
    def run(*args: P.args, **options: P.kwargs) -> StudyResult:
        started = time.perf_counter()
        done = analysis(*args, **options)
        return replace(done, seconds=round(time.perf_counter() - started, 2))

    return run


def value_of(figure: Result | Estimate, share: bool = True) -> Value:
    """A figure of an evaluation or of an analysis, to stand beside a paper's."""
    return Value(figure.value, figure.ci95, figure.n, share)


def contrast_of(source: Any, data: str | None) -> Any:
    """A contrast as a recipe names it: a source, of which ` first N` takes the first N train
    pairs."""
    if not isinstance(source, str):
        return source
    part = _FIRST.fullmatch(source)
    if part is None:
        return load_contrast(source, data=data)
    return load_contrast(part[1], data=data).train.take(int(part[2]))


def opened(contrast: Contrast | str, data: str | None) -> Contrast:
    """A contrast in hand, or what its source names."""
    return load_contrast(contrast, data=data)


def write(result: StudyResult, run: Run) -> None:
    """results.json, report.html, tables/ and pictures/ of a run directory."""
    if run.path is None:
        return
    model = run.config["model"]

    def made(environment: dict[str, Any]) -> str:
        return run_page(
            run,
            environment,
            result.title,
            f"{model['name']}; {model_line(model)}; {result.seconds:g} seconds",
            [*result.pictures, *result.tables],
            summary=result.summary,
            notes=result.notes,
        )

    run.finish(result.as_json(), made)
