"""Runs the trials of a sweep, together with whoever else works on its storage, and tells what came
of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.contrasts import Part
from trimtab.errors import TrimtabError
from trimtab.figures import Difference, Record, Result, comparisons_of, flips_of
from trimtab.files import json_digest
from trimtab.options import Search
from trimtab.reading import Engine
from trimtab.reports import Run, line_of
from trimtab.steering import Steering
from trimtab.sweeps.front import front, is_within, picked
from trimtab.sweeps.neutral import Neutral
from trimtab.sweeps.result import Sweep, Trial
from trimtab.sweeps.rows import TaskRows, choose
from trimtab.sweeps.space import Fitter, Params, Range, Space, at_ends, label, plain
from trimtab.sweeps.trials import Claimed, Trials, rungs
from trimtab.terminal import progress

#: Validation rows of the first rung of successive halving.
FIRST_RUNG = 16
_PARTS: tuple[Part, ...] = ("validation", "test")
#: Seconds between two looks at what other workers do.
_PATIENCE = 2.0
#: Trials about which an engine is asked at once.
_TOGETHER = 32


def try_settings(
    rows: TaskRows,
    fitter: Fitter,
    space: Space,
    search: Search,
    *,
    max_cost: float | None,
    seed: int,
    run: Run,
    storage: Any = None,
    fresh: bool = False,
    neutral: Neutral | None = None,
) -> Sweep:
    """A sweep on rows and with a fitter that may serve others too; arguments as of `sweep`."""
    if rows.engine is not None:
        hook(rows.engine, fitter, space)
    for part in _PARTS:
        kept = rows.kept(run, f"unsteered-{part}", part)
        if kept is not None:
            rows.recall(part, kept)
    _ = rows.metric  # one that the task does not have is refused before anything is written
    run.begin()
    worker = _Worker(rows, fitter, run, max_cost, search, neutral)
    if storage is None and run.path is not None:
        storage = run.path / "study.db"
    name, how = _name(run.config), (search.search, search.trials)
    queue = Trials(storage, name, space, *how, rows.maximise, seed, fresh)
    with queue.reachable():
        worker.work(queue)
        return worker.found(queue, rows.task)


def hook(engine: Engine, fitter: Fitter, space: Space) -> None:
    """Have an engine start with the kinds of sites at which a method's settings act, in all
    blocks: those of its first setting, of each site that is searched."""
    first = {
        name: values.low if isinstance(values, Range) else values[0]
        for name, values in space.items()
    }
    sites = space.get("site", ())
    more = [] if isinstance(sites, Range) else [{**first, "site": site} for site in sites]
    for params in [first, *more]:
        with suppress(TrimtabError):  # which fails when it is tried
            engine.prepare([fitter.steering(params)], everywhere=True)


def _name(config: Mapping[str, Any]) -> str:
    """The study's name: who sweeps the same joins, who sweeps something else does not."""
    return f"trimtab-{json_digest(config, sort_keys=True)[:16]}"


