"""The rows of a comparison: what each chosen steering changes, costs and gains, at its own setting
and at equal budgets.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from trimtab.contrasts import Prompt
from trimtab.dials import Budget, all_budgets
from trimtab.errors import TrimtabError, TrimtabWarning
from trimtab.evaluation import NextTokens
from trimtab.figures import Difference, Record, differences
from trimtab.steering import Steering
from trimtab.sweeps.baselines import Prompts
from trimtab.sweeps.comparison import AtBudget, Compared
from trimtab.sweeps.metering import overhead
from trimtab.sweeps.rows import TaskRows

#: Prompts on which the time of generation is measured.
_TIMED_PROMPTS = 8


def effects(bench: TaskRows, name: str, steering: Steering, timed: bool) -> Compared:
    """What a steering changes and what it costs, beside its figure on the task."""
    cost = bench.plain.cost(steering)
    return Compared(
        name,
        None,
        dial=steering.setting,
        changed=sum(one.operator.size for one in steering.interventions),
        cost=cost,
        perplexity=bench.plain.perplexity(cost),
        overhead=overhead(
            bench.language_model, steering, bench.prompts(_TIMED_PROMPTS), engine=bench.engine
        )
        if timed
        else None,
    )


# -- at equal budgets -----------------------------------------------------------------------------


def at_budgets(
    bench: TaskRows,
    chosen: Mapping[str, Steering],
    axis: NextTokens,
    kl: Sequence[float],
    prompts: Prompts | None,
) -> list[AtBudget]:
    """The chosen steerings once more at the dial of each budget, and prompts beside them."""
    reached = {name: _budgets_of(bench, one, axis.prompts, kl) for name, one in chosen.items()}
    found = []
    for i, nats in enumerate(kl):
        rows, records = [], {}
        for name, budgets in reached.items():
            if isinstance(budgets, str):
                rows.append(Compared(name, None, why=budgets))
                continue
            steering = replace(chosen[name], value=budgets[i].dial)
            unreached = budgets[i].unreached
            short = f"{unreached} prompts cost less" if unreached else ""
            row = effects(bench, name, steering, timed=False)
            rows.append(replace(row, axis_kl=axis.median(steering), why=short))
            records[name] = bench.records(steering, "test", name=name)
        found.append(_against(bench, AtBudget(nats, tuple(rows)), records, prompts))
    return found


def _budgets_of(
    bench: TaskRows, steering: Steering, prompts: Sequence[Prompt], kl: Sequence[float]
) -> list[Budget] | str:
    """The dials of a chosen steering whose median KL on the validation prompts is each budget, on
    the side on which it was chosen; or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)  # said by the row
            return all_budgets(
                bench.language_model,
                steering,
                prompts,
                kl,
                side="negative" if steering.setting < 0 else "positive",
                chat=None if any(not isinstance(prompt, str) for prompt in prompts) else False,
            )
    except TrimtabError as error:
        return str(error)


def _against(
    bench: TaskRows,
    found: AtBudget,
    records: Mapping[str, Sequence[Record]],
    prompts: Prompts | None,
) -> AtBudget:
    """Methods at a budget and what is said before prompts, against the unsteered model: p is
    corrected for all that stand there."""
    asked = [] if prompts is None else [row for row in prompts.rows if row.asks]
    said = {} if prompts is None else prompts.tested
    base = bench.unsteered("test")
    pairs = {name: (base, some) for name, some in {**records, **said}.items()}
    against = differences(pairs, bench.metric, bench.maximise)
    methods = _with_figures(bench, found.methods, records, against)
    beside = [replace(row, against=against.get(row.name)) for row in asked]
    return replace(found, methods=tuple(methods), prompts=tuple(beside))


# -- differences ----------------------------------------------------------------------------------


def with_differences(
    bench: TaskRows, rows: Sequence[Compared], records: Mapping[str, Sequence[Record]]
) -> tuple[list[Compared], dict[tuple[str, str], Difference]]:
    """The rows with their figures and differences against unsteered; and between each two."""
    base = bench.unsteered("test")
    names = [row.name for row in rows if row.name in records]
    said = bench.metric, bench.maximise
    against = differences({name: (base, records[name]) for name in names}, *said)
    pairs = {(a, b): (records[b], records[a]) for a, b in itertools.combinations(names, 2)}
    between = differences(pairs, *said)
    return _with_figures(bench, rows, records, against), between


def _with_figures(
    bench: TaskRows,
    rows: Sequence[Compared],
    records: Mapping[str, Sequence[Record]],
    against: Mapping[str, Difference],
) -> list[Compared]:
    """The rows with what their records come to, where there are some."""
    return [
        replace(row, test=bench.result(records[row.name]), against=against.get(row.name))
        if row.name in records
        else row
        for row in rows
    ]


def corrected(rows: Sequence[Compared], prompts: Prompts) -> list[Compared]:
    """The rows with p corrected for the number of prompts beside them too."""
    against = {row.name: row.against for row in prompts.rows}
    return [replace(row, against=against.get(row.name) or row.against) for row in rows]
