"""Sweeps over a method's hyperparameters: chosen on validation rows, reported on test rows.

All settings are fitted from one pass over the contrast; a trial runs only the blocks from its
lowest intervention on, on top of what the blocks below computed of the same prompts before, and
one-token tasks read one position. The best of all trials on the test rows is given apart: it is
the oracle that nobody has.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.answering import Settings
from trimtab.bench import Bench, contrast_for
from trimtab.contrasts import Contrast, Part
from trimtab.errors import TrimtabError
from trimtab.figures import Comparison, Record, Result, summarise
from trimtab.fitting import Method
from trimtab.jobs import Judging
from trimtab.methods import METHODS
from trimtab.metrics.judges import Judge
from trimtab.metrics.toxicity import Scorer
from trimtab.model import LanguageModel
from trimtab.progress import progress
from trimtab.runs import SharedRun, line_of
from trimtab.searching import Search, Trials, import_optuna, open_storage, plan, rungs
from trimtab.spaces import (
    Fitter,
    Params,
    Range,
    Space,
    check_space,
    default_space,
    described,
    grid,
    label,
    plain,
    tidy,
)
from trimtab.steering import Steering
from trimtab.tasks import Protocol

#: Validation rows that are enough for a sweep, as the AUSteer paper's fast sweep has them.
FAST = 100
#: Validation rows of the first rung of successive halving.
FIRST_RUNG = 16
_PARTS: tuple[Part, ...] = ("validation", "test")
#: Seconds between two looks at what other workers do.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Trial:
    """One setting.

    `state` is complete, pruned (stopped early), failed (`why`) or dear (above the limit of cost).
    `value` is the metric's mean over `n` validation rows, `test` that over `test_n` test rows where
    they were run; `cost` is in nats per token of plain text, where it was measured.
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


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    `best` is the complete trial of the best value on the validation rows, the first of those that
    are equal; `oracle` that of the best value on the test rows. `unsteered` has the figures of the
    unsteered model on both parts; `difference` compares the best with it on the test rows, and
    `chosen_p` is McNemar's p on the validation rows times the number of trials.
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
    difference: Comparison | None
    chosen_p: float | None
    steering: Steering | None
    flips: tuple[tuple[Record, Record], ...]
    model: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    #: Records of the best trial on the test rows.
    tested: tuple[Record, ...] = ()

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
            "difference": None if self.difference is None else asdict(self.difference),
            "trials": [asdict(trial) for trial in self.trials],
            "model": self.model,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def sweep(
    language_model: LanguageModel,
    method: str | type[Method],
    task: str,
    space: Space | None = None,
    *,
    fixed: Params | None = None,
    search: Search = "grid",
    trials: int | None = None,
    contrast: Contrast | str | None = None,
    data: str | Path | None = None,
    protocol: Protocol = "trimtab",
    limit: int | None = FAST,
    test_limit: int | None = None,
    validation_task: str | None = None,
    metric: str | None = None,
    max_cost: float | None = None,
    oracle: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    toxicity: str | Scorer = "offline",
    judges: Sequence[Judge] = (),
    output: str | Path | None = None,
    storage: str | None = None,
    resumed: bool = True,
    overwrite: bool = False,
) -> Sweep:
    """Try settings of a method on a task, choose on its validation rows, report on its test rows.

    `space` gives values (or a `Range`) for each hyperparameter that is searched (default: the
    grid of the method's paper), `fixed` values for others. `search` is grid; tpe (Optuna's
    sampler, `trials` of them); or halving: successive halving over growing parts of the validation
    rows, of a grid or of random draws from ranges. `contrast` is what is fitted on (default: the
    task's own train rows). `limit` takes so many validation rows (None: all), `test_limit` so many
    test rows; `validation_task` is another task whose test rows stand in for the validation rows,
    for tasks that have none. `metric` is by default the first that the task has. `max_cost` leaves
    out settings that cost more nats per token of plain text. `oracle` runs every complete trial on
    the test rows too. `output` names a run directory, in which a sweep that was interrupted goes
    on; `storage` is any Optuna storage, on which other processes and machines may work at the same
    time. `resumed` false runs every trial through all blocks.
    """
    kind = METHODS.get(method) if isinstance(method, str) else method
    if kind is None:
        raise TrimtabError(f"unknown method {method!r}: known are {', '.join(METHODS)}")
    if not isinstance(kind, type):
        raise TrimtabError(f"name a method, {kind.name!r}: its hyperparameters are space and fixed")
    own = {name: plain(value) for name, value in (fixed or {}).items()}
    layers = language_model.anatomy.layers
    given = tidy(default_space(kind, layers, own) if space is None else space)
    check_space(kind, given, own)
    plan(given, search, trials)  # refuses what it cannot plan
    import_optuna()
    if storage is not None and output is None:
        raise TrimtabError("a storage needs a run directory too: name an output")
    source = None if data is None else str(data)
    bench = Bench(
        language_model,
        task,
        data=source,
        protocol=protocol,
        limits={"validation": limit, "test": test_limit},
        validation_task=validation_task,
        judging=Judging(toxicity, tuple(judges)),
        settings=Settings(seed, batch_size, max_new_tokens),
        metric=metric,
        shuffle=seed if search == "halving" else None,
        resumed=resumed,
    )
    texts = contrast_for(task, contrast, source)
    config = {
        "method": kind.name,
        "space": described(given),
        "fixed": own,
        "search": search,
        "trials": trials,
        "task": bench.describe(),
        "contrast": {"name": texts.name, "digest": texts.digest},
        "protocol": protocol,
        "metric": metric,
        "max_cost": max_cost,
        "oracle": oracle,
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "model": language_model.described,
    }
    fitter = Fitter(language_model, kind, texts, given, own)
    if not any(isinstance(values, Range) for values in given.values()):
        fitter.check(grid(given))
    opened = None if storage is None else open_storage(storage)
    going_on = output is not None and Path(output).exists() and not overwrite
    if not going_on:
        bench.metric  # noqa: B018, refuses an unknown one before anything is written or lost
    run = SharedRun(output, config, overwrite)
    found = try_settings(
        bench,
        fitter,
        given,
        search=search,
        trials=trials,
        max_cost=max_cost,
        oracle=oracle,
        seed=seed,
        run=run,
        storage=opened,
        fresh=overwrite,
    )
    if found.trials and all(trial.state == "failed" for trial in found.trials):
        some = "the trial" if len(found.trials) == 1 else f"all {len(found.trials)} trials"
        raise TrimtabError(f"{some} failed: {found.trials[0].why}")
    if run.path is not None:
        from trimtab.sweep_report import sweep_page  # needs the classes of this file

        if found.steering is not None:
            found.steering.save(run.path / "best.safetensors", overwrite=True)
        run.finish(found.as_json(), lambda environment: sweep_page(found, run, environment))
    return found


