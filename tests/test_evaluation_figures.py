"""Evaluations: every figure and every comparison follows from the records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab as tt
from evaluations import chooser, data, of, strong, talker, wilson
from helpers import refused_in_one_line
from trimtab.evaluation.evaluation import evaluate
from trimtab.model.language_model import LanguageModel
from trimtab.reports import summarise

__all__ = ["chooser", "data", "talker"]  # fixtures, which pytest finds by their names here

# -- figures from the records ---------------------------------------------------------------------


def test_every_result_follows_from_the_records(talker: LanguageModel, data: Path) -> None:
    steering = strong(talker)
    found = evaluate(
        talker,
        ["svamp", "copa"],
        steering={"weak": steering.at(0.1), "strong": steering},
        data=data,
        protocol=["paper", "trimtab"],
        max_new_tokens=4,
    )
    expected = {}
    for record in found.records:
        for metric, value in record["values"].items():
            key = (record["task"], record["protocol"], record["steering"], metric)
            expected.setdefault(key, []).append(value)
    assert len(expected) == 2 * 2 * 3 * 2
    results = {(r.task, r.protocol, r.steering, r.metric): r for r in found.results}
    assert results.keys() == expected.keys()
    assert len(results) == len(found.results)
    for key, values in expected.items():
        result = results[key]
        assert (result.value, result.n, result.unclear) == (np.mean(values), len(values), 0)
        assert result.ci95 == pytest.approx(wilson(sum(values), len(values)), abs=1e-6)
    assert found.seconds == pytest.approx(sum(r["seconds"] for r in found.records), abs=0.01)
    assert found.model == vars(talker.identity)


def test_every_comparison_follows_from_the_records(chooser: LanguageModel, data: Path) -> None:
    steering = strong(chooser)
    found = evaluate(chooser, "copa", steering=steering, data=data)
    before, after = of(found, steering=None), of(found, steering=steering.label)
    for comparison in found.comparisons:
        old = np.array([record["values"][comparison.metric] for record in before])
        new = np.array([record["values"][comparison.metric] for record in after])
        assert (comparison.gained, comparison.lost) == ((new > old).sum(), (new < old).sum())
        assert comparison.difference == pytest.approx(new.mean() - old.mean())
        assert (comparison.n, comparison.steering) == (24, steering.label)
    assert [c.metric for c in found.comparisons] == ["accuracy", "answered"]
    accuracy = found.comparisons[0]
    assert accuracy.gained
    assert accuracy.lost
    flipped = [
        (one, two)
        for one, two in zip(before, after, strict=True)
        if one["values"]["accuracy"] != two["values"]["accuracy"]
    ]
    assert found.flips() == flipped
    assert len(flipped) == accuracy.gained + accuracy.lost
    answered = found.flips("answered")
    assert len(answered) == found.comparisons[1].gained + found.comparisons[1].lost  # type: ignore[operator]


def made(index: int, steering: str | None, **more: Any) -> dict[str, Any]:
    return {
        "task": "t",
        "protocol": "",
        "steering": steering,
        "index": index,
        "id": str(index),
        "seconds": 0.5,
        "values": {},
    } | more


def test_the_interval_of_a_difference_is_paired() -> None:
    # Steered is right where unsteered is, and in a tenth of the others: the pairs vary little.
    random = np.random.default_rng(0)
    old = random.integers(0, 2, 300)
    new = old | (random.random(300) < 0.1)
    records = [made(i, None, values={"accuracy": float(v)}) for i, v in enumerate(old)]
    records += [made(i, "s", values={"accuracy": float(v)}) for i, v in enumerate(new)]
    (comparison,) = summarise(records, {}).comparisons
    draws = random.integers(0, 300, (4000, 300))
    low, high = np.percentile((new - old)[draws].mean(1), (2.5, 97.5))
    assert comparison.difference == pytest.approx((new - old).mean())
    assert comparison.ci95 == pytest.approx((low, high), abs=0.01)
    assert comparison.ci95[1] - comparison.ci95[0] < 0.07  # unpaired it would be 0.16
    assert (comparison.gained, comparison.lost) == ((new > old).sum(), 0)


def test_flips_have_the_p_of_mcnemars_exact_test() -> None:
    def p_of(gained: int, lost: int) -> float | None:
        flips = [(0, 1)] * gained + [(1, 0)] * lost + [(1, 1)] * 4
        records = [
            made(i, steering, values={"accuracy": float(flips[i][side])})
            for side, steering in enumerate((None, "a"))
            for i in range(len(flips))
        ]
        (comparison,) = summarise(records, {}).comparisons
        return comparison.p

    # Twice the tail of a fair coin, by hand.
    assert p_of(3, 0) == pytest.approx(2 / 8)
    assert p_of(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert p_of(2, 2) == 1
    assert p_of(0, 0) == 1


def test_a_failure_to_write_leaves_the_model_unsteered(
    chooser: LanguageModel, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, records: Any) -> None:
        raise tt.TrimtabError("the disk is full")

    monkeypatch.setattr("trimtab.reports.run.Run.append", full)
    try:
        tt.evaluate(chooser, "copa", steering=strong(chooser), unsteered=False, data=data)
    except tt.TrimtabError:  # whose traceback, here alive, holds on to what was under way
        assert not any(module._forward_hooks for module in chooser.model.modules())
        assert not any(module._forward_pre_hooks for module in chooser.model.modules())
    else:
        pytest.fail("nothing was raised")


def test_records_are_paired_by_example_whatever_their_order() -> None:
    records = [made(i, None, values={"accuracy": float(i == 2)}) for i in (2, 0, 1, 3)]
    records += [made(i, "s", values={"accuracy": float(i != 0)}) for i in (1, 3, 2)]
    found = summarise(records, {})
    (comparison,) = found.comparisons
    assert (comparison.n, comparison.gained, comparison.lost) == (3, 2, 0)
    assert comparison.difference == pytest.approx(2 / 3)
    assert [r["index"] for r in found.records] == [0, 1, 2, 3, 1, 2, 3]
    assert [(a["index"], b["index"]) for a, b in found.flips()] == [(1, 1), (3, 3)]


def test_what_is_unclear_is_counted_apart() -> None:
    verdicts = [1.0, None, 0.0, 1.0, None]
    records = [made(i, None, values={"attack": v}) for i, v in enumerate(verdicts)]
    records += [
        made(i, "s", values={"attack": v}) for i, v in enumerate([0.0, 1.0, None, 0.0, 1.0])
    ]
    found = summarise(records, {})
    first, second = found.results
    assert (first.value, first.n, first.unclear) == (pytest.approx(2 / 3), 3, 2)
    assert (second.value, second.n, second.unclear) == (0.5, 4, 1)
    (comparison,) = found.comparisons  # of rows 0 and 3, which are clear in both
    assert (comparison.difference, comparison.n) == (-1.0, 2)
    assert (comparison.gained, comparison.lost) == (0, 2)
    assert [before["index"] for before, _ in found.flips()] == [0, 3]


def test_where_all_is_unclear_there_is_no_figure() -> None:
    found = summarise([made(i, None, values={"attack": None}) for i in range(3)], {})
    (result,) = found.results
    assert (result.value, result.n, result.ci95, result.unclear) == (None, 0, None, 3)


def test_examples_weigh_what_they_weigh() -> None:
    old, new, weights = [1.0, 2.0, 4.0], [1.5, 2.0, 3.0], [1, 2, 7]
    records = [
        made(i, steering, values={"cross_entropy": v}, weight=w)
        for steering, values in ((None, old), ("s", new))
        for i, (v, w) in enumerate(zip(values, weights, strict=True))
    ]
    found = summarise(records, {})
    assert found.value("t", "cross_entropy").value == pytest.approx(33 / 10)
    assert found.value("t", "cross_entropy").n == 3
    assert found.value("t", "perplexity").value == pytest.approx(math.exp(3.3))
    low, high = found.value("t", "cross_entropy").ci95  # type: ignore[misc]
    assert found.value("t", "perplexity").ci95 == pytest.approx((math.exp(low), math.exp(high)))
    (comparison,) = found.comparisons
    assert comparison.difference == pytest.approx((0.5 * 1 + 0 * 2 - 1 * 7) / 10)
    assert (comparison.gained, comparison.lost) == (None, None)


def test_means_that_happen_to_be_whole_are_no_rates() -> None:
    records = [made(i, s, values={"toxicity": 1.0}) for s in (None, "s") for i in range(4)]
    found = summarise(records, {})
    assert found.results[0].ci95 == (1.0, 1.0)  # Wilson's would be wide
    assert found.comparisons[0].gained is None
    assert found.flips() == []


def test_a_result_that_is_not_there(chooser: LanguageModel, data: Path) -> None:
    found = evaluate(chooser, "copa", data=data, limit=2)
    assert found.value("copa", "accuracy") is found.results[0]
    refused_in_one_line(lambda: found.value("copa", "perplexity"), "no result with .*perplexity")
