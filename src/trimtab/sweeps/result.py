"""What a sweep found: its trials, the best of them, and the figures beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trimtab.evaluation import Sample, samples_table
from trimtab.figures import Difference, Estimate, Record, Result, on_task, words_for
from trimtab.reports import (
    Presented,
    Table,
    cell,
    change_words,
    difference_cell,
    number_cell,
    tested_cell,
    value_text,
)
from trimtab.steering import Steering
from trimtab.sweeps.asked_tables import prompt_tables, prompts_as_json
from trimtab.sweeps.baselines import Prompts, Row
from trimtab.sweeps.space import Params, setting

#: Trials in the table; the records have all.
_MOST_ROWS = 400


@dataclass(frozen=True)
class Trial:
    """One setting.

    `state` is complete, pruned (stopped early), failed (`why`) or dear (above the limit of cost).
    `value` is the metric's mean over `n` validation rows, `test` that over `test_n` test rows where
    they were run; `cost` is in nats per token of plain text, where it was measured, and `kl` in
    nats per token after neutral texts, of a search for trade-offs.
    """

    number: int
    params: Params
    state: str
    value: float | None = None
    n: int = 0
    ci95: tuple[float, float] | None = None
    test: float | None = None
    test_n: int = 0
    test_ci95: tuple[float, float] | None = None
    cost: float | None = None
    seconds: float = 0.0
    why: str = ""
    kl: float | None = None

    @property
    def estimate(self) -> Estimate | None:
        """The figure on the validation rows, where there is one."""
        if self.value is None:
            return None
        return Estimate(self.value, *(self.ci95 or (self.value, self.value)), self.n)

    @property
    def on_test(self) -> Estimate | None:
        """The figure on the test rows, where there is one."""
        if self.test is None:
            return None
        return Estimate(self.test, *(self.test_ci95 or (self.test, self.test)), self.test_n)


@dataclass(frozen=True, repr=False)
class Sweep(Presented):
    """What a sweep found.

    `best` is the complete trial of the best value on the validation rows, the first of those that
    are equal; `oracle` that of the best value on the test rows. `unsteered` has the figures of the
    unsteered model on both parts; `difference` compares the best with it on the test rows, and
    `chosen_p` is p on the validation rows (McNemar's, or Wilcoxon's where values
    are not right or wrong) times the number of trials.

    Of a search for trade-offs `front` has the trials that none other beats both in value and in KL,
    from the least KL to the most, `best` the best of them with a KL of at most `max_kl`, and
    `unsearched` the method as it is without a search (None where it cannot be fitted).
    """

    method: str
    task: str
    metric: str
    maximise: bool
    space: dict[str, Any]
    trials: tuple[Trial, ...]
    best: Trial | None
    oracle: Trial | None
    unsteered: dict[str, Result]
    difference: Difference | None
    chosen_p: float | None
    steering: Steering | None
    flips: tuple[tuple[Record, Record], ...]
    model: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    #: Records of the best trial on the test rows.
    tested: tuple[Record, ...] = ()
    #: What the model writes on some test prompts, unsteered and with the best.
    samples: tuple[Sample, ...] = ()
    front: tuple[Trial, ...] = ()
    max_kl: float | None = None
    unsearched: Trial | None = None
    #: What asking in the prompt is worth beside the best, where it was asked.
    prompts: Prompts | None = None

    def tables(self) -> list[Table]:
        """What was chosen, beside the unsteered model and the oracle; what it writes; and all
        trials."""
        written = [samples_table(self.samples)] if self.samples else []
        asked = [] if self.prompts is None else prompt_tables(self.prompts, self.metric, self.task)
        traded = [self._front_table()] if self.max_kl is not None else []
        return [self._chosen_table(), *asked, *traded, *written, self._trials_table()]

    @property
    def summary(self) -> str:
        """One sentence: what was chosen, and what it does on the test rows."""
        tried = f"Of {len(self.trials)} settings of {self.method}"
        best, base = self.best, self.unsteered["test"]
        if best is None:
            return f"{tried} none can be chosen."
        what = f"{words_for(self.metric)} on {self.task}"
        chosen = f"{tried} {setting(best.params)} does best on the validation rows"
        if best.test is None or base.value is None or self.difference is None:
            return f"{chosen}; no figure says what it does on the test rows."
        new, old = value_text(best.test, self.metric), value_text(base.value, self.metric)
        return (
            f"{chosen}: on the test rows {what} is {new}, unsteered {old}: "
            f"{change_words(self.difference, self.metric)}, n = {self.difference.n}."
        )

    def plot(self, ax: Any = None) -> Any:
        """The metric over the one or two hyperparameters that were searched, or trial by trial: on
        the matplotlib axes `ax` or those of a new figure; they are returned."""
        from trimtab.sweeps.sweep_page import plot_sweep

        return plot_sweep(self, ax)

    def _chosen_table(self) -> Table:
        base, best, oracle, note = self.unsteered, self.best, self.oracle, ""
        shown = [cell(base[part], self.metric) for part in ("validation", "test")]
        rows = [["unsteered", "", *shown, "", ""]]
        if best is not None:
            figures = [setting(best.params), *self._cells(best)]
            compared = [difference_cell(self.difference, self.metric), tested_cell(self.difference)]
            rows.append(["chosen on validation", *figures, *compared])
        if self.unsearched is not None:
            figures = [setting(self.unsearched.params), *self._cells(self.unsearched)]
            rows.append(["unsearched", *figures, "", ""])
        if oracle is not None:
            note = (
                "The oracle was chosen on the rows that it is reported on: no one has it "
                "beforehand."
            )
            figures = [setting(oracle.params), *self._cells(oracle)]
            rows.append(["oracle: best on the test rows", *figures, "", ""])
        heads = ["", "setting", f"validation, n = {base['validation'].n}"]
        heads += [f"test, n = {base['test'].n}", "difference on test", "flipped"]
        return Table(on_task(self.metric, self.task), heads, rows, note)

    def _front_table(self) -> Table:
        """What does most for each KL: one of them is to be picked."""
        rows = [
            [
                t.number,
                "chosen" if self.best is not None and t.number == self.best.number else "",
                number_cell(t.kl, ".3f"),
                *self._cells(t),
                number_cell(t.cost, ".3f"),
                setting(t.params),
            ]
            for t in self.front
        ]
        if self.unsearched is not None:
            alone = self.unsearched
            cost = number_cell(alone.cost, ".3f")
            rows.append(["", "unsearched", number_cell(alone.kl, ".3f"), *self._cells(alone), cost])
            rows[-1].append("")
        rows += self._asked_rows()
        heads = [
            *("trial", "", "KL, nats/token", "validation", "test", "cost, nats/token"),
            "setting, or what it is",
        ]
        note = (
            "No other trial does more for as little KL on neutral texts. Chosen is what does most "
            f"at {self.max_kl:g} nats per token or less: --max-kl says another limit, --pick names "
            "a trial."
        )
        if self._asked:
            note += " A prompt has no dial: it stands here with the KL that it has."
        return Table("Trade-offs: the Pareto front", heads, rows, note).without_empty_columns()

    @property
    def _asked(self) -> list[Row]:
        """What is said before prompts, where its KL on neutral texts is known."""
        rows = () if self.prompts is None else self.prompts.rows
        return [row for row in rows if row.asks and row.axis_kl is not None]

    def _asked_rows(self) -> list[list[Any]]:
        """Prompts among the trade-offs, and whether they keep to the limit."""
        assert self.max_kl is not None
        return [
            [
                "",
                row.name,
                number_cell(row.axis_kl, ".3f"),
                cell(row.validation, self.metric),
                cell(row.test, self.metric),
                number_cell(row.cost, ".3f"),
                "within the limit" if (row.axis_kl or 0.0) <= self.max_kl else "above the limit",
            ]
            for row in self._asked
        ]

    def _cells(self, trial: Trial) -> list[str]:
        return [cell(trial, self.metric), cell(trial.on_test, self.metric)]

    def _trials_table(self) -> Table:
        rows = [
            [
                t.number,
                setting(t.params),
                t.state,
                cell(t, self.metric),
                t.n,
                cell(t.on_test, self.metric),
                number_cell(t.cost, ".3f"),
                number_cell(t.kl, ".3f"),
                f"{t.seconds:.1f}",
            ]
            for t in self.trials[:_MOST_ROWS]
        ]
        heads = ["trial", "setting", "state", "validation", "n", "test"]
        title = "All trials"
        if len(self.trials) > _MOST_ROWS:
            title = f"The first {_MOST_ROWS} of {len(self.trials)} trials"
        every = Table(title, [*heads, "cost, nats/token", "KL, nats/token", "seconds"], rows)
        return every.without_empty_columns()

    def as_json(self) -> dict[str, Any]:
        """What `trimtab sweep --json` prints."""
        best, oracle = self.best, self.oracle
        return {
            "method": self.method,
            "task": self.task,
            "metric": self.metric,
            "best": best
            and {
                "params": best.params,
                "validation": best.value,
                "test": best.test,
                "n": best.test_n,
                "ci95": best.test_ci95,
                "validation_n": best.n,
                "validation_ci95": best.ci95,
                "chosen_p": self.chosen_p,
                "trial": best.number,
            },
            "oracle": oracle and {"params": oracle.params, "test": oracle.test},
            "unsteered": {
                part: {"value": r.value, "n": r.n, "ci95": r.ci95}
                for part, r in self.unsteered.items()
            },
            "difference": None if self.difference is None else self.difference.as_json(),
            "prompts": None if self.prompts is None else prompts_as_json(self.prompts),
            "trials": [_as_json(trial) for trial in self.trials],
            **self._traded(),
            "model": self.model,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "samples": [sample.as_json() for sample in self.samples],
        }

    def _traded(self) -> dict[str, Any]:
        """Of a search for trade-offs what else is said of it."""
        if self.max_kl is None:
            return {}
        return {
            "front": [_as_json(trial) for trial in self.front],
            "max_kl": self.max_kl,
            "unsearched": self.unsearched and _as_json(self.unsearched),
        }


def _as_json(trial: Trial) -> dict[str, Any]:
    """A trial; of others than searches for trade-offs nothing is said of KL."""
    said = asdict(trial)
    if trial.kl is None:
        del said["kl"]
    return said
