"""Many methods, one contrast, one task: each with a sweep of equal budget, and one table.

One pass over the contrast fits them all; one bench serves all sweeps, so that what the blocks below
compute of the prompts is shared. Each method's setting is chosen on the validation rows; the test
rows say what it is worth: intervals, paired differences, p corrected for their number (Holm), what
it changes and what it costs. With budgets the chosen steerings are compared once more, each at the
dial that changes the next token by as many nats.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.contrasts import Contrast
from trimtab.dials import check_budgets
from trimtab.errors import TrimtabError, check_list
from trimtab.evaluation import (
    AnsweredBy,
    Asked,
    Judging,
    NextTokens,
    Repeated,
    Wanted,
    drift,
    engine_of,
    evaluate,
    find_job,
    refuse_elsewhere,
)
from trimtab.figures import Difference
from trimtab.fitting import collect
from trimtab.methods import METHODS
from trimtab.model import LanguageModel, check_model
from trimtab.options import Comparing, FitOn, Keep, Prompting, Rows, Search, flat, record
from trimtab.reports import Run, check_overwritable
from trimtab.steering import Gate
from trimtab.sweeps.asking import PROMPTS, asked_beside, askings, writer_of
from trimtab.sweeps.asking import described as prompts_described
from trimtab.sweeps.baselines import Baselines
from trimtab.sweeps.begun import DEFAULTS, begun_before, former, without_limit
from trimtab.sweeps.compared import at_budgets, corrected, effects, with_differences
from trimtab.sweeps.comparison import Compared, Comparison
from trimtab.sweeps.metering import Used, metered
from trimtab.sweeps.parts import contrast_for
from trimtab.sweeps.rows import Measured, TaskRows
from trimtab.sweeps.space import (
    Fitter,
    Params,
    Range,
    Space,
    check_space,
    default_space,
    described,
    gate_given,
    gate_said,
    grid,
    plain,
    tidy,
)
from trimtab.sweeps.sweep_method import check_cost
from trimtab.sweeps.worker import hook, try_settings

#: Prompts on which budgets are found.
_BUDGET_PROMPTS = 64
#: Bytes of the longest name of a method: below what file systems take.
_LONGEST_NAME = 200
_BESIDE = (
    "{engine} answered the rows, read the plain text and was timed; what takes whole distributions "
    "(KL, budgets, drift over a long text), and the samples, are of transformers beside it"
)
_ORACLE = "settings may have been chosen on the rows that they are reported on: an oracle's figures"


@dataclass(frozen=True)
class Candidate:
    """A method with the settings that are tried of it; `name` tells it from the others (default:
    the method's)."""

    method: str
    space: Space
    fixed: Params = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise TrimtabError(f"unknown method {self.method!r}: known are {', '.join(METHODS)}")
        fixed = {name: plain(value) for name, value in self.fixed.items()}
        object.__setattr__(self, "space", tidy(self.space))
        object.__setattr__(self, "fixed", fixed)
        object.__setattr__(self, "name", self.name or self.method)


@flat
def compare(
    language_model: LanguageModel,
    methods: Sequence[str | Candidate],
    task: Asked,
    *,
    comparing: Comparing = Comparing(),
    on: FitOn = FitOn(),
    rows: Rows = Rows(),
    measured: Measured = Measured(answering=AnsweredBy()),
    prompting: Prompting = Prompting(),
    oracle: bool = False,
    keep: Keep = Keep(),
) -> Comparison:
    """Compare methods on a task, each at the setting that its own sweep chose on validation rows.

    `methods` are names (with the default settings of each) or `Candidate`s. A method whose
    settings are more than `trials` draws so many of them (tpe), others try all. `kl`, one or
    several, compares the chosen ones once more at equal budgets of so many nats at the next token,
    beside which prompts stand with what they change there by themselves. `capability` names tasks
    on which side effects are measured, and `receipts` has some more (see `evaluate`); `drift`
    measures whether effects last, over turns before the prompt and over a long text.
    `oracle` lets `validation_task` be the rows that are reported on, as some papers have it, which
    a note says. `timed` false leaves out the time of generation. Beside the methods stand prompts
    that ask for the same (`Prompting`: `baselines`, `behaviour`, `opposite`, `written_prompt`,
    `writer`, `shots`). With an `engine` (`tt.VLLM`) methods are fitted by transformers, and so is
    KL measured; the rest is the engine's. The other arguments are those of `sweep`.
    """
    check_model(language_model)
    check_list("method", methods)
    candidates = [
        one if isinstance(one, Candidate) else default_candidate(language_model, one)
        for one in methods
    ]
    _check(candidates, comparing)
    engine = engine_of(measured.answering)
    if engine is not None:
        beside_rows = Wanted(("trimtab",), "test", comparing.capability_limit, rows.data)
        refuse_elsewhere([find_job(task, beside_rows, Judging()) for task in comparing.capability])
    check_cost(measured.choosing.max_cost)
    before = begun_before(keep)
    if before:
        measured = without_limit(measured)
    bench = TaskRows(language_model, task, rows, measured, chooses=not oracle)
    texts, gate = contrast_for(task, on.contrast, rows), gate_given(on.gate)
    config = {
        "methods": [_described(one) for one in candidates],
        "trials": comparing.trials,
        "task": bench.describe(),
        "contrast": {"name": texts.name, "digest": texts.digest},
        **gate_said(gate),
        **record(measured.choosing, comparing, measured.answering),
        "kl": _kl_said(comparing.kl),
        "model": language_model.described,
        **({} if engine is None else {"engine": engine.name}),
        **({"oracle": True} if oracle else {}),
        **({} if before else DEFAULTS),
    }
    said, unsaid = asked_beside(prompting, texts, bench.words, keep)
    if said is not None:
        _refuse_named_alike(candidates)
    writer = writer_of(prompting.writer, language_model)
    asked = {} if said is None else prompts_described(said, prompting.shots, writer)
    run = Run(keep.output, {**config, **({"prompts": asked} if asked else {})}, keep.overwrite)
    started = time.perf_counter()
    told = [_as_before(one) for one in candidates] if before else candidates
    fitters, fit = _fitters(bench, texts, told, on.cache, gate)
    if engine is not None:  # which starts at the first row, at the sites that it knows then
        for fitter, one in zip(fitters, candidates, strict=True):
            hook(engine, fitter, one.space)
    _ = bench.metric  # one that the task does not have is refused before anything is written
    # All directories are looked at before anything in one of them is overwritten.
    own_runs = [_own_run(run, one.name, config, keep.overwrite) for one in candidates]
    if keep.overwrite and run.path is not None and (comparing.capability or comparing.receipts):
        check_overwritable(run.path / "capability")
    run.begin()
    compared = [
        _swept(bench, fitter, one, comparing, measured, own)
        for fitter, one, own in zip(fitters, candidates, own_runs, strict=True)
    ]
    chosen = {row.name: row.sweep.steering for row in compared if row.sweep and row.sweep.steering}
    tested = [row for row in compared if row.sweep and row.sweep.tested]
    records = {row.name: list(row.sweep.tested) for row in tested if row.sweep}
    compared, between = with_differences(bench, compared, records)
    beside_prompts = None
    kl, axis = comparing.kl, None
    if kl:
        axis = NextTokens(language_model, bench.prompts(_BUDGET_PROMPTS))
    if said is not None:
        limit = measured.choosing.max_cost
        beside_prompts = Baselines(
            bench, run, limit, comparing.timed, None if axis is None else axis.median
        ).measure(said.behaviour, askings(said, texts, prompting.shots, writer), chosen, records)
        compared = corrected(compared, beside_prompts)
    budgeted = [] if axis is None else at_budgets(bench, chosen, axis, kl, beside_prompts)
    lasting = None
    if comparing.drift and chosen:
        words = {} if beside_prompts is None else beside_prompts.best_words
        lasting = drift(language_model, [_repeated(bench)], {**chosen, **words}, bench.asks_chats)
    beside = None
    if (comparing.capability or comparing.receipts) and chosen:
        # lm-eval makes its own prompts, before which nothing is put.
        own = any(task.startswith("lm-eval:") for task in comparing.capability)
        words = {} if beside_prompts is None or own else beside_prompts.best_words
        beside = evaluate(
            language_model,
            comparing.capability,
            steering={**chosen, **words},
            data=rows.data,
            limit=comparing.capability_limit,
            receipts=comparing.receipts,
            receipts_limit=comparing.receipts_limit,
            answering=AnsweredBy(
                batch_size=measured.answering.batch_size,
                seed=measured.answering.seed,
                engine=engine,
            ),
            output=None if run.path is None else run.path / "capability",
            overwrite=keep.overwrite,
        )
    caveats = _caveats(compared, between, comparing.trials)
    found = Comparison(
        bench.task,
        bench.metric,
        bench.maximise,
        {part: bench.result(bench.unsteered(part)) for part in ("validation", "test")},
        bench.plain.perplexity(0.0),
        tuple(compared),
        tuple(budgeted),
        between,
        fit,
        beside,
        dict(vars(language_model.identity)),
        round(time.perf_counter() - started, 2),
        (
            *bench.notes(),
            *([_ORACLE] if oracle else []),
            *unsaid,
            *caveats,
            *([] if engine is None else [_BESIDE.format(engine=engine.name)]),
        ),
        bench.samples({name: one for name, one in chosen.items() if one.acts}, run),
        beside_prompts,
        lasting,
    )
    if run.path is not None:
        from trimtab.sweeps.comparison_page import comparison_page  # loads matplotlib

        run.finish(found.as_json(), lambda environment: comparison_page(found, run, environment))
    return found


def default_candidate(
    language_model: LanguageModel, method: str, fixed: Params | None = None, name: str = ""
) -> Candidate:
    """A method with the settings of its paper, but for those that are fixed."""
    one = Candidate(method, {}, fixed or {}, name)
    layers = language_model.anatomy.layers
    return replace(one, space=default_space(METHODS[method], layers, one.fixed))


def _check(candidates: Sequence[Candidate], comparing: Comparing) -> None:
    if not candidates:
        raise TrimtabError("there is no method to compare")
    trials, kl = comparing.trials, comparing.kl
    if trials < 1:
        raise TrimtabError(f"a method has 1 trial or more, not {trials}")
    if kl:
        check_budgets(kl)
    names = [one.name for one in candidates]
    for one in candidates:
        if names.count(one.name) > 1:
            raise TrimtabError(f"two methods are called {one.name}: name them apart")
        if (
            not set(one.name).isdisjoint("/\0")
            or one.name.startswith(".")
            or len(os.fsencode(one.name)) > _LONGEST_NAME
        ):
            raise TrimtabError(f"{one.name[:60]!r} cannot be the name of a directory")
        check_space(METHODS[one.method], one.space, one.fixed)


def _kl_said(kl: Sequence[float]) -> list[float] | float | None:
    """What config.json says of budgets: of a single one, and of none, as when there was one."""
    return list(kl) if len(kl) > 1 else next(iter(kl), None)


def _refuse_named_alike(candidates: Sequence[Candidate]) -> None:
    """Refuse methods that are called as the prompts beside them."""
    for one in candidates:
        if one.name in PROMPTS:
            raise TrimtabError(f"{one.name} is what a prompt is called: name the method otherwise")


def _described(one: Candidate) -> dict[str, Any]:
    return {
        "name": one.name,
        "method": one.method,
        "space": described(one.space),
        "fixed": one.fixed,
    }


def _fitters(
    bench: TaskRows,
    contrast: Contrast,
    candidates: Sequence[Candidate],
    cache: str | Path | None,
    gate: Gate | None,
) -> tuple[list[Fitter], Used]:
    """Fitters that share one pass over the contrast, and what the pass took."""
    shared: dict[Any, Any] = {}
    lm = bench.language_model
    fitters = [
        Fitter(lm, METHODS[one.method], contrast, one.space, one.fixed, cache, shared, gate)
        for one in candidates
    ]
    with metered(lm) as used:
        wants = list(dict.fromkeys(want for fitter in fitters for want in fitter.wants()))
        if wants:
            shared[tuple(wants)] = collect(lm, contrast.train, wants, cache=cache)
    return fitters, used


def _as_before(one: Candidate) -> Candidate:
    """The candidate with the former defaults of what is not said."""
    said = {**one.space, **one.fixed}
    return replace(one, fixed={**former(one.method, said), **one.fixed})


def _own_run(run: Run, name: str, config: dict[str, Any], overwrite: bool) -> Run:
    """A directory for one method's sweep, which goes on where it stopped."""
    path = None if run.path is None else run.path / name
    return Run(path, {**config, "method": name}, overwrite)


def _swept(
    bench: TaskRows,
    fitter: Fitter,
    one: Candidate,
    comparing: Comparing,
    measured: Measured,
    run: Run,
) -> Compared:
    """The sweep of one method, and what its choice changes and costs."""
    drawn = _size(one.space) > comparing.trials
    with metered(bench.language_model, bench.engine) as used:
        found = try_settings(
            bench,
            fitter,
            one.space,
            Search(search="tpe", trials=comparing.trials, oracle=False)
            if drawn
            else Search(oracle=False),
            max_cost=measured.choosing.max_cost,
            seed=measured.answering.seed,
            run=run,
        )
    if found.steering is None or found.best is None:
        return Compared(one.name, found, swept=used, why="; ".join(found.notes))
    if run.path is not None and found.steering.acts:  # not k = 0, the model as it is
        found.steering.save(run.path / "best.safetensors", overwrite=True)
    row = effects(bench, one.name, found.steering, comparing.timed)
    return replace(row, sweep=found, swept=used)


def _size(space: Space) -> float:
    """How many settings there are."""
    if any(isinstance(values, Range) for values in space.values()):
        return math.inf
    return len(grid(space))


def _repeated(bench: TaskRows) -> Repeated:
    """The test rows, to be asked again behind turns."""
    return Repeated(
        bench.task,
        bench.metric,
        bench.maximise,
        lambda attached, name: bench.records(attached, "test", name=name),
    )


def _caveats(
    rows: Sequence[Compared], between: Mapping[tuple[str, str], Difference], trials: int
) -> list[str]:
    """What a reader must know."""
    said = [f"{row.name}: {note}" for row in rows if row.sweep for note in row.sweep.notes]
    if between and all((found.corrected_p or 0.0) > 0.05 for found in between.values()):
        said.append(
            f"no two methods differ beyond chance (Holm's correction for {len(between)} pairs)"
        )
    said.append(f"each method had {trials} trials at most, on the validation rows")
    return list(dict.fromkeys(said))
