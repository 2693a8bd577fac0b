"""Prompts beside methods, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trimtab.figures import Difference, on_task
from trimtab.reports import Table, cell, difference_cell, number_cell, wrong_way_cell
from trimtab.sweeps.baselines import Prompts, Row

#: Characters of a prompt in a table.
_WIDTH = 70


def prompt_tables(found: Prompts, metric: str, task: str) -> list[Table]:
    """Prompts beside methods; methods at what the best prompt changes; the rungs of the ladder."""
    tables = [_beside(found, metric, task)]
    if found.at_kl:
        tables.append(_at_kl(found, metric))
    rungs = [row for row in found.rows if row.rungs]
    return [*tables, *(_rungs(row, metric) for row in rungs)]


def _beside(found: Prompts, metric: str, task: str) -> Table:
    rows = []
    for row in found.rows:
        against = row.against
        rows.append(
            [
                row.name + (" (best prompt)" if row.name == found.best else ""),
                _said(row),
                cell(row.test, metric),
                difference_cell(against, metric),
                number_cell(_p(against), ".2g"),
                wrong_way_cell(against),
                *_spent(row),
                number_cell(row.tokens, "+.0f"),
                "" if row.overhead is None else f"{row.overhead.ratio:.2f}",
                difference_cell(found.against_best.get(row.name), metric),
                number_cell(_p(found.against_best.get(row.name)), ".2g"),
                row.why,
            ]
        )
    heads = [
        *("", "said, or the dial", "test", "against unsteered", "p, corrected"),
        *("moved the wrong way", "cost, nats/token", "KL per generated token", "worst 5 %"),
        *("tokens of a prompt", "time, times unsteered", "method minus best prompt"),
        *("p, corrected", "to know"),
    ]
    note = (
        "KL(unsteered || changed) in nats, over the unsteered model's continuations of neutral "
        "prompts. p is corrected for all rows of a column (Holm)."
    )
    title = f"Prompts beside methods: {on_task(metric, task)}"
    return Table(title, heads, rows, note).without_empty_columns(first=4)


def _said(row: Row) -> str:
    dial = "" if row.dial is None else f"dial {row.dial:.4g}"
    said = row.said if len(row.said) <= _WIDTH else row.said[: _WIDTH - 3] + "..."
    return said or dial


def _spent(row: Row) -> list[str]:
    """Cost on plain text, and KL per generated token."""
    kl = ["", ""] if row.kl is None else [cell(_Mean(row)), f"{row.kl.worst5:.3g}"]
    return [number_cell(row.cost, "+.3f"), *kl]


class _Mean:
    """The mean KL as a figure of a table."""

    def __init__(self, row: Row) -> None:
        assert row.kl is not None
        self.value, self.ci95 = row.kl.mean, row.kl.ci95


def _p(found: Difference | None) -> float | None:
    return None if found is None else found.corrected_p


def _at_kl(found: Prompts, metric: str) -> Table:
    """Methods where they change as much as the best prompt."""
    rows = [
        [
            row.name,
            number_cell(row.dial),
            difference_cell(row.against, metric),
            number_cell(_p(row.against), ".2g"),
            wrong_way_cell(row.against),
            *_spent(row),
            difference_cell(found.at_kl_against_best.get(row.name), metric),
            number_cell(_p(found.at_kl_against_best.get(row.name)), ".2g"),
            _verdict(found, row.name),
            row.why,
        ]
        for row in found.at_kl
    ]
    heads = [
        *("method", "dial", "against unsteered", "p, corrected", "moved the wrong way"),
        *("cost, nats/token", "KL per generated token", "worst 5 %", "minus the prompt"),
        *("p, corrected", "beats the prompt", "to know"),
    ]
    title = f"Methods at the KL of the best prompt ({found.best}, {found.kl:.3g} nats per token)"
    return Table(title, heads, rows).without_empty_columns(first=3)


def _verdict(found: Prompts, name: str) -> str:
    """Whether a method beats the best prompt at what that changes."""
    against = found.at_kl_against_best.get(name)
    if against is None:
        return ""
    if name in found.at_kl_beat_best:
        return "yes"
    return "no, it does less" if against.is_clear else "not clearly"


def at_own_kl(found: Prompts, row: Row) -> str:
    """Of the best prompt, which methods beat it where they change as much as it does."""
    if row.name != found.best or not found.at_kl_against_best:
        return ""
    by = ", ".join(found.at_kl_beat_best) or "no method"
    return f"at its own {found.kl:.3g} nats per generated token {by} clearly beats it"


def _rungs(row: Row, metric: str) -> Table:
    rows = [
        [
            one.name + (" (chosen)" if one.name == row.rung else ""),
            one.text,
            number_cell(one.value),
            f"{one.cost:+.3f}",
            "" if one.allowed else "above the limit",
        ]
        for one in row.rungs
    ]
    heads = ["rung", "said", "validation", "cost, nats/token", ""]
    return Table(f"Rungs of the {row.name}", heads, rows).without_empty_columns(first=4)


# -- JSON -----------------------------------------------------------------------------------------


def prompts_as_json(found: Prompts) -> dict[str, Any]:
    """For `--json` and results.json."""
    return {
        "behaviour": found.behaviour,
        "best": found.best,
        "rows": [prompt_row_json(row) for row in found.rows],
        "against_best": _differences_json(found.against_best),
        "at_kl": {
            "kl": found.kl,
            "methods": [prompt_row_json(row) for row in found.at_kl],
            "against_best": _differences_json(found.at_kl_against_best),
            "beat_best": list(found.at_kl_beat_best),
        },
    }


def prompt_row_json(row: Row) -> dict[str, Any]:
    """A prompt, or what stands beside prompts."""
    test = row.test
    return {
        "name": row.name,
        "said": row.said,
        "rung": row.rung,
        "rungs": [asdict(one) for one in row.rungs],
        "dial": row.dial,
        "validation": row.validation and row.validation.value,
        "test": test and test.value,
        "n": 0 if test is None else test.n,
        "ci95": test and test.ci95,
        "against_unsteered": row.against and difference_json(row.against),
        "cost": row.cost,
        "kl": row.kl and row.kl.as_json(),
        "tokens": row.tokens,
        "overhead": row.overhead and asdict(row.overhead),
        "axis_kl": row.axis_kl,
        "why": row.why,
    }


def difference_json(found: Difference) -> dict[str, Any]:
    """A difference that is one of several."""
    return {
        "value": found.difference,
        "ci95": found.ci95,
        "p": found.p,
        "corrected_p": found.corrected_p,
        "n": found.n,
        "wrong_way": found.wrong_way_as_json,
    }


def _differences_json(found: Mapping[str, Difference]) -> dict[str, Any]:
    return {name: difference_json(one) for name, one in found.items()}
