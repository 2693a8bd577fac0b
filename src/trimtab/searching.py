"""The trials of a sweep in an Optuna storage, which several processes and machines may share.

All trials are planned when the study is made, as waiting ones: a worker claims one, runs it, says
what came of it, and stops when none is left. So no trial runs twice, and one whose worker died goes
back among the waiting, with its number and its settings: a sweep that was interrupted ends as one
that was not. The sampler of a trial is seeded by its number.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import TrimtabError
from trimtab.spaces import Params, Range, Space, grid, shown

Search = Literal["grid", "tpe", "halving"]

#: Seconds between two signs of life of a worker, and after how many without one it is dead.
_BEAT, _DEAD = 15, 90
#: Rungs of successive halving keep one trial in so many.
REDUCTION = 3
_PLANNED = "planned"


class Trials:
    """The trials of one sweep in an Optuna study.

    `storage` is a path of an SQLite file, any URL that Optuna takes, or None for memory; `name` is
    the study's name. A study of this name that is there is joined, unless `fresh`.
    """

    def __init__(
        self,
        storage: str | Path | None,
        name: str,
        space: Space,
        search: Search,
        count: int | None,
        maximise: bool,
        seed: int,
        fresh: bool = False,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise TrimtabError("a sweep needs optuna: pip install 'trimtab[sweep]'") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self.space, self.search, self.seed = optuna, space, search, seed
        self.plan = plan(space, search, count)
        self._storage = optuna.storages.InMemoryStorage() if storage is None else _open(storage)
        if fresh:
            with contextlib.suppress(KeyError):
                optuna.delete_study(study_name=name, storage=self._storage)
        self.study = self._join(name, "maximize" if maximise else "minimize")

    # -- making or joining the study --------------------------------------------------------------

    def _join(self, name: str, direction: Literal["maximize", "minimize"]) -> Any:
        """The study of this name, made with all its trials where it is not there."""
        options = {"study_name": name, "storage": self._storage, "pruner": self._pruner()}
        try:
            study = self._optuna.create_study(direction=direction, **options)
        except self._optuna.exceptions.DuplicatedStudyError:
            study = self._optuna.load_study(**options)
            self._wait_for_plan(study)
        if _PLANNED not in study.user_attrs:
            for params in self.plan[len(study.get_trials(deepcopy=False)) :]:
                study.enqueue_trial(params)
            study.set_user_attr(_PLANNED, len(self.plan))
        return study

    def _wait_for_plan(self, study: Any) -> None:
        """Let the process that made the study finish its plan; one that died is replaced."""
        for _ in range(50):
            if _PLANNED in study.user_attrs:
                return
            time.sleep(0.2)

    def _pruner(self) -> Any:
        if self.search != "halving":
            return self._optuna.pruners.NopPruner()
        return self._optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=REDUCTION
        )

    # -- working ----------------------------------------------------------------------------------

    def claim(self) -> Any | None:
        """A trial that nobody else has, or None where none is left to claim."""
        states = self._optuna.trial.TrialState
        for waiting in self.study.get_trials(deepcopy=False, states=(states.WAITING,)):
            with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                if self._storage.set_trial_state_values(waiting._trial_id, state=states.RUNNING):
                    self.study.sampler = self._sampler(waiting.number)
                    trial = self._optuna.trial.Trial(self.study, waiting._trial_id)
                    trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
                    trial.set_user_attr("alive", time.time())
                    return trial
        return None

    def _sampler(self, number: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that are marked as experimental
            if self.search == "tpe":
                return self._optuna.samplers.TPESampler(
                    seed=self.seed * 100_003 + number, constant_liar=True
                )
            return self._optuna.samplers.RandomSampler(seed=self.seed * 100_003 + number)

    def params(self, trial: Any) -> Params:
        """The settings of a trial, drawn where they were not planned."""
        found: Params = {}
        for name, values in self.space.items():
            if not isinstance(values, Range):
                choices = _choices(values)
                place = choices.index(trial.suggest_categorical(name, choices))
                found[name] = list(dict.fromkeys(values))[place]
            elif values.whole:
                found[name] = trial.suggest_int(
                    name, int(values.low), int(values.high), log=values.log
                )
            else:
                found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
        return found

    @contextlib.contextmanager
    def alive(self, trial: Any) -> Iterator[None]:
        """Signs of life while a trial runs; one that is interrupted goes back among the waiting."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(_BEAT):
                with contextlib.suppress(Exception):  # the database may be away for a while
                    self._storage.set_trial_user_attr(trial._trial_id, "alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self._put_back(trial._trial_id)
            raise
        finally:
            over.set()
            thread.join()

    def _put_back(self, trial_id: int) -> None:
        waiting = self._optuna.trial.TrialState.WAITING
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, state=waiting)

    def release_dead(self) -> int:
        """Put trials back whose worker is gone; how many others are still at work."""
        running = self._optuna.trial.TrialState.RUNNING
        others = 0
        for trial in self.study.get_trials(deepcopy=False, states=(running,)):
            host, process = trial.user_attrs.get("worker", (None, None))
            silent = time.time() - trial.user_attrs.get("alive", 0.0)
            here = host == socket.gethostname()
            if (here and not _runs(process)) or silent > _DEAD:
                self._put_back(trial._trial_id)
            else:
                others += 1
        return others

    def report(self, trial: Any, value: float, rung: int) -> bool:
        """Say what a trial has reached on a rung; whether it is to stop there."""
        trial.report(value, REDUCTION**rung)
        return bool(trial.should_prune())

    def finish(self, trial: Any, value: float | None, state: str) -> None:
        """What came of a trial: complete with its value, failed, or stopped for another reason."""
        states = self._optuna.trial.TrialState
        named = {"complete": states.COMPLETE, "failed": states.FAIL}
        # A trial that another worker took over may have ended already.
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            ended = named.get(state, states.PRUNED)
            self.study.tell(trial, value if ended is states.COMPLETE else None, state=ended)

    def finished(self) -> list[Any]:
        """Trials that have ended, by their number."""
        return [
            trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()
        ]


