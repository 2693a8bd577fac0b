"""A comparison as a page: what each method is worth, what it changes and costs, and between which
two there is a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from trimtab.figures import Difference, Estimate
from trimtab.reports import (
    COLOURS,
    STYLE,
    Picture,
    SharedRun,
    Table,
    cell,
    evaluation_tables,
    interval,
    model_line,
    page,
    plot_effects,
    save_figure,
)
from trimtab.sweeps.comparison import Compared, Comparison
from trimtab.sweeps.metering import Used
from trimtab.sweeps.space import setting

#: A difference is called one where chance alone makes it with less than this probability.
_LEVEL = 0.05
_MARKERS = "os^vDPX*"


def comparison_page(found: Comparison, run: SharedRun, environment: dict[str, Any]) -> str:
    """The page of a comparison; its pictures are also saved beside it."""
    pictures = comparison_pictures(found)
    if run.path is not None:
        (run.path / "pictures").mkdir(exist_ok=True)
        for picture in pictures:
            save_figure(picture.figure, run.path / "pictures", picture.name)
    more = [] if found.capability is None else evaluation_tables(found.capability)
    return page(
        f"{len(found.rows)} methods on {found.task}",
        f"{found.model['name']}; {model_line(run.config['model'])}; {found.seconds:g} seconds",
        [
            worth(found),
            *pictures,
            effects(found),
            *_budget(found),
            _between(found),
            spent(found),
            *more,
        ],
        run.config,
        environment,
        notes=found.notes,
    )


def worth(found: Comparison) -> Table:
    """Each method at the setting that was chosen on validation."""
    base = found.unsteered
    rows: list[list[Any]] = [
        ["unsteered", "", "", _result(base["validation"]), _result(base["test"]), "", "", ""]
    ]
    for row in found.rows:
        best = None if row.sweep is None else row.sweep.best
        if best is None:
            rows.append([row.name, row.why, _trials(row), "", "", "", "", ""])
            continue
        validation = cell(best.value, best.ci95)
        rows.append(
            [
                row.name,
                setting(best.params),
                _trials(row),
                validation,
                _result(row.test),
                *_cells(row.against),
            ]
        )
    return Table(
        f"{found.metric} on {found.task}",
        [
            "method",
            "setting, chosen on validation",
            "trials",
            f"validation, n = {base['validation'].n}",
            f"test, n = {base['test'].n}",
            "against unsteered",
            "p",
            "p, corrected",
        ],
        rows,
        f"p: McNemar's exact test, or Wilcoxon's where values are not right or wrong; "
        f"corrected for {sum(row.against is not None for row in found.rows)} methods (Holm).",
    )


def effects(found: Comparison) -> Table:
    """What each steering changes and costs."""
    rows: list[list[Any]] = [["unsteered", "", "", "", f"{found.perplexity:.2f}", "1"]]
    rows += [
        [
            row.name,
            _number(row.dial),
            "" if row.changed is None else f"{row.changed:,}",
            _signed(row.cost),
            _number(row.perplexity, ".2f"),
            "" if row.overhead is None else f"{row.overhead.ratio:.3f}",
        ]
        for row in found.rows
    ]
    heads = [
        "method",
        "dial",
        "activations changed at a token",
        "cost on plain text, nats per token",
        "perplexity of plain text",
        "time to generate, times unsteered",
    ]
    return Table("Side effects", heads, rows)


def spent(found: Comparison) -> Table:
    """Wall time, tokens and memory of preparation and of inference."""
    rows: list[list[Any]] = [["one pass over the contrast, for all", *_used(found.fit), "", ""]]
    for row in found.rows:
        over = row.overhead
        inference = ["", ""]
        if over is not None:
            memory = "" if over.peak_bytes is None else f"{over.peak_bytes / 2**20:+.0f}"
            inference = [f"{1000 * over.steered:.2f} ({1000 * over.unsteered:.2f})", memory]
        rows.append([f"sweep of {row.name}", *_used(row.swept), *inference])
    heads = [
        "",
        "seconds",
        "tokens read",
        "peak memory, MiB",
        "ms per generated token (unsteered)",
        "memory beside unsteered, MiB",
    ]
    return Table(
        "What it took",
        heads,
        rows,
        "Memory is above what was in use before. Sweeps share what the blocks below steerings "
        "computed, so that the first pays for the others.",
    )


def comparison_pictures(found: Comparison) -> list[Picture]:
    """Differences with their intervals, and gain against cost."""
    against = {row.name: row.against for row in found.rows if row.against is not None}
    gains = {name: Estimate(one.difference, *one.ci95, one.n) for name, one in against.items()}
    clear = [name for name, one in against.items() if (one.corrected_p or 0.0) < _LEVEL]
    if not gains:
        return []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 1.2 + 0.42 * len(gains)), layout="constrained")
        n = next(iter(gains.values())).n
        label = f"{found.metric}, steered minus unsteered"
        plot_effects(figure.subplots(), gains, f"{label} (n = {n}, 95 % intervals)", clear)
        pictures = [
            Picture(
                "Against the unsteered model",
                "differences",
                figure,
                f"{label}, with 95 % intervals, for {', '.join(gains)}",
                f"Coloured where the corrected p is below {_LEVEL:g}.",
            ),
            _plane(found),
        ]
    return pictures


def _plane(found: Comparison) -> Picture:
    """Gain against cost, as chosen and at the budget."""
    groups: list[tuple[str, Sequence[Compared]]] = [("as chosen", found.rows)]
    if found.kl is not None:
        groups.append((f"at {found.kl:g} nats of KL", found.at_budget))
    figure = Figure(figsize=(4.6 * len(groups) + 1.6, 3.8), layout="constrained")
    every = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (title, rows) in zip(every, groups, strict=True):
        for i, row in enumerate(found.rows):
            mine = next((one for one in rows if one.name == row.name), None)
            if mine is None or mine.against is None or mine.cost is None:
                continue
            gain = mine.against
            axes.errorbar(
                mine.cost,
                gain.difference,
                yerr=[[gain.difference - gain.ci95[0]], [gain.ci95[1] - gain.difference]],
                color=COLOURS[i % len(COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle="none",
                capsize=2,
                label=row.name,
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="cost on plain text, nats per token")
    every[0].set_ylabel(f"{found.metric}, steered minus unsteered")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return Picture(
        "Gain and cost",
        "gain-and-cost",
        figure,
        f"gain in {found.metric} against cost on plain text for each method",
    )


def _budget(found: Comparison) -> list[Table]:
    if found.kl is None:
        return []
    rows = [
        [
            row.name,
            _number(row.dial),
            _result(row.test),
            *_cells(row.against),
            _signed(row.cost),
            row.why,
        ]
        for row in found.at_budget
    ]
    heads = ["method", "dial", "test", "against unsteered", "p", "p, corrected", "cost", "to know"]
    return [
        Table(
            f"At an equal budget: {found.kl:g} nats at the next token",
            heads,
            rows,
            "The median over validation prompts of KL(unsteered ‖ steered) is the budget.",
        )
    ]


def _between(found: Comparison) -> Table:
    rows = [
        [f"{first} minus {second}", *_cells(difference)]
        for (first, second), difference in found.between.items()
    ]
    return Table(
        "Between methods, on the test rows",
        ["", "difference", "p", "p, corrected"],
        rows,
        f"Corrected for {len(rows)} pairs (Holm).",
    )


def _cells(found: Difference | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    value = f"{found.difference:+.4g} {interval(found.ci95)}"
    return [value, f"{found.p:.2g}", f"{found.corrected_p:.2g}"]


def _result(result: Any) -> str:
    return "" if result is None else cell(result.value, result.ci95)


def _trials(row: Compared) -> Any:
    return "" if row.sweep is None else len(row.sweep.trials)


def _used(used: Used | None) -> list[str]:
    if used is None:
        return ["", "", ""]
    memory = "" if used.peak_bytes is None else f"{used.peak_bytes / 2**20:.0f}"
    return [f"{used.seconds:.1f}", f"{used.tokens:,}", memory]


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
