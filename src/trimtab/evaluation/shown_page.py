"""What the page of an evaluation shows beside its tables: each metric over the dial where one
steering is evaluated at several, and some of what is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.contrasts import last_message
from trimtab.figures import Result
from trimtab.reports import (
    Evaluation,
    Line,
    Picture,
    Table,
    curve,
    look_of,
    panels,
    styled,
)
from trimtab.steering import Steering

#: Metrics of a task that are drawn, its first ones.
_METRICS = 4
#: A steering at several dials: (dial, name among what is evaluated), rising.
Dials = list[tuple[float, str]]


def pictures_of(evaluation: Evaluation, subjects: Mapping[str | None, Any]) -> list[Picture]:
    """A picture for each task where a steering is evaluated at several dials, else none."""
    turned: dict[str, Dials] = {}
    dial = ""
    for name, one in subjects.items():
        if name is not None and isinstance(one, Steering):
            turned.setdefault(one.digest, []).append((one.setting, name))
            dial = f"{one.dial.name} ({one.dial.unit})" if one.dial.unit else one.dial.name
    several = [sorted(each) for each in turned.values() if len(each) > 1]
    if not several:
        return []
    return [
        _over_dial(title, [result for result, _ in rows], several, dial)
        for title, rows in evaluation.by_task()
    ]


@styled
def _over_dial(
    title: str, results: Sequence[Result], several: Sequence[Dials], dial: str
) -> Picture:
    """Each metric over the dial, with the unsteered model's as a band."""
    figures = {(result.metric, result.steering): result.estimate for result in results}
    metrics = list(dict.fromkeys(result.metric for result in results))[:_METRICS]
    figure, every = panels((5.2 * len(metrics), 3.4), 1, len(metrics))
    for axes, metric in zip(every, metrics, strict=True):
        lines = []
        for i, dials in enumerate(several):
            known = [(at, figures.get((metric, name))) for at, name in dials]
            clear = [(at, estimate) for at, estimate in known if estimate is not None]
            label = Path(dials[0][1].rpartition("@")[0] or dials[0][1]).name
            colour, marker = look_of(i)
            at, values = [at for at, _ in clear], [estimate for _, estimate in clear]
            lines.append(Line(label, at, values, colour, marker))
        base = figures.get((metric, None))
        curve(axes, lines, base, xlabel=dial, ylabel=metric)
        axes.legend(frameon=False, fontsize=8)
    name = f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-dial"
    alt = f"{', '.join(metrics)} over the dial, with 95 % intervals"
    note = "Bars are 95 % intervals; the dashed line and its band are the unsteered model."
    return Picture(f"{title}, over the dial", name, figure, alt, note)


def written_table(evaluation: Evaluation) -> list[Table]:
    """Some of what is written in tasks of coherence, unsteered first; no table where there are
    none."""
    rows = [
        [last_message(sample["prompt"]), one["steering"] or "unsteered", one["text"]]
        for sample in evaluation.samples()
        for one in sample["outputs"]
    ]
    heads = ["prompt", "steering", "what is written"]
    return [Table("What is written", heads, rows)] if rows else []