def try_settings(
    bench: Bench,
    fitter: Fitter,
    space: Space,
    *,
    search: Search,
    trials: int | None,
    max_cost: float | None,
    oracle: bool,
    seed: int,
    run: SharedRun,
    storage: Any = None,
    fresh: bool = False,
) -> Sweep:
    """A sweep on a bench and with a fitter that may serve others too; arguments as of `sweep`."""
    for part in _PARTS:
        kept = run.kept(f"unsteered-{part}")
        if kept is not None:
            bench.recall(part, kept)
    worker = _Worker(bench, fitter, run, max_cost, oracle)
    if storage is None and run.path is not None:
        storage = run.path / "study.db"
    queue = Trials(storage, _name(run.config), space, search, trials, bench.maximise, seed, fresh)
    with queue.reachable():
        worker.work(queue)
        return worker.found(queue, bench.task)


def _name(config: Mapping[str, Any]) -> str:
    """The study's name: who sweeps the same joins, who sweeps something else does not."""
    text = json.dumps(config, sort_keys=True)
    return f"trimtab-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass
class _Worker:
    """Runs trials until none is left, and tells what came of them."""

    bench: Bench
    fitter: Fitter
    run: SharedRun
    max_cost: float | None
    oracle: bool
    #: The best of the trials that were run here, and its records.
    _top: tuple[Trial, ...] = ()
    _top_records: dict[Part, list[Record]] = field(default_factory=dict)

    def work(self, queue: Trials) -> None:
        """Until every trial has ended, here or elsewhere."""
        with progress(f"sweep of {self.fitter.method.name}", len(queue.plan)) as advance:
            shown = 0
            while True:
                others = queue.release_dead()
                trial = queue.claim()
                if trial is not None:
                    with queue.alive(trial):
                        self._try(queue, trial)
                elif others:
                    time.sleep(_PATIENCE)
                else:
                    break
                ended = len(queue.finished())
                advance(ended - shown)
                shown = ended

    def _try(self, queue: Trials, trial: Any) -> None:
        """Run one trial, keep its records, and say what came of it."""
        started = time.perf_counter()
        params = queue.params(trial)
        outcome: dict[str, Any] = {"params": params, "state": "complete"}
        records: dict[Part, list[Record]] = {}
        earlier = queue.same(params)
        if earlier is not None:  # drawn before
            outcome = {**earlier.user_attrs["outcome"], "seconds": 0.0}
            for part in _PARTS:
                some = self.run.kept(f"{earlier.number:05d}-{part}")
                if some is not None:
                    self.run.keep(f"{trial.number:05d}-{part}", some)
            queue.finish(trial, outcome, outcome.get("value"))
            return
        try:
            steering = self.fitter.steering(params)
            self._measure(queue, trial, steering, outcome, records)
            for record in (record for part in records.values() for record in part):
                line_of(record)  # refuses what is not a number
        except TrimtabError as error:
            outcome = {"params": params, "state": "failed", "why": str(error)}
        outcome["seconds"] = round(time.perf_counter() - started, 3)
        if outcome["state"] == "failed":
            queue.finish(trial, outcome, None)
            return
        for part, some in records.items():
            self.run.keep(f"{trial.number:05d}-{part}", some)
        if outcome["state"] == "complete":
            known = Trial(trial.number, **outcome)
            if _best([*self._top, known], "value", self.bench.maximise) is known:
                self._top, self._top_records = (known,), records
        queue.finish(trial, outcome, outcome.get("value"))

    def _measure(
        self,
        queue: Trials,
        trial: Any,
        steering: Steering,
        outcome: dict[str, Any],
        records: dict[Part, list[Record]],
    ) -> None:
        """Fill in what a steering costs and what it is worth, and the records that say so."""
        bench, name = self.bench, label(self.fitter.method, outcome["params"])
        if self.max_cost is not None:
            cost = bench.cost(steering)
            if not math.isfinite(cost):
                raise TrimtabError("its cost is no finite number: the model's numbers overflow")
            outcome["cost"] = cost
            if cost > self.max_cost:
                outcome["state"] = "dear"
                return
        halving = queue.search == "halving"
        rows = bench.rows("validation")
        done: list[Record] = []
        for rung, stop in enumerate(rungs(rows, FIRST_RUNG) if halving else [rows]):
            done += bench.records(steering, "validation", len(done), stop, name)
            records["validation"] = done
            result = bench.result(done)
            outcome |= {"value": result.value, "n": result.n, "ci95": result.ci95}
            if result.value is None:
                continue
            if not math.isfinite(result.value):
                raise TrimtabError(f"{bench.metric} is no finite number")
            if stop < rows and queue.report(trial, result.value, rung):
                outcome["state"] = "pruned"
                return
        if outcome["value"] is None:
            raise TrimtabError("no answer was clear")
        if self.oracle:
            records["test"] = bench.records(steering, "test", name=name)
            outcome |= _tested(bench.result(records["test"]))

    # -- what was found ---------------------------------------------------------------------------

    def found(self, queue: Trials, task: str) -> Sweep:
        """The best trial, run on the test rows, and everything beside it."""
        bench, fitter = self.bench, self.fitter
        trials = [_trial(one) for one in queue.finished()]
        complete = [trial for trial in trials if trial.state == "complete"]
        best = _best(complete, "value", bench.maximise)
        unsteered = {part: self._unsteered(part) for part in _PARTS}
        difference, chosen_p, steering = None, None, None
        flips: tuple[tuple[Record, Record], ...] = ()
        tested: list[Record] | None = None
        if best is not None:
            steering = fitter.steering(best.params)
            tested = self._records(best, "test", steering)
            result = bench.result(tested)
            best = replace(best, **_tested(result))
            compared = summarise([*unsteered["test"], *tested], {})
            flips = tuple(compared.flips())
            difference = _of(compared.comparisons, bench.metric)
            chosen = self._records(best, "validation", steering)
            on_validation = summarise([*unsteered["validation"], *chosen], {})
            against = _of(on_validation.comparisons, bench.metric)
            if against is not None and against.p is not None:
                chosen_p = min(1.0, against.p * sum(trial.n > 0 for trial in trials))
            steering = fitter.fitted(best.params)
        with_test = [best if best and t.number == best.number else t for t in trials]
        oracle = None
        if self.oracle:
            oracle = _best([t for t in with_test if t.state == "complete"], "test", bench.maximise)
        figures: dict[str, Result] = {p: bench.result(some) for p, some in unsteered.items()}
        return Sweep(
            method=fitter.method.name,
            task=task,
            metric=bench.metric,
            maximise=bench.maximise,
            space=dict(queue.space),
            trials=tuple(with_test),
            best=best,
            oracle=oracle,
            unsteered=figures,
            difference=difference,
            chosen_p=chosen_p,
            steering=steering,
            flips=flips,
            model=dict(vars(bench.language_model.identity)),
            seconds=round(sum(trial.seconds for trial in trials), 2),
            notes=(*bench.notes(), *_caveats(trials, best, figures, bench.maximise, chosen_p)),
            tested=tuple(tested or ()),
        )

    def _records(self, trial: Trial, part: Part, steering: Steering) -> list[Record]:
        """The records of a trial on a part; run here where another machine has them, or nobody."""
        if part in self._top_records and trial.number == self._top[0].number:
            return self._top_records[part]
        name = f"{trial.number:05d}-{part}"
        records = self.run.kept(name)
        if records is None:
            called = label(self.fitter.method, trial.params)
            records = self.bench.records(steering, part, name=called)
            self.run.keep(name, records)
        return records

    def _unsteered(self, part: Part) -> list[Record]:
        records = self.bench.unsteered(part)
        if self.run.kept(f"unsteered-{part}") is None:
            self.run.keep(f"unsteered-{part}", records)
        return records