def plan(space: Space, search: Search, count: int | None) -> list[dict[str, Any]]:
    """What each trial begins with: its place in the grid, or nothing where a sampler draws."""
    if count is not None and count < 1:
        raise TrimtabError(f"a sweep has 1 trial or more, not {count}")
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if search == "tpe" or (search == "halving" and ranges):
        return [{} for _ in range(count or 50)]
    if search not in ("grid", "halving"):
        raise TrimtabError(f"search is {search!r}: known are grid, tpe, halving")
    rows = [{name: _choice(value) for name, value in row.items()} for row in grid(space)]
    if count is not None and count < len(rows):
        raise TrimtabError(
            f"the grid has {len(rows)} settings, and {count} trials are asked for: name fewer "
            "values, or search with tpe"
        )
    return rows


def _choices(values: Sequence[Any]) -> list[Any]:
    return [_choice(value) for value in dict.fromkeys(values)]


def _choice(value: Any) -> Any:
    """A value as a storage takes it: lists as text."""
    return value if value is None or isinstance(value, str | int | float) else shown(value)


def _open(storage: str | Path) -> Any:
    """An Optuna storage by URL, or the SQLite file of a path."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    text = str(storage)
    url = text if "://" in text else f"sqlite:///{Path(text).absolute()}"
    # Workers on one SQLite file wait for each other.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, SQLAlchemyError, ImportError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise TrimtabError(f"cannot open the storage {_without_password(url)}: {first}") from error


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://...@{tail}" if at else url


def _runs(process: Any) -> bool:
    """Whether a process of this machine is there."""
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def rungs(rows: int, first: int) -> Sequence[int]:
    """How many rows a trial has seen at each rung: three times as many each time, up to all."""
    found = [min(first, rows)]
    while found[-1] < rows:
        found.append(min(found[-1] * REDUCTION, rows))
    return found
