"""How much it takes: contrasting pairs (AUSteer, Figure 13), and units, from few to all of them
(Table 12)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from trimtab import options
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.fitting import Statistics, Want, collect, fit
from trimtab.methods import AUSteer
from trimtab.model import LanguageModel
from trimtab.options import flat
from trimtab.papers import measure
from trimtab.papers.austeer.ranking import site_units
from trimtab.papers.measure import FINE, Rows, Values, figure
from trimtab.papers.result import Analysis
from trimtab.papers.settings import (
    base_figures,
    compared,
    line,
    measured,
    named,
    settings_table,
    unsteered_band,
)
from trimtab.progress import progress
from trimtab.reports import COLOURS, DOWN, NEUTRAL, STYLE, UP, Picture, Table
from trimtab.steering import Steering
from trimtab.sweeps import contrast_for

PAIRS = (50, 100, 200, 300, 500, 1000)
COUNTS: tuple[int | Literal["all"], ...] = (
    *(1, 4, 16, 64, 100, 200, 500, 1000, 3000, 5000, 10000),
    "all",
)


# -- how many pairs -------------------------------------------------------------------------------


@flat
def pairs(
    language_model: LanguageModel,
    task: str,
    *,
    contrast: Contrast | str | None = None,
    asked: options.ValidationRows = options.ValidationRows(),
    seed: int = 0,
    counts: Sequence[int] = PAIRS,
    resamples: int = 5,
    site: str = "ffn_out",
    k: int = 16,
    alpha: float = 8.0,
) -> Analysis:
    """AUSteer from fewer pairs (Figure 13), `resamples` random subsets of each size, all from one
    pass over the contrast.

    Of each: how many of its k units are among those of all pairs; how many it shares with a second
    subset of the same size that has no pair in common (up to half of the pairs), which is what says
    whether another sample would choose the same; and the metric on the validation rows.
    """
    started = time.perf_counter()
    if resamples < 1:
        raise TrimtabError(f"the number of resamples must be 1 or more, not {resamples}")
    texts = contrast_for(task, contrast, asked.data)
    train = texts.train
    method = AUSteer(site=site, k=k, alpha=alpha)
    sizes = sorted({count for count in counts if 0 < count < len(train)})
    drawn = _subsets(len(train), sizes, resamples, seed)
    everything = frozenset(range(len(train)))
    subsets = [everything, *(each for two in drawn.values() for pair in two for each in pair)]
    steerings = fit_subsets(language_model, method, train, subsets)
    rows = _rows(language_model, task, asked, seed)
    all_units = _places(steerings[everything])
    total = site_units(language_model, site)
    entries = []
    with progress("fewer pairs", len(sizes) * resamples + 1) as advance:
        for size in [*sizes, len(train)]:
            entry: dict[str, Any] = {"pairs": size, "overlap": [], "overlap_disjoint": []}
            values: list[Values] = []
            for pair in drawn.get(size, [(everything,)]):
                first = _places(steerings[pair[0]])
                entry["overlap"].append(len(first & all_units) / k)
                if len(pair) > 1:
                    entry["overlap_disjoint"].append(len(first & _places(steerings[pair[1]])) / k)
                values.append(rows.values(steerings[pair[0]]))
                advance(1)
            entry["values"] = {
                metric: [figure(metric, each[metric]).value for each in values]
                for metric in values[0]
            }
            entries.append(entry)
    base = {name: figure(name, values) for name, values in rows.unsteered().items()}
    found = {
        "task": task,
        "site": site,
        "k": k,
        "alpha": alpha,
        "units": total,
        "metric": rows.metric,
        "rows": rows.count(),
        "unsteered": {name: measure.plain(each) for name, each in base.items()},
        "resamples": resamples,
        "counts": entries,
    }
    title = f"AUSteer from fewer pairs on {task}"
    return Analysis(
        "pairs",
        title,
        found,
        [_pairs_table(found)],
        [_pairs_picture(title, found)],
        [*rows.notes(), *_pairs_notes(found, counts, len(train))],
        round(time.perf_counter() - started, 2),
    )


def _subsets(
    count: int, sizes: Sequence[int], resamples: int, seed: int
) -> dict[int, list[tuple[frozenset[int], ...]]]:
    """Of each size random subsets, each with a disjoint one of its size where there is room."""
    found: dict[int, list[tuple[frozenset[int], ...]]] = {}
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        found[size] = []
        for _ in range(resamples):
            order = torch.randperm(count, generator=generator).tolist()
            pair = [order[:size], order[size : 2 * size]]
            found[size].append(tuple(frozenset(each) for each in pair if len(each) == size))
    return found


def fit_subsets(
    language_model: LanguageModel,
    method: Any,
    contrast: Contrast,
    subsets: Sequence[frozenset[int]],
) -> dict[frozenset[int], Steering]:
    """The steering that each subset of a contrast's rows gives, all from one pass."""
    wants = method.wants(language_model, contrast)
    limited = {
        subset: {want: replace(want, rows=subset) for want in wants}
        for subset in dict.fromkeys(subsets)
    }
    every: list[Want] = [want for each in limited.values() for want in each.values()]
    gathered = collect(language_model, contrast, every)
    found = {}
    for subset, each in limited.items():
        own = Statistics({want: gathered[narrow] for want, narrow in each.items()})
        rows = tuple(contrast.rows[i] for i in sorted(subset))
        found[subset] = method.build(language_model, replace(contrast, rows=rows), own)
    return found


