"""A sweep of AUSteer's k and alpha on copa, against the authors' way and a plain evaluation.

The grid is 13 x 13, the rows are 100 of copa's validation part, the model is SmolLM2; the methods
are fitted before anything is timed, for all contenders. Ours is `try_settings`, as `trimtab sweep`
runs it, without the oracle, in memory; it begins each round with nothing kept. How long a trial
takes depends on k, whose units may begin at any block, but not on alpha: all 13 k are run at one
alpha, with everything that only the first trials of a sweep compute, and once more at another,
which counts for the 12 others.

The authors answer one example at a time through `generate`, with a hook on every FFN that scales
the chosen units at every token. 16,900 such runs take long: every third setting on the diagonal of
the grid (k and alpha grow together) is run on every tenth row by length, and the time counts for as
many runs as the grid has. Plain is our own batched evaluation of the same settings through all
blocks; it costs the same for each of them, so that it too is timed on those and counts for all.

Of the blocks of a trial only those from its lowest unit on need to run. The share of the blocks
that this leaves, averaged over the trials, times the plain evaluation's time is what depth allows:
what a sweep would take that did nothing but that.

Successive halving runs most settings on a part of the rows only. What it takes depends on how good
the settings are, so that it is run in full, once, before the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clock import Report, Times, Took, interleaved, ratio, timed

import trimtab as tt
from trimtab.evaluation.jobs import TaskJob
from trimtab.methods import AUSTEER_GRID
from trimtab.options import Rows, Search, Searching
from trimtab.reading.streams import blocks_below
from trimtab.reports.run import Run
from trimtab.sweeps.parts import contrast_for
from trimtab.sweeps.rows import TaskRows
from trimtab.sweeps.space import Fitter, Space, grid
from trimtab.sweeps.worker import try_settings

MODEL = "smollm2-135m-instruct"
TASK = "copa"
ROWS = 100
ALPHAS = (8.0, 16.0)  # of the settings that are timed of ours
EVERY_SETTING = 3  # of the diagonal
EVERY_ROW = 10

Say = Callable[[str], None]


def run(data: Path, rounds: int, rows: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    count = rows or ROWS
    space = {"k": AUSTEER_GRID, "alpha": tuple(map(float, AUSTEER_GRID))}
    settings = grid(space)
    contrast = contrast_for(TASK, None, Rows(data=str(data)))
    if rows is not None:  # a quick look
        contrast = contrast.train.take(max(8, rows))
    say(f"sweeps: fitting AUSteer on {len(contrast.train)} pairs")
    fitter = Fitter(lm, tt.AUSteer, contrast, space, {})
    steerings = [fitter.steering(params) for params in settings]
    sampled = steerings[:: (len(AUSTEER_GRID) + 1) * EVERY_SETTING]

    def bench(resumed: bool = True) -> TaskRows:
        return TaskRows(lm, TASK, data=str(data), limit=count, test_limit=1, resumed=resumed)

    prompts = _prompts(bench())
    by_length = sorted(prompts, key=len)[:: min(EVERY_ROW, len(prompts))]

    def swept(on: TaskRows, some: Space, how: Searching = "grid") -> None:
        try_settings(
            on,
            fitter,
            some,
            Search(search=how, oracle=False),
            max_cost=None,
            seed=0,
            run=Run(None, {}),
        )

    def ours() -> Took:
        on = bench()
        first, other = (
            timed(partial(swept, on, {"k": AUSTEER_GRID, "alpha": (alpha,)})) for alpha in ALPHAS
        )
        others = len(AUSTEER_GRID) - 1
        return Took(first.cpu + others * other.cpu, first.wall + others * other.wall)

    def plain() -> None:
        measured = bench(resumed=False)
        for steering in sampled:
            measured.records(steering, "validation")

    def authors() -> None:
        for steering in sampled:
            _one_by_one(lm, steering, by_length)

    _check(lm, bench(), sampled, by_length, say)
    say("sweeps: successive halving")
    halving, _ = timed(partial(swept, bench(), space, "halving"))
    say(f"sweeps: {rounds} rounds of {len(settings)} settings on {count} rows")
    times = interleaved({"sweep": ours, "plain": plain, "authors": authors}, rounds)
    times["plain"] = _scaled(times["plain"], len(settings) / len(sampled))
    runs = len(sampled) * len(by_length)
    times["authors"] = _scaled(times["authors"], len(settings) * count / runs)
    layers = lm.anatomy.layers
    share = sum(layers - blocks_below(lm.anatomy, [s]) for s in steerings) / layers / len(steerings)
    times["what depth allows"] = _scaled(times["plain"], share)
    return [
        Report(
            f"sweeps: {len(settings)} settings of AUSteer on {count} rows of {TASK}, SmolLM2 135M",
            len(settings),
            times,
            [
                ratio("sweep / authors", times["sweep"], times["authors"], at_most=0.2),
                ratio(
                    "sweep / what depth allows",
                    times["sweep"],
                    times["what depth allows"],
                    at_most=1.3,
                ),
                ratio("sweep / plain", times["sweep"], times["plain"]),
            ],
            {
                "unit": "settings",
                "halving, CPU seconds of one run": halving,
                "halving / authors": halving / median(times["authors"].cpu),
                "share of blocks": share,
                "runs of the authors' way": runs,
                "settings evaluated plainly": len(sampled),
                "tokens": _mean_tokens(lm, prompts),
                "tokens of the authors' rows": _mean_tokens(lm, by_length),
            },
        )
    ]


def _prompts(bench: TaskRows) -> list[str]:
    job = bench.jobs["validation"]
    assert isinstance(job, TaskJob)
    return [str(example.prompt) for example in job.entries[0].examples]


def _check(
    lm: tt.LanguageModel,
    bench: TaskRows,
    steerings: Sequence[tt.Steering],
    prompts: Sequence[str],
    say: Say,
) -> None:
    """All ways answer alike."""
    say("sweeps: checking the answers")
    for steering in steerings:
        found = {
            record["prompt"]: record["output"] for record in bench.records(steering, "validation")
        }
        if [found[prompt] for prompt in prompts] != _one_by_one(lm, steering, prompts):
            raise tt.TrimtabError(f"sweeps: the two ways answer differently with {steering.label}")


@torch.no_grad()
def _one_by_one(lm: tt.LanguageModel, steering: tt.Steering, prompts: Sequence[str]) -> list[str]:
    """The authors' way: hooks on the FFNs, and one example at a time."""
    answers = []
    with _hooked(lm, steering):
        for prompt in prompts:
            inputs = lm.tokenizer(prompt, return_tensors="pt")
            output = lm.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            answers.append(lm.tokenizer.decode(new, skip_special_tokens=True))
    return answers


@contextmanager
def _hooked(lm: tt.LanguageModel, steering: tt.Steering) -> Iterator[None]:
    """x_i becomes (1 + gamma_i) x_i at the outputs of FFNs, with plain hooks."""
    handles = []
    for intervention in steering.interventions:
        operator: Any = intervention.operator
        layer = int(intervention.site.split(".")[1])
        units, factor = operator.units, 1 + steering.setting * operator.gain

        def scale(
            module: Any, args: Any, output: torch.Tensor, units: Any = units, factor: Any = factor
        ) -> torch.Tensor:
            changed = output.clone()
            changed[..., units] *= factor
            return changed

        handles.append(lm.model.model.layers[layer].mlp.register_forward_hook(scale))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaled(times: Times, share: float) -> Times:
    return Times([share * taken for taken in times.cpu], [share * taken for taken in times.wall])


def _mean_tokens(lm: tt.LanguageModel, prompts: Sequence[str]) -> float:
    return sum(map(len, lm.encode(prompts))) / len(prompts)
