"""Fitting nine methods in one pass against fitting each by itself.

On the first pairs of the built-in contrast's train part (all of its 200 by `--pairs 200`). What
methods want of a text is read while the model runs over it once, so nine of them should cost little
more than the dearest one, which is the one with the largest median. Before anything is timed, it
is checked that both ways give the same steerings.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from clock import Contender, Report, Times, interleaved, ratio

import trimtab as tt
from trimtab.steering.operators import to_tensors

MODEL = "smollm2-135m-instruct"
PAIRS = 48
CHECKED_PAIRS = 8
TOLERANCE = 1e-4  # of an operator's largest number

Say = Callable[[str], None]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    contrast = tt.Contrast.builtin("formality").part("train").take(pairs or PAIRS)
    methods = _methods(lm)
    say("onepass: checking that both ways fit the same")
    few = contrast.take(CHECKED_PAIRS)
    together = tt.fit(list(methods.values()), lm, few)
    for (name, method), steering in zip(methods.items(), together, strict=True):
        _check(name, method.fit(lm, few), steering)
    say(f"onepass: {rounds} rounds")
    contenders: dict[str, Contender] = {
        "all nine": lambda: _fit(list(methods.values()), lm, contrast)
    }
    for name, method in methods.items():
        contenders[name] = partial(_fit, [method], lm, contrast)
    times = interleaved(contenders, rounds)
    dearest = max(methods, key=lambda name: statistics.median(times[name].cpu))
    alone = [times[name] for name in methods]
    one_by_one = Times(
        [sum(own) for own in zip(*(taken.cpu for taken in alone), strict=True)],
        [sum(own) for own in zip(*(taken.wall for taken in alone), strict=True)],
    )
    ratios = [
        ratio(
            f"all nine / {dearest}", times["all nine"], times[dearest], at_most=1.3, of_median=True
        ),
        ratio("one by one / all nine", one_by_one, times["all nine"]),
    ]
    return [
        Report(
            "onepass: formality, SmolLM2 135M",
            len(contrast),
            {**times, "one by one": one_by_one},
            ratios,
            {"unit": "pairs", "dearest": dearest},
        )
    ]


def _methods(lm: tt.LanguageModel) -> dict[str, tt.Method]:
    layers = tuple(range(lm.anatomy.layers))
    return {
        "ActAdd": tt.ActAdd(),
        "CAA": tt.CAA(layer=layers),
        "CAA, pca": tt.CAA(layer=layers, variant="pca"),
        "ITI": tt.ITI(),
        "SADI": tt.SADI(),
        "SAS": tt.SAS(),
        "SS": tt.SS(),
        "ablation": tt.Ablation(layer=12),
        "AUSteer": tt.AUSteer(),
    }


def _fit(methods: list[tt.Method], lm: tt.LanguageModel, contrast: tt.Contrast) -> None:
    tt.fit(methods, lm, contrast)


def _check(name: str, alone: tt.Steering, together: tt.Steering) -> None:
    """The same sites and the same numbers in their operators."""
    if [i.site for i in alone.interventions] != [i.site for i in together.interventions]:
        raise tt.TrimtabError(f"onepass: {name} finds other sites when it is fitted alone")
    for first, second in zip(alone.interventions, together.interventions, strict=True):
        for key, tensor in to_tensors(first.operator)[0].items():
            apart = (tensor - to_tensors(second.operator)[0][key]).abs().max()
            if apart > TOLERANCE * tensor.abs().max():
                raise tt.TrimtabError(f"onepass: {name} finds other numbers when fitted alone")
