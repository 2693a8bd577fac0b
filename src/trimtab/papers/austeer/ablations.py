"""What each part of AUSteer is worth (AUSteer, Table 3) beside units by effect, and how its two
numbers play together (Figure 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trimtab import options
from trimtab.contrasts import Contrast
from trimtab.errors import TrimtabError
from trimtab.evaluation import Asked
from trimtab.figures import Difference, corrected, more_is_better, on_task, with_unit
from trimtab.fitting import fit
from trimtab.methods import AUSTEER_GRID, AUSteer
from trimtab.model import LanguageModel
from trimtab.options import flat
from trimtab.papers.austeer.ranking import Locate, located
from trimtab.papers.result import StudyResult, Value, timed, value_of
from trimtab.papers.settings import (
    Figures,
    Tried,
    best_of,
    drawn_metrics,
    means,
    measured,
    plain_means,
    rows_of,
)
from trimtab.reports import (
    NEUTRAL,
    Line,
    Picture,
    Table,
    cell,
    difference_cell,
    forest,
    panels,
    styled,
    tested_cell,
)
from trimtab.sweeps import (
    FINE,
    TaskRows,
    Values,
    contrast_for,
    difference_of,
    setting,
    sweep,
    sweep_pictures,
)

#: Table 3's rows, by the options of AUSteer that make them; and ours, units by effect, which have a
#: sign of their own.
VARIANTS: dict[str, dict[str, Any]] = {
    "AUSteer": {},
    "random localisation": {"locate": "random"},
    "mean difference localisation": {"locate": "difference"},
    "fixed vector": {"change": "vector"},
    "fixed strength": {"strength": "fixed"},
    "effect localisation": {"locate": "effect", "direction": None},
    "effect per nat localisation": {"locate": "effect_per_nat", "direction": None},
}


@dataclass
class Variant:
    """One of Table 3's rows: what each of its draws chose and gives on the test rows."""

    name: str
    seeds: list[int | None] = field(default_factory=list)
    chosen: list[Tried] = field(default_factory=list)
    draws: list[Values] = field(default_factory=list)
    against_austeer: dict[str, Difference] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """Row by row the mean over draws."""
        return {m: torch.stack([each[m] for each in self.draws]).mean(0) for m in self.draws[0]}

    @property
    def test(self) -> Figures:
        return means(self.values)

    def as_json(self, unsteered: Values) -> dict[str, Any]:
        draws = [
            {
                "params": best.params,
                **({} if seed is None else {"seed": seed}),
                "validation": plain_means(best.figures),
                "test": plain_means(means(values)),
            }
            for seed, best, values in zip(self.seeds, self.chosen, self.draws, strict=True)
        ]
        before = {
            m: difference_of(unsteered[m], each, more=more_is_better(m))
            for m, each in self.values.items()
        }
        return {
            "name": self.name,
            "draws": draws,
            "test": plain_means(self.test),
            "against_unsteered": {m: change.as_json() for m, change in before.items()},
            "against_austeer": {m: change.as_json() for m, change in self.against_austeer.items()}
            or None,
        }


@flat
@timed
def ablations(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    site: str = "ffn_out",
    ks: Sequence[int] = (16, 64),
    alphas: Sequence[float] = (1.0, 4.0, 8.0, 16.0, 32.0),
    seeds: int = 5,
) -> StudyResult:
    """AUSteer with one part replaced at a time (Table 3), and with units chosen by effect, all
    fitted from one pass.

    Every variant has its own k and alpha, chosen among the same ones on the validation rows, and
    its figure from the test rows, with the paired difference to AUSteer in full. Random
    localisation is drawn `seeds` times (from `seed` on), and each draw chooses for itself; its
    figure is the mean over draws.
    """
    if seeds < 1 or not ks or not alphas:
        raise TrimtabError("ablations take at least one k, one alpha and one random draw")
    texts = contrast_for(task, contrast, asked)
    draws: list[tuple[str, dict[str, Any]]] = []
    for name, changed in VARIANTS.items():
        random = changed.get("locate") == "random"
        drawn = [{"seed": seed + i} for i in range(seeds)] if random else [{}]
        draws += [(name, {**changed, **more}) for more in drawn]
    methods = [
        AUSteer(site=site, k=k, alpha=float(alphas[0]), **{"direction": "paper", **changed})
        for _, changed in draws
        for k in ks
    ]
    fitted = iter(fit(methods, language_model, texts, measure=False))
    rows = rows_of(language_model, task, asked, seed)
    variants = {name: Variant(name) for name in VARIANTS}
    for name, changed in draws:
        steerings = {k: next(fitted) for k in ks}
        settings = [
            ({"k": k, "alpha": float(alpha)}, replace(steering, value=float(alpha)))
            for k, steering in steerings.items()
            for alpha in alphas
        ]
        best = best_of(rows, measured(rows, settings))
        variants[name].seeds.append(changed.get("seed"))
        variants[name].chosen.append(best)
        variants[name].draws.append(rows.values(best.steering, "test"))
    found = list(variants.values())
    _compare(found)
    unsteered, metric = means(rows.values(None, "test")), rows.first
    title = f"Ablations of AUSteer at {site} on {rows.task}"
    count = rows.rows("validation")
    notes = [
        *rows.notes(),
        f"every variant chose among the same {len(ks) * len(alphas)} settings on {count} "
        "validation rows; where no setting helps, what is chosen is the least harmful",
        f"p-values are corrected for the {len(found) - 1} comparisons with AUSteer (Holm)",
        "alpha means something else to the fixed vector (a multiple of the mean difference) than "
        "to those that scale",
    ]
    document = {
        "task": rows.task,
        "site": site,
        "metric": metric,
        "rows": count,
        "test_rows": rows.rows("test"),
        "settings": {"k": list(ks), "alpha": [float(alpha) for alpha in alphas]},
        "unsteered": plain_means(means(rows.values(None))),
        "unsteered_test": plain_means(unsteered),
        "variants": [one.as_json(rows.values(None, "test")) for one in found],
    }
    values = {"unsteered": value_of(unsteered[metric].mean)}
    return StudyResult(
        document,
        values | {one.name: value_of(one.test[metric].mean) for one in found},
        [_table(rows, found, unsteered)],
        [_picture(title, rows, found, unsteered)],
        notes,
        "ablations",
        title,
    )


