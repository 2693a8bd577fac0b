"""Making units smaller instead of promoting them (AUSteer, Table 13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab import options
from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError
from trimtab.evaluation import Asked
from trimtab.figures import Difference, Estimate, holm, on_task, with_unit
from trimtab.fitting import fit
from trimtab.methods import AUSteer
from trimtab.model import LanguageModel
from trimtab.options import flat
from trimtab.papers.austeer.ranking import site_units
from trimtab.papers.result import StudyResult, timed, value_of
from trimtab.papers.settings import (
    Figures,
    Tried,
    best_of,
    compared,
    figures_of,
    line_of,
    means,
    measured,
    plain,
    plain_means,
    rows_of,
)
from trimtab.reports import (
    COLOURS,
    Picture,
    Table,
    cell,
    curve,
    difference_cell,
    flips_cell,
    number_cell,
    panels,
    styled,
)
from trimtab.steering import Scale, Steering
from trimtab.sweeps import TaskRows, contrast_for, mean_of, setting

#: Shares of all units that are suppressed, and by how much they shrink: within the ranges that
#: Table 13 was searched over, 0 to 99.95 % and factors 0.05 to 0.99.
SHARES = (0.1, 0.5, 0.9, 0.99, 0.9995)
SHRINK = (0.05, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class _Way:
    """A way of steering units: what was tried of it, and what was chosen on the test rows."""

    name: str
    tried: Sequence[Tried]
    best: Tried
    test: Figures
    corrected_p: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "params": self.best.params,
            "tried": len(self.tried),
            "validation": plain_means(self.best.figures),
            "test": plain(self.test),
            "p_corrected": self.corrected_p,
        }


@flat
@timed
def suppression(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    shrink: Sequence[float] = SHRINK,
    ks: Sequence[int] = (4, 16, 64),
    alphas: Sequence[float] = (2.0, 8.0, 32.0),
    site: str = "ffn_out",
) -> StudyResult:
    """Suppress units instead of promoting them (Table 13).

    The units of the lowest scores, and as a contrast those of the highest, are multiplied by
    1 - shrink, for each share of all units; AUSteer promotes and suppresses by sign over ks and
    alphas. Each way has its setting chosen on the validation rows, and its figure from the test
    rows. All are fitted from one pass.
    """
    if not all(0 < share <= 1 for share in shares) or not shares or not shrink:
        raise TrimtabError("shares of units lie above 0 and up to 1: 0.9 is 90 %")
    texts = contrast_for(task, contrast, asked)
    total = site_units(language_model, site)
    numbers = {share: max(1, round(share * total)) for share in shares}
    methods = [AUSteer(site=site, k=k, alpha=0.5, choose="least") for k in numbers.values()]
    methods += [AUSteer(site=site, k=k, alpha=0.5, direction="paper") for k in numbers.values()]
    methods += [AUSteer(site=site, k=k, alpha=1.0, direction="paper") for k in ks]
    fitted = fit(methods, language_model, texts, measure=False)
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
    rows = rows_of(language_model, task, asked, seed)
    metric = rows.first
    ways = _ways(rows, {name: settings for name, settings in groups.items() if settings})
    parts: tuple[Part, ...] = ("validation", "test")
    unsteered = {part: means(rows.values(None, part)) for part in parts}
    title = f"Suppressing units of {site} on {rows.task}"
    notes = [
        *rows.notes(),
        "each way's setting was chosen on the validation rows among "
        + ", ".join(f"{len(way.tried)} ({way.name})" for way in ways)
        + "; p-values on the test rows are corrected for the number of ways (Holm)",
        "the paper chose on the test rows",
    ]
    document = {
        "task": rows.task,
        "site": site,
        "units": total,
        "metric": metric,
        "rows": rows.rows("validation"),
        "test_rows": rows.rows("test"),
        "unsteered": plain_means(unsteered["validation"]),
        "unsteered_test": plain_means(unsteered["test"]),
        "chosen": [way.as_json() for way in ways],
        "tried": {way.name: [each.as_json() for each in way.tried] for way in ways},
    }
    values = {"unsteered": value_of(unsteered["test"][metric].mean)}
    return StudyResult(
        document,
        values | {way.name: value_of(way.test[metric].mean) for way in ways},
        [_chosen_table(rows, ways, [unsteered[part][metric].mean for part in parts])],
        [_picture(title, rows, ways, shrink)],
        notes,
        "suppression",
        title,
    )


def _ways(
    rows: TaskRows, groups: Mapping[str, Sequence[tuple[dict[str, Any], Steering]]]
) -> list[_Way]:
    """Each way with its setting chosen on the validation rows, and measured on the test rows."""
    ways = []
    for name, settings in groups.items():
        tried = compared(rows, measured(rows, settings))
        best = best_of(rows, tried)
        test = figures_of(rows, rows.values(best.steering, "test"), "test")
        ways.append(_Way(name, tried, best, test))
    every = holm([_change(way, rows.first).p or 0.0 for way in ways])
    return [replace(way, corrected_p=p) for way, p in zip(ways, every, strict=True)]


def _change(way: _Way, metric: str) -> Difference:
    change = way.test[metric].change
    assert change is not None
    return change


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


def _chosen_table(rows: TaskRows, ways: Sequence[_Way], unsteered: Sequence[Estimate]) -> Table:
    """What was chosen of each way, and its figures on both parts."""
    metric = rows.first
    lines = [["unsteered", "", *(cell(one, metric) for one in unsteered), "", ""]]
    for way in ways:
        change = _change(way, metric)
        said = [flips_cell(change), f"p {number_cell(way.corrected_p, '.2g')}"]
        lines.append(
            [
                way.name,
                setting(way.best.params),
                cell(way.best.figures[metric].mean, metric),
                cell(way.test[metric].mean, metric),
                difference_cell(change, metric),
                ", ".join(filter(None, said)),
            ]
        )
    heads = ["units", "setting", f"validation, n = {rows.rows('validation')}"]
    heads += [f"test, n = {rows.rows('test')}", "change on test", "flips"]
    return Table(on_task(metric, rows.task), heads, lines, "p corrected for their number.")


def _shifted(by: float) -> Callable[[int, dict[str, Any]], float]:
    """Places one after the other, so that bars of several lines are kept apart."""
    return lambda place, _: place + by


@styled
def _picture(title: str, rows: TaskRows, ways: Sequence[_Way], shrink: Sequence[float]) -> Picture:
    metric = rows.first
    names = {"least": "the lowest scores shrink", "most": "the highest scores shrink"}
    figure, every = panels((9.5, 3.8), 1, 2, sharey=True)
    for axes, way in zip(every, ways, strict=False):
        lines = [
            line_of(
                f"× {1 - by:.3g}",
                [each for each in way.tried if each.params["shrink"] == by],
                metric,
                COLOURS[i % len(COLOURS)],
                _shifted(0.06 * i),
            )
            for i, by in enumerate(shrink)
        ]
        curve(axes, lines, mean_of(metric, rows.values(None)[metric]))
        shares = dict.fromkeys(each.params["share"] for each in way.tried)
        axes.set_xticks(range(len(shares)), [f"{100 * share:g} %" for share in shares])
        axes.set(xlabel="share of all units", title=names[way.name])
    every[0].set(ylabel=with_unit(metric))
    every[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    return Picture(
        title,
        "suppression",
        figure,
        f"{metric} over the share of units that are made smaller",
        "The legend says what units are multiplied by. 95 % intervals over "
        f"{rows.rows('validation')} validation rows; grey: the unsteered model's.",
    )
