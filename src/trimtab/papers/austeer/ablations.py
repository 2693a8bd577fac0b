"""What each part of AUSteer is worth (AUSteer, Table 3), and how its two numbers play together
(Figure 10)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from trimtab import options
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.figures import holm
from trimtab.fitting import fit
from trimtab.methods import AUSTEER_GRID, AUSteer
from trimtab.model import LanguageModel
from trimtab.options import flat
from trimtab.papers import measure
from trimtab.papers.measure import Rows, Values, chosen, compare, figure
from trimtab.papers.result import Analysis
from trimtab.papers.settings import base_figures, figure_cell, measured, named
from trimtab.reports import NEUTRAL, STYLE, UP, Picture, Table, interval
from trimtab.sweeps import contrast_for, setting

#: Table 3's rows, by the options of AUSteer that make them.
VARIANTS: dict[str, dict[str, Any]] = {
    "AUSteer": {},
    "random localisation": {"locate": "random"},
    "mean difference localisation": {"locate": "difference"},
    "fixed vector": {"change": "vector"},
    "fixed strength": {"strength": "fixed"},
}


@flat
def ablations(
    language_model: LanguageModel,
    task: str,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    site: str = "ffn_out",
    ks: Sequence[int] = (16, 64),
    alphas: Sequence[float] = (1.0, 4.0, 8.0, 16.0, 32.0),
    seeds: int = 5,
) -> Analysis:
    """AUSteer with one part replaced at a time (Table 3), all fitted from one pass.

    Every variant has its own k and alpha, chosen among the same ones on the validation rows, and
    its figure from the test rows, with the paired difference to AUSteer in full. Random
    localisation is drawn `seeds` times (from `seed` on), and each draw chooses for itself; its
    figure is the mean over draws.
    """
    started = time.perf_counter()
    if seeds < 1 or not ks or not alphas:
        raise TrimtabError("ablations take at least one k, one alpha and one random draw")
    texts = contrast_for(task, contrast, asked.data)
    draws: list[tuple[str, dict[str, Any]]] = []
    for name, changed in VARIANTS.items():
        random = changed.get("locate") == "random"
        drawn = [{"seed": seed + i} for i in range(seeds)] if random else [{}]
        draws += [(name, {**changed, **more}) for more in drawn]
    methods = [
        AUSteer(site=site, k=k, alpha=float(alphas[0]), **changed)
        for _, changed in draws
        for k in ks
    ]
    fitted = iter(fit(methods, language_model, texts))
    rows = Rows(language_model, task, asked, seed=seed)
    found_values: dict[str, list[Values]] = {name: [] for name in VARIANTS}
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for name, changed in draws:
        tried = []
        for k in ks:
            steering = next(fitted)
            tried += [
                ({"k": k, "alpha": float(alpha)}, replace(steering, value=float(alpha)))
                for alpha in alphas
            ]
        settings = measured(rows, tried)
        best = chosen(rows, settings)
        values = rows.values(best.steering, "test")
        found_values[name].append(values)
        entries[name].append(
            {
                "params": best.params,
                **({"seed": changed["seed"]} if "seed" in changed else {}),
                "validation": {m: measure.plain(best.figure(m)) for m in best.values},
                "test": {m: measure.plain(figure(m, each)) for m, each in values.items()},
            }
        )
    results = _results(rows, entries, found_values)
    found = {
        "task": task,
        "site": site,
        "metric": rows.metric,
        "rows": rows.count(),
        "test_rows": rows.count("test"),
        "settings": {"k": list(ks), "alpha": [float(alpha) for alpha in alphas]},
        "unsteered": base_figures(rows),
        "unsteered_test": base_figures(rows, "test"),
        "variants": results,
    }
    title = f"Ablations of AUSteer at {site} on {task}"
    notes = [
        *rows.notes(),
        f"every variant chose among the same {len(ks) * len(alphas)} settings on {rows.count()} "
        "validation rows; where no setting helps, what is chosen is the least harmful",
        f"p-values are corrected for the {len(results) - 1} comparisons with AUSteer (Holm)",
        "alpha means something else to the fixed vector (a multiple of the mean difference) than "
        "to those that scale",
    ]
    return Analysis(
        "ablations",
        title,
        found,
        [_table(found)],
        [_picture(title, found)],
        notes,
        round(time.perf_counter() - started, 2),
    )


def _results(
    rows: Rows,
    entries: dict[str, list[dict[str, Any]]],
    values: dict[str, list[Values]],
) -> list[dict[str, Any]]:
    """Of each variant the figures on the test rows, against AUSteer and against no steering."""
    before = rows.unsteered("test")
    means = {name: _mean(each) for name, each in values.items()}
    full = means["AUSteer"]
    results = []
    for name, each in entries.items():
        own = means[name]
        results.append(
            {
                "name": name,
                "draws": each,
                "test": {m: measure.plain(figure(m, own[m])) for m in own},
                "against_unsteered": {m: measure.plain(compare(before[m], own[m])) for m in own},
                "against_austeer": None
                if name == "AUSteer"
                else {m: measure.plain(compare(full[m], own[m])) for m in own},
            }
        )
    for metric in full:
        against: list[Any] = [result["against_austeer"] for result in results]
        changes = [each[metric] for each in against if each is not None]
        for change, p in zip(changes, holm([change["p"] for change in changes]), strict=True):
            change["p_corrected"] = p
    return results


def _mean(values: Sequence[Values]) -> dict[str, torch.Tensor]:
    """Row by row the mean over draws."""
    return {metric: torch.stack([each[metric] for each in values]).mean(0) for metric in values[0]}


def _table(found: dict[str, Any]) -> Table:
    metric = found["metric"]
    lines = [["unsteered", "", figure_cell(found["unsteered_test"][metric]), "", ""]]
    for entry in found["variants"]:
        params = {tuple(each["params"].items()) for each in entry["draws"]}
        settings = "; ".join(setting(dict(each)) for each in sorted(params))
        change = None if entry["against_austeer"] is None else entry["against_austeer"][metric]
        lines.append(
            [
                entry["name"]
                + (f", {len(entry['draws'])} draws" if len(entry["draws"]) > 1 else ""),
                settings,
                figure_cell(entry["test"][metric]),
                "" if change is None else f"{change['difference']:+.4g} {interval(change['ci95'])}",
                "" if change is None else _flips(change),
            ]
        )
    heads = [
        "variant",
        "chosen on validation",
        f"{metric} on test, n = {found['test_rows']}",
        "difference to AUSteer",
        "flips",
    ]
    return Table(f"{metric} on {found['task']}", heads, lines, "p corrected for their number.")


def _flips(change: dict[str, Any]) -> str:
    flips = "" if change["gained"] is None else f"+{change['gained']} -{change['lost']} "
    return f"{flips}(p {change['p_corrected']:.2g})"


def _picture(title: str, found: dict[str, Any]) -> Picture:
    """Each variant's figure on the test rows; of random ones each draw too."""
    metrics = list(dict.fromkeys([found["metric"], *found["unsteered_test"]]))
    metrics = [m for m in metrics if m in (found["metric"], "accuracy", measure.FINE)]
    variants = found["variants"]
    with matplotlib.rc_context(STYLE):
        figure_drawn = Figure(figsize=(4.8 * len(metrics) + 0.6, 3.2), layout="constrained")
        panels: Any = figure_drawn.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            each = [entry["test"][metric] for entry in variants]
            middle = np.array([one["value"] for one in each])
            ends = np.array([(one["low"], one["high"]) for one in each])
            axes.errorbar(
                middle,
                range(len(variants)),
                xerr=np.clip([middle - ends[:, 0], ends[:, 1] - middle], 0, None),
                fmt="o",
                color=UP,
                markersize=5,
                capsize=3,
            )
            for place, entry in enumerate(variants):
                if len(entry["draws"]) > 1:
                    points = [draw["test"][metric]["value"] for draw in entry["draws"]]
                    at = [place + 0.22] * len(points)
                    axes.plot(points, at, "|", color=NEUTRAL, markersize=7, label="each draw")
            base = found["unsteered_test"][metric]
            axes.axvline(base["value"], color="black", linestyle="--", label="unsteered")
            axes.axvspan(base["low"], base["high"], color=NEUTRAL, alpha=0.15, linewidth=0)
            axes.set(xlabel=f"{named(metric)}, {found['test_rows']} test rows")
        panels[0].set_yticks(range(len(variants)), [entry["name"] for entry in variants])
        panels[0].invert_yaxis()
        panels[-1].legend(
            frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2
        )
        figure_drawn.suptitle(title, x=0.02, ha="left")
    return Picture(
        title,
        "ablations",
        figure_drawn,
        "the metric on the test rows with each part of AUSteer replaced",
        "95 % intervals; grey: the unsteered model's. Settings were chosen on the validation rows.",
    )


