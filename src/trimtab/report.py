"""A run as one page of HTML that needs no network: figures, caveats, flips, how to repeat it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from trimtab.contrasts import last_message

#: Flips that are shown in full; all of them are in the records.
_MOST_FLIPS = 100


def page(evaluation: Any, config: dict[str, Any], environment: dict[str, Any]) -> str:
    """The page of an `Evaluation`."""
    model = config["model"]
    flips = evaluation.flips()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        (files("trimtab") / "data" / "report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=f"Evaluation of {model['name']}",
        subtitle=f"{model['architecture']}, {model['layers']} layers, {model['dtype']}; "
        f"{environment['date'][:10]}; {evaluation.seconds:g} seconds",
        tables=_tables(evaluation),
        notes=evaluation.notes,
        flips=[_flip(before, after) for before, after in flips[:_MOST_FLIPS]],
        flips_shown=min(len(flips), _MOST_FLIPS),
        flips_all=len(flips),
        config=json.dumps(config, indent=1, ensure_ascii=False),
        environment=json.dumps(environment, indent=1, ensure_ascii=False),
    )


def _tables(evaluation: Any) -> list[dict[str, Any]]:
    """The tables as rows of cells."""
    tables = []
    for title, results in evaluation.tables():
        rows = []
        for r, found in results:
            value = "none is clear" if r.value is None else f"{r.value:.4g} {_interval(r.ci95)}"
            row = [r.metric, r.steering or "unsteered", value, r.n, r.unclear or ""]
            difference = flipped = ""
            if found is not None:
                difference = f"{found.difference:+.4g} {_interval(found.ci95)}"
                flipped = (
                    "" if found.p is None else f"+{found.gained} -{found.lost} (p {found.p:.2g})"
                )
            rows.append([*row, difference, flipped])
        heads = ["metric", "steering", "value", "n", "unclear", "difference", "flipped"]
        # Columns that this task has nothing for are left out.
        kept = [i for i in range(len(heads)) if i < 4 or any(row[i] != "" for row in rows)]
        tables.append(
            {
                "title": title,
                "heads": [heads[i] for i in kept],
                "rows": [[row[i] for i in kept] for row in rows],
            }
        )
    return tables


def _interval(ci95: tuple[float, float] | None) -> str:
    return "" if ci95 is None else f"[{ci95[0]:.4g}, {ci95[1]:.4g}]"


def _flip(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    metric = next(iter(after["values"]))
    change = f"{before['values'][metric]:g} to {after['values'][metric]:g}"
    return {
        "title": f"{after['task']} {after['id']}, {after['steering']}: {metric} {change}",
        "prompt": last_message(after.get("prompt", "")),
        "target": after.get("target"),
        "before": before.get("output"),
        "after": after.get("output"),
    }
