"""A run as one page of HTML that needs no network: tables, pictures, caveats, flips, how to repeat
it; light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from trimtab.contrasts import last_message
from trimtab.reports.tables import Table, cell, difference_cell, tested_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Flips that are shown in full; all of them are in the records.
_MOST_FLIPS = 100

_INTERVALS = (
    "Intervals are 95 %: Wilson for shares, bootstrap over examples for other means, paired "
    "bootstrap for differences."
)


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is that of its files, `alt` says in words what it shows."""

    title: str
    name: str
    figure: Figure
    alt: str
    note: str = ""


def render_page(
    title: str,
    subtitle: str,
    blocks: Sequence[Table | Picture],
    config: dict[str, Any],
    environment: dict[str, Any],
    *,
    notes: Sequence[str] = (),
    flips: Sequence[tuple[dict[str, Any], dict[str, Any]]] = (),
) -> str:
    """The page; `flips` are (unsteered, steered) records whose rating changed."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        (files("trimtab") / "data" / "report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        subtitle=f"{subtitle}; {environment['date'][:10]}",
        blocks=[_shown(block) for block in blocks],
        intervals=_INTERVALS,
        notes=notes,
        flips=[_flip(before, after) for before, after in flips[:_MOST_FLIPS]],
        flips_shown=min(len(flips), _MOST_FLIPS),
        flips_all=len(flips),
        config=json.dumps(config, indent=1, ensure_ascii=False),
        environment=json.dumps(environment, indent=1, ensure_ascii=False),
    )


def evaluation_page(
    evaluation: Any,
    config: dict[str, Any],
    environment: dict[str, Any],
    more: Sequence[Table | Picture] = (),
) -> str:
    """The page of an `Evaluation`, with what else is to be seen of it."""
    return render_page(
        f"Evaluation of {config['model']['name']}",
        f"{model_line(config['model'])}; {evaluation.seconds:g} seconds",
        [*evaluation_tables(evaluation), *more],
        config,
        environment,
        notes=evaluation.notes,
        flips=evaluation.flips(),
    )


def model_line(model: dict[str, Any]) -> str:
    """A model in a few words, from the configuration of a run."""
    precision = model["dtype"].removeprefix("torch.")
    return f"{model['architecture']}, {model['layers']} layers, {precision}"


def evaluation_tables(evaluation: Any) -> list[Table]:
    """A table for each task and protocol of an `Evaluation`."""
    heads = ["metric", "steering", "value", "n", "unclear", "difference", "flipped"]
    tables = []
    for title, results in evaluation.tables():
        rows = [
            [
                r.metric,
                r.steering or "unsteered",
                cell(r) or "none is clear",
                r.n,
                r.unclear or "",
                difference_cell(difference),
                tested_cell(difference),
            ]
            for r, difference in results
        ]
        # Columns that this task has nothing for are left out.
        tables.append(Table(title, heads, rows).without_empty_columns(first=4))
    return tables


def _shown(block: Table | Picture) -> dict[str, Any]:
    if isinstance(block, Table):
        return {"kind": "table", **vars(block)}
    from trimtab.reports.charts import rendered  # matplotlib takes a second to import

    svg = base64.b64encode(rendered(block.figure, "svg", block.name)).decode()
    return {"kind": "picture", "source": f"data:image/svg+xml;base64,{svg}", **vars(block)}


def _flip(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    changes = (
        f"{metric} {old:.4g} to {new:.4g}"
        for metric, new in after["values"].items()
        if None not in (new, old := before["values"].get(metric)) and old != new
    )
    return {
        "title": f"{after['task']} {after['id']}, {after['steering']}: {next(changes, '')}",
        "prompt": last_message(after.get("prompt", "")),
        "target": after.get("target"),
        "before": before.get("output"),
        "after": after.get("output"),
    }
