"""Answers requests with vLLM, each under steerings of its own, in an environment that has both.

    python vllm_steered.py JOB.json ANSWERS.json

The job has the model's directory (`base`), arguments of the engine, steerings' files by digest, the
places of their sites, and batches of requests that run one after the other: token ids, how many are
to be written, and the text that says what is wanted of it, or null. `control` may be "stock", where
the worker knows nothing of steerings, or "no key", where blocks are known by their tokens alone.
The answers have of each request its tokens and how many of its prompt's were cached; of the engine
how often each site was passed, and how often requests were put off; and of each bad request what
was said of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job_file: str, answers_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    ranks = job.get("ranks", 1)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        **job.get("environment", {}),
    }
    if job.get("second"):
        _second_runner()
    from vllm import LLM

    from trimtab.engines import LOADED, Place, configuration, plugin

    if job.get("control") == "no key":
        plugin.block_key = lambda *_: []
    places = {site: Place(*place) for site, place in job["places"].items()}
    more = (
        {}
        if job.get("control") == "stock"
        else {"additional_config": configuration(places, job.get("way"))}
    )
    engine = LLM(
        job["base"],
        dtype="float32",
        max_model_len=256,
        block_size=32,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        **job["engine"],
        **more,
    )
    if more:
        for digest, file in job["steerings"].items():
            engine.collective_rpc("trimtab_load", args=(digest, Path(file).read_bytes()))
            LOADED.add(digest)
    answered = [written(engine, batch, bool(more)) for batch in job["batches"]]
    refused = [refusal(engine, extra) for extra in job.get("bad", [])]
    said = {"answers": answered, "refused": refused}
    if "reads" in job:
        said["unread"] = refusal(engine, job["reads"])
        said["unloaded"] = [unloaded(engine, bytes.fromhex(content)) for content in job["odd"]]
    if more and ranks == 1:
        said |= {"calls": plugin.AT_WORK.calls, "missed": plugin.AT_WORK.missed}
    Path(answers_file).write_text(json.dumps(said))


def _second_runner() -> None:
    """vLLM's second runner on a CPU, where Triton's interpreter stands in for its compiler."""
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    import triton.backends

    triton.backends.backends["cpu"] = triton.backends.backends["nvidia"]


def written(engine: Any, batch: list[dict[str, Any]], steered: bool) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    found = engine.generate(
        [{"prompt_token_ids": request["tokens"]} for request in batch],
        [
            SamplingParams(
                temperature=0,
                max_tokens=request["new"],
                ignore_eos=True,
                extra_args=request["extra"] if steered else None,
            )
            for request in batch
        ],
        use_tqdm=False,
    )
    return [
        {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens or 0}
        for one in found
    ]


def unloaded(engine: Any, content: bytes) -> str:
    """What is said of a steering that cannot be loaded."""
    try:
        engine.collective_rpc("trimtab_load", args=("0" * 64, content))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusal(engine: Any, extra: Any) -> str:
    """What is said of a request that should not run."""
    from vllm import SamplingParams

    try:
        engine.generate(
            [{"prompt_token_ids": [1, 2, 3]}],
            SamplingParams(max_tokens=1, extra_args=extra),
            use_tqdm=False,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
