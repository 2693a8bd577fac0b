"""Another library, in its own environment: python peer.py JOB.json.

Loads the model, says so, then waits: each line on standard input is one command, answered by one
JSON line on standard output. Needs nothing of trimtab.

For a job with `pairs`: `run` takes the mean differences once and reports its own CPU and wall
seconds; `save PATH` writes the last ones, [layers, units], as .npy.

For a job with `vectors`, which it adds to blocks' outputs: `write SEED` writes the job's tokens
unsteered, steered at one block and steered at all of them, in turn, and reports the seconds of
every turn; `logits PATH` writes what each of the three predicts after the prompts,
[3, rows, vocabulary], as .npy.
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
from lockstep import Write, first_logits, lockstep, sibling
from torch import Tensor


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


def write_steering_vectors(model: Any, vectors: dict[int, Tensor], alpha: float) -> Write:
    """A generate() with the vectors added, as its manual has it."""
    from steering_vectors import SteeringVector

    vector = SteeringVector(vectors)

    def write(**options: Any) -> Any:
        with vector.apply(model, multiplier=alpha):
            return model.generate(**options)

    return write


def write_repeng(model: Any, vectors: dict[int, Tensor], alpha: float) -> Write:
    """The same; the model is wrapped once, as its manual has it."""
    from repeng import ControlModel, ControlVector

    control = ControlVector(
        model.config.model_type, {layer: vector.numpy() for layer, vector in vectors.items()}
    )
    controlled = ControlModel(model, list(vectors))

    def write(**options: Any) -> Any:
        controlled.set_control(control, alpha)
        try:
            return controlled.generate(**options)
        finally:
            controlled.reset()

    return write


MEANS: dict[str, Callable[[Any, Any, dict[str, Any]], np.ndarray]] = {
    "steering-vectors": steering_vectors,
    "repeng": repeng,
}
WRITERS: dict[str, Callable[[Any, dict[int, Tensor], float], Write]] = {
    "steering-vectors": write_steering_vectors,
    "repeng": write_repeng,
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
    writers = writers_of(model, job) if "vectors" in job else {}
    inputs = {name: torch.tensor(rows) for name, rows in job.get("inputs", {}).items()}
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        if command == "save":
            np.save(rest, found)
            answer({"saved": rest})
        elif command == "logits":
            logits = [first_logits(write, inputs).numpy() for write in writers.values()]
            np.save(rest, np.stack(logits))
            answer({"saved": rest})
        elif command == "write":
            answer({"turns": lockstep(writers, inputs, torch.tensor(job["written"]), int(rest))})
        else:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            found = MEANS[job["peer"]](model, tokenizer, job)
            answer({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


def writers_of(model: Any, job: dict[str, Any]) -> dict[str, Write]:
    """The three contenders of a job with vectors."""
    make = WRITERS[job["peer"]]
    vectors = dict(enumerate(torch.from_numpy(np.load(job["vectors"]))))
    one, every = job["one"], job["all"]
    return {
        "unsteered": sibling(model).generate,
        "one block": make(sibling(model), {one["layer"]: vectors[one["layer"]]}, one["alpha"]),
        f"{len(vectors)} blocks": make(sibling(model), vectors, every["alpha"]),
    }


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
