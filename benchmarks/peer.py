"""Another library, in its own environment: python peer.py JOB.json.

Loads the model, says so, then waits: each line on standard input is one command, answered by one
JSON line on standard output. `run` takes the mean differences once and reports its own CPU and
wall seconds; `save PATH` writes the last ones, [layers, units], as .npy. Needs nothing of trimtab.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch


def steering_vectors(model: Any, tokenizer: Any, job: dict[str, Any]) -> np.ndarray:
    """Its train_steering_vector; the default aggregator is the mean difference, at all layers."""
    from steering_vectors import train_steering_vector

    samples = [(positive, negative) for positive, negative in job["pairs"]]
    trained = train_steering_vector(model, tokenizer, samples, batch_size=job["batch_size"])
    found = trained.layer_activations
    return torch.stack([found[layer] for layer in sorted(found)]).numpy()


def repeng(model: Any, tokenizer: Any, job: dict[str, Any]) -> np.ndarray:
    """Its own reading of hidden states, then the mean difference.

    It has no mean difference: ControlVector.train does the same reading and then a PCA of each
    layer, so this is the cheaper part of what its users run.
    """
    from repeng.extract import batched_get_hiddens

    layers = list(range(model.config.num_hidden_layers))
    strings = [side for pair in job["pairs"] for side in pair]
    hidden = batched_get_hiddens(model, tokenizer, strings, layers, job["batch_size"])
    return np.stack([(hidden[layer][::2] - hidden[layer][1::2]).mean(0) for layer in layers])


PEERS: dict[str, Callable[[Any, Any, dict[str, Any]], np.ndarray]] = {
    "steering-vectors": steering_vectors,
    "repeng": repeng,
}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    names = (job["peer"], "torch", "transformers", "numpy")
    answer({"versions": {name: version(name) for name in names}})
    found = np.empty(0)
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "save":
            np.save(path, found)
            answer({"saved": path})
            continue
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        found = PEERS[job["peer"]](model, tokenizer, job)
        answer({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
