"""Answers requests with vLLM, in an environment that has vLLM and nothing of ours.

    python vllm_answers.py JOB.json ANSWERS.json

The job has the model's directory (`base`), over how many processes it is split (`ranks`), whether
the engine compiles it, adapters' directories by name, the largest rank of theirs, and requests:
token ids with the name of an adapter, or null. All run in one batch, greedily.
"""

from __future__ import annotations

import json
import os
import sys


def main(job_file: str, answers_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(job["ranks"]))),  # a core for each
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(job["ranks"] > 1)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = {
        name: LoRARequest(name, number, directory)
        for number, (name, directory) in enumerate(job["adapters"].items(), 1)
    }
    engine = LLM(
        job["base"],
        dtype="float32",
        enable_lora=True,
        # One more than there are: version 0.32 on a CPU gives requests without an adapter that of
        # the last place.
        max_loras=len(adapters) + 1,
        max_lora_rank=job["rank"],
        max_model_len=256,
        enforce_eager=not job["compiled"],
        tensor_parallel_size=job["ranks"],
    )
    answered = engine.generate(
        [{"prompt_token_ids": request["tokens"]} for request in job["requests"]],
        SamplingParams(temperature=0, max_tokens=job["new"]),
        lora_request=[adapters.get(request["adapter"]) for request in job["requests"]],
    )
    with open(answers_file, "w") as file:
        json.dump([list(one.outputs[0].token_ids) for one in answered], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
