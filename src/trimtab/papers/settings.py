"""Settings of a method on the rows of a task: tried, compared with no steering, chosen, shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.contrasts import Part
from trimtab.figures import holm
from trimtab.papers import measure
from trimtab.papers.measure import FINE, Rows, Setting, chosen, compare, figure
from trimtab.progress import progress
from trimtab.reports import NEUTRAL, Table, interval
from trimtab.steering import Steering
from trimtab.sweeps import shown


def measured(rows: Rows, tried: Sequence[tuple[dict[str, Any], Steering]]) -> list[Setting]:
    """Each steering on the validation rows."""
    found = []
    with progress("trying settings", len(tried)) as advance:
        for params, steering in tried:
            found.append(Setting(params, steering, rows.values(steering)))
            advance(1)
    return found


def base_figures(rows: Rows, part: Part = "validation") -> dict[str, Any]:
    """The unsteered model's figures."""
    found = rows.unsteered(part).items()
    return {name: measure.plain(figure(name, values)) for name, values in found}


def compared(rows: Rows, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Figures and changes of each setting, with p-values corrected for their number."""
    entries = []
    for setting in settings:
        entries.append(
            {
                **setting.params,
                "figures": {
                    metric: {
                        **measure.plain(setting.figure(metric)),
                        "change": measure.plain(rows.change(setting.values, metric)),
                    }
                    for metric in setting.values
                },
            }
        )
    for metric in settings[0].values:
        changes = [entry["figures"][metric]["change"] for entry in entries]
        for change, p in zip(changes, holm([change["p"] for change in changes]), strict=True):
            change["p_corrected"] = p
    return entries


def tested(rows: Rows, name: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """The setting that is best on the validation rows, on the test rows."""
    best = chosen(rows, settings)
    values = rows.values(best.steering, "test")
    before = rows.unsteered("test")
    return {
        "name": name,
        "params": best.params,
        "tried": len(settings),
        "validation": {metric: measure.plain(best.figure(metric)) for metric in best.values},
        "test": {
            metric: {
                **measure.plain(figure(metric, values[metric])),
                "change": measure.plain(compare(before[metric], values[metric])),
            }
            for metric in values
        },
    }


# -- for people -----------------------------------------------------------------------------------


def settings_table(title: str, entries: Sequence[dict[str, Any]], found: dict[str, Any]) -> Table:
    metrics = list(entries[0]["figures"])
    names = [name for name in entries[0] if name != "figures"]
    base: list[Any] = ["unsteered", *[""] * (len(names) - 1)]
    for metric in metrics:
        each = found["unsteered"][metric]
        base += [f"{each['value']:.4g} {interval((each['low'], each['high']))}", ""]
    lines = [base]
    for entry in entries:
        line = [_counted(entry[name]) for name in names]
        for metric in metrics:
            each = entry["figures"][metric]
            line += [
                f"{each['value']:.4g} {interval((each['low'], each['high']))}",
                change_cell(each),
            ]
        lines.append(line)
    heads = list(names)
    for metric in metrics:
        heads += [named(metric), "change"]
    note = f"n = {found['rows']} validation rows; p corrected for {len(entries)} comparisons."
    return Table(title, heads, lines, note)


def figure_cell(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.4g} {interval((entry['low'], entry['high']))}"


def change_cell(entry: dict[str, Any]) -> str:
    change = entry["change"]
    p = f"p {change['p_corrected']:.2g}"
    if change["gained"] is None:
        return f"{change['difference']:+.3g} ({p})"
    return f"+{change['gained']} -{change['lost']} ({p})"


def _counted(value: Any) -> str:
    """Whole numbers with commas, to be read rather than typed."""
    return f"{value:,}" if isinstance(value, int) else shown(value)


def named(metric: str) -> str:
    return f"{metric}, nats" if metric == FINE else metric


def line(
    axes: Any,
    name: str,
    entries: Sequence[dict[str, Any]],
    metric: str,
    colour: str,
    label: str,
    shift: float = 1.0,
) -> None:
    """A metric with its intervals over a parameter; `shift` keeps bars of several lines apart."""
    each = [entry["figures"][metric] for entry in entries]
    middle = np.array([one["value"] for one in each])
    ends = np.array([(one["low"], one["high"]) for one in each])
    axes.errorbar(
        [entry[name] * shift for entry in entries],
        middle,
        yerr=np.clip([middle - ends[:, 0], ends[:, 1] - middle], 0, None),
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.2,
        label=label,
    )


def unsteered_band(axes: Any, base: dict[str, Any]) -> None:
    """The unsteered model with its interval."""
    axes.axhline(base["value"], color="black", linestyle="--", linewidth=1, label="unsteered")
    axes.axhspan(base["low"], base["high"], color=NEUTRAL, alpha=0.15, linewidth=0)
