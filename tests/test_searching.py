"""Trials in a storage that several workers share: who gets which, what is drawn, who is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from helpers import refused_in_one_line
from postgres import postgres
from trimtab.sweeps import trials as searching
from trimtab.sweeps.space import Range
from trimtab.sweeps.storage import open_storage
from trimtab.sweeps.trials import Trials, plan, rungs

SPACE = {"k": (1, 2, 4), "site": ("ffn_out", "heads"), "layers": ((0, 1), (2,))}


def trials(storage: Any, search: Any = "grid", space: Any = None, **more: Any) -> Trials:
    options = {"count": None, "maximise": True, "seed": 0, **more}
    return Trials(storage, "test", SPACE if space is None else space, search, **options)


def end(queue: Trials, trial: Any, value: float = 0.5, state: str = "complete") -> dict[str, Any]:
    params = queue.params(trial)
    queue.finish(trial, {"params": params, "state": state}, value)
    return params


def run_all(queue: Trials) -> list[dict[str, Any]]:
    found = []
    while (trial := queue.claim()) is not None:
        found.append(end(queue, trial, float(trial.number)))
    return found


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return None if request.param == "memory" else tmp_path / "study.db"


# -- what is tried --------------------------------------------------------------------------------


def test_grid_in_order_each_once(storage: Any) -> None:
    queue = trials(storage)
    expected = [
        {"k": k, "site": site, "layers": layers}
        for k in (1, 2, 4)
        for site in ("ffn_out", "heads")
        for layers in ((0, 1), (2,))
    ]
    assert run_all(queue) == expected
    assert queue.claim() is None
    assert [trial.number for trial in queue.finished()] == list(range(12))
    assert [trial.value for trial in queue.finished()] == list(map(float, range(12)))


@pytest.mark.parametrize("search", ["tpe", "halving"])
def test_draws_keep_to_their_ranges_and_repeat_by_seed(search: Any) -> None:
    space = {
        "k": Range(3, 9),
        "alpha": Range(0.01, 100.0, True),
        "theta": Range(-5.0, 5.0),
        "site": ("heads", "resid"),
    }
    queue = trials(None, search, space, count=60)
    drawn = run_all(queue)
    assert len(drawn) == 60
    assert {type(params["k"]) for params in drawn} == {int}
    assert {params["k"] for params in drawn} >= {3, 9}
    assert all(3 <= params["k"] <= 9 and -5 <= params["theta"] <= 5 for params in drawn)
    assert all(0.01 <= params["alpha"] <= 100 for params in drawn)
    assert {params["site"] for params in drawn} == {"heads", "resid"}
    if search == "halving":  # drawn at random: half of a logarithmic range lies below its root
        assert 15 <= sum(params["alpha"] < 1 for params in drawn) <= 45
    assert run_all(trials(None, search, space, count=60)) == drawn
    assert run_all(trials(None, search, space, count=60, seed=1)) != drawn
    assert len(run_all(trials(None, search, space))) == 50


def test_tpe_goes_where_it_was_good() -> None:
    queue = trials(None, "tpe", {"alpha": Range(0.0, 1.0)}, count=60)
    found = []
    while (trial := queue.claim()) is not None:
        alpha = queue.params(trial)["alpha"]
        found.append(alpha)
        queue.finish(trial, {"params": {"alpha": alpha}, "state": "complete"}, -abs(alpha - 0.3))
    later = found[30:]
    assert sum(abs(alpha - 0.3) < 0.1 for alpha in later) > 15  # by chance 6


def test_same_settings_drawn_again_are_found() -> None:
    queue = trials(None, "tpe", {"layers": ((0, 1), (2,))}, count=10)
    first = queue.claim()
    params = end(queue, first)
    assert queue.same(params).number == 0
    assert queue.same({"layers": (7,)}) is None
    assert trials(None).same(params) is None  # a grid has each once


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((SPACE, "random", None), "search is 'random': known are grid, tpe, halving"),
        ((SPACE, "grid", 5), "the grid has 12 settings, and 5 trials"),
        ((SPACE, "tpe", 0), "1 trial or more"),
        (({"k": Range(1, 5)}, "grid", None), "search with tpe"),
    ],
)
def test_plans_that_cannot_be(arguments: tuple[Any, ...], says: str) -> None:
    refused_in_one_line(lambda: plan(*arguments), says)


def test_rungs_grow_threefold_up_to_all() -> None:
    assert rungs(100, 16) == [16, 48, 100]
    assert rungs(500, 16) == [16, 48, 144, 432, 500]
    assert rungs(48, 16) == [16, 48]
    assert rungs(10, 16) == [10]


# -- who is stopped -------------------------------------------------------------------------------


@pytest.mark.parametrize("maximise", [True, False])
def test_the_best_third_so_far_goes_on(storage: Any, maximise: bool) -> None:
    values = [0.5, 0.6, 0.4, 0.6, 0.55, 0.7, 0.65, 0.2, 0.7]
    queue = trials(storage, "halving", {"k": tuple(range(9))}, maximise=maximise)
    stopped = []
    for i, value in enumerate(values):
        trial = queue.claim()
        assert trial is not None
        signed = value if maximise else -value
        queue.params(trial)
        stopped.append(queue.report(trial, signed, 0))
        assert queue.report(trial, signed, 0) == stopped[-1]  # asked again after an interruption
        state = "pruned" if stopped[-1] else "complete"
        queue.finish(trial, {"params": {}, "state": state}, signed)
        # By hand: of those so far at most a third (or one) are better, or as good and went on.
        ahead = sum(
            other > value or (other == value and not stopped[j])
            for j, other in enumerate(values[:i])
        )
        assert stopped[-1] == (ahead >= max(1, (i + 1) // 3))
    assert stopped == [False, False, True, True, True, False, False, True, False]


def test_of_equals_a_third_goes_on(storage: Any) -> None:
    queue = trials(storage, "halving", {"k": tuple(range(30))})
    stopped = []
    for _ in range(30):
        trial = queue.claim()
        assert trial is not None
        queue.params(trial)
        stopped.append(queue.report(trial, 0.5, 0))
        state = "pruned" if stopped[-1] else "complete"
        queue.finish(trial, {"params": {}, "state": state}, 0.5)
    assert [i for i, out in enumerate(stopped) if not out] == [0, *range(5, 30, 3)]


# -- who gets which -------------------------------------------------------------------------------


def compete(open_queue: Any, workers: int, count: int) -> list[tuple[int, int]]:
    """(trial, worker) of all that were run by threads with connections of their own."""
    ran: list[tuple[int, int]] = []
    failures: list[BaseException] = []
    ready = threading.Barrier(workers)

    def work(worker: int) -> None:
        try:
            ready.wait()
            queue = open_queue()
            while True:
                others = queue.release_dead()
                trial = queue.claim()
                if trial is not None:
                    ran.append((trial.number, worker))
                    end(queue, trial)
                elif not others:
                    break
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert sorted(number for number, _ in ran) == list(range(count))
    return ran


def test_workers_on_sqlite_never_run_the_same(tmp_path: Path) -> None:
    space = {"k": tuple(range(30))}
    compete(lambda: trials(tmp_path / "study.db", space=space), 4, 30)
    found = trials(tmp_path / "study.db", space=space).finished()
    assert [trial.params["k"] for trial in found] == list(range(30))


def abandoned(queue: Trials, count: int, pid: int) -> None:
    """Trials whose worker, a process of this machine, is no more."""
    for _ in range(count):
        trial = queue.claim()
        assert trial is not None
        machine, _, start = trial.trial.user_attrs["worker"]
        trial.trial.set_user_attr("worker", [machine, pid, start])


@pytest.fixture(scope="module")
def dead() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_trials_of_dead_workers_are_run_once_by_who_comes_first(tmp_path: Path, dead: int) -> None:
    space = {"k": tuple(range(12))}
    abandoned(trials(tmp_path / "study.db", space=space), 8, dead)
    compete(lambda: trials(tmp_path / "study.db", space=space), 4, 12)


def test_a_trial_that_was_taken_over_is_not_given_up_by_who_saw_it_dead(
    tmp_path: Path, dead: int
) -> None:
    first, second = (trials(tmp_path / "study.db") for _ in range(2))
    abandoned(first, 1, dead)
    (seen,) = second._in_state("RUNNING")
    assert first.release_dead() == 0
    taken = first.claim()
    assert taken is not None
    assert taken.number == 0
    second._give_up(seen)
    assert second.release_dead() == 1  # somebody lives
    assert second.claim().number == 1


def test_a_worker_that_gives_no_sign_is_dead_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (trials(tmp_path / "study.db") for _ in range(2))
    trial = first.claim()
    attribute = trial.trial.set_user_attr
    attribute("worker", ["another machine", 1, trial.trial.user_attrs["worker"][2]])
    attribute("alive", time.time() - 9e6)  # its clock is wrong, and no matter
    now = time.monotonic()
    clock = {"now": now}
    monkeypatch.setattr(searching.time, "monotonic", lambda: clock["now"])
    assert second.release_dead() == 1
    clock["now"] = now + 80
    assert second.release_dead() == 1
    attribute("alive", 12345.0)
    clock["now"] = now + 160  # 160 after it began, a moment after its sign was seen
    assert second.release_dead() == 1
    clock["now"] = now + 260
    assert second.release_dead() == 0
    assert second.claim().number == 0


def test_an_interrupted_trial_goes_back_and_keeps_what_it_drew(storage: Any) -> None:
    queue = trials(storage, "tpe", {"alpha": Range(0.0, 1.0)}, count=3)
    threads = threading.active_count()
    end(queue, queue.claim())
    trial = queue.claim()
    drawn = queue.params(trial)
    with pytest.raises(KeyboardInterrupt), queue.alive(trial):
        raise KeyboardInterrupt
    again = queue.claim()
    assert again.number == trial.number == 1
    assert queue.params(again) == drawn
    assert threading.active_count() <= threads  # the sign of life has ended with its trial


def test_signs_of_life_are_given(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_BEAT", 0.01)
    queue = trials(storage)
    trial = queue.claim()
    before = trial.trial.user_attrs["alive"]
    with queue.alive(trial):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            (seen,) = queue._in_state("RUNNING")
            if seen.user_attrs["alive"] > before:
                break
        else:
            raise AssertionError("no sign")


def test_what_ended_elsewhere_stays_as_it_was(tmp_path: Path) -> None:
    first, second = (trials(tmp_path / "study.db") for _ in range(2))
    trial = first.claim()
    (seen,) = second._in_state("RUNNING")
    second._give_up(seen)  # it seemed dead
    other = second.claim()
    end(second, other, 0.25)
    with first.alive(trial):
        end(first, trial, 0.75)  # and was not
    assert [each.value for each in first.finished()] == [0.25]


def test_processes_that_are_and_are_not(dead: int) -> None:
    assert searching._runs(os.getpid())
    assert not searching._runs(dead)
    assert not searching._runs(None)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while searching._runs(zombie.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not searching._runs(zombie.pid) or sys.platform != "linux"  # nobody has waited for it
    zombie.wait()


# -- storages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.mark.slow
def test_workers_on_postgresql_never_run_the_same(server: str, dead: int) -> None:
    space = {"k": tuple(range(20))}

    def join() -> Trials:  # the first four make the tables, all at once
        return trials(server, space=space)

    compete(join, 4, 20)
    again = trials(server, space=space, fresh=True)
    assert again.finished() == []
    abandoned(again, 6, dead)
    compete(join, 3, 20)


def test_a_study_of_another_name_is_another_sweep(tmp_path: Path) -> None:
    one = trials(tmp_path / "study.db")
    run_all(one)
    other = Trials(tmp_path / "study.db", "other", SPACE, "grid", None, False, 0)
    assert other.finished() == []
    assert len(trials(tmp_path / "study.db").finished()) == 12  # joined
    assert trials(tmp_path / "study.db", fresh=True).finished() == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql+psycopg://me:hush@127.0.0.1:1/db?connect_timeout=2", "me:\\*\\*\\*@127.0.0.1"),
        ("postgresql+psycopg://me:hush@host:hush/db", "write it as in"),
        (
            "postgresql+psycopg://127.0.0.1:1/db?user=me&password=hush&connect_timeout=2",
            "127.0.0.1",
        ),
        ("nosuch://me:hush@host/db", "nosuch"),
        ("sqlite:////nowhere/at/all/study.db", "cannot open the storage sqlite"),
    ],
)
def test_storages_that_cannot_be_opened(url: str, says: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(tt.TrimtabError, match=says) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)
    assert "hu" not in str(caught.value).replace("such", "")


def test_a_file_that_is_no_database_and_one_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, only some text " * 40)
    refused_in_one_line(lambda: open_storage(tmp_path / "text.db"), "cannot open the storage")
    queue = trials(tmp_path / "study.db")
    queue._database.engine.dispose()
    (tmp_path / "study.db").write_text("gone " * 1000)

    def go_on() -> None:
        with queue.reachable():
            queue.claim()

    refused_in_one_line(go_on, "does not answer .* start the same again")


def test_optuna_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused_in_one_line(lambda: trials(None), r"pip install 'trimtab\[sweep\]'")
