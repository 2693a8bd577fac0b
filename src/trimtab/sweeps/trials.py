"""The trials of a sweep in an Optuna storage, which several processes and machines may share.

What a trial begins with is settled by its number in the plan, which also seeds its sampler. A
worker puts the first number that nobody has into the study's queue and asks for a trial, until all
have ended. One whose worker died is given up, and its number is free again, with the settings that
were drawn: a sweep that was interrupted ends as one that was not.

No number runs twice. Of several trials with one number the first counts, and whoever has another
gives it up; and on SQLite, where two processes could be given the same trial, they ask one by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trimtab.errors import TrimtabError
from trimtab.files import checksum
from trimtab.options import Searching
from trimtab.reports import Finite
from trimtab.sweeps.space import Params, Range, Space, grid, plain, shown
from trimtab.sweeps.storage import DAMAGES, import_optuna, one_by_one, open_storage, storage_name

#: Seconds between two signs of life of a worker, and after how many without one it is dead.
_BEAT, _DEAD = 15, 90
#: Rungs of successive halving keep one trial in so many.
REDUCTION = 3
#: Trials that are drawn where nobody says how many.
_DRAWN = 50
#: Trials that tpe draws at random, before it looks at what came of others.
_BEFORE_TPE = 10
#: Which share of the trials of a search for trade-offs is drawn at random, before the others.
_AT_RANDOM = 0.3


_Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]
_Count = Annotated[int, Field(ge=0)]


class _Outcome(BaseModel):
    """The form of what a study says came of a trial."""

    model_config = ConfigDict(extra="forbid", strict=True)

    params: dict[str, Any]
    state: Literal["complete", "pruned", "failed", "dear"]
    value: Finite | None = None
    n: _Count = 0
    ci95: _Interval | None = None
    test: Finite | None = None
    test_n: _Count = 0
    test_ci95: _Interval | None = None
    cost: Finite | None = None
    kl: Finite | None = None
    seconds: Annotated[Finite, Field(ge=0)] = 0.0
    why: str = ""


#: Who has a trial, and when a sign of life came.
_SIGNS = TypeAdapter(tuple[str, int, str])


@dataclass(frozen=True)
class Claimed:
    """A trial that this worker runs: its number in the plan, and Optuna's trial."""

    number: int
    trial: Any


