"""How much it takes: contrasting pairs (AUSteer, Figure 13), and units, from few to all of them
(Table 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from trimtab import options
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import Asked
from trimtab.figures import Estimate, with_unit
from trimtab.fitting import Statistics, Want, collect, fit
from trimtab.methods import AUSteer
from trimtab.model import LanguageModel
from trimtab.options import flat, option
from trimtab.papers.austeer.ranking import LOCATE_HELP, Locate, located, site_units
from trimtab.papers.result import StudyResult, Value, timed, value_of
from trimtab.papers.settings import (
    Figures,
    Tried,
    compared,
    drawn_metrics,
    line_of,
    means,
    measured,
    plain_means,
    rows_of,
    settings_table,
)
from trimtab.reports import COLOURS, DOWN, UP, Line, Picture, Table, curve, panels, styled
from trimtab.steering import Steering
from trimtab.sweeps import TaskRows, contrast_for
from trimtab.terminal import progress

PAIRS = (50, 100, 200, 300, 500, 1000)
COUNTS: tuple[int | Literal["all"], ...] = (
    *(1, 4, 16, 64, 100, 200, 500, 1000, 3000, 5000, 10000),
    "all",
)


@dataclass(frozen=True, kw_only=True)
class Steered:
    """Which units are steered, how many, and how strongly."""

    heading = "Units"

    site: str = option("A kind of site: ffn_out, heads, ffn_in, resid ...", "ffn_out")
    k: int = option("How many units.", 16)
    alpha: float = option("Strength.", 8.0)
    locate: Locate = option(LOCATE_HELP, "momentum")


# -- how many pairs -------------------------------------------------------------------------------


@flat
@timed
def pairs(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.ValidationRows = options.ValidationRows(),
    seed: int = 0,
    counts: Sequence[int] = PAIRS,
    resamples: int = 5,
    steered: Steered = Steered(),
) -> StudyResult:
    """AUSteer from fewer pairs (Figure 13), `resamples` random subsets of each size, all from one
    pass over the contrast.

    Of each: how many of its k units are among those of all pairs; how many it shares with a second
    subset of the same size that has no pair in common (up to half of the pairs), which is what says
    whether another sample would choose the same; and the metric on the validation rows.
    """
    if resamples < 1:
        raise TrimtabError(f"the number of resamples must be 1 or more, not {resamples}")
    site, k, alpha = steered.site, steered.k, steered.alpha
    texts = contrast_for(task, contrast, asked)
    train = texts.train
    method = AUSteer(site=site, k=k, alpha=alpha, **located(steered.locate))
    sizes = sorted({count for count in counts if 0 < count < len(train)})
    drawn = _subsets(len(train), sizes, resamples, seed)
    everything = frozenset(range(len(train)))
    subsets = [everything, *(each for two in drawn.values() for pair in two for each in pair)]
    steerings = fit_subsets(language_model, method, train, subsets)
    rows = _rows(language_model, task, asked, seed)
    unsteered, metric = means(rows.values(None)), rows.first
    all_units = _places(steerings[everything])
    groups = []
    with progress("fewer pairs", len(sizes) * resamples + 1) as advance:
        for size in [*sizes, len(train)]:
            group = _Size(size)
            for pair in drawn.get(size, [(everything,)]):
                first = _places(steerings[pair[0]])
                group.overlap.append(len(first & all_units) / k)
                if len(pair) > 1:
                    group.disjoint.append(len(first & _places(steerings[pair[1]])) / k)
                for name, figure in means(rows.values(steerings[pair[0]])).items():
                    group.values.setdefault(name, []).append(figure.mean.value)
                advance(1)
            groups.append(group)
    document: dict[str, Any] = {
        "task": rows.task,
        "site": site,
        "k": k,
        "alpha": alpha,
        "locate": steered.locate,
        "units": site_units(language_model, site),
        "metric": metric,
        "rows": rows.rows("validation"),
        "unsteered": plain_means(unsteered),
        "resamples": resamples,
        "counts": [group.as_json() for group in groups],
    }
    values = {"unsteered": value_of(unsteered[metric].mean)}
    for group in groups:
        scores = group.values[metric]
        mean = sum(scores) / len(scores)
        values[f"{group.pairs} pairs"] = Value(mean, n=len(scores), share=True)
    title = f"AUSteer from fewer pairs on {rows.task}"
    return StudyResult(
        document,
        values,
        [_pairs_table(groups, unsteered, rows.rows("validation"))],
        [_pairs_picture(title, groups, unsteered, document)],
        [*rows.notes(), *_pairs_notes(document, counts, len(train))],
        "pairs",
        title,
    )


@dataclass(frozen=True)
class _Size:
    """What came of the subsets of one size: the share of the k units that are those of all pairs,
    that of disjoint subsets, and each metric's mean."""

    pairs: int
    overlap: list[float] = field(default_factory=list)
    disjoint: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        shares = {"overlap": self.overlap, "overlap_disjoint": self.disjoint}
        return {"pairs": self.pairs, **shares, "values": self.values}


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


