"""Sweeps: chosen on validation, reported on test, the oracle apart; interrupted and shared."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from scipy.stats import binomtest, wilcoxon

import trimtab as tt
from helpers import few_quick, language_model, refused_in_one_line, write_pairs
from postgres import postgres
from trimtab.figures import METRICS, Metric
from trimtab.reading import plain_texts
from trimtab.sweeps.effect import Effect
from trimtab.sweeps.result import Sweep
from trimtab.sweeps.rows import TaskRows
from trimtab.sweeps.space import Range
from trimtab.sweeps.sweep_method import sweep

SPACE = {"k": (1, 3, 9), "alpha": (2.0, 30.0)}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def figures(found: Sweep) -> dict[str, Any]:
    """What does not depend on when and where it was run."""
    whole = found.as_json()
    for trial in whole["trials"]:
        del trial["seconds"]
    del whole["seconds"]
    return json.loads(json.dumps(whole))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- what is chosen and reported ------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(
    lm: tt.LanguageModel, task: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sweep, Path]:
    output = tmp_path_factory.mktemp("sweep") / "run"
    return sweep(lm, "austeer", task, SPACE, metric="prefers", output=output), output


def test_choice_and_report_recomputed_from_the_records(done: tuple[Sweep, Path]) -> None:
    found, output = done
    whole = json.loads((output / "results.json").read_text())
    assert whole == json.loads(json.dumps(found.as_json()))
    values: dict[str, list[list[float]]] = {}
    for part in ("validation", "test"):
        files = [output / "records" / f"{i:05d}-{part}.jsonl" for i in range(6)]
        values[part] = [[r["values"]["prefers"] for r in lines(file)] for file in files]
        assert {len(each) for each in values[part]} == {20}
    means = {part: [sum(each) / 20 for each in some] for part, some in values.items()}
    best = means["validation"].index(max(means["validation"]))  # of equal ones the first
    assert whole["best"]["trial"] == best
    assert whole["best"]["validation"] == pytest.approx(means["validation"][best])
    assert whole["best"]["test"] == pytest.approx(means["test"][best])
    right = round(sum(values["test"][best]))
    wilson = binomtest(right, 20).proportion_ci(method="wilson")
    assert whole["best"]["ci95"] == pytest.approx([wilson.low, wilson.high])
    oracle = means["test"].index(max(means["test"]))
    assert whole["oracle"] == {
        "params": whole["trials"][oracle]["params"],
        "test": max(means["test"]),
    }
    grid = [{"k": k, "alpha": alpha} for k in (1, 3, 9) for alpha in (2.0, 30.0)]
    for i, trial in enumerate(whole["trials"]):
        assert (trial["number"], trial["params"], trial["state"]) == (i, grid[i], "complete")
        assert trial["value"] == pytest.approx(means["validation"][i])
        assert (trial["n"], trial["test_n"]) == (20, 20)
    before = [r["values"]["prefers"] for r in lines(output / "records" / "unsteered-test.jsonl")]
    assert whole["unsteered"]["test"]["value"] == pytest.approx(sum(before) / 20)
    difference = (sum(values["test"][best]) - sum(before)) / 20
    assert whole["difference"]["difference"] == pytest.approx(difference)
    checked = [
        r["values"]["prefers"] for r in lines(output / "records" / "unsteered-validation.jsonl")
    ]
    flips = [a - b for a, b in zip(values["validation"][best], checked, strict=True) if a != b]
    mcnemar = binomtest(sum(f > 0 for f in flips), len(flips)).pvalue if flips else 1.0
    assert whole["best"]["chosen_p"] == pytest.approx(min(1.0, 6 * mcnemar))


def test_trials_equal_plain_evaluations_of_fresh_fits(
    done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str
) -> None:
    contrast = tt.load_contrast(task.partition(":")[2])
    for number, params in enumerate([{"k": 1, "alpha": 2.0}, {"k": 1, "alpha": 30.0}]):
        steering = tt.AUSteer(**params).fit(lm, contrast)
        plain = tt.evaluate(lm, [task], steering=steering)
        expected = [r["values"]["log_odds"] for r in plain.records if r["steering"] is not None]
        kept = lines(done[1] / "records" / f"{number:05d}-test.jsonl")
        assert [r["values"]["log_odds"] for r in kept] == pytest.approx(expected, abs=1e-4)


def test_best_steering_is_saved_with_its_dial(
    done: tuple[Sweep, Path], lm: tt.LanguageModel
) -> None:
    found, output = done
    saved = tt.Steering.load(output / "best.safetensors")
    assert found.best is not None
    assert saved.dial.default == found.best.params["alpha"]
    assert len(saved.tables["unit"]) == found.best.params["k"]


def test_report_and_pictures(done: tuple[Sweep, Path]) -> None:
    page = (done[1] / "report.html").read_text()
    for said in ("chosen on validation", "oracle: best on the test rows", "All trials", "viewport"):
        assert said in page
    assert "The oracle was chosen" in page
    assert "prefers-color-scheme: dark" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    heat = (done[1] / "pictures" / "heatmap.svg").read_text()
    for label in ("alpha", "k", "prefers on 20 validation rows", "30", "9"):
        assert f">{label}<" in heat
    history = (done[1] / "pictures" / "trials.svg").read_text()
    for label in ("trial", "prefers", "validation", "test", "unsteered, validation"):
        assert f">{label}<" in history
    assert (done[1] / "pictures" / "heatmap.png").stat().st_size > 5000


@pytest.mark.slow
def test_pictures_of_one_of_three_and_of_draws(
    lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    layers = {"layer": (0, 1, (0, 2))}
    sweep(lm, "caa", task, layers, oracle=False, test_limit=3, output=tmp_path / "one")
    assert "The oracle was chosen" not in (tmp_path / "one" / "report.html").read_text()
    line = (tmp_path / "one" / "pictures" / "line.svg").read_text()
    for label in ("layer", "0,2", "steered, 95 % intervals", "log-odds, nats, 20 validation rows"):
        assert f">{label}<" in line
    three = {"layer": (0, 1), "alpha": Range(0.1, 10.0, True), "token": ("last", "mean")}
    found = sweep(
        lm,
        "caa",
        task,
        three,
        search="tpe",
        trials=4,
        limit=6,
        test_limit=3,
        output=tmp_path / "three",
    )
    panels = (tmp_path / "three" / "pictures" / "panels.svg").read_text()
    for label in ("layer", "alpha", "token", "mean"):
        assert f">{label}<" in panels
    assert found.oracle is not None


def test_less_is_better_where_it_is(lm: tt.LanguageModel, task: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(METRICS, "log_odds", Metric("log_odds", "mean", "less"))
    found = sweep(lm, "austeer", task, SPACE, test_limit=8)
    assert not found.maximise
    values = [trial.value for trial in found.trials]
    tests = [trial.test for trial in found.trials]
    assert found.best is not None
    assert found.oracle is not None
    assert found.best.number == values.index(min(values))
    assert found.oracle.number == tests.index(min(tests))


@pytest.mark.usefixtures("undrawn")
def test_without_the_oracle_only_the_best_sees_the_test_rows(
    lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    found = sweep(lm, "austeer", task, SPACE, oracle=False, limit=5, output=tmp_path / "run")
    assert found.oracle is None
    assert found.best is not None
    assert [t.number for t in found.trials if t.test is not None] == [found.best.number]
    kept = sorted(path.name for path in (tmp_path / "run" / "records").glob("*-test.jsonl"))
    assert kept == [f"{found.best.number:05d}-test.jsonl", "unsteered-test.jsonl"]


def test_the_contrast_is_read_once(lm: tt.LanguageModel, task: str) -> None:
    lengths: list[int] = []
    contrast = tt.load_contrast(task.partition(":")[2])
    sides = {side for pair in contrast.train.pairs for side in (pair.prompt,)}
    assert len(sides) == 20
    from trimtab.sweeps import space as spaces

    seen = spaces.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            spaces, "collect", lambda *a, **k: (lengths.append(len(a[1])), seen(*a, **k))[1]
        )
        sweep(lm, "caa", task, {"layer": (0, 1, 2), "alpha": (1.0, 3.0)}, limit=3, test_limit=3)
    assert lengths == [20]


# -- searches -------------------------------------------------------------------------------------


def test_halving_shows_a_stopped_trial_its_rungs_rows_only(
    lm: tt.LanguageModel, tmp_path: Path
) -> None:
    task = write_pairs(tmp_path / "pairs.jsonl", 180)  # 60 for validation: rungs of 16, 48, 60
    space = {"layer": (0, 1, 2), "alpha": (0.5, 4.0, 16.0, -8.0)}
    asked: Counter[str] = Counter()
    records = TaskRows.records

    def counted(self: TaskRows, steering: Any, part: Any, *rest: Any, **more: Any) -> Any:
        found = records(self, steering, part, *rest, **more)
        asked[f"{found[0]['steering']} {part}"] += len(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskRows, "records", counted)
        found = sweep(lm, "caa", task, space, search="halving", test_limit=4)
    whole = sweep(lm, "caa", task, space, test_limit=4)
    stopped = [trial for trial in found.trials if trial.state == "pruned"]
    assert len(stopped) >= 4
    assert {trial.n for trial in stopped} <= {16, 48}
    from trimtab.sweeps.space import label

    for trial in found.trials:
        name = label(tt.CAA, trial.params)
        assert asked[f"{name} validation"] == trial.n
        assert asked[f"{name} test"] == (4 if trial.state == "complete" else 0)
        if trial.state == "complete":  # over all rows, and they are the grid's
            assert trial.n == 60
            assert trial.value == pytest.approx(whole.trials[trial.number].value, abs=1e-4)


@pytest.mark.usefixtures("undrawn")
def test_max_cost_leaves_out_what_costs_more(
    lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    contrast = tt.load_contrast(task.partition(":")[2])
    effect = Effect(lm, contrast.part("test"), plain_texts())
    space = {"layer": (0, 2), "alpha": (0.1, 20.0)}
    every = [{"layer": layer, "alpha": alpha} for layer in (0, 2) for alpha in (0.1, 20.0)]
    costs = [effect.cost(tt.CAA(**params).fit(lm, contrast)) for params in every]
    limit = sum(sorted(costs)[1:3]) / 2
    found = sweep(lm, "caa", task, space, max_cost=limit, test_limit=4, output=tmp_path / "run")
    assert [trial.cost for trial in found.trials] == pytest.approx(costs, abs=1e-5)
    for trial, cost in zip(found.trials, costs, strict=True):
        assert trial.state == ("complete" if cost <= limit else "dear")
        run = (tmp_path / "run" / "records" / f"{trial.number:05d}-validation.jsonl").exists()
        assert (trial.n, run) == ((20, True) if cost <= limit else (0, False))
    nothing = sweep(lm, "caa", task, space, max_cost=-100.0)
    assert nothing.best is None
    assert nothing.oracle is None
    assert any("the cheapest trial costs" in note for note in nothing.notes)


@pytest.mark.usefixtures("undrawn")
def test_failures_stay_with_their_trials(lm: tt.LanguageModel, task: str, tmp_path: Path) -> None:
    found = sweep(lm, "caa", task, {"layer": (99, 1)}, test_limit=4, output=tmp_path / "run")
    assert [trial.state for trial in found.trials] == ["failed", "complete"]
    assert "99" in found.trials[0].why
    assert found.best is not None
    assert found.best.number == 1
    assert any("1 of 2 trials failed" in note for note in found.notes)
    none = tmp_path / "none"
    refused_in_one_line(lambda: sweep(lm, "caa", task, {"layer": (98, 99)}, output=none), "98")
    assert not none.exists()
    late = {"alpha": Range(1.0, 2.0)}
    with pytest.raises(tt.TrimtabError, match="all 3 trials failed: .*99"):
        sweep(lm, "caa", task, late, fixed={"layer": 99}, search="tpe", trials=3)


@pytest.mark.parametrize("better", ["more", "less"])
def test_numbers_are_tested_and_go_the_way_that_is_better(
    better: Literal["more", "less"], lm: tt.LanguageModel, task: str
) -> None:
    found = sweep(lm, "caa", task, {"alpha": (-2.0, 2.0)}, fixed={"layer": 1}, better=better)
    assert (found.metric, found.maximise) == ("log_odds", better == "more")
    assert found.best is not None
    assert found.steering is not None
    contrast = tt.load_contrast(task.partition(":")[2])
    changes = {}
    for part in ("validation", "test"):
        own = contrast.part(part)
        changes[part] = tt.log_odds(lm, own, found.steering) - tt.log_odds(lm, own)
    p = wilcoxon(changes["validation"]).pvalue
    assert found.chosen_p == pytest.approx(min(1.0, 2 * p), rel=0.05)
    assert found.difference is not None
    against = changes["test"] < 0 if better == "more" else changes["test"] > 0
    assert found.difference.wrong == int(against.sum())


def test_the_best_says_where_nothing_beyond_it_was_tried(lm: tt.LanguageModel, task: str) -> None:
    found = sweep(lm, "caa", task, {"alpha": (1.0, 2.0)}, fixed={"layer": 1}, test_limit=4)
    assert found.best is not None
    ends = {1.0: "alpha=1 is the least", 2.0: "alpha=2 is the largest"}
    said = [note.split(" of its values")[0] for note in found.notes if "of its values" in note]
    assert said == [ends[found.best.params["alpha"]]]


def test_numbers_that_overflow_are_failures(lm: tt.LanguageModel, task: str) -> None:
    found = sweep(lm, "caa", task, {"alpha": (1.0, 1e38)}, fixed={"layer": 1}, test_limit=4)
    states = [trial.state for trial in found.trials]
    assert states[0] == "complete"
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_not_the_trials_failure(
    lm: tt.LanguageModel, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    def full(self: Any, name: str, records: Any) -> None:
        raise tt.TrimtabError("cannot write: no space left")

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.reports.run.Run.keep", full)
        with pytest.raises(tt.TrimtabError, match="no space left"):
            sweep(lm, "austeer", task, SPACE, limit=3, test_limit=3, output=output)
    found = sweep(lm, "austeer", task, SPACE, limit=3, test_limit=3, output=output)
    assert {trial.state for trial in found.trials} == {"complete"}


# -- interrupted and shared -----------------------------------------------------------------------

SEARCHES: dict[str, dict[str, Any]] = {
    "grid": {"space": SPACE},
    "tpe": {"space": {"k": Range(1, 40), "alpha": Range(0.5, 50.0, True)}, "trials": 14},
    "halving": {"space": {"k": (1, 3, 9, 20), "alpha": (2.0, 30.0)}},
}


class Interrupted:
    """Ctrl-C in the middle of the trial that is the nth to be run."""

    def __init__(self, patch: pytest.MonkeyPatch, nth: int) -> None:
        seen: list[int] = []
        records = TaskRows.records

        def watched(bench: TaskRows, steering: Any, part: Any, *rest: Any, **more: Any) -> Any:
            if steering is not None and part == "test":
                seen.append(1)
                if len(seen) == nth:
                    raise KeyboardInterrupt
            return records(bench, steering, part, *rest, **more)

        patch.setattr(TaskRows, "records", watched)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("search", few_quick(SEARCHES, "tpe"))
def test_an_interrupted_sweep_ends_as_one_that_was_not(
    lm: tt.LanguageModel, task: str, tmp_path: Path, search: str
) -> None:
    options = {"search": search, "test_limit": 5, "seed": 3, **SEARCHES[search]}
    whole = sweep(lm, "austeer", task, **options)
    for nth in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            Interrupted(patch, nth)
            with pytest.raises(KeyboardInterrupt):
                sweep(lm, "austeer", task, output=tmp_path / "run", **options)
        assert not (tmp_path / "run" / "results.json").exists()
    assert len(list((tmp_path / "run" / "records").glob("0*-test.jsonl"))) >= 1
    found = sweep(lm, "austeer", task, output=tmp_path / "run", **options)
    assert figures(found) == figures(whole)
    again = sweep(lm, "austeer", task, output=tmp_path / "run", **options)
    assert figures(again) == figures(whole)
    assert again.seconds == found.seconds  # what it took, not what looking it up took


def _work(task: str, output: str, storage: str | None, slow: bool) -> None:
    """A worker in a process of its own; a slow one stops in its third trial, and says so."""
    torch.set_num_threads(1)
    records, tried = TaskRows.records, []

    def watched(bench: TaskRows, steering: Any, part: Any, *rest: Any, **more: Any) -> Any:
        if steering is not None and part == "test":
            tried.append(1)
            if len(tried) == 3:
                Path(output).with_suffix(".stopped").touch()
                time.sleep(600)
        return records(bench, steering, part, *rest, **more)

    if slow:
        TaskRows.records = watched  # type: ignore[method-assign]
    else:
        Path(output).with_suffix(".ready").touch()
    sweep(language_model("llama"), "austeer", task, SPACE, output=output, storage=storage)


def _start(*arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments)
    process.start()
    return process


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_leaves_its_trial_to_the_next(
    done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = _start(task, str(output), None, True)
    _wait_for(tmp_path / "run.stopped")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = sweep(lm, "austeer", task, SPACE, output=output)
    assert figures(found) == figures(sweep(lm, "austeer", task, SPACE))


def _shared(lm: tt.LanguageModel, task: str, output: Path, storage: str | None) -> None:
    """Two processes on one sweep: no trial twice, and both end with the same."""
    helper = _start(task, str(output), storage, False)
    _wait_for(output.with_suffix(".ready"))
    ran: Counter[str] = Counter()
    from trimtab.sweeps.worker import _Worker

    attempt = _Worker._try
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _Worker,
            "_try",
            lambda w, q, t: (ran.update([t.number]), attempt(w, q, t), time.sleep(0.3)),
        )
        found = sweep(lm, "austeer", task, SPACE, output=output, storage=storage)
    helper.join(120)
    assert helper.exitcode == 0
    assert set(ran.values()) <= {1}
    assert figures(found) == figures(sweep(lm, "austeer", task, SPACE))
    written = json.loads((output / "results.json").read_text())
    assert [t["params"] for t in written["trials"]] == [t.params for t in found.trials]
    assert len(list((output / "records").glob("0*-validation.jsonl"))) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_another_takes_last_is_waited_for(
    lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    from trimtab.sweeps.trials import Trials

    release, taken = Trials.release_dead, []

    def look(queue: Trials) -> int:
        others = release(queue)
        if len(queue.finished()) == 5 and not taken:  # after this look, before the next claim
            taken.append(queue.claim())
        elif taken and others:
            outcome = {"params": queue.params(taken[0]), "state": "failed", "why": "elsewhere"}
            queue.finish(taken[0], outcome, None)
        return others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "release_dead", look)
        found = sweep(lm, "austeer", task, SPACE, output=tmp_path / "run")
    assert [trial.state for trial in found.trials] == ["complete"] * 5 + ["failed"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_two_processes_on_one_sqlite_file(lm: tt.LanguageModel, task: str, tmp_path: Path) -> None:
    _shared(lm, task, tmp_path / "run", None)


@pytest.mark.slow
def test_two_processes_on_postgresql(lm: tt.LanguageModel, task: str, tmp_path: Path) -> None:
    with postgres() as url:
        _shared(lm, task, tmp_path / "run", url)
        # Other machines have directories of their own, and other sweeps the same storage.
        elsewhere = sweep(lm, "austeer", task, SPACE, output=tmp_path / "other", storage=url)
        assert figures(elsewhere) == figures(sweep(lm, "austeer", task, SPACE))
        other = sweep(lm, "caa", task, {"layer": (0, 1)}, output=tmp_path / "caa", storage=url)
        assert [trial.params for trial in other.trials] == [{"layer": 0}, {"layer": 1}]


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "nosuch"}, "unknown method 'nosuch'"),
        ({"method": tt.CAA(layer=1, token="last")}, "name a method, 'caa'"),
        ({"search": "random"}, "search is 'random'"),
        ({"space": {"k": Range(1, 5)}}, "search with tpe"),
        ({"space": {"k": 5}}, "k: give several values"),
        ({"space": {"kk": (1,)}}, "no kk"),
        ({"trials": 3}, "the grid has 6 settings"),
        ({"metric": "accuracy"}, "no metric 'accuracy'"),
        ({"task": "refusal:nosuch.jsonl"}, "nosuch"),
        ({"storage": "sqlite:///x.db"}, "needs a run directory"),
        ({"limit": 0}, "1 or more"),
        ({"test_limit": -1}, "1 or more"),
    ],
)
def test_mistakes_write_nothing(
    lm: tt.LanguageModel, task: str, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    output = None if "storage" in options else tmp_path / "run"
    given = {"method": "austeer", "task": task, "space": SPACE, "output": output, **options}
    refused_in_one_line(lambda: sweep(lm, **given), says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_other_runs_are_not_mixed_nor_lost(
    done: tuple[Sweep, Path], lm: tt.LanguageModel, task: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = {"limit": 3, "test_limit": 3, "output": output}
    sweep(lm, "caa", task, {"layer": (0, 1)}, **options)
    before = (output / "results.json").read_bytes()
    more = {"layer": (0, 1, 2)}
    refused_in_one_line(
        lambda: sweep(lm, "caa", task, more, **options), "differs in space: .*--overwrite"
    )
    wrong = {**options, "metric": "nosuch", "overwrite": True}
    refused_in_one_line(lambda: sweep(lm, "caa", task, more, **wrong), "no metric")
    assert (output / "results.json").read_bytes() == before
    found = sweep(lm, "caa", task, more, **options, overwrite=True)
    assert len(found.trials) == 3
    (tmp_path / "file").write_text("")
    options["output"] = tmp_path / "file"
    refused_in_one_line(lambda: sweep(lm, "caa", task, more, **options), "is a file")