def _compare(variants: Sequence[Variant]) -> None:
    """Each against AUSteer in full, the first of them."""
    full, *others = variants
    for metric, before in full.values.items():
        more = more_is_better(metric)
        changes = [difference_of(before, one.values[metric], more=more) for one in others]
        for one, change in zip(others, corrected(changes), strict=True):
            one.against_austeer[metric] = change


def _table(rows: TaskRows, variants: Sequence[Variant], unsteered: Figures) -> Table:
    metric = rows.first
    lines = [["unsteered", "", cell(unsteered[metric].mean, metric), "", ""]]
    for one in variants:
        params = {tuple(best.params.items()) for best in one.chosen}
        change = one.against_austeer.get(metric)
        lines.append(
            [
                one.name + (f", {len(one.draws)} draws" if len(one.draws) > 1 else ""),
                "; ".join(setting(dict(each)) for each in sorted(params)),
                cell(one.test[metric].mean, metric),
                difference_cell(change, metric),
                tested_cell(change),
            ]
        )
    heads = [
        "variant",
        "chosen on validation",
        f"{metric} on test, n = {rows.rows('test')}",
        "difference to AUSteer",
        "flips",
    ]
    return Table(on_task(metric, rows.task), heads, lines, "p corrected for their number.")


@styled
def _picture(
    title: str, rows: TaskRows, variants: Sequence[Variant], unsteered: Figures
) -> Picture:
    """Each variant's figure on the test rows; of random ones each draw too."""
    metrics, names = drawn_metrics(rows, unsteered), [one.name for one in variants]
    figure, every = panels((4.8 * len(metrics) + 0.6, 3.2), 1, len(metrics), sharey=True)
    for axes, metric in zip(every, metrics, strict=True):
        line = Line("", range(len(names)), [one.test[metric].mean for one in variants])
        label = f"{with_unit(metric)}, {rows.rows('test')} test rows"
        forest(axes, names, [line], unsteered[metric].mean, xlabel=label)
        for place, one in enumerate(variants):
            if len(one.draws) > 1:
                points = [means(values)[metric].mean.value for values in one.draws]
                at = [place + 0.22] * len(points)
                axes.plot(points, at, "|", color=NEUTRAL, markersize=7, label="each draw")
    every[-1].legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.suptitle(title, x=0.02, ha="left")
    return Picture(
        title,
        "ablations",
        figure,
        "the metric on the test rows with each part of AUSteer replaced",
        "95 % intervals; grey: the unsteered model's. Settings were chosen on the validation rows.",
    )


# -- k and alpha ----------------------------------------------------------------------------------


@flat
@timed
def heatmap(
    language_model: LanguageModel,
    task: Asked,
    *,
    contrast: Contrast | str | None = None,
    asked: options.Rows = options.Rows(),
    seed: int = 0,
    ks: Sequence[int] = AUSTEER_GRID,
    alphas: Sequence[float] = AUSTEER_GRID,
    site: str = "ffn_out",
    locate: Locate = "momentum",
    close: float | None = None,
) -> StudyResult:
    """AUSteer over a grid of k and alpha on the validation rows (Figure 10), and the setting that
    is best there on the test rows. `locate` is how units are ranked, `close` how near to the best a
    setting must come to count as robust (default: the paper's 1.5 points; of a metric in nats a
    tenth of a nat)."""
    found = sweep(
        language_model,
        "austeer",
        task,
        {"k": tuple(ks), "alpha": tuple(map(float, alphas))},
        fixed={"site": site, **located(locate)},
        contrast=contrast,
        max_cost=None,
        rows=asked,
        oracle=False,
        baselines=False,
        seed=seed,
    )
    if close is None:
        close = 0.1 if found.metric == FINE else 0.015
    sign = 1 if found.maximise else -1
    scores = [trial.value for trial in found.trials if trial.value is not None]
    base, best = found.unsteered["validation"].value or 0.0, found.best
    near = better = 0
    if best is not None and best.value is not None:
        near = sum(sign * (best.value - score) <= close + 1e-12 for score in scores)
        better = sum(sign * (score - base) > 0 for score in scores)
    robust = {
        "settings": len(scores),
        "close": close,
        "within_close_of_best": near,
        "better_than_unsteered": better,
    }
    notes = [
        *found.notes,
        f"{near} of {len(scores)} settings lie within {close:g} of the best one on the validation "
        f"rows, and {better} are better than the unsteered model; with n = "
        f"{found.unsteered['validation'].n} a difference of that size cannot be told from luck",
    ]
    values = {"unsteered": value_of(found.unsteered["test"])}
    if best is not None:
        values["chosen"] = Value(best.test, best.test_ci95, best.test_n, True)
        values |= {name: Value(value) for name, value in best.params.items()}
    return StudyResult(
        {**found.as_json(), "site": site, "locate": locate, "robustness": robust},
        values,
        found.tables()[:1],
        [picture for picture in sweep_pictures(found) if picture.name in ("heatmap", "line")],
        notes,
        "heatmap",
        f"AUSteer at {site} on {found.task}: k × alpha",
    )