def _pairs_table(groups: Sequence[_Size], unsteered: Figures, rows: int) -> Table:
    lines: list[list[Any]] = [
        ["unsteered", "", "", "", *(f"{each.mean.value:.4g}" for each in unsteered.values())]
    ]
    lines += [
        [group.pairs, len(group.overlap), _spread(group.overlap), _spread(group.disjoint)]
        + [_spread(group.values[metric]) for metric in unsteered]
        for group in groups
    ]
    heads = ["pairs", "subsets", "units of all pairs", "units of disjoint subsets", *unsteered]
    note = f"Means (lowest to highest) over subsets; n = {rows} validation rows."
    return Table("Units and effect by the number of pairs", heads, lines, note)


@styled
def _pairs_picture(
    title: str, groups: Sequence[_Size], unsteered: Figures, found: dict[str, Any]
) -> Picture:
    metric, k = found["metric"], found["k"]
    figure, (left, right) = panels((9.5, 3.8), 1, 2)
    agreements = [
        _ranges("with all pairs", {group.pairs: group.overlap for group in groups}, UP),
        _ranges("of two disjoint subsets", {group.pairs: group.disjoint for group in groups}, DOWN),
    ]
    curve(left, agreements, ylabel=f"share of the {k} units that agree", ylim=(-0.03, 1.05))
    left.axhline(k / found["units"], color="black", linestyle=":", label="chance")
    steered = {group.pairs: group.values[metric] for group in groups}
    line = _ranges("steered, range over subsets", steered, UP)
    curve(right, [line], unsteered[metric].mean, ylabel=with_unit(metric))
    sizes = [group.pairs for group in groups]
    for axes in (left, right):
        axes.set(xlabel="pairs", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return Picture(
        title,
        "pairs",
        figure,
        "agreement of the chosen units and the metric over the number of pairs",
        f"Bars: lowest to highest of {found['resamples']} random subsets. Grey: the unsteered "
        f"model's 95 % interval over {found['rows']} validation rows.",
    )


def _ranges(label: str, groups: Mapping[int, Sequence[float]], colour: str) -> Line:
    """Means with the range from the lowest to the highest, of the groups that have something."""
    full = {place: group for place, group in groups.items() if group}
    ranges = [
        Estimate(float(np.mean(group)), min(group), max(group), len(group))
        for group in full.values()
    ]
    return Line(label, list(full), ranges, colour)


def _rows(
    language_model: LanguageModel, task: Asked, asked: options.ValidationRows, seed: int
) -> TaskRows:
    """The validation rows; of the test rows, on which nothing is measured, one."""
    one = options.Rows(data=asked.data, limit=asked.limit, split=asked.split, test_limit=1)
    return rows_of(language_model, task, one, seed)


# -- how many units -------------------------------------------------------------------------------


@flat
@timed
def count(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.ValidationRows = options.ValidationRows(),
    seed: int = 0,
    ks: Sequence[int | Literal["all"]] = COUNTS,
    alpha: float | Sequence[float] = 8.0,
    site: str = "ffn_out",
    direction: Literal["paper", "signed"] = "paper",
    locate: Locate = "momentum",
) -> StudyResult:
    """AUSteer with more and more units, up to all of them (Table 12), at one strength or several;
    all fitted from one pass and measured on the same validation rows. `locate` is how they are
    ranked; by effect units have a direction of their own."""
    alphas = [float(each) for each in ([alpha] if isinstance(alpha, int | float) else alpha)]
    texts = contrast_for(task, contrast, asked)
    total = site_units(language_model, site)
    wanted: list[int | Literal["all"]] = [k for k in ks if k == "all" or k < total]
    wanted += ["all"] if any(k != "all" and k >= total for k in ks) and "all" not in ks else []
    if not wanted or not alphas:
        raise TrimtabError("there is no number of units, or no strength, to try")
    how = located(locate, direction)
    methods = [AUSteer(site=site, k=k, alpha=alphas[0], **how) for k in wanted]
    fitted = fit(methods, language_model, texts, measure=False)
    rows = _rows(language_model, task, asked, seed)
    settings = [
        ({"k": len(steering.tables["unit"]), "alpha": each}, replace(steering, value=each))
        for each in alphas
        for steering in fitted
    ]
    tried = compared(rows, measured(rows, settings))
    unsteered, metric = means(rows.values(None)), rows.first
    title, number = f"AUSteer with more units on {rows.task}", rows.rows("validation")
    notes = [
        *rows.notes(),
        f"{len(tried)} settings were tried on {number} validation rows; p-values are "
        "corrected for their number (Holm)",
        "the largest numbers leave out units that are equal on both sides of every pair",
    ]
    document = {
        "task": rows.task,
        "site": site,
        "locate": locate,
        "units": total,
        "metric": metric,
        "rows": number,
        "unsteered": plain_means(unsteered),
        "counts": [each.as_json() for each in tried],
    }
    values = {"0": value_of(unsteered[metric].mean)}
    for each in tried:  # of each number of units the best strength
        name, mean = str(each.params["k"]), each.figures[metric].mean
        if name not in values or mean.value > float(values[name].value or 0):
            values[name] = value_of(mean)
    return StudyResult(
        document,
        values,
        [settings_table("By the number of units", tried, unsteered, number)],
        [_count_picture(title, rows, tried, alphas, total)],
        notes,
        "count",
        title,
    )


def _counted(times: float) -> Callable[[int, dict[str, Any]], float]:
    """At the number of units, so that bars of several lines are kept apart."""
    return lambda _, params: float(params["k"] * times)


@styled
def _count_picture(
    title: str, rows: TaskRows, tried: Sequence[Tried], alphas: Sequence[float], units: int
) -> Picture:
    unsteered = means(rows.values(None))
    metrics = drawn_metrics(rows, unsteered)
    figure, every = panels((5 * len(metrics) + 0.5, 3.8), 1, len(metrics))
    for axes, metric in zip(every, metrics, strict=True):
        lines = [
            line_of(
                f"α = {alpha:g}",
                [each for each in tried if each.params["alpha"] == alpha],
                metric,
                COLOURS[i % len(COLOURS)],
                _counted(1 + 0.04 * i),
            )
            for i, alpha in enumerate(alphas)
        ]
        labels = {"xlabel": "units that are steered", "ylabel": with_unit(metric)}
        curve(axes, lines, unsteered[metric].mean, xscale="log", **labels)
        axes.axvline(units, color="black", linewidth=0.8, linestyle=":")
    every[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    rows_drawn = rows.rows("validation")
    return Picture(
        title,
        "count",
        figure,
        f"{', '.join(metrics)} over the number of steered units",
        f"95 % intervals over {rows_drawn} validation rows; grey: the unsteered model's. The "
        f"dotted line is all {units:,} units.",
    )