def _trial(frozen: Any) -> Trial:
    outcome = frozen.user_attrs.get("outcome", {"params": {}, "state": "failed"})
    return Trial(frozen.number, **{name: plain(value) for name, value in outcome.items()})


def _tested(result: Result) -> dict[str, Any]:
    return {"test": result.value, "test_n": result.n, "test_ci95": result.ci95}


def _best(trials: Sequence[Trial], part: str, maximise: bool) -> Trial | None:
    """The first of the trials that are best on a part."""
    known = [trial for trial in trials if getattr(trial, part) is not None]
    sign = -1 if maximise else 1
    return min(known, key=lambda t: (sign * getattr(t, part), t.number), default=None)


def _of(comparisons: Sequence[Comparison], metric: str) -> Comparison | None:
    return next((found for found in comparisons if found.metric == metric), None)


def _caveats(
    trials: Sequence[Trial],
    best: Trial | None,
    unsteered: Mapping[str, Result],
    maximise: bool,
    chosen_p: float | None,
) -> list[str]:
    """What a reader of the figures must know."""
    states = [trial.state for trial in trials]
    said = []
    for state, words in (
        ("pruned", "were stopped early"),
        ("dear", "cost more than the limit and were not run"),
        ("failed", "failed"),
    ):
        if state in states:
            said.append(f"{states.count(state)} of {len(trials)} trials {words}")
    reasons = dict.fromkeys(trial.why for trial in trials if trial.why)
    said += list(reasons)[:3]
    base = unsteered["validation"].value
    if best is None:
        said.append("no trial has a value: there is nothing to choose")
        costs = [trial.cost for trial in trials if trial.cost is not None]
        if costs:
            said.append(f"the cheapest trial costs {min(costs):.3g} nats per token of plain text")
    elif base is not None and best.value is not None:
        if (best.value <= base) if maximise else (best.value >= base):
            said.append("no setting beats the unsteered model on the validation rows")
        elif chosen_p is not None and chosen_p > 0.05:
            ran = sum(trial.n > 0 for trial in trials)
            said.append(
                f"the best of {ran} trials on the validation rows could be luck: McNemar's "
                f"p, times the number of trials, is {chosen_p:.2g}"
            )
    return said
