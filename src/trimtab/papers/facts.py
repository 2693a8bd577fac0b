"""Studies that need few runs or none: sizes of data sets, prompts, what methods change, how
AUSteer comes to its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.contrasts import Contrast, last_message
from trimtab.errors import TrimtabError
from trimtab.evaluation import find_task
from trimtab.fitting import fit
from trimtab.methods import METHODS, AUSteer
from trimtab.model import LanguageModel
from trimtab.papers.result import StudyResult, Value, contrast_of
from trimtab.reports import DOWN, NEUTRAL, UP, Picture, Table, panels, styled
from trimtab.steering import Steering, chosen


def sizes(
    language_model: LanguageModel | None = None, *, tasks: Sequence[str], data: str | None = None
) -> StudyResult:
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
    return StudyResult(document, values, [table])


def prompts(
    language_model: LanguageModel | None = None,
    *,
    tasks: Sequence[str],
    rows: int = 1,
    data: str | None = None,
) -> StudyResult:
    """The prompts of tasks, as the paper's protocol has them; the model has no part."""
    shown = []
    for name in tasks:
        task = find_task(name, data)
        for index, row in enumerate(task.rows("test", "paper", data)[:rows]):
            example = task.example(row, index, "paper")
            shown.append([name, last_message(example.prompt), example.target])
    table = Table("Prompts", ["task", "prompt", "target"], shown)
    document = {"prompts": [{"task": t, "prompt": p, "target": str(a)} for t, p, a in shown]}
    return StudyResult(document, {}, [table])


def footprint(
    language_model: LanguageModel,
    methods: Sequence[Mapping[str, Any]],
    contrast: Contrast | str,
    *,
    data: str | None = None,
) -> StudyResult:
    """How many activations each method changes at a token: blocks of them, or single ones."""
    source = contrast_of(contrast, data)
    made = [METHODS[one["method"]](**one.get("fixed", {})) for one in methods]
    counts, rows = {}, []
    for one, steering in zip(
        methods, fit(made, language_model, source, measure=False), strict=True
    ):
        name = one.get("name", one["method"])
        counts[name] = sum(each.operator.size for each in steering.interventions)
        rows.append([name, len(steering.interventions), counts[name]])
    table = Table("What each method changes", ["method", "sites", "activations per token"], rows)
    values = {name: Value(count) for name, count in counts.items()}
    return StudyResult({"activations": counts}, values, [table], [_footprint_picture(counts)])


@styled
def _footprint_picture(counts: Mapping[str, int]) -> Picture:
    figure, (axes,) = panels((6.5, 1.2 + 0.35 * len(counts)))
    colours = [UP if name.lower().startswith("austeer") else NEUTRAL for name in counts]
    drawn = axes.barh(list(counts), list(counts.values()), color=colours, height=0.6)
    axes.bar_label(drawn, [f"{count:,}" for count in counts.values()], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 6 * max(counts.values()))
    axes.invert_yaxis()
    axes.set(xlabel="activations changed at a token (logarithmic)")
    axes.set_title("Blocks of activations, or single ones")
    return Picture(
        "Activations that are changed at a token",
        "footprint",
        figure,
        "bars of how many activations each method changes, on a logarithmic axis",
    )


def overview(
    language_model: LanguageModel,
    contrast: Contrast | str,
    *,
    site: str = "ffn_out",
    k: int = 16,
    alpha: float = 8.0,
    data: str | None = None,
) -> StudyResult:
    """AUSteer step by step: the k highest scores, their shares, the factors that follow."""
    source = contrast_of(contrast, data)
    steering = AUSteer(site=site, k=k, alpha=alpha, direction="paper").fit(
        language_model, source, measure=False
    )
    units = chosen(steering)["units"]
    if not units:
        raise TrimtabError(f"no unit of {site} tells the two sides apart")
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
    values = {
        "highest score": Value(units[0]["score"]),
        "scaled up": Value(sum(unit["gamma"] > 0 for unit in units)),
        "scaled down": Value(sum(unit["gamma"] < 0 for unit in units)),
    }
    picture = _overview_picture(steering, units)
    return StudyResult({"units": units}, values, [table], [picture])


@styled
def _overview_picture(steering: Steering, units: Sequence[Mapping[str, Any]]) -> Picture:
    figure, (left, right) = panels((10, 3.8), 1, 2, width_ratios=[1.3, 1])
    steering.plot(left)
    gammas = [unit["gamma"] for unit in units]
    colours = [UP if gamma > 0 else DOWN for gamma in gammas]
    right.bar(range(1, len(gammas) + 1), gammas, color=colours, width=0.8)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="rank by score", ylabel="factor γ", title="What each is scaled by: 1 + γ")
    return Picture(
        "Where the units are, and what is done to them",
        "overview",
        figure,
        "left: the chosen units by layer and place; right: the factor of each by rank",
    )