@dataclass
class _Worker:
    """Runs trials until none is left, and tells what came of them."""

    rows: TaskRows
    fitter: Fitter
    run: Run
    max_cost: float | None
    search: Search
    #: Texts on which a search for trade-offs measures KL.
    neutral: Neutral | None = None
    #: The best of the trials that were run here, and its records.
    _top: tuple[Trial, ...] = ()
    _top_records: dict[Part, list[Record]] = field(default_factory=dict)
    #: Steerings that an engine was asked about, by the number of their trial.
    _fitted: dict[int, Steering] = field(default_factory=dict)

    def work(self, queue: Trials) -> None:
        """Until every trial has ended, here or elsewhere."""
        with progress(f"sweep of {self.fitter.method.name}", len(queue.plan)) as advance:
            shown = 0
            while shown < len(queue.plan):
                others = queue.release_dead()
                with ExitStack() as alive:
                    trials = self._claimed(queue, alive)
                    share = self._ask_ahead(queue, trials)
                    for trial in trials:
                        self._try(queue, trial, share)
                if others and not trials:
                    time.sleep(_PATIENCE)
                ended = len(queue.finished())
                advance(ended - shown)
                shown = ended

    def _claimed(self, queue: Trials, alive: ExitStack) -> list[Claimed]:
        """A trial that nobody else has, or none; of an engine several, where no trial hangs on what
        came of another."""
        most = 1 if self.rows.engine is None else min(_TOGETHER, queue.together)
        found: list[Claimed] = []
        while len(found) < most and (not found or found[-1].number + 1 < queue.together):
            trial = queue.claim()
            if trial is None:
                break
            alive.enter_context(queue.alive(trial))
            found.append(trial)
        return found

    def _ask_ahead(self, queue: Trials, trials: Sequence[Claimed]) -> float:
        """Of an engine: have it answer for all of some trials at once; seconds for each."""
        if self.rows.engine is None or len(trials) < 2:
            return 0.0
        started = time.perf_counter()
        steerings: dict[int, Steering] = {}
        drawn: list[Params] = []
        for trial in trials:
            params = queue.params(trial)
            if params in drawn or queue.same(params) is not None:
                continue  # another says what comes of it
            drawn.append(params)
            # What cannot be fitted, or is not carried, fails when it is tried.
            with suppress(TrimtabError):
                steering = self.fitter.steering(params)
                self.rows.engine.prepare([steering])
                self._fitted[trial.number] = steerings[id(steering)] = steering
        parts = _PARTS if self.search.oracle else _PARTS[:1]
        self.rows.ask_ahead(list(steerings.values()), parts, self.max_cost)
        return (time.perf_counter() - started) / len(trials)

    def _try(self, queue: Trials, trial: Claimed, share: float = 0.0) -> None:
        """Run one trial, keep its records, and say what came of it; `share` are seconds that it
        took already."""
        started = time.perf_counter()
        params = queue.params(trial)
        outcome: dict[str, Any] = {"params": params, "state": "complete"}
        records: dict[Part, list[Record]] = {}
        earlier = queue.same(params)
        if earlier is not None:  # drawn before
            outcome = {**queue.outcome(earlier), "seconds": 0.0}
            for part in _PARTS:
                some = self.run.kept(f"{earlier.number:05d}-{part}")
                if some is not None:
                    self.run.keep(f"{trial.number:05d}-{part}", some)
            queue.finish(trial, outcome, outcome.get("value"))
            return
        try:
            steering = self._fitted.pop(trial.number, None) or self.fitter.steering(params)
            self._measure(queue, trial, steering, outcome, records)
            for record in (record for part in records.values() for record in part):
                line_of(record)  # refuses what is not a number
        except TrimtabError as error:
            outcome = {"params": params, "state": "failed", "why": str(error)}
        outcome["seconds"] = round(share + time.perf_counter() - started, 3)
        if outcome["state"] == "failed":
            queue.finish(trial, outcome, None)
            return
        for part, some in records.items():
            self.run.keep(f"{trial.number:05d}-{part}", some)
        if outcome["state"] == "complete":
            known = _trial(trial.number, outcome)
            if self._better([*self._top, known]) is known:
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
        rows, name = self.rows, label(self.fitter.method, outcome["params"])
        if self.max_cost is not None:
            cost = rows.plain.cost(steering)
            if not math.isfinite(cost):
                raise TrimtabError("its cost is no finite number: the model's numbers overflow")
            outcome["cost"] = cost
            if cost > self.max_cost and self.neutral is None:
                outcome["state"] = "dear"
                return
        if self.neutral is not None:  # what costs too much is a point of the front all the same
            outcome["kl"] = self.neutral.kl(steering)
            if not math.isfinite(outcome["kl"]):
                raise TrimtabError("its KL on neutral texts is no finite number")
        halving = queue.search == "halving"
        count = rows.rows("validation")
        done: list[Record] = []
        for rung, stop in enumerate(rungs(count, FIRST_RUNG) if halving else [count]):
            done += rows.records(steering, "validation", len(done), stop, name)
            records["validation"] = done
            result = rows.result(done)
            outcome |= {"value": result.value, "n": result.n, "ci95": result.ci95}
            if result.value is None:
                continue
            if not math.isfinite(result.value):
                raise TrimtabError(f"{rows.metric} is no finite number")
            if stop < count and queue.report(trial, result.value, rung):
                outcome["state"] = "pruned"
                return
        if outcome["value"] is None:
            raise TrimtabError("no answer was clear")
        if self.search.oracle:
            records["test"] = rows.records(steering, "test", name=name)
            outcome |= _tested(rows.result(records["test"]))

    # -- what was found ---------------------------------------------------------------------------

    def found(self, queue: Trials, task: str) -> Sweep:
        """The best trial, run on the test rows, and everything beside it."""
        rows, fitter = self.rows, self.fitter
        ended = queue.finished()
        trials = [_trial(one.number, queue.outcome(one)) for one in ended]
        for one, trial in zip(ended, trials, strict=True):
            if trial.state == "complete" and not queue.has_checksum(one):
                self._check_kept(trial)
        complete = [trial for trial in trials if trial.state == "complete"]
        best = self._better(complete)
        if self.neutral is not None and self.search.pick is not None:
            best = picked(complete, self.search.pick)
        unsteered = {
            part: rows.recorded(self.run, f"unsteered-{part}", None, part) for part in _PARTS
        }
        difference, chosen_p, steering = None, None, None
        flips: tuple[tuple[Record, Record], ...] = ()
        tested: list[Record] | None = None
        if best is not None:
            steering = fitter.steering(best.params)
            tested = self._records(best, "test", steering)
            result = rows.result(tested)
            self._check(best, "test", tested)
            best = replace(best, **_tested(result))
            flips = tuple(flips_of([*unsteered["test"], *tested]))
            difference = self._difference(unsteered["test"], tested)
            chosen = self._records(best, "validation", steering)
            self._check(best, "validation", chosen)
            against = self._difference(unsteered["validation"], chosen)
            if against is not None and against.p is not None:
                chosen_p = min(1.0, against.p * sum(trial.n > 0 for trial in trials))
            steering = fitter.fitted(best.params)
        with_test = [best if best and t.number == best.number else t for t in trials]
        oracle = None
        if self.search.oracle:
            allowed = [t for t in with_test if t.state == "complete" and self._allows(t)]
            oracle = _best(allowed, "test", rows.maximise)
        traded = self._traded(with_test, best)
        figures: dict[str, Result] = {p: rows.result(some) for p, some in unsteered.items()}
        return Sweep(
            method=fitter.method.name,
            task=task,
            metric=rows.metric,
            maximise=rows.maximise,
            space=dict(queue.space),
            trials=tuple(with_test),
            best=best,
            oracle=oracle,
            unsteered=figures,
            difference=difference,
            chosen_p=chosen_p,
            steering=steering,
            flips=flips,
            model=dict(vars(rows.language_model.identity)),
            seconds=round(sum(trial.seconds for trial in trials), 2),
            notes=(
                *rows.notes(),
                *_caveats(trials, best, figures, rows.maximise, chosen_p),
                *self._ends(queue.space, best),
                *traded.pop("notes"),
            ),
            tested=tuple(tested or ()),
            **traded,
        )

    def _difference(self, before: Sequence[Record], after: Sequence[Record]) -> Difference | None:
        """Of the metric that is chosen by, with its test."""
        metric, more = self.rows.metric, self.rows.maximise
        found = comparisons_of([*before, *after], tested=True, more={metric: more})
        return next((one for one in found if one.metric == metric), None)

    def _ends(self, space: Space, best: Trial | None) -> list[str]:
        """What is to be said of a choice at an end of the space; nothing of a search for
        trade-offs, whose limit may be what ends it."""
        if best is None or self.neutral is not None:
            return []
        return at_ends(space, best.params, self.rows.language_model.anatomy.layers)

    def _better(self, complete: Sequence[Trial]) -> Trial | None:
        """The best on the validation rows; of trade-offs among those within the limits."""
        allowed = [trial for trial in complete if self._allows(trial)]
        return _best(allowed, "value", self.rows.maximise)

    def _allows(self, trial: Trial) -> bool:
        """Whether a trial is within the limits; of others than trade-offs only such were run."""
        if self.neutral is None:
            return True
        return is_within(trial, self.search.max_kl, self.max_cost)

    def _traded(self, trials: Sequence[Trial], best: Trial | None) -> dict[str, Any]:
        """Of a search for trade-offs its front, the method beside it as it is unsearched, and what
        is to be said of them."""
        if self.neutral is None:
            return {"notes": []}
        limit, notes = self.search.max_kl, [f"KL is measured {self.neutral.in_words}"]
        found, unsearched = front(trials, self.rows.maximise), None
        if best is None and found:
            notes.append(
                f"no trial keeps the limits: the least KL on neutral texts is {found[0].kl:.3g} "
                f"nats per token, the limit {limit:g}"
            )
        elif best is not None and not self._allows(best):
            notes.append(f"trial {best.number}, which was picked, is beyond the limits")
        try:
            unsearched = self._unsearched(self.neutral)
        except TrimtabError as error:
            notes.append(f"the method unsearched is not there to compare with: {error}")
        return {
            "front": found,
            "max_kl": limit,
            "unsearched": unsearched,
            "notes": notes,
        }

    def _unsearched(self, neutral: Neutral) -> Trial:
        """The method with what was fixed, and else its defaults, measured on both parts."""
        steering, rows = self._as_it_is(), self.rows
        name = f"{label(self.fitter.method, {})} unsearched"
        known: dict[str, Any] = {"kl": neutral.kl(steering)}
        if self.max_cost is not None:
            known["cost"] = rows.plain.cost(steering)
        for part in _PARTS:
            file = f"unsearched-{part}"
            result = rows.result(rows.recorded(self.run, file, steering, part, name))
            if part == "test":
                known |= _tested(result)
            else:
                known |= {"value": result.value, "n": result.n, "ci95": result.ci95}
        return Trial(-1, {}, "complete", **known)

    def _as_it_is(self) -> Steering:
        """The method's steering without a search; a method that chooses something itself does so
        once for a run directory."""
        file = None if self.run.path is None else self.run.path / "unsearched.safetensors"
        if file is not None and file.exists():
            return Steering.load(file)
        steering = self.fitter.steering({})
        if file is not None and steering.acts:
            steering.save(file)
        return steering

    def _records(self, trial: Trial, part: Part, steering: Steering) -> list[Record]:
        """The records of a trial on a part; run here where another machine has them, or nobody."""
        if part in self._top_records and trial.number == self._top[0].number:
            return self._top_records[part]
        called = label(self.fitter.method, trial.params)
        name = f"{trial.number:05d}-{part}"
        return self.rows.recorded(self.run, name, steering, part, called)

    def _check(self, trial: Trial, part: Part, records: list[Record]) -> None:
        """Refuse records that do not give what the study says of a trial."""
        said = trial.value if part == "validation" else trial.test
        found = self.rows.result(records).value
        if said is not None and (found is None or not math.isclose(found, said, rel_tol=1e-9)):
            name = f"{trial.number:05d}-{part}"
            self.run.refuse(name, f"{self.rows.metric} is {found} in it and {said} in the study")

    def _check_kept(self, trial: Trial) -> None:
        """Refuse what a study says of a trial if its records, where they are here, do not."""
        called = label(self.fitter.method, trial.params)
        for part in _PARTS:
            records = self.rows.kept(self.run, f"{trial.number:05d}-{part}", part, called)
            if records is not None:
                self._check(trial, part, records)


