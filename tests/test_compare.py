"""Comparing methods: one pass, equal budgets of trials, choice on validation, corrected p."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from statsmodels.stats.multitest import multipletests

import trimtab as tt
from helpers import kl_at, language_model, refused_in_one_line
from trimtab.figures.significance import paired_p
from trimtab.reading.likelihood import log_odds
from trimtab.sweeps import compare_methods
from trimtab.sweeps.compare_methods import Candidate, compare
from trimtab.sweeps.comparison import Comparison

WORDS = ("glad", "calm", "kind", "warm", "fine", "good", "nice", "bright", "gentle", "happy")


def rows(part: str, start: int, count: int) -> Iterator[dict[str, str]]:
    for i in range(start, start + count):
        word, other = WORDS[i % len(WORDS)], WORDS[(i * 3 + 1) % len(WORDS)]
        yield {
            "prompt": f"On day {i} I felt {other} and",
            "positive": f" {word} again",
            "negative": f" rather {other[::-1]}",
            "part": part,
        }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [*rows("train", 0, 16), *rows("validation", 16, 10), *rows("test", 26, 14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return str(path)


CANDIDATES = (
    Candidate("caa", {"layer": (0, 1), "alpha": (1.0, 8.0)}, {}, "caa"),
    Candidate("actadd", {"alpha": (0.5, 2.0)}, {"layer": 1}, "actadd"),
    Candidate("sas", {"theta": (0.0, 90.0)}, {}, "rotation"),
)
#: In nats at the next token.
BUDGETS = (0.003, 0.01)


@pytest.fixture(scope="module")
def compared(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    directory = tmp_path_factory.mktemp("runs") / "compare"
    found = compare(
        language_model("llama"),
        CANDIDATES,
        f"contrast:{pairs}",
        kl=BUDGETS,
        max_cost=None,
        timed=False,
        output=directory,
    )
    return found, directory


def odds(lm: tt.LanguageModel, pairs: str, part: Any, steering: Any) -> torch.Tensor:
    return log_odds(lm, tt.Contrast.from_jsonl(pairs).part(part), steering)


@pytest.mark.usefixtures("undrawn")
def test_each_is_chosen_on_validation_and_reported_on_test(
    compared: tuple[Comparison, Path], pairs: str
) -> None:
    lm, (found, _) = language_model("llama"), compared
    methods = {"caa": tt.CAA, "actadd": tt.ActAdd, "rotation": tt.SAS}
    base = odds(lm, pairs, "test", None)
    assert found.unsteered["test"].value == pytest.approx(float(base.mean()), abs=1e-5)
    for row, one in zip(found.rows, CANDIDATES, strict=True):
        settings = [
            dict(zip(one.space, values, strict=True))
            for values in (
                [(a, b) for a in one.space["layer"] for b in one.space["alpha"]]
                if "layer" in one.space
                else [(v,) for v in next(iter(one.space.values()))]
            )
        ]
        contrast = tt.Contrast.from_jsonl(pairs)
        fitted = [methods[row.name](**one.fixed, **s).fit(lm, contrast) for s in settings]
        means = [float(odds(lm, pairs, "validation", steering).mean()) for steering in fitted]
        best = int(np.argmax(means))
        assert row.sweep is not None
        assert row.sweep.best is not None
        assert row.sweep.best.params == settings[best]
        assert row.sweep.best.value == pytest.approx(means[best], abs=1e-5)
        gains = odds(lm, pairs, "test", fitted[best]) - base
        assert row.against is not None
        assert row.against.difference == pytest.approx(float(gains.mean()), abs=1e-5)
        assert row.against.ci95[0] <= row.against.difference <= row.against.ci95[1]
        assert row.against.p == pytest.approx(paired_p(gains.tolist()), abs=0.02)
        assert row.test is not None
        assert row.test.n == row.against.n == 14


def test_p_are_corrected_for_their_number(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    for group in ([row.against for row in found.rows], list(found.between.values())):
        plain = [one.p for one in group if one is not None]
        corrected = multipletests(plain, method="holm")[1]
        assert [one.corrected_p for one in group if one is not None] == pytest.approx(corrected)
    assert list(found.between) == [
        ("caa", "actadd"), ("caa", "rotation"), ("actadd", "rotation"),
    ]  # fmt: skip
    first, second = (row.against for row in found.rows[:2])
    assert first is not None
    assert second is not None
    between = found.between["caa", "actadd"].difference
    assert between == pytest.approx(first.difference - second.difference, abs=1e-9)


def test_where_less_is_better_the_words_say_so_too(pairs: str) -> None:
    both = [
        Candidate("caa", {"alpha": (alpha,)}, {"layer": 1}, name)
        for name, alpha in (("up", 6.0), ("down", -6.0))
    ]
    asked: dict[str, Any] = {"better": "less", "behaviour": "be glad", "timed": False}
    found = compare(
        language_model("llama"), both, f"contrast:{pairs}", limit=4, max_cost=None, **asked
    )
    changes = {row.name: row.against for row in found.rows}
    least = min(changes, key=lambda name: changes[name].difference)
    assert found.summary.startswith(f"Of 2 methods {least} moves")
    for row in found.rows:  # of which each that goes up goes the wrong way
        assert row.against is not None
        assert row.sweep is not None
        assert row.sweep.difference is not None
        assert row.sweep.difference.wrong == row.against.wrong
    assert changes["up"].difference > changes["down"].difference
    assert changes["up"].wrong > changes["down"].wrong
    assert found.prompts is not None
    together = [row for row in found.prompts.rows if row.against is not None]
    assert len(together) > 2  # prompts and both together beside the methods
    lowest = min(together, key=lambda row: row.against.p)
    assert lowest.against.corrected_p == pytest.approx(min(1, len(together) * lowest.against.p))
    (worth, *_) = found.tables()
    assert f"corrected for {len(together)} rows" in worth.note


def test_side_effects(compared: tuple[Comparison, Path]) -> None:
    found, _ = compared
    lm = language_model("llama")
    from trimtab.reading import plain_texts
    from trimtab.reading.likelihood import cross_entropy

    for row in found.rows:
        assert row.sweep is not None
        steering = row.sweep.steering
        assert steering is not None
        plain, tokens = cross_entropy(lm, plain_texts())
        steered, _ = cross_entropy(lm, plain_texts(), steering)
        cost = float(((steered - plain) * tokens).sum() / tokens.sum())
        assert row.cost == pytest.approx(cost, abs=1e-5)
        total = float((steered * tokens).sum() / tokens.sum())
        assert row.perplexity == pytest.approx(np.exp(total), rel=1e-4)
    assert found.rows[0].changed == lm.model.config.hidden_size


@pytest.mark.parametrize("place", [0, 1])
def test_at_equal_budgets(place: int, compared: tuple[Comparison, Path], pairs: str) -> None:
    """The dial of each budget, by plain passes over the prompts; the test rows were asked there."""
    lm, (found, _) = language_model("llama"), compared
    prompts = [pair.prompt for pair in tt.Contrast.from_jsonl(pairs).part("validation").pairs]
    assert [one.kl for one in found.at_budgets] == list(BUDGETS)
    at = found.at_budgets[place]
    rotation = at.methods[2]
    assert rotation.dial is None
    assert "sets an angle" in rotation.why
    for row, chosen in zip(at.methods[:2], found.rows, strict=False):
        assert chosen.sweep is not None
        steering = chosen.sweep.steering
        assert steering is not None
        assert row.dial is not None
        assert row.test is not None
        gains = odds(lm, pairs, "test", replace(steering, value=row.dial))
        assert row.test.value == pytest.approx(float(gains.mean()), abs=1e-4)
        if row.why:  # the range of the dial ends before
            continue
        used = [kl_at(lm, steering, prompt, row.dial) for prompt in prompts]
        assert np.median(used) == pytest.approx(BUDGETS[place], rel=0.25)


def test_one_pass_fits_all(pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    collect = compare_methods.collect

    def counting(*args: Any, **options: Any) -> Any:
        passes.append(len(args[2]))
        return collect(*args, **options)

    monkeypatch.setattr(compare_methods, "collect", counting)
    monkeypatch.setattr("trimtab.sweeps.space.collect", counting)
    compare(language_model("llama"), CANDIDATES, f"contrast:{pairs}", timed=False, limit=3)
    assert len(passes) == 1


def test_the_directory_goes_on_and_the_page_shows_everything(
    compared: tuple[Comparison, Path], pairs: str
) -> None:
    found, directory = compared
    page = (directory / "report.html").read_text(encoding="utf-8")
    for text in ("caa", "actadd", "rotation", "p, corrected", "What it took"):
        assert text in page
    for text in ("At an equal budget: 0.003 nats", "At an equal budget: 0.01 nats"):
        assert text in page
    svg = (directory / "pictures" / "differences.svg").read_text(encoding="utf-8")
    assert "log-odds, nats: steered minus unsteered" in svg
    assert (directory / "caa" / "best.safetensors").exists()
    assert tt.Steering.load(directory / "caa" / "best.safetensors").method == "caa"
    records = (directory / "caa" / "records").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in records}
    again = compare(
        language_model("llama"),
        CANDIDATES,
        f"contrast:{pairs}",
        kl=BUDGETS,
        max_cost=None,
        timed=False,
        output=directory,
    )
    after = {p.name: p.stat().st_mtime_ns for p in (directory / "caa" / "records").iterdir()}
    assert after == before  # no trial ran twice
    assert again.as_json()["between"] == found.as_json()["between"]
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["methods"]] == ["caa", "actadd", "rotation"]


def test_more_settings_than_trials_are_drawn(pairs: str) -> None:
    one = Candidate("caa", {"layer": (0, 1), "alpha": (0.5, 1.0, 2.0, 4.0)}, {}, "caa")
    found = compare(
        language_model("llama"), [one], f"contrast:{pairs}", trials=3, limit=3, timed=False
    )
    assert found.rows[0].sweep is not None
    assert len(found.rows[0].sweep.trials) == 3


def test_a_candidate_may_be_given_in_arrays_and_lists() -> None:
    given = Candidate(
        "caa", {"layer": range(2), "alpha": np.linspace(0.5, 1, 2)}, {"token": "mean"}
    )
    assert given == Candidate(
        "caa", {"layer": (0, 1), "alpha": (0.5, 1.0)}, {"token": "mean"}, "caa"
    )
    assert type(given.space["alpha"][0]) is float


def test_refusals(pairs: str, tmp_path: Path) -> None:
    lm, task = language_model("llama"), f"contrast:{pairs}"
    twice = [CANDIDATES[0], CANDIDATES[0]]
    for action, says in (
        (lambda: compare(lm, [], task), "no method"),
        (lambda: compare(lm, ["cab"], task), "unknown method 'cab'"),
        (lambda: compare(lm, twice, task), "two methods are called caa"),
        (lambda: compare(lm, CANDIDATES, task, trials=0), "1 trial or more"),
        (lambda: compare(lm, CANDIDATES, task, kl=-1), "above 0 nats"),
        (lambda: compare(lm, CANDIDATES, task, max_cost=math.nan), "finite number of nats"),
        (lambda: Candidate("cab", {"layer": (1,)}), "unknown method 'cab'"),
        (lambda: compare(lm, [Candidate("caa", {"depth": (1,)}, {}, "x")], task), "no depth"),
        (lambda: compare(lm, CANDIDATES, "lm-eval:arc_challenge"), "no validation rows"),
    ):
        refused_in_one_line(action, says)
