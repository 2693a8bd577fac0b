"""The trials of a sweep in an Optuna storage, which several processes and machines may share.

What a trial begins with is settled by its number, so a worker makes the next one and runs it until
there are as many as are planned. No trial runs twice, because making one and taking one over are
single steps in the database; and one whose worker died goes back among the waiting, with its number
and its settings: a sweep that was interrupted ends as one that was not. The sampler of a trial is
seeded by its number.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trimtab.errors import TrimtabError
from trimtab.files import checksum
from trimtab.reports import Finite
from trimtab.sweeps.space import Params, Range, Space, grid, plain, shown

Search = Literal["grid", "tpe", "halving"]

#: Seconds between two signs of life of a worker, and after how many without one it is dead.
_BEAT, _DEAD = 15, 90
#: Rungs of successive halving keep one trial in so many.
REDUCTION = 3
#: What reading a damaged study raises, in Optuna and in SQLAlchemy's conversions.
_DAMAGES = (LookupError, TypeError, ValueError, AttributeError, AssertionError)
#: Trials that are drawn where nobody says how many.
_DRAWN = 50


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
    seconds: Annotated[Finite, Field(ge=0)] = 0.0
    why: str = ""


#: Who has a trial, and when a sign of life came.
_SIGNS = TypeAdapter(tuple[str, int, str])


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
        search: Search,
        count: int | None,
        maximise: bool,
        seed: int,
        fresh: bool = False,
    ) -> None:
        self._optuna = import_optuna()
        self.space, self.search, self.seed, self.maximise = space, search, seed, maximise
        self.plan = plan(space, search, count)
        self._database = open_storage(storage)
        self._storage = self._optuna.storages.get_storage(self._database)  # with what it has read
        self._heard: dict[int, tuple[float, float]] = {}
        self.name = name
        with self.reachable():
            if fresh:
                with contextlib.suppress(KeyError):
                    self._optuna.delete_study(study_name=name, storage=self._storage)
            try:
                self.study = self._optuna.create_study(
                    study_name=name,
                    storage=self._storage,
                    direction="maximize" if maximise else "minimize",
                    load_if_exists=True,
                )
                self._check()
            except (*_DAMAGES, RecursionError) as error:
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
                f"the storage {_where(self._database)} does not answer ({reason}): what was "
                "finished is kept, start the same again to go on"
            ) from error

    # -- what is there already --------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse a study that cannot have come of this sweep."""
        if (self.study.direction.name == "MAXIMIZE") != self.maximise:
            self._refuse("it counts the metric the other way")
        for trial in self.study.get_trials(deepcopy=False)[: len(self.plan)]:
            planned = self.plan[trial.number]
            if any(name not in self.space for name in trial.params) or any(
                trial.params.get(name, value) != value for name, value in planned.items()
            ):
                self._refuse(f"trial {trial.number} has other settings than planned")
            if trial.state.is_finished():
                self.outcome(trial)
            elif "worker" in trial.user_attrs:
                _SIGNS.validate_python(trial.user_attrs["worker"])
                float(trial.user_attrs.get("alive", 0.0))

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
        if state == "complete" and value is not None and trial.values != [value]:
            self._refuse(f"{where} has another value than it says")
        if {name: _choice(plain(value)) for name, value in trial.params.items()} != params:
            self._refuse(f"{where} has other settings than it says")
        if reached is not None and steps != reached:
            self._refuse(f"{where} has reached other values than it says")
        return kept

    def has_checksum(self, trial: Any) -> bool:
        """Whether what came of a trial has one; in studies of before there were any it has not."""
        return "checksum" in trial.user_attrs["outcome"]

    def _checksum(self, number: int, outcome: dict[str, Any], reached: Any) -> str:
        return checksum({"outcome": outcome, "reached": reached}, f"{self.name} {number}")

    def _ended(self, state: str) -> Any:
        """Optuna's word for it."""
        states = self._optuna.trial.TrialState
        return {"complete": states.COMPLETE, "failed": states.FAIL}.get(state, states.PRUNED)

    def _refuse(self, reason: str) -> NoReturn:
        raise TrimtabError(
            f"the study in {_where(self._database)} is damaged: {reason}; choose another "
            "directory, or pass --overwrite"
        )

    # -- working ----------------------------------------------------------------------------------

    def claim(self) -> Any | None:
        """A trial that nobody else has, or None where none is left to claim."""
        start = datetime.now()
        for waiting in self._in_state("WAITING"):
            if self._move(waiting, "RUNNING", start):
                self._storage.set_trial_user_attr(waiting._trial_id, "worker", _worker(start))
                return self._begun(waiting._trial_id, waiting.number)
        if len(self.study.get_trials(deepcopy=False)) >= len(self.plan):
            return None
        states = self._optuna.trial.TrialState
        signs = {"worker": _worker(start), "alive": time.time()}
        blank = self._optuna.trial.create_trial(state=states.RUNNING, user_attrs=signs)
        blank.datetime_start = start
        trial_id = self._storage.create_new_trial(self.study._study_id, template_trial=blank)
        number = self._storage.get_trial_number_from_id(trial_id)
        if number >= len(self.plan):  # another worker made the last one in this moment
            self._storage.set_trial_state_values(trial_id, state=states.FAIL)
            return None
        return self._begun(trial_id, number)

    def _begun(self, trial_id: int, number: int) -> Any:
        """The trial with what is planned for its number."""
        self._storage.set_trial_system_attr(trial_id, "fixed_params", self.plan[number])
        study = self._optuna.load_study(  # anew, since a study keeps the trials that it has seen
            study_name=self.name, storage=self._storage, sampler=self._sampler(number)
        )
        return self._optuna.trial.Trial(study, trial_id)

    def _sampler(self, number: int) -> Any:
        seed = self.seed * 100_003 + number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that are marked as experimental
            if self.search == "tpe":
                return self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            return self._optuna.samplers.RandomSampler(seed=seed)

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
        over, begun = threading.Event(), self._storage.get_trial(trial._trial_id)

        def beat() -> None:
            while not over.wait(_BEAT):
                with contextlib.suppress(Exception):  # the database may be away for a while
                    self._storage.set_trial_user_attr(trial._trial_id, "alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except self._optuna.exceptions.UpdateFinishedTrialError:
            pass  # another worker, to whom this one seemed dead, has ended it
        except BaseException:
            with contextlib.suppress(Exception):
                self._move(begun, "WAITING")
            raise
        finally:
            over.set()
            thread.join()

    def release_dead(self) -> int:
        """Put trials back whose worker is gone; how many others are still at work."""
        others = 0
        for trial in self._in_state("RUNNING"):
            if self._lives(trial):
                others += 1
            else:
                self._move(trial, "WAITING")
        return others

    def _lives(self, trial: Any) -> bool:
        """Whether a trial's worker is there: a process of this machine, or one that gives signs.

        What counts is when a sign was seen here, since the clocks of machines differ.
        """
        machine, process, start = trial.user_attrs.get("worker", (None, None, None))
        signed = start == str(trial.datetime_start)  # or it is that of who had the trial before
        if signed and machine == _machine() and not _runs(process):
            return False
        sign, now = trial.user_attrs.get("alive", 0.0), time.monotonic()
        known, since = self._heard.get(trial._trial_id, (None, now))
        if known != sign:
            since = now
        self._heard[trial._trial_id] = (sign, since)
        return now - since <= _DEAD

    def _in_state(self, state: str) -> list[Any]:
        """The planned trials in a state, by their number."""
        states = (self._optuna.trial.TrialState[state],)
        found = self.study.get_trials(deepcopy=False, states=states)
        return [trial for trial in found if trial.number < len(self.plan)]

    def _move(
        self, trial: Any, state: Literal["WAITING", "RUNNING"], start: datetime | None = None
    ) -> bool:
        """Move a trial to another state if it is still as it was seen, in one step.

        Optuna reads the state and then writes it, between which SQLite lets other processes in.
        """
        states = self._optuna.trial.TrialState
        if not hasattr(self._database, "engine"):  # in memory, where there is only this process
            return bool(self._storage.set_trial_state_values(trial._trial_id, states[state]))
        import sqlalchemy

        table = _trials_table(self._database.engine)
        changed = {"state": state} if start is None else {"state": state, "datetime_start": start}
        asked = sqlalchemy.update(table).values(**changed)
        asked = asked.where(table.c.trial_id == trial._trial_id, table.c.state == trial.state.name)
        if state == "WAITING":  # and not begun anew by somebody else
            asked = asked.where(table.c.datetime_start == trial.datetime_start)
        with self._database.engine.begin() as connection:
            changed_rows: int = connection.execute(asked).rowcount
        return changed_rows == 1

    def report(self, trial: Any, value: float, rung: int) -> bool:
        """Say what a trial has reached on a rung; whether it is to stop there.

        It goes on if it is among the best third of those that have reached the rung so far. Equals,
        of which there are many on a few rows, go on until the third is full.
        """
        step = REDUCTION**rung
        if step not in self._storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, step)
        others = [
            each
            for each in self.study.get_trials(deepcopy=False)
            if each.number != trial.number and step in each.intermediate_values
        ]
        sign, pruned = 1 if self.maximise else -1, self._optuna.trial.TrialState.PRUNED
        ahead = 0
        for other in others:
            lead = sign * (other.intermediate_values[step] - value)
            stopped = other.state == pruned and max(other.intermediate_values) == step
            ahead += lead > 0 or (lead == 0 and not stopped)
        return ahead >= max(1, (len(others) + 1) // REDUCTION)

    def finish(self, trial: Any, outcome: dict[str, Any], value: float | None) -> None:
        """What came of a trial: complete with its value, failed, or stopped for another reason."""
        ended = self._ended(outcome["state"])
        values = [value] if outcome["state"] == "complete" and value is not None else None
        seen = self._storage.get_trial(trial._trial_id).intermediate_values
        reached = {str(step): number for step, number in seen.items()}
        plain_outcome = json.loads(json.dumps(outcome))  # as it comes back
        seal = self._checksum(trial.number, plain_outcome, reached)
        kept = plain_outcome | {"reached": reached, "checksum": seal}
        self._storage.set_trial_user_attr(trial._trial_id, "outcome", kept)
        self._storage.set_trial_state_values(trial._trial_id, ended, values)

    def same(self, params: Params) -> Any | None:
        """An earlier trial of the same settings, which a sampler may draw again."""
        for trial in self.finished() if self.search == "tpe" else ():
            outcome = self.outcome(trial)
            if plain(outcome["params"]) == plain(params) and outcome["state"] != "failed":
                return trial
        return None

    def finished(self) -> list[Any]:
        """Trials that have ended, by their number."""
        every = self.study.get_trials(deepcopy=False)[: len(self.plan)]
        return [trial for trial in every if trial.state.is_finished()]


def plan(space: Space, search: Search, count: int | None) -> list[dict[str, Any]]:
    """What each trial begins with: its place in the grid, or nothing where a sampler draws."""
    if search not in ("grid", "tpe", "halving"):
        raise TrimtabError(f"search is {search!r}: known are grid, tpe, halving")
    if count is not None and count < 1:
        raise TrimtabError(f"a sweep has 1 trial or more, not {count}")
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if search == "tpe" or (search == "halving" and ranges):
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


# -- the storage ----------------------------------------------------------------------------------


def import_optuna() -> Any:
    """Optuna, quiet; it is an extra."""
    try:
        import optuna
    except ImportError as error:
        raise TrimtabError("a sweep needs optuna: pip install 'trimtab[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_storage(storage: Any) -> Any:
    """An Optuna storage: of a URL, in the SQLite file of a path, or in memory (None)."""
    optuna = import_optuna()
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if not isinstance(storage, str | Path):
        return storage
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError

    text = str(storage)
    file = None if "://" in text else Path(text).absolute()
    # Workers on one SQLite file wait for each other.
    options: dict[str, Any] = {}
    if file is not None:  # by its name and not in a URL, in which some characters mean something
        url = "sqlite:///study.db"
        options = {"creator": partial(sqlite3.connect, file, timeout=60, check_same_thread=False)}
    else:
        url = text.replace("{", "{{").replace("}", "}}")  # else Optuna would fill them in
        if url.startswith("sqlite"):
            options = {"connect_args": {"timeout": 60}}
    for again in range(20):
        try:
            opened = optuna.storages.RDBStorage(url, engine_kwargs=options)
            opened.url = text
            return opened
        except (SQLAlchemyError, ImportError, RuntimeError, *_DAMAGES) as error:
            # Of workers that make the tables at the same time one is first.
            if again < 19 and (isinstance(error, IntegrityError) or "already exists" in str(error)):
                time.sleep(0.1)
                continue
            raise TrimtabError(
                f"cannot open the storage {_without_password(text)}{_reason(error, text)}"
            ) from error
    raise AssertionError


def _reason(error: Exception, url: str) -> str:
    """What a database says, if it cannot hold the password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in url:
        return f": {error.__cause__ or error}".strip().splitlines()[0]
    try:
        secrets = [make_url(url).password, *make_url(url).query.values()]
    except (ArgumentError, ValueError):
        return ": write it as in sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
    lines = str(error.__cause__ or error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if any(str(secret) in first for secret in secrets if secret):
        return f": {type(error).__name__}"
    return f": {first}"


def _where(database: Any) -> str:
    """A storage for messages."""
    return _without_password(str(getattr(database, "url", "memory")))


def _without_password(url: str) -> str:
    """A URL for messages: who and where, and nothing that could be secret; a path as it is."""
    if "://" not in url:
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return f"{url.partition('://')[0]}://..."


@cache
def _trials_table(engine: Any) -> Any:
    """Optuna's table of trials, as the database has it."""
    import sqlalchemy

    return sqlalchemy.Table("trials", sqlalchemy.MetaData(), autoload_with=engine)


# -- workers --------------------------------------------------------------------------------------


def _worker(start: datetime) -> list[Any]:
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
