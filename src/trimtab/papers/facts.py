"""Studies that need few runs or none: sizes of data sets, prompts, what methods change, how
AUSteer comes to its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from trimtab.contrasts import last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import find_task
from trimtab.fitting import fit
from trimtab.methods import METHODS, AUSteer
from trimtab.papers.found import Found, Value, contrast_of
from trimtab.reports import DOWN, NEUTRAL, STYLE, UP, Picture, Table, plot_units
from trimtab.steering import chosen


def sizes(language_model: Any = None, *, tasks: Sequence[str], data: str | None = None) -> Found:
    """How many contrastive pairs and test rows each task has here; the model has no part."""
    values, rows = {}, []
    for name in tasks:
        task = find_task(name, data)
        pairs = 0
        if task.train is not None and task.pairs is not None:
            pairs = len(task.rows("train", "paper", data))
        tested = len(task.rows("test", "paper", data))
        values[name] = Value(f"{pairs} / {tested}")
        rows.append([name, pairs, tested])
    table = Table("Rows of the data sets here", ["task", "contrastive pairs", "test rows"], rows)
    document = {"tasks": [{"task": name, "pairs": p, "test": t} for name, p, t in rows]}
    return Found(document, values, [table])


def prompts(
    language_model: Any = None, *, tasks: Sequence[str], rows: int = 1, data: str | None = None
) -> Found:
    """The prompts of tasks, as the paper's protocol has them; the model has no part."""
    shown = []
    for name in tasks:
        task = find_task(name, data)
        for index, row in enumerate(task.rows("test", "paper", data)[:rows]):
            example = task.example(row, index, "paper")
            shown.append([name, last_message(example.prompt), example.target])
    table = Table("Prompts", ["task", "prompt", "target"], shown)
    document = {"prompts": [{"task": t, "prompt": p, "target": str(a)} for t, p, a in shown]}
    return Found(document, {}, [table])


def footprint(
    language_model: Any,
    methods: Sequence[Mapping[str, Any]],
    contrast: str,
    *,
    data: str | None = None,
) -> Found:
    """How many activations each method changes at a token: blocks of them, or single ones."""
    source = contrast_of(contrast, data)
    made = [METHODS[one["method"]](**one.get("fixed", {})) for one in methods]
    counts, rows = {}, []
    for one, steering in zip(methods, fit(made, language_model, source), strict=True):
        name = one.get("name", one["method"])
        counts[name] = sum(each.operator.size for each in steering.interventions)
        rows.append([name, len(steering.interventions), counts[name]])
    with matplotlib.rc_context(STYLE):
        drawn = _bars(counts)
    picture = Picture(
        "Activations that are changed at a token", "footprint", drawn,
        "bars of how many activations each method changes, on a logarithmic axis",
    )  # fmt: skip
    table = Table("What each method changes", ["method", "sites", "activations per token"], rows)
    values = {name: Value(count) for name, count in counts.items()}
    return Found({"activations": counts}, values, [table], [picture])


def _bars(counts: Mapping[str, int]) -> Figure:
    figure = Figure(figsize=(6.5, 1.2 + 0.35 * len(counts)), layout="constrained")
    axes: Any = figure.subplots()
    names = list(counts)
    colours = [UP if name.lower().startswith("austeer") else NEUTRAL for name in names]
    drawn = axes.barh(names, [counts[name] for name in names], color=colours, height=0.6)
    axes.bar_label(drawn, [f"{counts[name]:,}" for name in names], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 6 * max(counts.values()))
    axes.invert_yaxis()
    axes.set(xlabel="activations changed at a token (logarithmic)")
    axes.set_title("Blocks of activations, or single ones")
    return figure


def overview(
    language_model: Any,
    contrast: str,
    *,
    site: str = "ffn_out",
    k: int = 16,
    alpha: float = 8.0,
    data: str | None = None,
) -> Found:
    """AUSteer step by step: the k highest scores, their shares, the factors that follow."""
    source = contrast_of(contrast, data)
    steering = AUSteer(site=site, k=k, alpha=alpha).fit(language_model, source)
    units = chosen(steering)["units"]
    if not units:
        raise TrimtabError(f"no unit of {site} tells the two sides apart")
    width = int(language_model.anatomy.width(units[0]["site"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
        plot_units(left, steering, language_model.anatomy.layers, width)
        _factors(right, units)
    rows = [
        [unit["site"], unit["unit"], *(f"{unit[key]:.3f}" for key in ("r_pos", "r_neg", "score")),
         f"{unit['gamma']:+.2f}"]
        for unit in units
    ]  # fmt: skip
    table = Table(
        "1. shares of pairs in which a unit is higher on each side; 2. score; 3. factor",
        ["site", "unit", "r_pos", "r_neg", "score s", "γ at the dial"],
        rows[:50],
        f"α = {alpha:g}; the activation becomes (1 + γ) times what it was.",
    )
    picture = Picture(
        "Where the units are, and what is done to them", "overview", figure,
        "left: the chosen units by layer and place; right: the factor of each by rank",
    )  # fmt: skip
    values = {
        "highest score": Value(units[0]["score"]),
        "scaled up": Value(sum(unit["gamma"] > 0 for unit in units)),
        "scaled down": Value(sum(unit["gamma"] < 0 for unit in units)),
    }
    return Found({"units": units}, values, [table], [picture])


def _factors(axes: Any, units: Sequence[Mapping[str, Any]]) -> None:
    gammas = [unit["gamma"] for unit in units]
    places = range(1, len(gammas) + 1)
    axes.bar(places, gammas, color=[UP if gamma > 0 else DOWN for gamma in gammas], width=0.8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="rank by score", ylabel="factor γ", title="What each is scaled by: 1 + γ")
