"""What a comparison found: a row for each method, and the differences between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trimtab.evaluation import Drift, Sample, samples_table
from trimtab.figures import Difference, Result, on_task, words_for
from trimtab.reports import (
    Evaluation,
    Presented,
    Table,
    axes_for,
    cell,
    change_words,
    difference_cell,
    number_cell,
    number_text,
)
from trimtab.sweeps.asked_tables import (
    at_own_kl,
    difference_json,
    prompt_row_json,
    prompt_tables,
    prompts_as_json,
)
from trimtab.sweeps.baselines import Prompts, Row
from trimtab.sweeps.metering import Overhead, Used
from trimtab.sweeps.result import Sweep
from trimtab.sweeps.space import setting


@dataclass(frozen=True)
class Compared:
    """One method's row.

    `against` compares it with the unsteered model. `changed` is how many activations it changes at
    a token; `cost` what it adds to the cross-entropy of plain text, in nats per token, `perplexity`
    that of the steered model there; `fit` and `sweep` what they took, `overhead` generation beside
    the unsteered model. At a budget `axis_kl` is what is changed on the budget's axis. `why` says
    why there is nothing, where there is not.
    """

    name: str
    sweep: Sweep | None
    test: Result | None = None
    against: Difference | None = None
    dial: float | None = None
    changed: int | None = None
    cost: float | None = None
    perplexity: float | None = None
    overhead: Overhead | None = None
    swept: Used | None = None
    axis_kl: float | None = None
    why: str = ""


@dataclass(frozen=True)
class AtBudget:
    """Methods at the dials that change the next token by `kl` nats, and beside them `prompts`, what
    is said before prompts, with a steering or without, as they are: a prompt has no dial to
    turn."""

    kl: float
    methods: tuple[Compared, ...]
    prompts: tuple[Row, ...] = ()

    def within(self, row: Row) -> bool | None:
        """Whether a prompt changes no more than the budget; None where that is not known."""
        return None if row.axis_kl is None else row.axis_kl <= self.kl

    def as_json(self) -> dict[str, Any]:
        """What stands there, for results.json."""
        return {
            "kl": self.kl,
            "methods": [_row_json(row) for row in self.methods],
            "prompts": [
                prompt_row_json(row) | {"within": self.within(row)} for row in self.prompts
            ],
        }


@dataclass(frozen=True, repr=False)
class Comparison(Presented):
    """The rows of a comparison: of methods as they were chosen, and at equal budgets of KL."""

    task: str
    metric: str
    maximise: bool
    unsteered: dict[str, Result]
    perplexity: float
    rows: tuple[Compared, ...]
    at_budgets: tuple[AtBudget, ...]
    between: dict[tuple[str, str], Difference]
    fit: Used
    capability: Evaluation | None
    model: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    #: What the model writes on some test prompts, unsteered and with each method as it was chosen.
    samples: tuple[Sample, ...] = ()
    #: What asking in the prompt is worth beside the methods, where it was asked.
    prompts: Prompts | None = None
    #: Whether effects last, where that was measured.
    drift: Drift | None = None

    def tables(self) -> list[Table]:
        """What each method is worth, what it changes and costs, at an equal budget, between which
        two there is a difference, what each writes, and what it took."""
        written = [samples_table(self.samples)] if self.samples else []
        asked = [] if self.prompts is None else prompt_tables(self.prompts, self.metric, self.task)
        asked += [] if self.drift is None else self.drift.tables()
        tables = [self._worth(), *asked, self._effects(), *self.budget_tables()]
        return [*tables, self._between_table(), *written, self._spent()]

    @property
    def summary(self) -> str:
        """One sentence: the method that does most on the test rows, and what it costs."""
        compared = {row.name: row.against for row in self.rows if row.against is not None}
        if not compared:
            return f"None of {len(self.rows)} methods has a setting that could be chosen."
        sign = 1 if self.maximise else -1
        best = max(compared, key=lambda name: sign * compared[name].difference)
        found = compared[best]
        cost = next(row.cost for row in self.rows if row.name == best)
        priced = (
            "" if cost is None else f", for {number_text(cost, '+')} nats per token of plain text"
        )
        clear = sum(one.is_clear for one in compared.values())
        return (
            f"Of {len(self.rows)} methods {best} moves {words_for(self.metric)} on {self.task} "
            f"most: {change_words(found, self.metric)}, n = {found.n}{priced}; {clear} of "
            f"{len(compared)} differ clearly from the unsteered model."
        )

    def plot(self, ax: Any = None) -> Any:
        """What each method gains against the unsteered model, with intervals: on the matplotlib
        axes `ax` or those of a new figure; they are returned."""
        from trimtab.sweeps.comparison_page import draw_differences

        axes = axes_for(ax, (7, 1.2 + 0.42 * len(self.rows)))
        draw_differences(axes, self)
        return axes

    def _worth(self) -> Table:
        """Each method at the setting that was chosen on validation."""
        base = self.unsteered
        rows: list[list[Any]] = [
            [
                *("unsteered", "", ""),
                *(cell(base[part], self.metric) for part in ("validation", "test")),
                *("", "", ""),
            ]
        ]
        for row in self.rows:
            trials = "" if row.sweep is None else len(row.sweep.trials)
            best = None if row.sweep is None else row.sweep.best
            if best is None:
                rows.append([row.name, row.why, trials, "", "", "", "", ""])
                continue
            figures = [cell(best, self.metric), cell(row.test, self.metric)]
            compared = _cells(row.against, self.metric)
            rows.append([row.name, setting(best.params), trials, *figures, *compared])
        heads = ["method", "setting, chosen on validation", "trials"]
        heads += [f"{part}, n = {base[part].n}" for part in ("validation", "test")]
        return Table(
            on_task(self.metric, self.task),
            [*heads, "against unsteered", "p", "p, corrected"],
            rows,
            "p: McNemar's exact test, or Wilcoxon's where values are not right or wrong; corrected "
            f"for {self._held_together()} (Holm).",
        )

    def _held_together(self) -> str:
        """How many differences p is corrected for, and of what."""
        if self.prompts is None:
            return f"{sum(row.against is not None for row in self.rows)} methods"
        count = sum(row.against is not None for row in self.prompts.rows)
        return f"{count} rows, which are methods, prompts, and methods with the prompt"

    def _effects(self) -> Table:
        """What each steering changes and costs."""
        rows = [["unsteered", "", "", "", f"{self.perplexity:.2f}", "1"]]
        rows += [
            [
                row.name,
                number_cell(row.dial),
                number_cell(row.changed, ","),
                number_cell(row.cost, "+.3f"),
                number_cell(row.perplexity, ".2f"),
                "" if row.overhead is None else f"{row.overhead.ratio:.3f}",
            ]
            for row in self.rows
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

    def budget_tables(self) -> list[Table]:
        """For each budget the methods at its dials, and beside them what has no dial."""
        return [self._budget_table(one) for one in self.at_budgets]

    def _budget_table(self, found: AtBudget) -> Table:
        rows = [
            [
                row.name,
                number_cell(row.dial),
                number_cell(row.axis_kl, ".3g"),
                "",
                cell(row.test, self.metric),
                *_cells(row.against, self.metric),
                number_cell(row.cost, "+.3f"),
                row.why,
            ]
            for row in found.methods
        ]
        rows += [self._asked_cells(row, found) for row in found.prompts]
        heads = ["method, or prompt", "dial", "KL at the next token", "within the budget", "test"]
        heads += ["against unsteered", "p", "p, corrected", "cost", "to know"]
        note = "The median over validation prompts of KL(unsteered ‖ steered) is the budget."
        if found.prompts:
            note += (
                " A prompt has no dial: it stands here with what it changes by itself, as it does "
                "with a steering at the dial that was chosen."
            )
        title = f"At an equal budget: {found.kl:g} nats at the next token"
        return Table(title, heads, rows, note).without_empty_columns(first=3)

    def _asked_cells(self, row: Row, found: AtBudget) -> list[Any]:
        assert self.prompts is not None
        return [
            row.name,
            number_cell(row.dial),
            number_cell(row.axis_kl, ".3g"),
            {True: "yes", False: "no", None: ""}[found.within(row)],
            cell(row.test, self.metric),
            *_cells(row.against, self.metric),
            number_cell(row.cost, "+.3f"),
            "; ".join(filter(None, (row.why, at_own_kl(self.prompts, row)))),
        ]

    def _between_table(self) -> Table:
        rows = [
            [f"{first} minus {second}", *_cells(difference, self.metric)]
            for (first, second), difference in self.between.items()
        ]
        heads = ["", "difference", "p", "p, corrected"]
        note = f"Corrected for {len(rows)} pairs (Holm)."
        return Table("Between methods, on the test rows", heads, rows, note)

    def _spent(self) -> Table:
        """Wall time, tokens and memory of preparation and of inference."""
        rows = [["one pass over the contrast, for all", *_used(self.fit), "", ""]]
        for row in self.rows:
            over, inference = row.overhead, ["", ""]
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
        note = (
            "Memory is above what was in use before. Sweeps share what the blocks below steerings "
            "computed, so that the first pays for the others."
        )
        return Table("What it took", heads, rows, note)

    def as_json(self) -> dict[str, Any]:
        """What `trimtab compare --json` prints."""
        return {
            "task": self.task,
            "metric": self.metric,
            "unsteered": {
                part: {"value": r.value, "n": r.n, "ci95": r.ci95}
                for part, r in self.unsteered.items()
            }
            | {"perplexity": self.perplexity},
            "methods": [_row_json(row) for row in self.rows],
            "at_budgets": [one.as_json() for one in self.at_budgets],
            "between": [
                {"first": first, "second": second, **difference_json(found)}
                for (first, second), found in self.between.items()
            ],
            "prompts": None if self.prompts is None else prompts_as_json(self.prompts),
            "drift": None if self.drift is None else self.drift.as_json(),
            "fit": asdict(self.fit),
            "capability": None if self.capability is None else self.capability.as_json(),
            "model": self.model,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "samples": [sample.as_json() for sample in self.samples],
        }


def _cells(difference: Difference | None, metric: str) -> list[str]:
    if difference is None:
        return ["", "", ""]
    p = [number_cell(difference.p, ".2g"), number_cell(difference.corrected_p, ".2g")]
    return [difference_cell(difference, metric), *p]


def _used(used: Used | None) -> list[str]:
    if used is None:
        return ["", "", ""]
    memory = "" if used.peak_bytes is None else f"{used.peak_bytes / 2**20:.0f}"
    return [f"{used.seconds:.1f}", f"{used.tokens:,}", memory]


def _row_json(row: Compared) -> dict[str, Any]:
    best = None if row.sweep is None else row.sweep.best
    test = row.test
    return {
        "name": row.name,
        "params": best and best.params,
        "validation": best and best.value,
        "trials": 0 if row.sweep is None else len(row.sweep.trials),
        "test": test and test.value,
        "n": 0 if test is None else test.n,
        "ci95": test and test.ci95,
        "against_unsteered": row.against and difference_json(row.against),
        "dial": row.dial,
        "changed": row.changed,
        "cost": row.cost,
        "perplexity": row.perplexity,
        "overhead": row.overhead and asdict(row.overhead),
        "swept": row.swept and asdict(row.swept),
        "axis_kl": row.axis_kl,
        "why": row.why,
    }
