"""Fits, compares and asks under gates through vLLM and through transformers, in an environment that
has both.

    python vllm_fitted.py FOLDER

The folder has a model in `model`; what both gave, and the CPU seconds that each took, go into
`said.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vllm_batch import ENDS, SHARED

T = TypeVar("T")


def main(folder: Path) -> None:
    import torch

    import trimtab as tt
    from trimtab.reading import encode_contrast

    lm = tt.load(folder / "model", device="cpu", dtype=torch.float32)
    pairs = [
        {
            "prompt": f"{SHARED}{end}, I feel",
            "positive": " happy and light",
            "negative": f" sad and heavy {part}",
            "part": part,
        }
        for part in ("train", "validation", "test")
        for end in ENDS
    ]
    file = folder / "parts.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    parts = tt.Contrast.from_jsonl(file)
    methods = [
        tt.CAA(layer=3), tt.CAA(layer=2, token="mean", variant="pca"), tt.ITI(k=3),
        tt.AUSteer(k=8, site="heads"), tt.Probe(layer=2, token="last"), tt.ActAdd(layer=1),
    ]  # fmt: skip
    candidates = [
        tt.Candidate("caa", {"layer": (1, 3), "alpha": (1.0, 4.0)}, {"token": "last"}),
        tt.Candidate("iti", {"alpha": (1.0, 3.0)}, {"k": 3}),
    ]
    beside: dict[str, Any] = {"kl": 0.05, "baselines": False, "max_cost": None}
    options: dict[str, Any] = {"max_new_tokens": 10, "chat": False}
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        started = time.process_time()
        found = work()
        seconds[name] = round(time.process_time() - started, 2)
        return found

    wanted = timed("fit, transformers", lambda: tt.fit(methods, lm, parts, measure=False))
    stacks = gated(lm, wanted[0], wanted[2])
    prompts = [SHARED + end for end in ENDS for _ in stacks]
    acting = stacks * len(ENDS)
    texts = timed("gates, transformers", lambda: lm.generate(prompts, steering=acting, **options))
    compared = timed(
        "compare, transformers", lambda: tt.compare(lm, candidates, parts, timed=False, **beside)
    )
    arguments = {"max_model_len": 256, "block_size": 32, "max_num_seqs": 8,
                 "max_num_batched_tokens": 64, "enforce_eager": True}  # fmt: skip
    with tt.VLLM(
        lm, [one for stack in stacks for one in stack], hooks=["resid", "heads"],
        model=folder / "model", **arguments,
    ) as engine:  # fmt: skip
        plain = engine.generate(prompts, **options)  # which fills the cache with these prompts
        under = timed("gates, vllm", lambda: engine.generate(prompts, steering=acting, **options))
        found = timed("compare, vllm", lambda: tt.compare(lm, candidates, parts, **beside,
                                                          engine=engine))  # fmt: skip
        # All of these texts were read before, and lie in the cache.
        read = [engine.read]
        fits = timed("fit, vllm", lambda: tt.fit(methods, lm, parts, measure=False, engine=engine))
        read.append(engine.read)
        tt.fit([tt.CAA(layer=3, token="last")], lm, parts, measure=False, engine=engine)
        read.append(engine.read)
    tokens = sum(len(text) for row in encode_contrast(lm, parts.train, None)
                 for text in row.texts())  # fmt: skip
    held_out = sum(len(text) for row in encode_contrast(lm, parts.part("validation"), None)
                   for text in row.texts())  # fmt: skip
    said = {
        "seconds": seconds,
        "fitted": [
            [method.name, off(tensors_of(one), tensors_of(other))]
            for method, one, other in zip(methods, fits, wanted, strict=True)
        ],
        "read": [read[1] - read[0], tokens, held_out, read[2] - read[1]],
        "texts": {"vllm": told(under), "transformers": told(texts)},
        "plain": told(plain),
        "compared": {"vllm": rows_of(found), "transformers": rows_of(compared)},
        "timed": [row.overhead is not None and row.overhead.ratio for row in found.rows],
        "swept": [row.swept is not None and row.swept.tokens for row in found.rows],
        "notes": list(found.notes),
    }
    (folder / "said.json").write_text(json.dumps(said))


def gated(lm: Any, caa: Any, heads: Any) -> list[Any]:
    """Stacks with gates of each kind, whose thresholds lie among what prompts have."""
    import trimtab as tt

    prompts = [SHARED + end for end in ENDS]
    condition = caa.condition()
    early = tt.Condition("layers.1.resid", condition.direction, 0.0, reads="last")
    gate = tt.Gate((early,), "two-pass")
    scores = [one.gates[0].scores[0] for one in lm.generate(
        prompts, steering=caa.gated(gate), max_new_tokens=1, chat=False)]  # fmt: skip
    at = sorted(scores)
    limit = (at[1] + at[2]) / 2
    early = tt.Condition("layers.1.resid", condition.direction, limit, reads="last")
    two_pass = tt.Gate((early,), "two-pass")
    token = tt.Gate((tt.Condition("layers.1.resid", condition.direction, limit),), "token")
    latched = tt.Gate((early,), "latched")
    return [
        [caa.at(6)], [caa.at(6).gated(two_pass)], [caa.at(6).gated(token)],
        [caa.at(6).scoped("generated").gated(latched)],
        [heads.at(5), caa.at(6).gated(two_pass)], [caa.at(6).gated(token), heads.at(5)],
    ]  # fmt: skip


def told(completions: Any) -> list[Any]:
    return [[list(one.tokens), [gate.as_json() for gate in one.gates]] for one in completions]


def rows_of(found: Any) -> list[Any]:
    return [
        [row.name, row.dial, row.cost, row.axis_kl, row.test.value, row.against.difference]
        for row in (*found.rows, *(row for at in found.at_budgets for row in at.methods))
        if row.test is not None and row.against is not None
    ]


def tensors_of(steering: Any) -> list[Any]:
    from trimtab.steering import to_tensors

    return [
        (each.site, name, tensor.double())
        for each in steering.interventions
        for name, tensor in to_tensors(each.operator)[0].items()
    ]


def off(found: list[Any], expected: list[Any]) -> float:
    """How far tensors are off at most, as a share of their length."""
    if [one[:2] for one in found] != [one[:2] for one in expected]:
        return float("inf")
    return max(
        float((one[2] - other[2]).norm() / other[2].norm())
        for one, other in zip(found, expected, strict=True)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