def _places(steering: Steering) -> set[tuple[int, int]]:
    tables = steering.tables
    return set(zip(tables["layer"].tolist(), tables["unit"].tolist(), strict=True))


def _pairs_notes(found: dict[str, Any], counts: Sequence[int], available: int) -> list[str]:
    notes = [
        f"two random choices of {found['k']} among {found['units']:,} units share a "
        f"{found['k'] / found['units']:.2g} part",
        "the share of the units of all pairs rises to 1 by itself, because a large subset is most "
        "of them; the share of disjoint subsets does not",
        f"the spread is over {found['resamples']} random subsets, on the same validation rows: "
        "other rows would move all of them together",
    ]
    large = [str(count) for count in counts if count > available]
    if large:
        notes.append(f"there are {available} pairs, so {', '.join(large)} were left out")
    return notes


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def _pairs_table(found: dict[str, Any]) -> Table:
    metrics = list(found["unsteered"])
    lines = [
        [
            entry["pairs"],
            len(entry["overlap"]),
            _spread(entry["overlap"]),
            _spread(entry["overlap_disjoint"]),
            *(_spread(entry["values"][metric]) for metric in metrics),
        ]
        for entry in found["counts"]
    ]
    base = [f"{found['unsteered'][m]['value']:.4g}" for m in metrics]
    heads = ["pairs", "subsets", "units of all pairs", "units of disjoint subsets", *metrics]
    return Table(
        "Units and effect by the number of pairs",
        heads,
        [["unsteered", "", "", "", *base], *lines],
        f"Means (lowest to highest) over subsets; n = {found['rows']} validation rows.",
    )


def _pairs_picture(title: str, found: dict[str, Any]) -> Picture:
    entries, metric = found["counts"], found["metric"]
    sizes = [entry["pairs"] for entry in entries]
    with matplotlib.rc_context(STYLE):
        figure_drawn = Figure(figsize=(9.5, 3.8), layout="constrained")
        left, right = figure_drawn.subplots(1, 2)
        _range_line(left, sizes, [entry["overlap"] for entry in entries], UP, "with all pairs")
        both = [entry for entry in entries if entry["overlap_disjoint"]]
        _range_line(
            left,
            [entry["pairs"] for entry in both],
            [entry["overlap_disjoint"] for entry in both],
            DOWN,
            "of two disjoint subsets",
        )
        left.axhline(found["k"] / found["units"], color="black", linestyle=":", label="chance")
        left.set(
            ylim=(-0.03, 1.05), ylabel=f"share of the {found['k']} units that agree", xlabel="pairs"
        )
        left.legend(frameon=False, fontsize=8)
        values = [entry["values"][metric] for entry in entries]
        _range_line(right, sizes, values, UP, "steered, range over subsets")
        base = found["unsteered"][metric]
        right.axhline(base["value"], color="black", linestyle="--", label="unsteered")
        right.axhspan(base["low"], base["high"], color=NEUTRAL, alpha=0.15, linewidth=0)
        right.set(ylabel=named(metric), xlabel="pairs")
        right.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
        figure_drawn.suptitle(title)
    return Picture(
        title,
        "pairs",
        figure_drawn,
        "agreement of the chosen units and the metric over the number of pairs",
        f"Bars: lowest to highest of {found['resamples']} random subsets. Grey: the unsteered "
        f"model's 95 % interval over {found['rows']} validation rows.",
    )


