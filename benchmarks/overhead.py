"""What an attached steering adds to the time in which a model writes, to a thousandth.

Every kind of steering that is cheap enough to need it, against the same model unsteered, and the
additive ones of steering-vectors and repeng, each against its own process's unsteered model. Eight
prompts, twelve new tokens, the same ones for all. The contenders write them token by token in turn
(lockstep.py), on copies of the model that share its weights. Putting a steering on and taking it
off again is part of its time.

A ratio is 1 plus what a steering adds: for each turn the median over the rounds of the difference
to the unsteered model, summed, over the sum of the unsteered medians. Turns that write a token
after the first count so often that the sum is that of 64 tokens, where the prompt and putting the
steering on have their usual share. The interval comes from drawing each turn's rounds anew.
`unsteered, again` is the unsteered model a second time, whose distance from 1 is noise. The ratio
of the best rounds is that of the twelve tokens, and noisier.

Before anything is timed, it is checked that the three libraries' predictions are equal, and that
steering changes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import RESAMPLES, Ratio, Report, Times
from lockstep import Write, first_logits, lockstep, sibling
from peers import PEERS, Process, running

import trimtab as tt
from trimtab.checkpoints import packs
from trimtab.steering import Intervention, Steering
from trimtab.steering.operators import Rotate

MODEL = "smollm2-135m-instruct"
PAIRS = 32
ROWS = 8
NEW_TOKENS = 12
STANDS_FOR_TOKENS = 64
LAYER = 12
#: A thirtieth of the usual strength, because the same is added at all thirty blocks.
ALPHA_ALL = 1 / 30
TOLERANCE = 1e-4  # of the largest logit

Say = Callable[[str], None]
#: CPU and wall seconds by contender, round and turn.
Turns = dict[str, list[list[tuple[float, float]]]]


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    contrast = tt.Contrast.builtin("formality")
    say("overhead: fitting")
    steerings = _steerings(lm, contrast.part("train").take(pairs or PAIRS))
    inputs = lm.tokenizer(
        [pair.prompt for pair in contrast.part("test").pairs][:ROWS],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    with torch.inference_mode():
        written = lm.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    writers: dict[str, Write] = {
        "unsteered": sibling(lm.model).generate,
        "unsteered, again": sibling(lm.model).generate,
    }
    for name, (steering, _) in steerings.items():
        writers[name] = _writer(lm, steering)
    with tempfile.TemporaryDirectory() as room:
        vectors = Path(room) / "vectors.npy"
        np.save(vectors, _vectors(steerings["CAA, 30 blocks"][0]))
        job = {
            "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
            "written": written.tolist(),
            "vectors": str(vectors),
            "one": {"layer": LAYER, "alpha": steerings["CAA, one block"][0].setting},
            "all": {"alpha": ALPHA_ALL},
        }
        with running(PEERS, packs.ensure(MODEL), job, say) as processes:
            say("overhead: checking that all predict the same")
            apart = {process.name: _check(process, writers, inputs) for process in processes}
            say("overhead: warming up")
            lockstep(writers, inputs, written[:, :2], seed=0)
            for process in processes:
                process.ask("write 0")
            say(f"overhead: {rounds} rounds")
            turns = _rounds(writers, inputs, written, processes, rounds)
            versions = {process.name: process.versions for process in processes}
    ratios = [_ratio("unsteered, again", turns["unsteered, again"], turns["unsteered"], None)]
    for name, (_, most) in steerings.items():
        ratios.append(_ratio(name, turns[name], turns["unsteered"], most))
    for peer in PEERS:
        for kind in ("one block", "30 blocks"):
            own = turns[f"{peer.name}, {kind}"]
            ratios.append(_ratio(f"{peer.name}, {kind}", own, turns[f"{peer.name}, unsteered"]))
    facts = {
        "unit": "rows",
        "new_tokens": NEW_TOKENS,
        "stands_for_tokens": STANDS_FOR_TOKENS,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "sites": {name: len(steering.interventions) for name, (steering, _) in steerings.items()},
        "versions": versions,
        "largest_relative_difference": apart,
        "turns": turns,
    }
    times = {name: _times(own) for name, own in turns.items()}
    return [Report(f"overhead: SmolLM2 135M, batch {ROWS}", ROWS, times, ratios, facts)]


# -- the contenders ---------------------------------------------------------------------------


def _steerings(lm: tt.LanguageModel, contrast: tt.Contrast) -> dict[str, tuple[Steering, float]]:
    """Every steering with the most that it may cost, as a ratio."""
    layers = lm.anatomy.layers
    one, every, ss, iti, heads, neurons = tt.fit(
        [
            tt.CAA(layer=LAYER),
            tt.CAA(layer=tuple(range(layers)), alpha=ALPHA_ALL),
            tt.SAS(),
            tt.ITI(k=48),
            tt.SADI(variant="head", k=8),
            tt.SADI(variant="neuron", k=50),
        ],
        lm,
        contrast,
    )
    # The plane is fitted; the blocks are half of them, however many tell the two sides apart.
    plane = ss.interventions[0].operator.plane
    assert plane is not None
    rotate = Rotate(plane)
    sites = [
        f"layers.{layer}.{norm}"
        for layer in range(layers // 2, layers)
        for norm in ("attn_norm", "ffn_norm")
    ]
    half = replace(ss, interventions=tuple(Intervention(site, rotate) for site in sites))
    return {
        "CAA, one block": (one, 1.005),
        "CAA, 30 blocks": (every, 1.015),
        "SS, 15 blocks": (half.at(30), 1.03),
        "ITI, 48 heads": (iti, 1.02),
        "SADI, 8 heads": (heads, 1.02),
        "SADI, 50 neurons": (neurons, 1.02),
    }


def _writer(lm: tt.LanguageModel, steering: Steering) -> Write:
    own = tt.wrap(sibling(lm.model), lm.tokenizer, lm.name)

    def write(**options: Any) -> Any:
        with own.steered(steering):
            return own.model.generate(**options)

    return write


def _vectors(steering: Steering) -> np.ndarray:
    """What is added at each block's output at dial 1, [layers, units]."""
    added = [i.operator.added for i in steering.interventions]
    return np.stack([vector.numpy() for vector in added if vector is not None])