# -- k and alpha ----------------------------------------------------------------------------------


@flat
def heatmap(
    language_model: LanguageModel,
    task: str,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    ks: Sequence[int] = AUSTEER_GRID,
    alphas: Sequence[float] = AUSTEER_GRID,
    site: str = "ffn_out",
    close: float | None = None,
) -> Analysis:
    """AUSteer over a grid of k and alpha on the validation rows (Figure 10), and the setting that
    is best there on the test rows. `close` is how near to the best a setting must come to count as
    robust (default: the paper's 1.5 points; of a metric in nats a tenth of a nat)."""
    # A sweep needs Optuna, which other analyses do not.
    from trimtab.sweeps import sweep, sweep_pictures

    started = time.perf_counter()
    found = sweep(
        language_model,
        "austeer",
        task,
        {"k": tuple(ks), "alpha": tuple(map(float, alphas))},
        fixed={"site": site},
        contrast=contrast,
        rows=asked,
        oracle=False,
        seed=seed,
    )
    if close is None:
        close = 0.1 if found.metric == measure.FINE else 0.015
    sign = 1 if found.maximise else -1
    values = [trial.value for trial in found.trials if trial.value is not None]
    base = found.unsteered["validation"].value or 0.0
    near = better = 0
    if found.best is not None and found.best.value is not None:
        near = sum(sign * (found.best.value - value) <= close + 1e-12 for value in values)
        better = sum(sign * (value - base) > 0 for value in values)
    robust = {
        "settings": len(values),
        "close": close,
        "within_close_of_best": near,
        "better_than_unsteered": better,
    }
    best = found.best
    rows: list[list[Any]] = [
        ["unsteered", *(_result(found.unsteered[part]) for part in ("validation", "test"))]
    ]
    if best is not None:
        chosen_name = f"k={best.params['k']} alpha={best.params['alpha']:g}"
        rows.append(
            [
                f"chosen: {chosen_name}",
                f"{best.value:.4g} {interval(best.ci95)}",
                f"{best.test:.4g} {interval(best.test_ci95)}",
            ]
        )
    heads = ["setting", *(f"{part}, n = {found.unsteered[part].n}" for part in _PARTS)]
    notes = [
        *found.notes,
        f"{near} of {len(values)} settings lie within {close:g} of the best one on the validation "
        f"rows, and {better} are better than the unsteered model; with n = "
        f"{found.unsteered['validation'].n} a difference of that size cannot be told from luck",
    ]
    return Analysis(
        "heatmap",
        f"AUSteer at {site} on {task}: k × alpha",
        {**found.as_json(), "site": site, "robustness": robust},
        [Table(f"{found.metric} on {task}", heads, rows)],
        [picture for picture in sweep_pictures(found) if picture.name in ("heatmap", "line")],
        notes,
        round(time.perf_counter() - started, 2),
    )


_PARTS = ("validation", "test")


def _result(result: Any) -> str:
    return f"{result.value:.4g} {interval(result.ci95)}"