class Trials:
    """The trials of one sweep in an Optuna study.

    `storage` is what `open_storage` takes or has opened; `name` is the study's name. A study of
    this name that is there is joined, unless `fresh`.
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        space: Space,
        search: Searching,
        count: int | None,
        maximise: bool,
        seed: int,
        fresh: bool = False,
    ) -> None:
        self._optuna = import_optuna()
        self.space, self.search, self.seed, self.maximise = space, search, seed, maximise
        self.plan = plan(space, search, count)
        self._database = open_storage(storage)
        self._states = self._optuna.trial.TrialState
        self._heard: dict[int, tuple[float, float]] = {}
        self.name = name
        with self.reachable():
            if fresh:
                with contextlib.suppress(KeyError):
                    self._optuna.delete_study(study_name=name, storage=self._database)
            try:
                self.study = self._optuna.create_study(
                    study_name=name,
                    storage=self._database,
                    directions=self._directions,
                    load_if_exists=True,
                )
                self._check()
            except (*DAMAGES, RecursionError) as error:
                self._refuse(type(error).__name__)

    @contextlib.contextmanager
    def reachable(self) -> Iterator[None]:
        """A database that goes away meanwhile is said in one line."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (self._optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            reason = type(error.__cause__ or error).__name__
            raise TrimtabError(
                f"the storage {storage_name(self._database)} does not answer ({reason}): what was "
                "finished is kept, start the same again to go on"
            ) from error

    # -- what is there already --------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse a study that cannot have come of this sweep."""
        if [each.name.lower() for each in self.study.directions] != self._directions:
            self._refuse("it counts the metric the other way")
        for trial in self.study.get_trials(deepcopy=False):
            number = _number(trial)
            if number not in range(len(self.plan)):
                continue
            if any(name not in self.space for name in trial.params) or any(
                trial.params.get(name, value) != value for name, value in self.plan[number].items()
            ):
                self._refuse(f"trial {number} has other settings than planned")
            if not trial.state.is_finished() and "worker" in trial.user_attrs:
                _SIGNS.validate_python(trial.user_attrs["worker"])
                float(trial.user_attrs.get("alive", 0.0))
        for trial in self.finished():
            self.outcome(trial)

    def outcome(self, trial: Any) -> dict[str, Any]:
        """What came of a trial that has ended; refused where it is damaged."""
        where = f"trial {trial.number}"
        kept = dict(trial.user_attrs.get("outcome") or {})
        sealed, reached = kept.pop("checksum", None), kept.pop("reached", None)
        if sealed is not None and sealed != self._checksum(trial.number, kept, reached):
            self._refuse(f"{where} was changed, or has another's outcome")
        try:
            _Outcome.model_validate(kept)
        except ValidationError as error:
            first = error.errors()[0]
            self._refuse(f"{where}, {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}")
        state, value = kept["state"], kept.get("value")
        params = {name: _choice(plain(value)) for name, value in kept["params"].items()}
        steps = {str(step): number for step, number in trial.intermediate_values.items()}
        if trial.state.name != self._ended(state).name:
            self._refuse(f"{where} ended in another way than it says")
        if state == "complete" and value is not None and trial.values != self._values(kept):
            self._refuse(f"{where} has another value than it says")
        if {name: _choice(plain(value)) for name, value in trial.params.items()} != params:
            self._refuse(f"{where} has other settings than it says")
        if reached is not None and steps != reached:
            self._refuse(f"{where} has reached other values than it says")
        return kept

    @property
    def _directions(self) -> list[str]:
        """Which way each of what a trial is judged by counts: the metric, and KL."""
        metric = "maximize" if self.maximise else "minimize"
        return [metric, "minimize"] if self.search == "pareto" else [metric]

    def _values(self, outcome: Mapping[str, Any]) -> list[Any]:
        """What a complete trial is judged by."""
        if self.search == "pareto":
            return [outcome["value"], outcome["kl"]]
        return [outcome["value"]]

    def has_checksum(self, trial: Any) -> bool:
        """Whether what came of a trial has one; in studies of before there were any it has not."""
        return "checksum" in trial.user_attrs["outcome"]

    def _checksum(self, number: int, outcome: dict[str, Any], reached: Any) -> str:
        return checksum({"outcome": outcome, "reached": reached}, f"{self.name} {number}")

    def _ended(self, state: str) -> Any:
        """Optuna's word for it."""
        states = {"complete": self._states.COMPLETE, "failed": self._states.FAIL}
        return states.get(state, self._states.PRUNED)

    def _refuse(self, reason: str) -> NoReturn:
        raise TrimtabError(
            f"the study in {storage_name(self._database)} is damaged: {reason}; choose another "
            "directory, or pass --overwrite"
        )

    # -- working ----------------------------------------------------------------------------------

    @property
    def together(self) -> int:
        """How many of the first trials may run side by side and be what they are one by one, since
        none of them hangs on what came of another."""
        return {"grid": len(self.plan), "tpe": _BEFORE_TPE}.get(self.search, 1)

    def claim(self) -> Claimed | None:
        """A trial that nobody else has, or None where none is left to claim."""
        with one_by_one(self._database):
            while True:
                counting = self._counting()
                free = next((n for n in range(len(self.plan)) if n not in counting), None)
                if free is not None:
                    begun = {"place": free, "alive": time.time()}
                    self.study.enqueue_trial(self._start(free), begun)
                elif all(trial.state != self._states.WAITING for trial in counting.values()):
                    return None
                trial = self.study.ask()
                # Where another worker took what was waiting, this is one of no number.
                known = not trial.user_attrs.keys().isdisjoint(("place", "worker"))
                trial.set_user_attr("worker", _worker(trial.datetime_start))
                number = _number(trial)
                first = self._counting().get(number)
                if known and first is not None and first.number == trial.number:
                    return Claimed(number, trial)
                self.study.tell(trial, state=self._states.FAIL)

    def _start(self, number: int) -> dict[str, Any]:
        """What a trial begins with: what is planned, and what was drawn before it was given up."""
        earlier = [t for t in self.study.get_trials(deepcopy=False) if _number(t) == number]
        return {**self.plan[number], **(earlier[-1].params if earlier else {})}

    def _counting(self) -> dict[int, Any]:
        """The trials that count, by their number: the first of each that was not given up."""
        found: dict[int, Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            number = _number(trial)
            given_up = trial.state == self._states.FAIL and "outcome" not in trial.user_attrs
            if number in range(len(self.plan)) and not given_up:
                found.setdefault(number, trial)
        return found

    def _sampler(self, number: int) -> Any:
        seed = self.seed * 100_003 + number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that are marked as experimental
            if self.search == "tpe":
                return self._optuna.samplers.TPESampler(
                    seed=seed, constant_liar=True, n_startup_trials=_BEFORE_TPE
                )
            if self.search == "pareto":
                return self._optuna.samplers.TPESampler(
                    seed=seed,
                    constant_liar=True,
                    multivariate=True,
                    n_startup_trials=max(10, round(_AT_RANDOM * len(self.plan))),
                )
            return self._optuna.samplers.RandomSampler(seed=seed)

    def params(self, claimed: Claimed) -> Params:
        """The settings of a trial, drawn where they were not planned."""
        self.study.sampler = self._sampler(claimed.number)
        found: Params = {}
        trial = claimed.trial
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
    def alive(self, claimed: Claimed) -> Iterator[None]:
        """Signs of life while a trial runs; one that is interrupted is given up."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(_BEAT):
                with contextlib.suppress(Exception):  # the database may be away for a while
                    claimed.trial.set_user_attr("alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except self._optuna.exceptions.UpdateFinishedTrialError:
            pass  # another worker, to whom this one seemed dead, has given it up
        except BaseException:
            with contextlib.suppress(Exception):
                self._give_up(claimed.trial)
            raise
        finally:
            over.set()
            thread.join()

    def release_dead(self) -> int:
        """Give up the trials whose worker is gone; how many others are still at work."""
        others = 0
        for trial in self._in_state("RUNNING"):
            if self._lives(trial):
                others += 1
            else:
                self._give_up(trial)
        return others

    def _give_up(self, trial: Any) -> None:
        """End a trial of which nothing came, unless it has ended."""
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(trial.number, state=self._states.FAIL, skip_if_finished=True)

    def _lives(self, trial: Any) -> bool:
        """Whether a trial's worker is there: a process of this machine, or one that gives signs.

        What counts is when a sign was seen here, since the clocks of machines differ.
        """
        machine, process, start = trial.user_attrs.get("worker", (None, None, None))
        signed = start == str(trial.datetime_start)  # or it is that of who had the trial before
        if signed and machine == _machine() and not _runs(process):
            return False
        sign, now = trial.user_attrs.get("alive", 0.0), time.monotonic()
        known, since = self._heard.get(trial.number, (None, now))
        if known != sign:
            since = now
        self._heard[trial.number] = (sign, since)
        return now - since <= _DEAD

    def _in_state(self, state: str) -> list[Any]:
        """The trials that count and are in a state."""
        return [trial for trial in self._counting().values() if trial.state.name == state]

    def report(self, claimed: Claimed, value: float, rung: int) -> bool:
        """Say what a trial has reached on a rung; whether it is to stop there.

        It goes on if it is among the best third of those that have reached the rung so far. Equals,
        of which there are many on a few rows, go on until the third is full; Optuna's own pruner
        would let all of them go on.
        """
        step = REDUCTION**rung
        if step not in self._reached(claimed):
            claimed.trial.report(value, step)
        others = [
            trial
            for number, trial in self._counting().items()
            if number != claimed.number and step in trial.intermediate_values
        ]
        sign = 1 if self.maximise else -1
        ahead = 0
        for other in others:
            lead = sign * (other.intermediate_values[step] - value)
            pruned = other.state == self._states.PRUNED
            stopped = pruned and max(other.intermediate_values) == step
            ahead += lead > 0 or (lead == 0 and not stopped)
        return ahead >= max(1, (len(others) + 1) // REDUCTION)

    def _reached(self, claimed: Claimed) -> dict[int, float]:
        """What a trial has reached, by rung."""
        trials = self.study.get_trials(deepcopy=False)
        own = next(trial for trial in trials if trial.number == claimed.trial.number)
        reached: dict[int, float] = own.intermediate_values
        return reached

    def finish(self, claimed: Claimed, outcome: dict[str, Any], value: float | None) -> None:
        """What came of a trial: complete with its value, failed, or stopped for another reason."""
        reached = {str(step): number for step, number in self._reached(claimed).items()}
        plain_outcome = json.loads(json.dumps(outcome))  # as it comes back
        seal = self._checksum(claimed.number, plain_outcome, reached)
        kept = plain_outcome | {"reached": reached, "checksum": seal}
        claimed.trial.set_user_attr("outcome", kept)
        state = self._ended(outcome["state"])
        values = (
            self._values(outcome | {"value": value}) if outcome["state"] == "complete" else None
        )
        self.study.tell(claimed.trial, values, state, skip_if_finished=True)

    def same(self, params: Params) -> Any | None:
        """An earlier trial of the same settings, which a sampler may draw again."""
        for trial in self.finished() if self.search == "tpe" else ():
            outcome = self.outcome(trial)
            if plain(outcome["params"]) == plain(params) and outcome["state"] != "failed":
                return trial
        return None

    def finished(self) -> list[Any]:
        """The trials that have ended, by their number in the plan."""
        ended = []
        for number, trial in sorted(self._counting().items()):
            if trial.state.is_finished():
                numbered = copy(trial)
                numbered.number = number
                ended.append(numbered)
        return ended


def _number(trial: Any) -> Any:
    """A trial's number in the plan; those from before some were given up have only Optuna's."""
    return trial.user_attrs.get("place", trial.number)


def plan(space: Space, search: Searching, count: int | None) -> list[dict[str, Any]]:
    """What each trial begins with: its place in the grid, or nothing where a sampler draws."""
    if search not in get_args(Searching):
        raise TrimtabError(f"search is {search!r}: known are {', '.join(get_args(Searching))}")
    if count is not None and count < 1:
        raise TrimtabError(f"a sweep has 1 trial or more, not {count}")
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if search in ("tpe", "pareto") or (search == "halving" and ranges):
        return [{} for _ in range(count or _DRAWN)]
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


def rungs(rows: int, first: int) -> Sequence[int]:
    """How many rows a trial has seen at each rung: three times as many each time, up to all."""
    found = [min(first, rows)]
    while found[-1] < rows:
        found.append(min(found[-1] * REDUCTION, rows))
    return found


# -- workers --------------------------------------------------------------------------------------


def _worker(start: Any) -> list[Any]:
    """This process, for others to tell whether it is there, and when it began a trial."""
    return [_machine(), os.getpid(), str(start)]


@cache
def _machine() -> str:
    """This machine, or the container in which process numbers mean the same."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _runs(process: Any) -> bool:
    """Whether a process of this machine is there, and is more than its parent's memory of it."""
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] not in "ZX"
    return True