def _check(process: Process, writers: dict[str, Write], inputs: Any) -> float:
    """The largest difference between a peer's steered predictions and ours, relative to theirs."""
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "logits.npy"
        process.ask(f"logits {path}")
        theirs = np.load(path)
    names = ("unsteered", "CAA, one block", "CAA, 30 blocks")
    ours = np.stack([first_logits(writers[name], inputs).numpy() for name in names])
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if (np.abs(ours[1:] - ours[0]).max((1, 2)) < 100 * TOLERANCE * np.abs(ours).max()).any():
        raise tt.TrimtabError("overhead: steering hardly changes what is predicted")
    if apart > TOLERANCE:
        raise tt.TrimtabError(f"{process.name} steers otherwise than trimtab: {apart:.1e} apart")
    return apart


# -- the rounds -------------------------------------------------------------------------------


def _rounds(
    writers: dict[str, Write], inputs: Any, written: Any, processes: list[Process], rounds: int
) -> Turns:
    """Every library once in each round, every other round in the opposite order."""
    turns: Turns = {}
    for number in range(rounds):
        order: list[Process | None] = [None, *processes]
        for process in order if number % 2 == 0 else reversed(order):
            if process is None:
                taken = lockstep(writers, inputs, written, number)
            else:
                own = process.ask(f"write {number}")["turns"]
                taken = {f"{process.name}, {name}": seconds for name, seconds in own.items()}
            for name, seconds in taken.items():
                turns.setdefault(name, []).append(seconds)
    return turns


def _times(turns: list[list[tuple[float, float]]]) -> Times:
    """A contender's seconds by round."""
    cpu, wall = ([sum(turn[clock] for turn in own) for own in turns] for clock in (0, 1))
    return Times(cpu, wall)


def _ratio(
    what: str,
    steered: list[list[tuple[float, float]]],
    unsteered: list[list[tuple[float, float]]],
    most: float | None = None,
) -> Ratio:
    below = np.array(unsteered)[..., 0]  # [rounds, turns], CPU seconds
    added = np.array(steered)[..., 0] - below
    rounds, turns = below.shape
    weights = np.full(turns, (STANDS_FOR_TOKENS - 1) / (turns - 2))
    weights[[0, -1]] = 1
    drawn = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds, turns))

    def relative(added: np.ndarray, below: np.ndarray) -> np.ndarray:
        result: np.ndarray = 1 + (np.median(added, -2) @ weights) / (np.median(below, -2) @ weights)
        return result

    resampled = relative(
        np.take_along_axis(added[None], drawn, axis=1),
        np.take_along_axis(below[None], drawn, axis=1),
    )
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Ratio(
        f"{what} / unsteered",
        min(_times(steered).cpu) / min(_times(unsteered).cpu),
        float(relative(added, below)),
        at_most=most,
        of_median=True,
        interval=(float(low), float(high)),
    )
