"""Making units smaller instead of promoting them (AUSteer, Table 13)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from trimtab import options
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.figures import holm
from trimtab.fitting import fit
from trimtab.methods import AUSteer
from trimtab.model import LanguageModel
from trimtab.options import flat
from trimtab.papers.austeer.ranking import site_units
from trimtab.papers.measure import Rows, Setting
from trimtab.papers.result import Analysis
from trimtab.papers.settings import (
    base_figures,
    compared,
    figure_cell,
    line,
    measured,
    named,
    tested,
    unsteered_band,
)
from trimtab.reports import COLOURS, STYLE, Picture, Table, interval
from trimtab.steering import Scale, Steering
from trimtab.sweeps import contrast_for, setting

#: Shares of all units that are suppressed, and by how much they shrink: within the ranges that
#: Table 13 was searched over, 0 to 99.95 % and factors 0.05 to 0.99.
SHARES = (0.1, 0.5, 0.9, 0.99, 0.9995)
SHRINK = (0.05, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class _Way:
    """A way of steering units, with the settings that were tried of it."""

    name: str
    settings: Sequence[Setting]


@flat
def suppression(
    language_model: LanguageModel,
    task: str,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    shrink: Sequence[float] = SHRINK,
    ks: Sequence[int] = (4, 16, 64),
    alphas: Sequence[float] = (2.0, 8.0, 32.0),
    site: str = "ffn_out",
) -> Analysis:
    """Suppress units instead of promoting them (Table 13).

    The units of the lowest scores, and as a contrast those of the highest, are multiplied by
    1 - shrink, for each share of all units; AUSteer promotes and suppresses by sign over ks and
    alphas. Each way has its setting chosen on the validation rows, and its figure from the test
    rows. All are fitted from one pass.
    """
    started = time.perf_counter()
    if not all(0 < share <= 1 for share in shares) or not shares or not shrink:
        raise TrimtabError("shares of units lie above 0 and up to 1: 0.9 is 90 %")
    texts = contrast_for(task, contrast, asked.data)
    total = site_units(language_model, site)
    numbers = {share: max(1, round(share * total)) for share in shares}
    methods = [AUSteer(site=site, k=k, alpha=0.5, choose="least") for k in numbers.values()]
    methods += [AUSteer(site=site, k=k, alpha=0.5) for k in numbers.values()]
    methods += [AUSteer(site=site, k=k, alpha=1.0) for k in ks]
    fitted = fit(methods, language_model, texts)
    n = len(numbers)
    groups = {
        "least": _at_shares(numbers, fitted[:n], shrink),
        "most": _at_shares(numbers, [shrinking(each) for each in fitted[n : 2 * n]], shrink),
        "AUSteer": [
            ({"k": k, "alpha": alpha}, replace(steering, value=alpha))
            for k, steering in zip(ks, fitted[2 * n :], strict=True)
            for alpha in alphas
        ],
    }
    rows = Rows(language_model, task, asked, seed=seed)
    ways = [_Way(name, measured(rows, tried)) for name, tried in groups.items() if tried]
    results = [tested(rows, way.name, way.settings) for way in ways]
    for entry, p in zip(
        results, holm([e["test"][rows.metric]["change"]["p"] for e in results]), strict=True
    ):
        entry["p_corrected"] = p
    found = {
        "task": task,
        "site": site,
        "units": total,
        "metric": rows.metric,
        "rows": rows.count(),
        "test_rows": rows.count("test"),
        "unsteered": base_figures(rows),
        "unsteered_test": base_figures(rows, "test"),
        "chosen": results,
        "tried": {way.name: compared(rows, way.settings) for way in ways},
    }
    title = f"Suppressing units of {site} on {task}"
    notes = [
        *rows.notes(),
        "each way's setting was chosen on the validation rows among "
        + ", ".join(f"{len(way.settings)} ({way.name})" for way in ways)
        + "; p-values on the test rows are corrected for the number of ways (Holm)",
        "the paper chose on the test rows",
    ]
    return Analysis(
        "suppression",
        title,
        found,
        [chosen_table(found)],
        [_suppression_picture(title, found, shrink)],
        notes,
        round(time.perf_counter() - started, 2),
    )


def _at_shares(
    numbers: dict[float, int], steerings: Sequence[Steering], shrink: Sequence[float]
) -> list[tuple[dict[str, Any], Steering]]:
    return [
        ({"share": share, "k": k, "shrink": by}, replace(steering, value=by))
        for (share, k), steering in zip(numbers.items(), steerings, strict=True)
        for by in shrink
    ]


def shrinking(steering: Steering) -> Steering:
    """The same units, multiplied by 1 - dial whatever their gain was."""
    interventions = []
    for intervention in steering.interventions:
        operator: Any = intervention.operator
        gain = -torch.ones_like(operator.gain)
        shrunk = Scale(operator.units, gain, operator.width)
        interventions.append(replace(intervention, operator=shrunk))
    dial = replace(steering.dial, default=0.5, range=(0.0, 1.0))
    return replace(steering, interventions=tuple(interventions), dial=dial)


def chosen_table(found: dict[str, Any]) -> Table:
    """What was chosen of each way, and its figures on both parts."""
    metric = found["metric"]
    lines = [
        [
            "unsteered",
            "",
            figure_cell(found["unsteered"][metric]),
            figure_cell(found["unsteered_test"][metric]),
            "",
            "",
        ]
    ]
    for entry in found["chosen"]:
        change = entry["test"][metric]["change"]
        difference = f"{change['difference']:+.4g} {interval(change['ci95'])}"
        p = f"p {entry['p_corrected']:.2g}"
        flips = "" if change["gained"] is None else f"+{change['gained']} -{change['lost']}, "
        lines.append(
            [
                entry["name"],
                setting(entry["params"]),
                figure_cell(entry["validation"][metric]),
                figure_cell(entry["test"][metric]),
                difference,
                flips + p,
            ]
        )
    heads = [
        "units",
        "setting",
        f"validation, n = {found['rows']}",
        f"test, n = {found['test_rows']}",
        "change on test",
        "flips",
    ]
    return Table(f"{metric} on {found['task']}", heads, lines, "p corrected for their number.")


def _suppression_picture(title: str, found: dict[str, Any], shrink: Sequence[float]) -> Picture:
    metric = found["metric"]
    names = {"least": "the lowest scores shrink", "most": "the highest scores shrink"}
    with matplotlib.rc_context(STYLE):
        figure_drawn = Figure(figsize=(9.5, 3.8), layout="constrained")
        panels: Any = figure_drawn.subplots(1, 2, sharey=True)
        for axes, (way, words) in zip(panels, names.items(), strict=True):
            for i, by in enumerate(shrink):
                some = [entry for entry in found["tried"][way] if entry["shrink"] == by]
                places = [{**entry, "place": j + 0.06 * i} for j, entry in enumerate(some)]
                colour = COLOURS[i % len(COLOURS)]
                line(axes, "place", places, metric, colour, f"× {1 - by:.3g}")
            unsteered_band(axes, found["unsteered"][metric])
            shares = [entry["share"] for entry in found["tried"][way]]
            ticks = [f"{100 * share:g} %" for share in dict.fromkeys(shares)]
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set(xlabel="share of all units", title=words)
        panels[0].set(ylabel=named(metric))
        panels[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure_drawn.suptitle(title)
    return Picture(
        title,
        "suppression",
        figure_drawn,
        f"{metric} over the share of units that are made smaller",
        "The legend says what units are multiplied by. 95 % intervals over "
        f"{found['rows']} validation rows; grey: the unsteered model's.",
    )