def _trial(number: int, outcome: Mapping[str, Any]) -> Trial:
    return Trial(number, **{name: plain(value) for name, value in outcome.items()})


def _tested(result: Result) -> dict[str, Any]:
    return {"test": result.value, "test_n": result.n, "test_ci95": result.ci95}


def _best(trials: Sequence[Trial], part: str, maximise: bool) -> Trial | None:
    """The best by its `value` or its `test`, of those that are equal the first that began."""
    in_order = sorted(trials, key=lambda trial: trial.number)
    return choose(in_order, lambda trial: getattr(trial, part), maximise)


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
    if best is None and "complete" not in states:
        said.append("no trial has a value: there is nothing to choose")
        costs = [trial.cost for trial in trials if trial.cost is not None]
        if costs:
            said.append(f"the cheapest trial costs {min(costs):.3g} nats per token of plain text")
    elif best is not None and base is not None and best.value is not None:
        if (best.value <= base) if maximise else (best.value >= base):
            said.append("no setting beats the unsteered model on the validation rows")
        elif chosen_p is not None and chosen_p > 0.05:
            ran = sum(trial.n > 0 for trial in trials)
            said.append(
                f"the best of {ran} trials on the validation rows could be luck: p "
                f"against the unsteered model, times the number of trials, is {chosen_p:.2g}"
            )
    return said