def _range_line(
    axes: Any, at: Sequence[float], groups: Sequence[Sequence[float]], colour: str, label: str
) -> None:
    """Means with the range from the lowest to the highest."""
    if not at:
        return
    means = np.array([np.mean(group) for group in groups])
    low = means - [min(group) for group in groups]
    high = np.array([max(group) for group in groups]) - means
    axes.errorbar(
        at,
        means,
        yerr=np.clip([low, high], 0, None),
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        label=label,
    )


# -- how many units -------------------------------------------------------------------------------


def _rows(
    language_model: LanguageModel, task: str, asked: options.ValidationRows, seed: int
) -> Rows:
    """The validation rows; of the test rows, on which nothing is measured, one."""
    rows = options.Rows(data=asked.data, limit=asked.limit, test_limit=1)
    return Rows(language_model, task, rows, seed=seed)


@flat
def count(
    language_model: LanguageModel,
    task: str,
    *,
    contrast: Contrast | str | None = None,
    asked: options.ValidationRows = options.ValidationRows(),
    seed: int = 0,
    ks: Sequence[int | Literal["all"]] = COUNTS,
    alpha: float | Sequence[float] = 8.0,
    site: str = "ffn_out",
    direction: Literal["paper", "signed"] = "paper",
) -> Analysis:
    """AUSteer with more and more units, up to all of them (Table 12), at one strength or several;
    all fitted from one pass and measured on the same validation rows."""
    started = time.perf_counter()
    alphas = [float(each) for each in ([alpha] if isinstance(alpha, int | float) else alpha)]
    texts = contrast_for(task, contrast, asked.data)
    total = site_units(language_model, site)
    wanted: list[int | Literal["all"]] = [k for k in ks if k == "all" or k < total]
    wanted += ["all"] if any(k != "all" and k >= total for k in ks) and "all" not in ks else []
    if not wanted or not alphas:
        raise TrimtabError("there is no number of units, or no strength, to try")
    methods = [AUSteer(site=site, k=k, alpha=alphas[0], direction=direction) for k in wanted]
    fitted = fit(methods, language_model, texts)
    rows = _rows(language_model, task, asked, seed)
    tried = [
        ({"k": len(steering.tables["unit"]), "alpha": each}, replace(steering, value=each))
        for each in alphas
        for steering in fitted
    ]
    settings = measured(rows, tried)
    entries = compared(rows, settings)
    found = {
        "task": task,
        "site": site,
        "units": total,
        "metric": rows.metric,
        "rows": rows.count(),
        "unsteered": base_figures(rows),
        "counts": entries,
    }
    title = f"AUSteer with more units on {task}"
    notes = [
        *rows.notes(),
        f"{len(entries)} settings were tried on {rows.count()} validation rows; p-values are "
        "corrected for their number (Holm)",
        "the largest numbers leave out units that are equal on both sides of every pair",
    ]
    return Analysis(
        "count",
        title,
        found,
        [settings_table("By the number of units", entries, found)],
        [_count_picture(title, found, alphas)],
        notes,
        round(time.perf_counter() - started, 2),
    )


def _count_picture(title: str, found: dict[str, Any], alphas: Sequence[float]) -> Picture:
    metrics = list(found["unsteered"])
    metrics = [metric for metric in metrics if metric in (found["metric"], "accuracy", FINE)]
    with matplotlib.rc_context(STYLE):
        figure_drawn = Figure(figsize=(5 * len(metrics) + 0.5, 3.8), layout="constrained")
        panels: Any = figure_drawn.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for i, alpha in enumerate(alphas):
                some = [entry for entry in found["counts"] if entry["alpha"] == alpha]
                colour = COLOURS[i % len(COLOURS)]
                line(axes, "k", some, metric, colour, f"α = {alpha:g}", shift=1 + 0.04 * i)
            unsteered_band(axes, found["unsteered"][metric])
            axes.set(xscale="log", xlabel="units that are steered", ylabel=named(metric))
            axes.axvline(found["units"], color="black", linewidth=0.8, linestyle=":")
        panels[0].legend(frameon=False, fontsize=8)
        figure_drawn.suptitle(title)
    return Picture(
        title,
        "count",
        figure_drawn,
        f"{', '.join(metrics)} over the number of steered units",
        f"95 % intervals over {found['rows']} validation rows; grey: the unsteered model's. The "
        f"dotted line is all {found['units']:,} units.",
    )
