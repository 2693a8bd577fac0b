"""The mean difference of the last token at `resid` of all layers: trimtab and two other libraries.

The peers run in their own processes and measure themselves, model loading excluded. Each gets the
same weights, texts, precision and thread count, and their vectors are compared with trimtab's
before anything is timed.

steering-vectors  train_steering_vector, whose default is the mean difference, in batches of 16
repeng            has no mean difference: its own reading of hidden states (batched_get_hiddens,
                  batches of 32, its default) and the mean taken by numpy, which is cheaper than
                  its ControlVector.train, that is the same reading and a PCA of each layer
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from clock import Report, interleaved, ratio
from peers import PEERS, Process, running

import trimtab as tt
from trimtab.checkpoints import packs

MODEL = "smollm2-135m-instruct"
PAIRS = 50
TOLERANCE = 1e-3  # of a layer's largest unit

Say = Callable[[str], None]

#: Long answers, of which the sides share little, and short ones after a long prompt.
CONTRASTS = ("formality", "facts")


def run(rounds: int, pairs: int | None, say: Say) -> list[Report]:
    lm = tt.load(MODEL, device="cpu")
    return [_run(lm, name, rounds, pairs or PAIRS, say) for name in CONTRASTS]


def _run(lm: tt.LanguageModel, name: str, rounds: int, pairs: int, say: Say) -> Report:
    contrast = tt.Contrast.builtin(name).part("train").take(pairs)
    methods = [tt.CAA(layer=layer) for layer in range(lm.anatomy.layers)]
    # The prompts of these contrasts are plain text.
    texts = [(f"{p.prompt}{p.positive}", f"{p.prompt}{p.negative}") for p in contrast.pairs]

    def fit() -> None:
        tt.fit(methods, lm, contrast)

    with running(PEERS, packs.ensure(MODEL), {"pairs": texts}, say) as processes:
        say("means: checking that all find the same vectors")
        steerings = tt.fit(methods, lm, contrast)
        vectors = [steering.interventions[0].operator.added for steering in steerings]
        ours = np.stack([vector.numpy() for vector in vectors if vector is not None])
        apart = {process.name: _check(process, ours) for process in processes}
        say(f"means: {rounds} rounds")
        times = interleaved(
            {"trimtab": fit, **{process.name: process.run for process in processes}}, rounds
        )
        facts = {
            "unit": "pairs",
            "versions": {process.name: process.versions for process in processes},
            "batch_sizes": {peer.name: peer.batch_size for peer in PEERS},
            "largest_relative_difference": apart,
        }
    ratios = [
        ratio(f"{peer.name} / trimtab", times[peer.name], times["trimtab"], at_least=2.0)
        for peer in PEERS
    ]
    return Report(f"means: {name}, SmolLM2 135M", len(contrast), times, ratios, facts)


def _check(process: Process, ours: np.ndarray) -> float:
    """The largest difference between a peer's vectors and ours, relative to the layer's largest."""
    process.run()
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "vectors.npy"
        process.ask(f"save {path}")
        theirs = np.load(path)
    # What transformers calls the last hidden state is behind the final norm; repeng reads that.
    layers = len(ours) - (process.name == "repeng")
    scale = np.abs(ours[:layers]).max(1, keepdims=True)
    apart = float((np.abs(theirs[:layers] - ours[:layers]) / scale).max())
    if theirs.shape != ours.shape or apart > TOLERANCE:
        raise tt.TrimtabError(f"{process.name} finds other vectors than trimtab: {apart:.1e} apart")
    return apart
