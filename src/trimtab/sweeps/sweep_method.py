"""Sweeps over a method's hyperparameters: chosen on validation rows, reported on test rows.

All settings are fitted from one pass over the contrast; a trial runs only the blocks from its
lowest intervention on, on top of what the blocks below computed of the same prompts before, and
one-token tasks read one position. The best of all trials on the test rows is given apart: it is
the oracle that nobody has.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation import AnsweredBy, Asked
from trimtab.fitting import Method
from trimtab.methods import METHODS
from trimtab.model import LanguageModel, check_model
from trimtab.options import FitOn, Keep, Rows, Search, flat, record
from trimtab.reports import Run
from trimtab.sweeps.asking import Asking, Behaviour, asked_beside, askings, writer_of
from trimtab.sweeps.asking import described as prompts_described
from trimtab.sweeps.baselines import Baselines, Prompts
from trimtab.sweeps.begun import DEFAULTS, begun_before, former, without_limit
from trimtab.sweeps.neutral import Neutral, neutral_texts
from trimtab.sweeps.parts import contrast_for
from trimtab.sweeps.result import Sweep
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
from trimtab.sweeps.storage import import_optuna, open_storage
from trimtab.sweeps.trials import plan
from trimtab.sweeps.worker import try_settings


@flat
def sweep(
    language_model: LanguageModel,
    method: str | type[Method],
    task: Asked,
    space: Space | None = None,
    *,
    fixed: Params | None = None,
    on: FitOn = FitOn(),
    rows: Rows = Rows(),
    searching: Search = Search(),
    measured: Measured = Measured(answering=AnsweredBy()),
    keep: Keep = Keep(),
) -> Sweep:
    """Try settings of a method on a task, choose on its validation rows, report on its test rows.

    `task` is a name, or a `Contrast` whose pairs are asked; where its rows name no part, the
    `split` draws them (see `Contrast.with_parts`).
    The fields of the groups are keywords too: `limit=4` is `rows=Rows(limit=4)`.

    `space` gives values (or a `Range`) for each hyperparameter that is searched (default: the
    grid of the method's paper), `fixed` values for others. `search` is grid; tpe (Optuna's
    sampler, `trials` of them); halving: successive halving over growing parts of the validation
    rows, of a grid or of random draws from ranges; or pareto: trade-offs of the metric against KL
    on neutral texts, by Optuna's multivariate sampler, of which what does most at `max_kl` nats per
    token or less is chosen, or trial `pick`; `neutral` names the texts, `kl_tokens` says how many
    tokens after each count. `contrast` is what is fitted on (default: the
    task's own train rows). `limit` takes so many validation rows (None: all), `test_limit` so many
    test rows; `validation_task` is another task whose test rows stand in for the validation rows,
    for tasks that have none. `metric` is by default the first that the task has, and `better` says
    whether more or less of it is, where its name does not (attack success: less, unless told).
    `gate` is the condition under which every setting acts (see `fit_gate`).
    `max_cost` leaves out settings that cost more nats per token of plain text (None: no limit);
    what costs more breaks text, whatever it gains. `oracle` runs every
    complete trial on the test rows too. `output` names a run directory, in which a sweep that was
    interrupted goes on, and `cache` one that keeps the pass over the contrast (see `fit`).
    `storage` is any Optuna storage, on which other processes and machines may work at the same
    time. `resumed` false runs every trial through all blocks. `engine` (`tt.VLLM`) answers the
    rows in place of transformers, all trials of a grid in one continuous batch.
    Beside the best stand prompts that ask for the same, as in `compare` (`baselines` and what goes
    with it).
    """
    check_model(language_model)
    kind = METHODS.get(method) if isinstance(method, str) else method
    if kind is None:
        raise TrimtabError(f"unknown method {method!r}: known are {', '.join(METHODS)}")
    if not isinstance(kind, type):
        raise TrimtabError(f"name a method, {kind.name!r}: its hyperparameters are space and fixed")
    own = {name: plain(value) for name, value in (fixed or {}).items()}
    layers = language_model.anatomy.layers
    trading = searching.search == "pareto"
    given = tidy(_default(kind, layers, own, trading) if space is None else space)
    check_space(kind, given, own)
    plan(given, searching.search, searching.trials)  # refuses what it cannot plan
    check_cost(measured.choosing.max_cost)
    import_optuna()
    if searching.storage is not None and keep.output is None:
        raise TrimtabError("a storage needs a run directory too: name an output")
    before = begun_before(keep)
    if before:
        measured = without_limit(measured)
    bench = TaskRows(
        language_model,
        task,
        rows,
        measured,
        shuffle=measured.answering.seed if searching.search == "halving" else None,
        resumed=searching.resumed,
    )
    texts, gate = contrast_for(task, on.contrast, rows), gate_given(on.gate)
    neutral = None
    if trading:
        others = neutral_texts(texts, searching.neutral)
        neutral = Neutral(language_model, others, searching.kl_tokens, bench.settings.kept)
    config = {
        "method": kind.name,
        "space": described(given),
        "fixed": own,
        "search": searching.search,
        "trials": searching.trials,
        "task": bench.describe(),
        "contrast": {"name": texts.name, "digest": texts.digest},
        **gate_said(gate),
        **record(measured.choosing, searching, measured.answering),
        "model": language_model.described,
        **({} if bench.engine is None else {"engine": bench.engine.name}),
        **({} if neutral is None else {"neutral": neutral.describe()}),
        **({} if before else DEFAULTS),
    }
    prompting = searching.prompting
    said, unsaid = asked_beside(prompting, texts, bench.words, keep)
    writer = writer_of(prompting.writer, language_model)
    if said is not None:
        config["prompts"] = prompts_described(said, prompting.shots, writer)
    told = {**former(kind.name, {**given, **own}), **own} if before else own
    fitter = Fitter(language_model, kind, texts, given, told, cache=on.cache, gate=gate)
    if not any(isinstance(values, Range) for values in given.values()):
        fitter.check(grid(given))
    storage = None if searching.storage is None else open_storage(searching.storage)
    run = Run(keep.output, config, keep.overwrite)
    found = try_settings(
        bench,
        fitter,
        given,
        searching,
        max_cost=measured.choosing.max_cost,
        seed=measured.answering.seed,
        run=run,
        storage=storage,
        fresh=keep.overwrite,
        neutral=neutral,
    )
    if found.trials and all(trial.state == "failed" for trial in found.trials):
        some = "the trial" if len(found.trials) == 1 else f"all {len(found.trials)} trials"
        raise TrimtabError(f"{some} failed: {found.trials[0].why}")
    # Helpers of another process leave that to it.
    if said is not None and multiprocessing.parent_process() is None:
        asked = askings(said, texts, prompting.shots, writer)
        axis = None if neutral is None else neutral.kl
        beside = Baselines(bench, run, measured.choosing.max_cost, timed=False, axis=axis)
        found = replace(found, prompts=_beside(found, beside, said, asked))
    found = replace(found, notes=(*found.notes, *unsaid))
    if found.steering is not None and found.steering.acts:
        shown = bench.samples({"steered": found.steering}, run)
        found = replace(found, samples=shown)
    if run.path is not None:
        from trimtab.sweeps.sweep_page import sweep_page  # loads matplotlib

        # The best may be k = 0, the model as it is, which is no steering to keep.
        if found.steering is not None and found.steering.acts:
            found.steering.save(run.path / "best.safetensors", overwrite=True)
        run.finish(found.as_json(), lambda environment: sweep_page(found, run, environment))
    return found


def _default(
    kind: type[Method], layers: int, fixed: Params, trading: bool
) -> Mapping[str, Sequence[Any] | Range]:
    """What is searched where nothing is said: of trade-offs the method's ranges, if it has some."""
    ranges = kind.ranges(layers) if trading else {}
    if not ranges:
        return default_space(kind, layers, fixed)
    return {name: Range(*ends) for name, ends in ranges.items() if name not in fixed}


def _beside(
    found: Sweep, baselines: Baselines, said: Behaviour, asked: Sequence[Asking]
) -> Prompts:
    """Prompts beside the best setting."""
    chosen = {} if found.steering is None else {found.method: found.steering}
    return baselines.measure(said.behaviour, asked, chosen, {found.method: found.tested})


def check_cost(most: float | None) -> None:
    """Refuse what is no limit of cost."""
    if most is not None and not math.isfinite(most):
        raise TrimtabError(f"a limit of cost is a finite number of nats per token, not {most}")
